"""Guided sampling: the classifier's gradient, samplers, and measures of what they produce."""

from ds_classifier.guidance.gradient import classifier_gradient
from ds_classifier.guidance.guide import Guide, guide_denoiser, guide_scheduler_output

__all__ = ["Guide", "classifier_gradient", "guide_denoiser", "guide_scheduler_output"]
