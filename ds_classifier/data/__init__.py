"""Images on disk -> shards -> the sample at position q -> batches."""
