"""The configuration of a run: settings, recipes, flags, and the DeepSpeed JSON."""

from ds_classifier.config.command_line import CommandLine, parse_training_command
from ds_classifier.config.recipes import RECIPES
from ds_classifier.config.settings import Settings

__all__ = ["RECIPES", "CommandLine", "Settings", "parse_training_command"]
