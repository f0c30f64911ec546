"""Write the model card of an exported classifier: Markdown with Hugging Face's front matter.

Front matter, and model-index for results: https://huggingface.co/docs/hub/model-cards
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ds_classifier.data.labels.targets import Targets

LIBRARY = "library_name: ds_classifier"  # a line of the front matter
CLASSES_SHOWN = 100
# By the kind of the targets: what is predicted, what the logits mean, what guidance is asked for.
PREDICTS = {
    "class": "the class of an image",
    "classes": "which classes an image shows, any number of them,",
    "soft": "the probability of each class of an image",
    "values": "{column} of an image, as the probability of each of its bins,",
}
LOGITS = {
    "class": "",
    "classes": "; the sigmoid of each is the probability of that class by itself, since an image "
    "may show several, or none",
    "soft": "; their softmax is the probability of each class, as it was trained on",
    "values": "; their softmax is the probability of each bin (below), and with its mean value v_k "
    "the expected value is sum_k p_k v_k",
}
GUIDED = {
    "class": "",
    "classes": """
import torch
y = torch.zeros(1, {number})  # a row for each image
y[:, [0, 1]] = 1  # the classes asked for together; 0: not asked for, either way
""",
    "soft": "",
    "values": """
import torch
y = torch.full((1,), {eta:.2g})  # eta, one for each image: below 0 for smaller values
# Guidance follows the gradient of log sum_k p_k exp(eta v_k); eta is in 1 / unit of the value.
# This eta moves the mean by about one spread of the bins.
""",
}


# The columns of the accuracies that an evaluation may have: head, factor, format.
MEASURED = {
    "acc@1": ("accuracy %", 100, ".1f"),
    "acc@5": ("top-5 %", 100, ".1f"),
    "mAP": ("mAP %", 100, ".1f"),
    "acc": ("right answers %", 100, ".1f"),
    "mae": ("mean absolute error", 1, ".4g"),
    "loss": ("cross-entropy", 1, ".3f"),
    "ece": ("ECE %", 100, ".1f"),
    "grad_norm": ("gradient", 1, ".3g"),
}


def model_card(description: dict[str, Any], flags: str) -> str:
    """Return the text of the card.

    description: an export's JSON. flags: the text of its flags file; "" for another network than
    the reference's.
    """
    name = description["name"]
    classifier, classes = description["classifier"], description["classes"]
    size, number = classifier["image_size"], classifier["num_classes"]
    step, targets = description["step"], Targets.from_json(description.get("targets"))
    units, towards, column = "classes", "a class", ""
    if targets.kind == "values":
        # The inside of a JSON string, as code without another mark of code, cannot break the page.
        inside = json.dumps(targets.name, ensure_ascii=False)[1:-1]
        column = f"`{inside.replace('`', chr(39))}`"
        units, towards = f"bins of {column}", "larger or smaller values"
    sections = [
        _front_matter(description),
        f"# Noise-aware classifier, {size} px, {number} {units}\n\n"
        f"`{name}` predicts {PREDICTS[targets.kind].format(column=column)} at every noise level of "
        "a diffusion process. "
        f"Its gradient steers a diffusion model towards {towards} (classifier guidance, "
        "[Dhariwal & Nichol 2021](https://arxiv.org/abs/2105.05233), Alg. 1 and 2). "
        f"It has {description['parameters']:,} parameters in fp32"
        + ("." if step is None else f" and was trained for {step:,} steps."),
        _files(description),
        _input(description),
        _use(name, flags, targets, number) if flags else _use_own(description, targets, number),
        _evaluation(description["evaluation"]),
        _training(description),
        _classes(classes, number, targets),
        "## Limits\n\n"
        "The classifier works on images like its training images, at its own size. For a sampler "
        "of another noise process, `Guide` asks it at the same log-SNR. A diffusion model with "
        "another scale of pixel values, or of latents, needs another classifier. "
        + _clean_only(description)
        + "This card states no licence: whoever shares the classifier has to add its licence and "
        "that of its training data.",
    ]
    return "\n\n".join(sections) + "\n"


def is_model_card(path: Path) -> bool:
    """Return whether a file is the card of an export, perhaps edited, by its front matter."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    front_matter = text.removeprefix("---\n").partition("\n---")[0]
    return text.startswith("---\n") and LIBRARY in front_matter.splitlines()


