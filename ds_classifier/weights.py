"""Keep `load_classifier` under the name that model cards of version 0.1 import it by."""

from ds_classifier.checkpoint.weights import load_classifier

__all__ = ["load_classifier"]
