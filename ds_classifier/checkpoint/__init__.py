"""Checkpoints and weights: written, verified, found, read and fitted."""
