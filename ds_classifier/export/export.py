"""Export a classifier as files that guided-diffusion, this package and people can read.

    modelNNNNNN.pt           a plain fp32 state dict that loads strictly, with weights_only, into
                             guided-diffusion's `create_classifier`; not of another network
    modelNNNNNN.safetensors  the same tensors
    modelNNNNNN.json         all settings, class names, accuracy by noise level, the files' hashes
    modelNNNNNN.flags.txt    guided-diffusion's flags, and what would have to change in its code;
                             not of another network
    README.md                a model card

The files are written to a staging directory, read back, rebuilt and compared with the live
classifier before they get their names. The same weights and evaluation give the same bytes.
"""

from __future__ import annotations

import json
import os
import shutil
from contextlib import suppress
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
    architecture,
    home_of,
    open_weights,
    own_json,
    refuse_not_finite,
)
from ds_classifier.common import files
from ds_classifier.common.version import __version__
from ds_classifier.config import Settings
from ds_classifier.config.settings import FIXED_SETTINGS
from ds_classifier.data.arrays import Arrays
from ds_classifier.data.labels.targets import Targets
from ds_classifier.diffusion import create_gaussian_diffusion, range_in_words, timestep_range
from ds_classifier.export.measured import find_evaluation
from ds_classifier.export.model_card import is_model_card, model_card
from ds_classifier.export.reference_flags import (
    Obstacle,
    classifier_flags,
    flags_text,
    process_flags,
    reference_obstacles,
)
from ds_classifier.model import create_classifier, parse_channel_mult
from ds_classifier.model.own import load_weights

SUFFIXES = (".pt", ".safetensors", ".json", ".flags.txt")
CARD = "README.md"
PROBES = 5  # timesteps at which the files are compared with the live classifier
# Largest difference allowed, relative to the largest number. On one machine it is 0.
TOLERANCE = 1e-6


@dataclass(frozen=True)
class Exported:
    """The files of an export, and how they compare with the live classifier.

    timesteps: the timesteps at which logits and input gradients were compared.
    largest_difference: of logits and input gradients, relative to their largest number.
    evaluated: whether an evaluation of these weights was found and recorded.
    obstacles: why unmodified guided-diffusion cannot use the classifier; empty if it can, None if
        it is another network.
    notes: lines on what a bare file does not record (see WeightsFile.notes).
    """

    paths: list[Path]
    timesteps: list[int]
    largest_difference: float
    evaluated: bool
    obstacles: list[Obstacle] | None
    notes: list[str]


def export(path: Path, given: dict[str, Any] | None = None, out: Path | None = None) -> Exported:
    """Export a classifier.

    path: see `weights.open_weights`.
    given: the settings that the user named.
    out: a directory; None means export/ of the run, or of the directory that holds the file. The
        files of an earlier export of the same name are replaced there, each atomically.
    Raises ValueError if path holds no weights, or some that are not finite or give such logits, if
    `given` contradicts the settings recorded with them, or if out cannot be written or holds a file
    that no export wrote; RuntimeError if the written files read back as another classifier. In both
    cases no file has got its name.
    """
    given = given or {}
    out = out or home_of(path) / "export"
    files.refuse_unwritable("--out", out)
    source, weights = open_weights(path, given)
    source.refuse_contradicting_flags(given)
    live = create_classifier(**source.settings.model_kwargs())
    refuse_not_finite(weights, source.path, live)
    load_weights(live, weights)
    live.eval().requires_grad_(False)
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
        # The JSON goes first: it marks the other files as ours. After a kill in this loop, the
        # next export therefore replaces them instead of refusing to.
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
        _obstacles(source),
        source.notes(),
    )


def _obstacles(source: WeightsFile) -> list[Obstacle] | None:
    """Return why unmodified guided-diffusion cannot use it; None for another network."""
    if source.settings.classifier:
        return None
    return reference_obstacles(source.settings, Targets.from_json(source.targets).kind)


# ----------------------------------------------------------------------------------- the files


