"""The DeepSpeed JSON: read, checked against what works here, completed from the settings."""

from ds_classifier.config.deepspeed_json.reading import read_ds_config
from ds_classifier.config.deepspeed_json.resolve import Resolved, resolve
from ds_classifier.config.deepspeed_json.schedules import WARM_UP, meant

__all__ = ["WARM_UP", "Resolved", "meant", "read_ds_config", "resolve"]
