"""Files, URLs and keyed random numbers: what knows nothing of training."""
