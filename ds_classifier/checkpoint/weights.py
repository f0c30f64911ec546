"""Find and read a classifier's weights: of a run, one of its checkpoints, an export, or a file.

A checkpoint records its settings, and so does an export: MODEL.pt or MODEL.safetensors with our
MODEL.json in the same directory (see `export.py`). Any other file, such as guided-diffusion's
published ones, holds tensors alone. Its architecture is inferred from them; its noise process is
not in them and is taken from the flags.
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
from ds_classifier.checkpoint.fitting import (
    differences,
    fits,
    infer_settings,
    misfit,
    tensors_of,
)
from ds_classifier.checkpoint.wrapping import unwrap
from ds_classifier.common import files
from ds_classifier.common.text import first_line
from ds_classifier.config import Settings
from ds_classifier.diffusion import create_gaussian_diffusion
from ds_classifier.model import create_classifier
from ds_classifier.model.own import OFFERED, load_weights, names_own_code

EXPORT_FORMAT, EXPORT_VERSION = "ds_classifier export", 1
# The sections of an export's JSON that hold settings, under the names of `Settings`.
SETTINGS_SECTIONS = ("classifier", "diffusion", "training")
DESCRIPTION = {"files": dict, "step": int | None, "classes": list | None, "data": str | None}
DESCRIPTION |= dict.fromkeys(SETTINGS_SECTIONS, dict)
# What a network that is not the encoder is built with.
OF_OWN_NETWORK = (*OFFERED, "classifier", "classifier_args")


@dataclass(frozen=True)
class WeightsFile:
    """The place and the settings of a classifier's weights.

    kind: "checkpoint", "export" or "file"; only a "file" does not record its settings.
    step, classes, data (the training set's fingerprint): None if unknown.
    sha256: hash of the file of weights, in hex.
    arrays: what a manifest records of the arrays that it was trained on; None: on images.
    targets: what a manifest records of the targets that it was trained on; None: one class.
    inferred: for a "file", the names of the settings that were inferred from its tensors and that
        differ from the flags and defaults.
    """

    path: Path
    settings: Settings
    kind: str
    sha256: str
    step: int | None = None
    classes: list[str] | None = None
    data: str | None = None
    arrays: dict[str, Any] | None = None
    targets: dict[str, Any] | None = None
    inferred: list[str] = dataclasses.field(default_factory=list)

    @property
    def name(self) -> str:
        """The name of files made from it: the checkpoint's, or the file's without its suffix."""
        return self.path.stem

    @property
    def home(self) -> Path:
        """The run directory of a checkpoint; the directory that holds a file."""
        return self.path.parents[1] if self.kind == "checkpoint" else self.path.parent

    def notes(self) -> list[str]:
        """Return lines for the screen: what was inferred for a bare file, and what was assumed."""
        if self.kind != "file":
            return []
        settings = self.settings
        values = ", ".join(f"--{name} {getattr(settings, name)}" for name in self.inferred)
        process = f"{settings.noise_schedule} noise, {settings.diffusion_steps} steps"
        process += ", rescaled timesteps" if settings.rescale_timesteps else ""
        inferred = f"inferred from the tensors in {self.path.name}: {values}"
        assumed = (
            f"{self.path.name} does not record its noise process; assumed, from flags and their "
            f"defaults: {process}"
        )
        return [inferred, assumed] if values else [assumed]

    def contradicted_by(self, given: dict[str, Any]) -> list[str]:
        """Return the names in `given` whose values differ from the recorded settings.

        Empty for a bare file, which records none.
        """
        if self.kind == "file":
            return []
        return [name for name, value in given.items() if value != getattr(self.settings, name)]

    def refuse_contradicting_flags(self, given: dict[str, Any]) -> None:
        """Raise ValueError, naming the first flag in `given` that differs from what is recorded."""
        for name in self.contradicted_by(given):
            raise ValueError(
                f"got --{name}; need none for {self.path}, in which it is "
                f"{getattr(self.settings, name)!r}; do: drop it"
            )


def architecture(classifier: str) -> list[str]:
    """Return the names of the settings that build a network, which an export records.

    classifier: "" for the encoder, whose exports do not name it.
    """
    if classifier:
        return list(OF_OWN_NETWORK)
    return [n for n in Settings().model_kwargs() if n not in ("classifier", "classifier_args")]


def load_classifier(
    path: Path, given: dict[str, Any] | None = None
) -> tuple[WeightsFile, nn.Module]:
    """Return a classifier to use: fp32, on the CPU, in eval mode, parameters without gradients.

    path, given: see `open_weights`. Raises ValueError as it does.
    """
    source, weights = open_weights(path, given)
    classifier = create_classifier(**source.settings.model_kwargs())
    load_weights(classifier, weights)
    return source, classifier.eval().requires_grad_(False)


def open_weights(
    path: Path, given: dict[str, Any] | None = None
) -> tuple[WeightsFile, dict[str, Tensor]]:
    """Find weights and read them, on the CPU.

    path: a run or a directory of exports (the newest step), a checkpoint, or a .pt or .safetensors
        file.
    given: the settings that the user named, by name. They count only for a file that does not
        record its own (see `fitting.infer_settings`).
    Raises ValueError if there are no weights at path, if recorded settings do not build them, or if
    a bare file's settings cannot be inferred or contradict `given`.
    """
    given = given or {}
    named = given.get("classifier", "")
    source = find_recorded(path)
    if source is not None:
        return source, read_recorded(source, named)
    weights = read_weights(path, own_network=bool(named))
    if named:
        settings = Settings(**given)
        if not fits(weights, settings):
            fault = misfit(weights, tensors_of(settings), f"--classifier {named}")
            raise ValueError(f"got {path}, {fault}")
        return WeightsFile(path.resolve(), settings, "file", files.sha256(path)), weights
    settings = infer_settings(weights, given, path)
    inferred = differences(settings, Settings(**given))
    digest = files.sha256(path)
    return WeightsFile(path.resolve(), settings, "file", digest, inferred=inferred), weights


def find_recorded(path: Path) -> WeightsFile | None:
    """Find the weights at a path whose settings are recorded; return None for a bare file.

    path: see `open_weights`.
    Raises ValueError if the path does not exist, if a directory holds no weights, if a checkpoint
    or a JSON is damaged, or if a file is not the one that its JSON describes.
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
        **{name: state.get(name) for name in ("arrays", "targets")},
    )


