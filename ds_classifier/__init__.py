"""Training of noise-aware image classifiers, on DeepSpeed and WebDataset.

In Python: `load` a trained classifier. What stands here is imported when it is asked for, so that
`import ds_classifier` costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ds_classifier.common.version import __version__

_HOME = {
    "load": "export.predictor",
    "Predictor": "export.predictor",
    "create_classifier": "model",
    "create_gaussian_diffusion": "diffusion",
}
__all__ = ["Predictor", "__version__", "create_classifier", "create_gaussian_diffusion", "load"]

if TYPE_CHECKING:
    from ds_classifier.diffusion import create_gaussian_diffusion
    from ds_classifier.export.predictor import Predictor, load
    from ds_classifier.model import create_classifier


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
