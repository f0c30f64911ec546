"""Training of noise-aware image classifiers for classifier guidance, on DeepSpeed and WebDataset."""

__version__ = "0.1.0"
