"""A classifier's weights, wherever they lie: a run, one of its checkpoints, an export, or a file.

A checkpoint brings its settings, and so does an export: MODEL.pt or MODEL.safetensors with our
MODEL.json beside it (see `export.py`). Another file, such as guided-diffusion's published ones,
holds tensors alone: the settings come with it, and what of them does not fit its tensors is named.
"""

from __future__ import annotations

import dataclasses
import json
import pickle
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

import torch
from torch import Tensor, nn

from ds_classifier.checkpoint import disk
from ds_classifier.checkpoint.fitting import differences, fits, fitting_settings
from ds_classifier.common import files
from ds_classifier.config import Settings
from ds_classifier.diffusion import create_gaussian_diffusion
from ds_classifier.model import create_classifier

EXPORT_FORMAT, EXPORT_VERSION = "ds_classifier export", 1
# Of an export's JSON: the sections that hold settings, under the names of `Settings`.
SETTINGS_SECTIONS = ("classifier", "diffusion", "training")
DESCRIPTION = {"files": dict, "step": int | None, "classes": list | None, "data": str | None}
DESCRIPTION |= dict.fromkeys(SETTINGS_SECTIONS, dict)
# Those that the tensors do not tell, or not all of them: a default would be another classifier's.
NEEDED_SETTINGS = (*Settings().model_kwargs(), *Settings().diffusion_kwargs())


@dataclass(frozen=True)
class WeightsFile:
    """Whose weights: their settings and place.

    kind: "checkpoint", "export" or "file"; a file does not tell its settings.
    step, classes, data (the training set's fingerprint): None where it is not known.
    sha256: of the file of weights, in hex.
    """

    path: Path
    settings: Settings
    kind: str
    sha256: str
    step: int | None = None
    classes: list[str] | None = None
    data: str | None = None

    @property
    def name(self) -> str:
        """Of files made from it: the checkpoint's, or the file's without its suffix."""
        return self.path.stem

    @property
    def home(self) -> Path:
        """The run of a checkpoint; the directory of a file."""
        return self.path.parents[1] if self.kind == "checkpoint" else self.path.parent

    def contradicted_by(self, given: dict[str, Any]) -> list[str]:
        """Which settings of `given` are not those recorded with the weights; none of a file's."""
        if self.kind == "file":
            return []
        return [name for name, value in given.items() if value != getattr(self.settings, name)]

    def refuse_contradicting_flags(self, given: dict[str, Any]) -> None:
        """Raise ValueError, which names the first flag whose setting is recorded otherwise."""
        for name in self.contradicted_by(given):
            raise ValueError(
                f"got --{name}; need none for {self.path}, in which it is "
                f"{getattr(self.settings, name)!r}; do: drop it"
            )


def load_classifier(path: Path, given: Settings | None = None) -> tuple[WeightsFile, nn.Module]:
    """A classifier to use: fp32, on the CPU, in eval mode, its parameters without gradients.

    path, given: as of `open_weights`. Raises ValueError as it does.
    """
    source, weights = open_weights(path, given or Settings())
    classifier = create_classifier(**source.settings.model_kwargs())
    classifier.load_state_dict(weights)
    return source, classifier.eval().requires_grad_(False)


def open_weights(path: Path, given: Settings) -> tuple[WeightsFile, dict[str, Tensor]]:
    """Find weights and read them, on the CPU.

    path: a run or a directory of exports (the newest step), a checkpoint, or a .pt or .safetensors
    file. given: the settings for a file that does not tell them, where num_classes 0 means as many
    as it has.
    Raises ValueError for what holds no weights, or for settings, given or recorded, that do not fit
    them.
    """
    source = find_recorded(path)
    if source is not None:
        return source, read_recorded(source)
    weights = read_weights(path)
    fitting = fitting_settings(weights, given)
    if fitting is None:
        raise ValueError(
            f"got {path}, whose tensors ({', '.join(list(weights)[:2])}, ...) are no classifier's; "
            "need those of guided-diffusion's EncoderUNetModel"
        )
    misfits = [
        f"--{name}: got {getattr(given, name)!r}; need {getattr(fitting, name)!r}"
        for name in differences(fitting, given)
    ]
    if misfits:
        raise ValueError(
            f"the classifier in {path} was built with other settings:\n  "
            + "\n  ".join(misfits)
            + "\ndo: give these flags; its noise schedule cannot be seen in it"
        )
    return WeightsFile(path.resolve(), fitting, "file", files.sha256(path)), weights


