"""Guided sampling: the classifier's gradient, samplers, and measures of what they produce."""

from ds_classifier.guidance.gradient import classifier_gradient, guide_scheduler_output

__all__ = ["classifier_gradient", "guide_scheduler_output"]