def _front_matter(description: dict[str, Any]) -> str:
    """Return the front matter: YAML, with strings written as JSON, which YAML reads."""
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
        for levels, row in rows:
            metric, key = ("mAP", "mAP") if "mAP" in row else ("accuracy", "acc@1")
            lines += [
                f"    - type: {metric}",
                f"      name: {json.dumps(f'{metric}, {levels}')}",
                f"      value: {round(row[key], 6)}",
            ]
    return "\n".join([*lines, "---"])


def _files(description: dict[str, Any]) -> str:
    """Return the section on the files."""
    name = description["name"]
    files = (
        "## Files\n\n"
        f"- `{name}.safetensors`: the weights\n"
        f"- `{name}.json`: all settings, class names and measured accuracies"
    )
    if "reference_flags" not in description:
        return files
    return (
        f"{files}\n"
        f"- `{name}.pt`: the same weights in guided-diffusion's format, a plain state dict\n"
        f"- `{name}.flags.txt`: the flags for guided-diffusion's `classifier_sample.py`"
    )


def _input(description: dict[str, Any]) -> str:
    """Return the section on input and output."""
    shown, process = description["input"], description["diffusion"]
    respaced = process["timestep_respacing"]
    meaning = LOGITS[Targets.from_json(description.get("targets")).kind]
    lines = [
        "## Input and output",
        "",
        f"- images: {shown['shape']}, {shown['normalisation']}",
        f"- resizing: {shown['resize']}",
        f"- noise: {process['noise_schedule']} schedule of {process['diffusion_steps']} steps"
        + (f", respaced to {respaced}" if respaced else "")
        + ", log-SNR from {:.2f} to {:.2f}".format(*shown["log_snr"]),
        f"- timesteps: {shown['timesteps']}",
        *([f"- trained at: {shown['trained_at']} alone"] if "trained_at" in shown else []),
        f"- output: logits [N, {description['classifier']['num_classes']}], fp32{meaning}",
    ]
    return "\n".join(lines)


def _use(name: str, flags: str, targets: Targets, number: int) -> str:
    """Return the section on use, with the flags and the changes that guided-diffusion needs.

    number: of classes.
    """
    own = [line for line in flags.splitlines() if not line.startswith("#")]
    notes = [line.removeprefix("#").removeprefix(" ") for line in flags.splitlines()
             if line.startswith("#")]  # fmt: skip
    obstacle = next((i for i, line in enumerate(notes) if line.startswith("Unmodified")), None)
    changes = "" if obstacle is None else "\n\n" + _code(notes[obstacle:])
    return (
        f"## Use\n\nWith guided-diffusion{', to one bin' if targets.values else ''}:\n\n"
        + _code(
            [
                f"python scripts/classifier_sample.py --classifier_path {name}.pt \\",
                f"    --model_path DIFFUSION.pt MODEL_FLAGS $(grep -v '^#' {name}.flags.txt)",
            ]
        )
        + "\n\nThe flags file holds\n\n"
        + _code(own)
        + changes
        + "\n\nWith `ds_classifier`, as a `cond_fn(x, t, y)` in samplers of the same process, or "
        "as a guide of any sampler of x = alpha x_0 + sigma noise, the schedulers of diffusers "
        "among them (`ds_classifier.guidance.guide_scheduler_output`):\n\n"
        + _in_python(name, targets, number)
    )


def _use_own(description: dict[str, Any], targets: Targets, number: int) -> str:
    """Return the section on the use of a network that is not the reference's.

    number: of classes.
    """
    name, network = description["name"], description["classifier"]["classifier"]
    arguments = description["classifier"]["classifier_args"]
    if network.startswith("torchvision:"):
        what = f"The network is torchvision's {network.removeprefix('torchvision:')}, whose norms "
        what += "the timestep scales and shifts; it needs `torchvision`."
        named = ""
    else:
        module, _, function = network.partition(":")
        what = f"The network is built by the function `{function}` of the Python module `{module}`"
        what += ", which is not among these files. It must be importable, and is named in the call,"
        what += " since a file of weights does not choose which code runs."
        named = f", classifier={json.dumps(network)}"
    what += f" Its keywords: `{arguments}`." if arguments else ""
    return (
        f"## Use\n\n{what}\n\n"
        "With `ds_classifier`, as a `cond_fn(x, t, y)` in samplers of the same process, or as a "
        "guide of any sampler of x = alpha x_0 + sigma noise, the schedulers of diffusers among "
        "them (`ds_classifier.guidance.guide_scheduler_output`):\n\n"
        + _in_python(name, targets, number, named)
    )