def find_recorded(path: Path) -> WeightsFile | None:
    """The weights that a path names, if their settings are recorded with them; None: a bare file.

    path: as of `open_weights`. Raises ValueError for a path that does not exist, for a directory
    without weights, for a damaged checkpoint or JSON, and for a file that is not the one its JSON
    tells of.
    """
    path = disk.named_by(path)
    if path.is_dir() and (exports := _exports_in(path)):
        path = max(exports, key=lambda file: _description(file)["step"] or 0)
    if path.is_file():
        return _find_export(path)
    if not path.exists():
        raise ValueError(
            f"got {path}, which does not exist; need a run, one of its checkpoints, an export, or "
            "a .pt or .safetensors file"
        )
    found = disk.resolve_checkpoint(path)
    state = disk.read_state(found)
    manifest = json.loads((found / disk.MANIFEST).read_text(encoding="utf-8"))
    return WeightsFile(
        found,
        Settings(**state["settings"]),
        "checkpoint",
        manifest["files"][disk.MODEL]["sha256"],
        **{name: state[name] for name in ("step", "classes", "data")},
    )


def read_recorded(source: WeightsFile) -> dict[str, Tensor]:
    """The state dict of a checkpoint or an export.

    Raises ValueError where the settings recorded with it build another classifier.
    """
    path = source.path
    weights = disk.read_model(path) if source.kind == "checkpoint" else read_weights(path)
    if not fits(weights, source.settings):
        told = path if source.kind == "checkpoint" else path.with_suffix(".json")
        raise ValueError(
            f"{told}: got settings that do not build the tensors in {path.name}; need those that "
            "it was trained with; do: export it again, or restore the file"
        )
    return weights


def read_weights(path: Path) -> dict[str, Tensor]:
    """The state dict in a .pt or .safetensors file; no code in it is run.

    Raises ValueError for anything but names and dense floating tensors with numbers in them.
    """
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            weights: Any = load_file(path)
        else:
            weights = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:  # torch's own text says how to run the code
        code = re.search(r"GLOBAL (\S+)", str(error))
        raise ValueError(
            f"{path} is no plain state dict: "
            + (f"it holds {code[1]}, whose code is not run" if code else "it cannot be unpickled")
            + "; need names and tensors alone; do: save model.state_dict()"
        ) from None
    except Exception as error:  # unpickling raises whatever the file makes it
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"{path} is no plain state dict: {first_line}") from None
    fault = _fault_of_state_dict(weights)
    if fault is not None:
        raise ValueError(f"{path}: got {fault}; need a state dict of dense floating tensors")
    return weights


def refuse_not_finite(weights: dict[str, Tensor], path: Path) -> None:
    """Raise ValueError where an fp32 classifier of these weights, read at path, has NaN or inf."""
    for name, value in weights.items():
        if not value.float().isfinite().all():
            raise ValueError(
                f"got {path}, whose weights are not all finite ({name}); need those of another step"
            )


def _fault_of_state_dict(weights: Any) -> str | None:
    """What of it no classifier could be built with, whatever its settings; None: nothing."""
    if not isinstance(weights, dict) or not weights:
        return "nothing" if isinstance(weights, dict) else f"a {type(weights).__name__}"
    for name, value in weights.items():
        if not isinstance(name, str):
            return f"the name {name!r}"
        if not torch.is_tensor(value):
            return f"a {type(value).__name__} called {name!r}"
        if value.layout != torch.strided or value.is_nested or value.is_meta:
            return f"{name!r} as a sparse tensor, or one without storage"
        if not value.is_floating_point():
            return f"{name!r} of {value.dtype}"
        if value.numel() == 0:
            return f"{name!r} of the shape {list(value.shape)}"
    return None