def _refuse_others_files(out: Path, name: str, source: WeightsFile) -> None:
    """Raise ValueError if a file to be replaced is the source, or was not written by an export."""
    described = own_json(out / f"{name}.json") is not None
    ours = dict.fromkeys([name + suffix for suffix in SUFFIXES], described)
    ours[CARD] = is_model_card(out / CARD)
    existing = [file for file in ours if (out / file).exists()]
    problem = None
    if others := [file for file in existing if not ours[file]]:
        problem = f"which holds {', '.join(others)} of another origin"
    if own := [file for file in existing if (out / file).samefile(source.path)]:
        problem = f"in which {own[0]} is what is exported"
    if problem:
        raise ValueError(
            f"--out: got {out}, {problem}; need a place where nothing but an earlier export is "
            "replaced; do: choose another --out"
        )


def _write(
    folder: Path,
    name: str,
    source: WeightsFile,
    live: nn.Module,
    evaluation: dict[str, Any] | None,
) -> list[str]:
    """Write all files into a directory, and return their names."""
    state = {key: value.clone() for key, value in live.state_dict().items()}
    reference = not source.settings.classifier
    if reference:
        # Given an open file instead of a path, torch.save puts no file name into the archive.
        with open(folder / f"{name}.pt", "wb") as file:
            torch.save(state, file)
    # Only one key: safetensors writes several metadata keys in any order.
    save_file(state, folder / f"{name}.safetensors", metadata={"format": "pt"})
    of_weights = {
        path.name: {"bytes": path.stat().st_size, "sha256": files.sha256(path)}
        for path in _files_of_weights(folder, name)
    }
    parameters = sum(value.numel() for value in live.parameters())
    description = describe(source, name, parameters, evaluation) | {"files": of_weights}
    kind = Targets.from_json(source.targets).kind
    flags = flags_text(source.settings, f"{name}.pt", kind) if reference else ""
    texts = {
        f"{name}.json": json.dumps(description, indent=1, ensure_ascii=False) + "\n",
        **({f"{name}.flags.txt": flags} if reference else {}),
        CARD: model_card(description, flags),
    }
    for key, text in texts.items():
        (folder / key).write_text(text, encoding="utf-8")
    # safetensors makes its file readable for the owner only, whatever the umask.
    with suppress(OSError):  # exFAT and the like have no modes of their own
        shutil.copymode(folder / CARD, folder / f"{name}.safetensors")
    return [*of_weights, *texts]


def _files_of_weights(folder: Path, name: str) -> list[Path]:
    """Return the files of weights that an export of this name has written."""
    return [f for s in (".pt", ".safetensors") if (f := folder / f"{name}{s}").exists()]


def describe(
    source: WeightsFile, name: str, parameters: int, evaluation: dict[str, Any] | None
) -> dict[str, Any]:
    """Return an export's JSON without its files' hashes; it holds no path and no time."""
    settings = source.settings
    size, channels = settings.image_size, settings.in_channels
    process, reference_flags = settings.diffusion_kwargs(), {}
    if settings.classifier:
        classifier = {key: getattr(settings, key) for key in architecture(settings.classifier)}
    else:
        mult = parse_channel_mult(settings.classifier_channel_mult, size)
        classifier = classifier_flags(settings) | {
            "num_classes": settings.num_classes,
            "in_channels": channels,
            "classifier_channel_mult": ",".join(f"{m:g}" for m in mult),
        }
        reference_flags = {"reference_flags": classifier_flags(settings) | process_flags(settings)}
    training = {
        key: getattr(settings, key)
        for key in FIXED_SETTINGS
        if key not in settings.model_kwargs() and key not in process
    }
    if settings.extend:  # it may change in a run, and shapes the learning rate all the same
        training["extend"] = settings.extend
    diffusion = create_gaussian_diffusion(**process)
    levels = timestep_range(settings.t_range, diffusion)
    trained = {"trained_at": range_in_words(levels, diffusion)} if settings.t_range else {}
    shape, arrays = f"[N, {channels}, {size}, {size}]", source.arrays
    shown_images = {
        "shape": shape,
        "mean": 127.5,
        "std": 127.5,
        "normalisation": "8-bit values / 127.5 - 1, so in [-1, 1] before noise",
        "resize": "guided-diffusion's centre crop: halved by BOX while twice too large, then "
        "BICUBIC to the short side",
    }
    if arrays is not None:
        scaling = Arrays.from_json(arrays).scaling
        shown_images = {
            "shape": shape,
            "normalisation": f"arrays such as latents: x_0 = {scaling}, before noise",
            "resize": "none",
        }
    return {
        "format": EXPORT_FORMAT,
        "version": EXPORT_VERSION,
        "written_by": f"ds_classifier {__version__}",
        "name": name,
        "step": source.step,
        "parameters": parameters,
        "classifier": classifier,
        "diffusion": process,
        "input": shown_images
        | {
            "log_snr": [diffusion.log_snr[0].item(), diffusion.log_snr[-1].item()],
            "timesteps": f"{diffusion.shown}, for t from 0 (almost clean) to "
            f"{settings.diffusion_steps - 1} (almost noise) of the process before respacing",
        }
        | trained,
        **reference_flags,
        "classes": source.classes,
        "data": source.data,
        **({} if arrays is None else {"arrays": arrays}),
        **({} if source.targets is None else {"targets": source.targets}),
        "training": training if source.kind != "file" else {},
        "evaluation": evaluation,
    }


