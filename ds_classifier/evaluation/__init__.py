"""A classifier measured on the whole validation set, at every noise level."""
