"""Taking the classifier away: one set of files that guided-diffusion, we and people can read.

    modelNNNNNN.pt           a plain fp32 state dict that loads strictly, weights_only, into
                             guided-diffusion's `create_classifier`
    modelNNNNNN.safetensors  the same tensors
    modelNNNNNN.json         all settings, class names, accuracy by noise level, the files' hashes
    modelNNNNNN.flags.txt    guided-diffusion's flags, and what would have to change there
    README.md                a model card

They are written elsewhere, read back, rebuilt and compared with the live classifier before they get
their names. The same weights and evaluation give the same bytes.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ds_classifier.checkpoint.weights import (
    EXPORT_FORMAT,
    EXPORT_VERSION,
    WeightsFile,
    open_weights,
    own_json,
    refuse_not_finite,
)
from ds_classifier.common import files
from ds_classifier.common.version import __version__
from ds_classifier.config import Settings
from ds_classifier.config.settings import FIXED_SETTINGS
from ds_classifier.diffusion import create_gaussian_diffusion
from ds_classifier.evaluation.record import (
    EVALUATION_FORMAT,
    EVALUATION_VERSION,
    PRECISIONS,
    evaluation_name,
)
from ds_classifier.export.model_card import is_evaluation, is_model_card, model_card
from ds_classifier.export.reference_flags import (
    Obstacle,
    classifier_flags,
    flags_text,
    process_flags,
    reference_obstacles,
)
from ds_classifier.model import create_classifier, parse_channel_mult

SUFFIXES = (".pt", ".safetensors", ".json", ".flags.txt")
CARD = "README.md"
PROBES = 5  # timesteps at which the files are compared with the live classifier
# Relative to the largest number; on one machine the same weights give the same numbers.
TOLERANCE = 1e-6


@dataclass(frozen=True)
class Exported:
    """What was written. timesteps: where it was compared. largest_difference: of logits and input
    gradients, relative to their largest. obstacles: why stock guided-diffusion cannot load it.
    notes: lines on what a bare file does not record (see WeightsFile.notes)."""

    paths: list[Path]
    timesteps: list[int]
    largest_difference: float
    evaluated: bool
    obstacles: list[Obstacle]
    notes: list[str]


def export(path: Path, given: dict[str, Any] | None = None, out: Path | None = None) -> Exported:
    """Export a classifier.

    path: as of `weights.open_weights`. given: the settings that the user named; the others are the
    defaults. out: a directory; None: export/ of the run, or beside the file. Files of an export of
    the same name there are replaced, each at once.
    Raises ValueError where path holds no weights or none that are finite, where what is given
    contradicts the settings recorded with them, or where out holds a file that is no export's;
    RuntimeError where what was written reads back as another classifier. Nothing has got its name
    then.
    """
    given = given or {}
    source, weights = open_weights(path, given)
    source.refuse_contradicting_flags(given)
    refuse_not_finite(weights, source.path)
    live = create_classifier(**source.settings.model_kwargs())
    live.load_state_dict(weights)
    live.eval().requires_grad_(False)
    out = out or source.home / "export"
    name = source.name if source.step is None else f"model{source.step:06d}"
    _refuse_others_files(out, name, source)
    out.mkdir(parents=True, exist_ok=True)
    staging = out / ".staging"
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir()
    try:
        evaluation = find_evaluation(source)
        names = _write(staging, name, source, live, evaluation)
        timesteps, difference = _compare(staging, name, live, source.settings)
        # The JSON first: cut off here, an export is made anew, for it tells whose the files are.
        for file in sorted(names, key=lambda file: not file.endswith(".json")):
            files.fsync(staging / file)
            os.replace(staging / file, out / file)
        files.fsync(out)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return Exported(
        [out / name for name in names],
        timesteps,
        difference,
        evaluation is not None,
        reference_obstacles(source.settings),
        source.notes(),
    )


# ----------------------------------------------------------------------------------- the files


def _refuse_others_files(out: Path, name: str, source: WeightsFile) -> None:
    """Raise ValueError where a file to be replaced is the source, or was written by no export."""
    described = own_json(out / f"{name}.json") is not None
    ours = dict.fromkeys([name + suffix for suffix in SUFFIXES], described)
    ours[CARD] = is_model_card(out / CARD)
    found = [file for file in ours if (out / file).exists()]
    problem = None
    if others := [file for file in found if not ours[file]]:
        problem = f"which holds {', '.join(others)} of another origin"
    if own := [file for file in found if (out / file).samefile(source.path)]:
        problem = f"in which {own[0]} is what is exported"
    if problem:
        raise ValueError(
            f"--out: got {out}, {problem}; need a place where nothing but an earlier export is "
            "replaced; do: choose another --out"
        )


def _write(
    folder: Path, name: str, source: WeightsFile, live: nn.Module, evaluation: dict[str, Any] | None
) -> list[str]:
    """Write all files into a directory; returns their names."""
    state = {key: value.clone() for key, value in live.state_dict().items()}
    # Given a file and not its path, torch.save puts no name into the archive.
    with open(folder / f"{name}.pt", "wb") as file:
        torch.save(state, file)
    # One key: safetensors writes several in any order.
    save_file(state, folder / f"{name}.safetensors", metadata={"format": "pt"})
    # It writes for its owner alone, whatever the umask.
    shutil.copymode(folder / f"{name}.pt", folder / f"{name}.safetensors")
    of_weights = {
        path.name: {"bytes": path.stat().st_size, "sha256": files.sha256(path)}
        for path in (folder / f"{name}.pt", folder / f"{name}.safetensors")
    }
    parameters = sum(value.numel() for value in state.values())
    description = describe(source, name, parameters, evaluation) | {"files": of_weights}
    flags = flags_text(source.settings, f"{name}.pt")
    texts = {
        f"{name}.json": json.dumps(description, indent=1, ensure_ascii=False) + "\n",
        f"{name}.flags.txt": flags,
        CARD: model_card(description, flags),
    }
    for key, text in texts.items():
        (folder / key).write_text(text, encoding="utf-8")
    return [*of_weights, *texts]


def find_evaluation(source: WeightsFile) -> dict[str, Any] | None:
    """What evaluate.py has measured of exactly this classifier, in eval/ of the run, or None.

    The one of the highest precision. None too for other settings, such as another noise process of
    a bare file's weights, and for a record that is damaged.
    """
    names = [evaluation_name(source.name, precision) for precision in PRECISIONS]
    found = (_evaluation(source, source.home / "eval" / f"{name}.json") for name in names)
    return next((evaluation for evaluation in found if evaluation is not None), None)


def _evaluation(source: WeightsFile, path: Path) -> dict[str, Any] | None:
    settings = source.settings.model_kwargs() | source.settings.diffusion_kwargs()
    ours = dict(
        format=EVALUATION_FORMAT,
        version=EVALUATION_VERSION,
        weights_sha256=source.sha256,
        settings=settings,
    )
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if ours != {key: record[key] for key in ours}:
            return None
        rows = [record["classifier"]["uniform_t"], *record["classifier"]["levels"]]
        evaluation = {
            "precision": record["precision"],
            "samples": record["data"]["samples"],
            "data": record["data"]["fingerprint"],
            "noise": record["noise"],
            "uniform_t": rows[0],
            "levels": rows[1:],
        }
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return None
    return evaluation if is_evaluation(evaluation) else None


def describe(
    source: WeightsFile, name: str, parameters: int, evaluation: dict[str, Any] | None
) -> dict[str, Any]:
    """An export's JSON, but for its files' hashes; no path of this machine, no time."""
    settings = source.settings
    size, channels = settings.image_size, settings.in_channels
    mult = parse_channel_mult(settings.classifier_channel_mult, size)
    classifier = classifier_flags(settings) | {
        "num_classes": settings.num_classes,
        "in_channels": channels,
        "classifier_channel_mult": ",".join(f"{m:g}" for m in mult),
    }
    process = settings.diffusion_kwargs()
    training = {
        key: getattr(settings, key)
        for key in FIXED_SETTINGS
        if key not in classifier and key not in process
    }
    shown = "t * 1000 / diffusion_steps" if settings.rescale_timesteps else "t"
    return {
        "format": EXPORT_FORMAT,
        "version": EXPORT_VERSION,
        "written_by": f"ds_classifier {__version__}",
        "name": name,
        "step": source.step,
        "parameters": parameters,
        "classifier": classifier,
        "diffusion": process,
        "input": {
            "shape": f"[N, {channels}, {size}, {size}]",
            "mean": 127.5,
            "std": 127.5,
            "normalisation": "8-bit values / 127.5 - 1, so in [-1, 1] before noise",
            "resize": "guided-diffusion's centre crop: halved by BOX while twice too large, then "
            "BICUBIC to the short side",
            "timesteps": f"{shown}, of 0 (almost clean) to {settings.diffusion_steps - 1} (almost "
            "noise) of the process that is not respaced",
        },
        "reference_flags": classifier_flags(settings) | process_flags(settings),
        "classes": source.classes,
        "data": source.data,
        "training": training if source.kind != "file" else {},
        "evaluation": evaluation,
    }


# --------------------------------------------------------------------------------- reading back


def _compare(
    folder: Path, name: str, live: nn.Module, settings: Settings
) -> tuple[list[int], float]:
    """Rebuild the classifier from each file and compare; returns the timesteps and the largest
    relative difference. Raises RuntimeError where one differs."""
    state, largest = live.state_dict(), 0.0
    timesteps, *expected = logits_and_gradients(live, settings)
    for path in (folder / f"{name}.safetensors", folder / f"{name}.pt"):
        try:
            source, weights = open_weights(path)  # by the JSON beside it, with hashes
        except ValueError as error:
            raise RuntimeError(f"{path.name}: cannot be read back: {error}") from None
        if path.suffix == ".pt" and list(weights) != list(state):
            raise RuntimeError(f"{path.name}: reads back with other names, or in another order")
        wrong = [key for key in state if not torch.equal(weights[key], state[key])]
        if wrong:
            raise RuntimeError(f"{path.name}: reads back other numbers in {', '.join(wrong[:3])}")
        rebuilt = create_classifier(**source.settings.model_kwargs())
        rebuilt.load_state_dict(weights)
        rebuilt.eval().requires_grad_(False)
        _, *got = logits_and_gradients(rebuilt, source.settings)
        for what, a, b in zip(("logits", "input gradients"), got, expected, strict=True):
            difference = float((a - b).abs().max() / b.abs().max().clamp_min(1e-30))
            if not difference <= TOLERANCE:
                raise RuntimeError(
                    f"{path.name}: rebuilt, its {what} are {difference:.1e} beside the live "
                    f"classifier's (at most {TOLERANCE:g} is rounding)"
                )
            largest = max(largest, difference)
    return timesteps, largest


def logits_and_gradients(
    classifier: nn.Module, settings: Settings
) -> tuple[list[int], Tensor, Tensor]:
    """What a classifier makes of fixed images, noised by its own process at timesteps from the
    first to the last: these; logits [N, K]; and the gradient [N, C, S, S] of log p(y | x_t), for
    y = 0, 1, ..., which guidance follows."""
    diffusion = create_gaussian_diffusion(**settings.diffusion_kwargs())
    timesteps = np.linspace(0, diffusion.num_timesteps - 1, PROBES).round().astype(int).tolist()
    random, size = np.random.RandomState(7), settings.image_size
    shape = (PROBES, settings.in_channels, size, size)
    x_start = torch.from_numpy(random.uniform(-1, 1, shape).astype(np.float32))
    noise = torch.from_numpy(random.standard_normal(shape).astype(np.float32))
    t = torch.tensor(timesteps)
    x_t = diffusion.q_sample(x_start, t, noise).requires_grad_()
    logits = classifier(x_t, diffusion.model_timesteps(t))
    y = torch.arange(PROBES) % settings.num_classes
    asked = logits.log_softmax(dim=1).gather(1, y[:, None])
    (gradient,) = torch.autograd.grad(asked.sum(), x_t)
    return timesteps, logits.detach(), gradient
