"""DeepSpeed configurations, shipped as data."""
