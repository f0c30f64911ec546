"""Shards made from images: sources, the plan, the conversion."""