# --------------------------------------------------------------------------------------- exports


def _exports_in(folder: Path) -> list[Path]:
    """The .safetensors in a directory that one of our JSON files describes."""
    return [path for path in sorted(folder.glob("*.safetensors")) if _description(path)]


def own_json(path: Path) -> dict[str, Any] | None:
    """The JSON of an export beside a file of weights, of any version, whole or damaged.

    None where there is none, or another program's.
    """
    try:
        description = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    ours = isinstance(description, dict) and description.get("format") == EXPORT_FORMAT
    return description if ours else None


def _description(path: Path) -> dict[str, Any] | None:
    """As `own_json`. Raises ValueError for one of a version that cannot be read, or damaged."""
    description = own_json(path)
    if description is None:
        return None
    if description.get("version") != EXPORT_VERSION:
        raise ValueError(
            f"{path.with_suffix('.json')}: got version {description.get('version')}; need "
            f"{EXPORT_VERSION}; do: export again with this version of ds_classifier"
        )
    fault = _fault_of_description(description)
    if fault is not None:
        raise ValueError(
            f"{path.with_suffix('.json')} is damaged: {fault}; do: export it again, or move the "
            "JSON away and give its settings as flags"
        )
    return description


def _fault_of_description(description: dict[str, Any]) -> str | None:
    """What of an export's JSON is not as `export.describe` writes it; None: nothing."""
    fault = _fault_of_values(description, DESCRIPTION)
    if fault is not None:
        return fault
    for name, facts in description["files"].items():
        if not isinstance(facts, dict) or not isinstance(facts.get("sha256"), str):
            return f"files: got {facts!r:.60} for {name}; need its sha256"
    told, kinds = _settings_in(description), get_type_hints(Settings)
    fault = _fault_of_values(told, {name: kinds[name] for name in (*NEEDED_SETTINGS, *told)})
    if fault is not None:
        return fault
    settings = Settings(**told)
    try:
        create_gaussian_diffusion(**settings.diffusion_kwargs())
    except ValueError as error:
        return str(error)
    classes = description["classes"]
    if classes is None:
        return None
    if not all(isinstance(name, str) for name in classes):
        return "classes: got a name that is no text"
    if len(classes) != settings.num_classes:
        return f"classes: got {len(classes)} names; need num_classes, {settings.num_classes}"
    return None


def _fault_of_values(values: dict[str, Any], kinds: dict[str, Any]) -> str | None:
    """Which value is not of its kind, a type or several; a whole number may stand for a float."""
    for name, kind in kinds.items():
        allowed = get_args(kind) or (kind,)
        if name not in values:
            return f"{name}: got none; need it"
        exact = type(values[name])
        if exact not in allowed and not (exact is int and float in allowed):
            words = " or ".join("null" if k is type(None) else k.__name__ for k in allowed)
            return f"{name}: got {values[name]!r:.60}; need {words}"
    return None


def _settings_in(description: dict[str, Any]) -> dict[str, Any]:
    """The settings told in an export's JSON, by name; what is none of ours is left out."""
    known = {field.name for field in dataclasses.fields(Settings)}
    return {
        name: value
        for section in SETTINGS_SECTIONS
        for name, value in description[section].items()
        if name in known
    }


def _find_export(path: Path) -> WeightsFile | None:
    description = _description(path)
    if description is None:
        return None
    sha256 = files.sha256(path)
    if description["files"].get(path.name, {}).get("sha256") != sha256:
        raise ValueError(
            f"got {path}, which is not the file that {path.with_suffix('.json').name} beside it "
            "tells of; do: export it again, or move the JSON away and give its settings as flags"
        )
    return WeightsFile(
        path.resolve(),
        Settings(**_settings_in(description)),
        "export",
        sha256,
        **{name: description[name] for name in ("step", "classes", "data")},
    )
