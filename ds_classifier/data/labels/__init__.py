"""The labels of a data set: its class names and their order."""
