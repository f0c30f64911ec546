"""Keep `load_classifier` under the name that model cards of version 0.1 import it by."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import nn

from ds_classifier.checkpoint import weights
from ds_classifier.config import Settings

__all__ = ["load_classifier"]


def load_classifier(
    path: Path, given: Settings | dict[str, Any] | None = None
) -> tuple[weights.WeightsFile, nn.Module]:
    """Return the description of weights and the classifier; see checkpoint.weights.

    given: settings of a bare file; of a Settings, as version 0.1 took, those that are not defaults.
    """
    if isinstance(given, Settings):
        defaults = asdict(Settings())
        given = {name: v for name, v in asdict(given).items() if v != defaults[name]}
    return weights.load_classifier(path, given)
