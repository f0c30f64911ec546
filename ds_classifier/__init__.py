"""Training of noise-aware image classifiers, on DeepSpeed and WebDataset.

In Python: `load` a trained classifier. The packages, from the lowest layer up:

common       files, text, keyed random numbers: no knowledge of training
model        the classifier; diffusion: noise schedules and q_sample; loss: the loss of a step
config       settings, recipes, flags, the DeepSpeed JSON
distributed  many processes as one: ranks, printing, stopping, failures
data         from shards, at any place, to batches
checkpoint   written, verified, and read into new runs
guidance     gradients of the classifier, and guided samples
evaluation   the whole validation set, at every noise level
export       a classifier as a folder of its own, and `Predictor`
training     the loop, and all that a run needs around it
report       a run as an HTML page

The names in __all__ and the packages are imported when they are first used, as in
`ds_classifier.guidance.classifier_gradient`, so `import ds_classifier` is cheap. It sets how
torch's threads will wait (`common.threads`), for every program and test.
"""

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from ds_classifier.common.threads import wait_asleep
from ds_classifier.common.version import __version__

_HOME = {
    "load": "export.predictor",
    "Predictor": "export.predictor",
    "create_classifier": "model",
    "create_gaussian_diffusion": "diffusion",
}
__all__ = ["Predictor", "__version__", "create_classifier", "create_gaussian_diffusion", "load"]

wait_asleep()

if TYPE_CHECKING:
    from ds_classifier.diffusion import create_gaussian_diffusion
    from ds_classifier.export.predictor import Predictor, load
    from ds_classifier.model import create_classifier


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    if name.startswith("_") or find_spec(f"{__name__}.{name}") is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return import_module(f"{__name__}.{name}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
