"""The training loop and what stands around it: optimizers, average, checkpoints, logs, pictures."""
