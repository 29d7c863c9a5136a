"""Training methods: pure loss functions and the steps that combine them."""
