"""The training loop, one step, and everything that a run keeps, logs and prints."""
