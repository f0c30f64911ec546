"""What a run is asked to do: settings, recipes, flags, and the DeepSpeed JSON joined with them."""

from ds_classifier.config.settings import RECIPES, CommandLine, Settings, parse_training_command

__all__ = ["RECIPES", "CommandLine", "Settings", "parse_training_command"]
