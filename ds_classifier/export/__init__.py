"""The trained classifier as a folder of files, and in Python."""