def home_of(path: Path) -> Path:
    """Return the directory for what is made from the weights at a path: see `WeightsFile.home`.

    Raises ValueError as `find_recorded` does.
    """
    source = find_recorded(path)
    return path.resolve().parent if source is None else source.home


def read_recorded(source: WeightsFile, named: str) -> dict[str, Tensor]:
    """Read the state dict of a checkpoint or an export.

    named: the --classifier that the user named; "" if none. Only then is a function of the user's
        called that is recorded with the weights.
    Raises ValueError if another one is recorded, or if the settings recorded build another
    classifier.
    """
    path, recorded = source.path, source.settings.classifier
    if names_own_code(recorded) and named != recorded:
        raise ValueError(
            f"--classifier: got {named or 'none'}; need {recorded}, the function that builds the "
            f"network in {path}: no file chooses which code runs; do: give --classifier {recorded} "
            "if you know it"
        )
    if source.kind == "checkpoint":
        weights = disk.read_model(path)
    else:
        weights = read_weights(path, own_network=bool(recorded))
    if not fits(weights, source.settings):
        record = path if source.kind == "checkpoint" else path.with_suffix(".json")
        raise ValueError(
            f"{record}: got settings that do not build the tensors in {path.name}; need those that "
            "it was trained with; do: export it again, or restore the file"
        )
    return weights


def read_weights(path: Path, *, own_network: bool = False) -> dict[str, Tensor]:
    """Read the state dict in a .pt or .safetensors file, without running any code in it.

    What other trainers save around it is left out (see `wrapping.unwrap`).
    own_network: it is of another network than the encoder, whose buffers may hold whole numbers.
    Raises ValueError for anything but names and dense, non-empty tensors, floating ones if not.
    """
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            weights: Any = load_file(path)
        else:
            weights = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:  # torch's own message explains how to run the code
        code = re.search(r"GLOBAL (\S+)", str(error))
        raise ValueError(
            f"{path} is not a plain state dict: "
            + (f"it holds {code[1]}, whose code is not run" if code else "it cannot be unpickled")
            + "; need names and tensors alone; do: save model.state_dict()"
        ) from None
    except Exception as error:  # a damaged file can raise any error while it is unpickled
        raise ValueError(f"{path} is not a plain state dict: {first_line(error)}") from None
    try:
        weights = unwrap(weights)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    fault = _fault_of_state_dict(weights, own_network=own_network)
    if fault is not None:
        floating = "" if own_network else "floating "
        raise ValueError(f"{path}: got {fault}; need a state dict of dense {floating}tensors")
    return weights


