"""Readers of data sets: each lists the labelled images of one form, such as lists or parquet."""
