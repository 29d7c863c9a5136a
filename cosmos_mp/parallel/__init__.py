"""Parallelism around the networks: process groups and randomness that no layout changes."""
