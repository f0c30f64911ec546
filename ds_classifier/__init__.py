"""Training of noise-aware image classifiers, on DeepSpeed and WebDataset."""

__version__ = "0.1.0"
