"""`python -m cosmos_mp bench NAME`: measurements, each against a baseline of the same run."""
