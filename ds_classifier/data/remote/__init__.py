"""Shards at a URL: connections, downloads, and the cache of a node."""
