"""Shards made by other programs: indexed and verified."""
