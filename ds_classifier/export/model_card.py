"""The model card of an exported classifier: Markdown with Hugging Face's front matter.

What of it a machine reads: https://huggingface.co/docs/hub/model-cards (model-index: the results).
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

LIBRARY = "library_name: ds_classifier"  # a line of the front matter
CLASSES_SHOWN = 100
MEANS = ("acc@5", "loss", "ece", "grad_norm")  # shown beside acc@1; null where nothing is finite


def model_card(description: dict[str, Any], flags: str) -> str:
    """The card as text. description: an export's JSON. flags: its classifier_sample.py flags."""
    name = description["name"]
    classifier, classes = description["classifier"], description["classes"]
    size, count = classifier["image_size"], classifier["num_classes"]
    sections = [
        _front_matter(description),
        f"# Noise-aware classifier, {size} px, {count} classes\n\n"
        f"`{name}`: tells the class of an image at every noise level of a diffusion process, so "
        "that its gradient can steer a diffusion model (classifier guidance, "
        "[Dhariwal & Nichol 2021](https://arxiv.org/abs/2105.05233), Alg. 1 and 2). "
        f"{description['parameters']:,} parameters, fp32"
        + ("." if description["step"] is None else f", after {description['step']:,} steps."),
        _files(description),
        _input(description),
        _use(name, flags),
        _evaluation(description["evaluation"]),
        _training(description),
        _classes(classes, count),
        "## Limits\n\n"
        "It knows images like those it was trained on, at its own size, noised by its own "
        "process: a diffusion model with another schedule or another scale of pixels needs "
        "another classifier. " + _clean_only(description) + "Its licence and that of its training "
        "data are for whoever shares it to state.",
    ]
    return "\n\n".join(sections) + "\n"


def is_model_card(path: Path) -> bool:
    """Whether a file is a card of an export, perhaps edited: its front matter tells."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    front_matter = text.removeprefix("---\n").partition("\n---")[0]
    return text.startswith("---\n") and LIBRARY in front_matter.splitlines()


def _front_matter(description: dict[str, Any]) -> str:
    """YAML; its strings are written as JSON, which YAML reads."""
    lines = [
        "---",
        LIBRARY,
        "pipeline_tag: image-classification",
        "tags:",
        *(f"- {tag}" for tag in ("classifier-guidance", "diffusion", "guided-diffusion")),
    ]
    evaluation = description["evaluation"]
    if evaluation:
        data = json.dumps(f"validation set {evaluation['data'][:12]}")
        lines += [
            "model-index:",
            f"- name: {json.dumps(description['name'])}",
            "  results:",
            "  - task:",
            "      type: image-classification",
            "    dataset:",
            f"      name: {data}",
            "      type: imagefolder",
            "    metrics:",
        ]
        rows = [("all noise levels", evaluation["uniform_t"])]
        rows += [(f"t = {row['t']}", row) for row in evaluation["levels"] if row["t"] == 0]
        for where, row in rows:
            lines += [
                "    - type: accuracy",
                f"      name: {json.dumps('accuracy, ' + where)}",
                f"      value: {round(row['acc@1'], 6)}",
            ]
    return "\n".join([*lines, "---"])


def _files(description: dict[str, Any]) -> str:
    name = description["name"]
    return (
        "## Files\n\n"
        f"- `{name}.safetensors`: the weights; `{name}.json`: all settings, class names, numbers\n"
        f"- `{name}.pt`: the same weights as guided-diffusion's file, a plain state dict\n"
        f"- `{name}.flags.txt`: the flags that guided-diffusion's `classifier_sample.py` needs"
    )


def _input(description: dict[str, Any]) -> str:
    shown, process = description["input"], description["diffusion"]
    respaced = process["timestep_respacing"]
    lines = [
        "## Input and output",
        "",
        f"- images: {shown['shape']}, {shown['normalisation']}",
        f"- made square by: {shown['resize']}",
        f"- noise: {process['noise_schedule']} schedule of {process['diffusion_steps']} steps"
        + (f", respaced to {respaced}" if respaced else ""),
        f"- timesteps: {shown['timesteps']}",
        f"- out: logits [N, {description['classifier']['num_classes']}], fp32",
    ]
    return "\n".join(lines)


def _use(name: str, flags: str) -> str:
    own = [line for line in flags.splitlines() if not line.startswith("#")]
    notes = [line.removeprefix("#").removeprefix(" ") for line in flags.splitlines()
             if line.startswith("#")]  # fmt: skip
    obstacle = next((i for i, line in enumerate(notes) if line.startswith("Unmodified")), None)
    changes = "" if obstacle is None else "\n\n" + _indented(notes[obstacle:])
    return (
        "## Use\n\n"
        "With guided-diffusion:\n\n"
        + _indented(
            [
                f"python scripts/classifier_sample.py --classifier_path {name}.pt \\",
                f"    --model_path DIFFUSION.pt MODEL_FLAGS $(grep -v '^#' {name}.flags.txt)",
            ]
        )
        + "\n\nwhich are\n\n"
        + _indented(own)
        + changes
        + "\n\nWith ds_classifier, in any sampler that takes a cond_fn(x, t, y), or with "
        "diffusers' schedulers (`guidance.guide_scheduler_output`):\n\n"
        "```python\n"
        "from pathlib import Path\n"
        "from ds_classifier.guidance import classifier_gradient\n"
        "from ds_classifier.weights import load_classifier\n"
        "\n"
        f'source, classifier = load_classifier(Path("{name}.safetensors"))\n'
        "cond_fn = classifier_gradient(classifier, scale=1.0)  # or .half(), .bfloat16()\n"
        "```"
    )


def is_evaluation(evaluation: dict[str, Any]) -> bool:
    """Whether every value that the card shows of an export's evaluation is of its kind."""

    def number(value: Any) -> bool:
        return type(value) in (int, float) and math.isfinite(value)

    def row(row: Any) -> bool:
        return (
            isinstance(row, dict)
            and number(row.get("acc@1"))
            and all(name in row and (row[name] is None or number(row[name])) for name in MEANS)
        )

    return (
        type(evaluation["samples"]) is int
        and all(isinstance(evaluation[key], str) for key in ("precision", "data", "noise"))
        and row(evaluation["uniform_t"])
        and all(
            row(level) and type(level.get("t")) is int and number(level.get("log_snr"))
            for level in evaluation["levels"]
        )
    )


