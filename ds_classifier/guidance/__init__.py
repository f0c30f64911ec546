"""Guided sampling: the classifier's gradient, samplers, and judges of what they make."""

from ds_classifier.guidance.gradient import classifier_gradient

__all__ = ["classifier_gradient"]