def refuse_not_finite(
    weights: dict[str, Tensor], path: Path, network: nn.Module | None = None
) -> None:
    """Raise ValueError if these weights, read from path, have NaN or infinity in fp32.

    network: what they are for; its buffers may hold infinities, as masks of attention do.
    """
    buffers = set() if network is None else {name for name, _ in network.named_buffers()}
    for name, value in weights.items():
        numbers = value if value.is_complex() else value.float()
        if (numbers.isnan() if name in buffers else ~numbers.isfinite()).any():
            raise ValueError(
                f"got {path}, whose weights are not all finite ({name}); need those of another step"
            )


def _fault_of_state_dict(weights: Any, *, own_network: bool) -> str | None:
    """Return why no settings can build these tensors, or None if nothing speaks against it."""
    if not isinstance(weights, dict) or not weights:
        return "nothing" if isinstance(weights, dict) else f"a {type(weights).__name__}"
    for name, value in weights.items():
        if not isinstance(name, str):
            return f"the name {name!r}"
        if not torch.is_tensor(value):
            return f"a {type(value).__name__} called {name!r}"
        if value.layout != torch.strided or value.is_nested or value.is_meta:
            return f"{name!r} as a sparse tensor, or one without storage"
        if not value.is_floating_point() and not own_network:
            return f"{name!r} of {value.dtype}"
        if value.numel() == 0 and not own_network:
            return f"{name!r} of the shape {list(value.shape)}"
    return None


# --------------------------------------------------------------------------------------- exports


def _exports_in(folder: Path) -> list[Path]:
    """Return the .safetensors files in a directory that one of our JSON files describes."""
    return [path for path in sorted(folder.glob("*.safetensors")) if _description(path)]


def own_json(path: Path) -> dict[str, Any] | None:
    """Read the JSON that an export wrote for a file of weights, of any version, whole or damaged.

    None if there is no JSON, or another program wrote it.
    """
    try:
        description = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    ours = isinstance(description, dict) and description.get("format") == EXPORT_FORMAT
    return description if ours else None


def _description(path: Path) -> dict[str, Any] | None:
    """Read and check the JSON that an export wrote for a file of weights; None if there is none.

    Raises ValueError if it is damaged, or of a version that this code does not read.
    """
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
    """Return how an export's JSON differs from what `export.describe` writes; None if it does not.

    Checked by hand: pydantic takes as many lines, and its messages name our classes.
    """
    fault = _fault_of_values(description, DESCRIPTION)
    if fault is not None:
        return fault
    for name, facts in description["files"].items():
        if not isinstance(facts, dict) or not isinstance(facts.get("sha256"), str):
            return f"files: got {facts!r:.60} for {name}; need its sha256"
    recorded, kinds = _settings_in(description), get_type_hints(Settings)
    # The tensors do not show all of these: a default could build another classifier.
    needed = [*architecture(recorded.get("classifier", "")), *Settings().diffusion_kwargs()]
    fault = _fault_of_values(recorded, {name: kinds[name] for name in (*needed, *recorded)})
    if fault is not None:
        return fault
    settings = Settings(**recorded)
    try:
        create_gaussian_diffusion(**settings.diffusion_kwargs())
    except ValueError as error:
        return str(error)
    for name in "arrays", "targets":
        if not isinstance(description.get(name), dict | None):
            return f"{name}: need what a manifest records of them"
    classes = description["classes"]
    if classes is None:
        return None
    if not all(isinstance(name, str) for name in classes):
        return "classes: got a name that is not text"
    if len(classes) != settings.num_classes:
        return f"classes: got {len(classes)} names; need num_classes, {settings.num_classes}"
    return None


def _fault_of_values(values: dict[str, Any], kinds: dict[str, Any]) -> str | None:
    """Return which value is missing or of a wrong type; None if all are right.

    kinds: a type or a union by name. A whole number may stand for a float.
    """
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
    """Return the settings in an export's JSON by name, without names that Settings lacks."""
    known = {field.name for field in dataclasses.fields(Settings)}
    return {
        name: value
        for section in SETTINGS_SECTIONS
        for name, value in description[section].items()
        if name in known
    }


def _find_export(path: Path) -> WeightsFile | None:
    """Return the export that a file of weights belongs to; None if no JSON describes the file.

    Raises ValueError if the file's hash is not the one in its JSON.
    """
    description = _description(path)
    if description is None:
        return None
    sha256 = files.sha256(path)
    if description["files"].get(path.name, {}).get("sha256") != sha256:
        raise ValueError(
            f"got {path}, which is not the file that {path.with_suffix('.json').name} describes "
            "(another sha256); do: export it again, or move the JSON away and give its settings as "
            "flags"
        )
    return WeightsFile(
        path.resolve(),
        Settings(**_settings_in(description)),
        "export",
        sha256,
        **{name: description[name] for name in ("step", "classes", "data")},
        **{name: description.get(name) for name in ("arrays", "targets")},
    )
