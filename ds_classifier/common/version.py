"""The version of this package, which exports, checkpoints and env.json record."""

__version__ = "0.1.0"