def _in_python(name: str, targets: Targets, number: int, named: str = "") -> str:
    """Return the code that loads and uses an export.

    number: of classes. named: more arguments of load.
    """
    given = "" if targets.kind == "class" else ", targets=model.targets"
    eta = 1.0 if targets.values is None else targets.moving_eta
    return (
        "```python\n"
        "import ds_classifier\n"
        "from ds_classifier.guidance import Guide, classifier_gradient\n"
        "\n"
        f'model = ds_classifier.load("{name}.safetensors"{named})  # device="cuda" for a GPU\n'
        f"cond_fn = classifier_gradient(model.classifier, scale=1.0{given})\n"
        f"guide = Guide(model.classifier, model.diffusion, scale=1.0{given})"
        "  # guide(x, alpha, sigma, y)\n"
        + GUIDED[targets.kind].format(number=number, eta=eta)
        + "```"
    )


def _evaluation(evaluation: dict[str, Any] | None) -> str:
    """Return the section on accuracy, with a row per noise level."""
    if not evaluation:
        return (
            "## Accuracy by noise level\n\n"
            "Not measured for these weights. `evaluate.py` of `ds_classifier` measures it."
        )
    columns = {key: of for key, of in MEASURED.items() if key in evaluation["uniform_t"]}
    lines = [
        "## Accuracy by noise level",
        "",
        f"Measured in {evaluation['precision']} on all {evaluation['samples']:,} held-out images, "
        "with fixed noise. t = 0 is almost clean. ECE is the expected calibration error; gradient "
        "is the mean norm of the guidance gradient at scale 1.",
        "",
        f"| t | log-SNR | {' | '.join(head for head, *_ in columns.values())} |",
        "|---:|---:" + "|---:" * len(columns) + "|",
    ]
    for row in [evaluation["uniform_t"], *evaluation["levels"]]:
        snr = f"{row['log_snr']:.2f}" if "log_snr" in row else ""
        cells = [str(row.get("t", "uniform t")), snr]
        cells += [_number(row[key], *of) for key, (_, *of) in columns.items()]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _number(value: float | None, factor: float, form: str) -> str:
    """Return a cell: factor * value in a format; "-" for None."""
    return "-" if value is None else format(factor * value, form)


def _training(description: dict[str, Any]) -> str:
    """Return the section on training: the settings that shaped it."""
    training = description["training"]
    if not training:
        return "## Training\n\nNot recorded with these weights."
    facts = {key: value for key, value in training.items() if value not in (None, "")}
    lines = [f"{key}: {json.dumps(value)}" for key, value in facts.items()]
    data = description["data"]
    return (
        "## Training\n\nTrained with `ds_classifier`"
        + (f" on the data with fingerprint `{data}`" if data else "")
        + ":\n\n"
        + _code(lines)
    )


def _classes(classes: list[str] | None, number: int, targets: Targets) -> str:
    """Return the section on the classes: the first CLASSES_SHOWN names, and the values of bins."""
    if classes is None:
        return f"## Classes\n\n{number}; their names are not recorded with these weights."
    # Written as JSON strings in a block of code, no name can break the page.
    lines = [f"{k}: {json.dumps(name, ensure_ascii=False)}" for k, name in enumerate(classes)]
    more = f"\n\nand {number - CLASSES_SHOWN} more, in the JSON." if number > CLASSES_SHOWN else ""
    if targets.values is None:
        return f"## Classes\n\n{_code(lines[:CLASSES_SHOWN])}{more}"
    lines = [f"{line}, mean value {v:.6g}" for line, v in zip(lines, targets.values, strict=True)]
    column = _code([f"column: {json.dumps(targets.name, ensure_ascii=False)}"])
    return f"## Bins\n\n{column}\n\n{_code(lines[:CLASSES_SHOWN])}{more}"


def _clean_only(description: dict[str, Any]) -> str:
    """Return the warning for a classifier of clean images; "" for a noise-aware one."""
    if description["training"].get("noised", True):
        return ""
    return "This one was trained on clean images only, with t = 0. "


def _code(lines: list[str]) -> str:
    """Return a block of code."""
    return "\n".join(f"    {line}" if line else "" for line in lines)