# --------------------------------------------------------------------------------- reading back


def _compare(
    folder: Path, name: str, live: nn.Module, settings: Settings
) -> tuple[list[int], float]:
    """Rebuild the classifier from each file of weights and compare it with the live one.

    Returns the timesteps, and the largest relative difference of logits and input gradients.
    Raises RuntimeError if a file gives other tensors or another classifier, ValueError if the live
    classifier's own numbers are not finite.
    """
    state, largest = live.state_dict(), 0.0
    timesteps, *expected = logits_and_gradients(live, settings)
    if not all(numbers.isfinite().all() for numbers in expected):
        raise ValueError(
            f"got {name}, whose logits or input gradients are not finite for images in [-1, 1]; "
            "need weights of another step"
        )
    for path in _files_of_weights(folder, name):
        try:  # reads the settings and hashes in the JSON
            source, weights = open_weights(path, {"classifier": settings.classifier})
        except ValueError as error:
            raise RuntimeError(f"{path.name}: cannot be read back: {error}") from None
        if path.suffix == ".pt" and list(weights) != list(state):
            raise RuntimeError(f"{path.name}: reads back with other names, or in another order")
        wrong = [key for key in state if not torch.equal(weights[key], state[key])]
        if wrong:
            raise RuntimeError(f"{path.name}: reads back other numbers in {', '.join(wrong[:3])}")
        rebuilt = create_classifier(**source.settings.model_kwargs())
        load_weights(rebuilt, weights)
        rebuilt.eval().requires_grad_(False)
        _, *got = logits_and_gradients(rebuilt, source.settings)
        for what, a, b in zip(("logits", "input gradients"), got, expected, strict=True):
            difference = float((a - b).abs().max() / b.abs().max().clamp_min(1e-30))
            if not difference <= TOLERANCE:
                raise RuntimeError(
                    f"{path.name}: the rebuilt classifier's {what} differ by {difference:.1e} from "
                    f"the live classifier's (rounding is at most {TOLERANCE:g})"
                )
            largest = max(largest, difference)
    return timesteps, largest


def logits_and_gradients(
    classifier: nn.Module, settings: Settings
) -> tuple[list[int], Tensor, Tensor]:
    """Run a classifier on fixed images, noised by its own process at PROBES timesteps.

    Returns the timesteps, evenly spaced from the first to the last; logits [PROBES, K]; and the
    gradient [PROBES, C, S, S] of log p(y | x_t) with respect to x_t, for y = 0, 1, ...
    """
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
    log_p = logits.log_softmax(dim=1).gather(1, y[:, None])
    (gradient,) = torch.autograd.grad(log_p.sum(), x_t)
    return timesteps, logits.detach(), gradient