def _evaluation(evaluation: dict[str, Any] | None) -> str:
    if not evaluation:
        return (
            "## Accuracy by noise level\n\n"
            "Not measured for these weights (`ds_classifier`'s `evaluate.py` measures it)."
        )
    lines = [
        "## Accuracy by noise level",
        "",
        f"On all {evaluation['samples']:,} held-out images, with fixed noise, computed in "
        f"{evaluation['precision']}. t = 0 is almost clean; ECE: expected calibration error; "
        "gradient: the mean norm of what guidance follows at scale 1.",
        "",
        "| t | log-SNR | accuracy % | top-5 % | cross-entropy | ECE % | gradient |",
        "|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in [evaluation["uniform_t"], *evaluation["levels"]]:
        snr = f"{row['log_snr']:.2f}" if "log_snr" in row else ""
        cells = [str(row.get("t", "all, evenly")), snr]
        cells += [_number(row["acc@1"], 100, ".1f"), _number(row["acc@5"], 100, ".1f")]
        cells += [_number(row["loss"], 1, ".3f"), _number(row["ece"], 100, ".1f")]
        cells += [_number(row["grad_norm"], 1, ".3g")]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _number(value: float | None, factor: float, form: str) -> str:
    return "-" if value is None else format(factor * value, form)


def _training(description: dict[str, Any]) -> str:
    training = description["training"]
    if not training:
        return "## Training\n\nNot recorded with these weights."
    facts = {key: value for key, value in training.items() if value not in (None, "")}
    lines = [f"{key}: {json.dumps(value)}" for key, value in facts.items()]
    data = description["data"]
    return (
        "## Training\n\nWith `ds_classifier`"
        + (f", on the data of fingerprint `{data}`" if data else "")
        + ":\n\n"
        + _indented(lines)
    )


def _classes(classes: list[str] | None, count: int) -> str:
    if classes is None:
        return f"## Classes\n\n{count}; their names are not recorded with these weights."
    # As JSON strings in a block of code, no name can break the page.
    lines = [f"{k}: {json.dumps(name, ensure_ascii=False)}" for k, name in enumerate(classes)]
    more = f"\n\nand {count - CLASSES_SHOWN} more, in the JSON." if count > CLASSES_SHOWN else ""
    return f"## Classes\n\n{_indented(lines[:CLASSES_SHOWN])}{more}"


def _clean_only(description: dict[str, Any]) -> str:
    if description["training"].get("noised", True):
        return ""
    return "It was trained on clean images alone, as if t were 0. "


def _indented(lines: list[str]) -> str:
    """A block of code."""
    return "\n".join(f"    {line}" if line else "" for line in lines)
