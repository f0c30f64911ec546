"""The code of README.md, docs/ and model cards: Python runs, and programs know every flag.

A snippet or a command that is added to a page is found and tested without a change here.
"""

from __future__ import annotations

import re
import types
from pathlib import Path

import pytest
import torch
from made import make_images, make_run
from pages import GUIDES, commands, flags_of, is_python, parser_of, python_blocks, split
from running import ROOT
from small_models import SMALL

from ds_classifier.data.labels.targets import Targets
from ds_classifier.export.export import export

TRAIN = ROOT / "launch" / "train.py"
SHAPE = (2, 3, SMALL["image_size"], SMALL["image_size"])
# Flags of other programs that a sentence names.
OF_OTHERS = {"--user", "--format", "--nodes", "--gpus-per-node", "--gpus-per-task", "--logdir"}


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """A directory with the files that the pages name: runs, an export, images."""
    run = make_run(tmp_path / "runs" / "digits32", step=150000)
    export(run, out=tmp_path)
    make_run(tmp_path / "runs" / "tags", targets={"kind": "classes"})
    ages = Targets("values", (3.0, 9.0, 20.0, 40.0, 70.0), (6.0, 12.0, 30.0, 60.0), "age")
    make_run(tmp_path / "runs" / "ages", targets=ages.to_json())
    make_images(tmp_path, ["three.png", "seven.png"])
    monkeypatch.chdir(tmp_path)
    return tmp_path


def names_left_open() -> dict[str, object]:
    """Return what the snippets use and do not make: diffusers' objects, images, classes."""
    try:
        from diffusers import DDIMScheduler, UNet2DModel
    except ImportError:  # an extra; these have what the snippets use of them
        scheduler = types.SimpleNamespace(
            timesteps=torch.tensor([500, 0]),
            alphas_cumprod=torch.linspace(0.9, 0.1, 1000),
            config=types.SimpleNamespace(prediction_type="epsilon"),
            scale_model_input=lambda x, t: x,
            step=lambda output, t, x: types.SimpleNamespace(prev_sample=x - output),
        )
        unet = lambda x, t: types.SimpleNamespace(sample=0.1 * x)  # noqa: E731
    else:
        scheduler = DDIMScheduler(timestep_spacing="leading")
        scheduler.set_timesteps(2)
        blocks = dict(down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",))
        channels = dict(in_channels=SHAPE[1], out_channels=SHAPE[1], block_out_channels=(32,))
        unet = UNet2DModel(layers_per_block=1, **blocks, **channels).requires_grad_(False)
    noise = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    of_loop = dict(x=noise, y=torch.tensor([0, 3]), scheduler=scheduler, unet=unet)
    of_flow = type("FlowMatch", (types.SimpleNamespace,), {})(
        timesteps=torch.tensor([1000.0, 500.0]),
        config=types.SimpleNamespace(num_train_timesteps=1000),
        step=lambda output, t, x: types.SimpleNamespace(prev_sample=x - output / 2),
    )
    velocity = lambda x, t: types.SimpleNamespace(sample=0.1 * x)  # noqa: E731
    of_loop |= dict(flow_scheduler=of_flow, transformer=velocity, s=0.3, velocity=noise)
    of_loop |= dict(sit_velocity=-noise, time=0.7, denoiser=lambda x, sigma: x, alpha=1, sigma=2)
    return of_loop | dict(x_t=noise, t=100, mean=noise, variance=0.01, scale=3.0)


def run_snippets(text: str) -> dict[str, object]:
    """Run the Python of a page from top to bottom, as a reader would. Return all its names."""
    names = names_left_open()
    for code in python_blocks(text):
        exec(compile(code, "<snippet>", "exec"), names)
    return names


@pytest.mark.parametrize(
    "page", [page for page in GUIDES if python_blocks(page.read_text())], ids=lambda p: p.name
)
def test_the_python_of_a_page_runs(page, place):
    names = run_snippets(page.read_text())
    assert "ds_classifier" in names
    if "guide_scheduler_output" in names:
        assert names["x"].shape == SHAPE
        assert names["x"].isfinite().all()


def test_names_that_a_page_gives_exist():
    """Look up each `ds_classifier.NAME` of the prose as a reader would, after a bare import."""
    import ds_classifier

    for page in GUIDES:
        for dotted in re.findall(r"`ds_classifier((?:\.\w+)+)[`(]", page.read_text()):
            found = ds_classifier
            for name in dotted.strip(".").split("."):
                found = getattr(found, name)


def test_the_snippet_of_a_model_card_runs(place):
    card = (place / "README.md").read_text()
    assert len(python_blocks(card)) == 1
    names = run_snippets(card)
    gradient = names["cond_fn"](torch.zeros(SHAPE), torch.tensor([3, 7]), y=torch.tensor([0, 1]))
    assert gradient.shape == SHAPE


@pytest.mark.parametrize("page", GUIDES, ids=lambda path: path.name)
def test_programs_parse_the_commands_of_a_page(page, tmp_path, monkeypatch, capsys):
    """Parse whole commands. Of those in sentences, which leave things out, look up the flags."""
    monkeypatch.chdir(tmp_path)
    problems = []
    for command in commands(page.read_text()):
        for file in (word for word in command.argv if word.endswith((".yaml", ".json"))):
            if "/" not in file:  # a file of the reader's own, which a parser may open
                (tmp_path / file).write_text("{}")
        parser, argv = parser_of(command.script, command.argv)
        known = flags_of(parser)
        if command.script.name == "benchmark.py":  # it hands the others on
            known |= flags_of(parser_of(TRAIN, [])[0])
        words = [word.split("=")[0] for word in argv if word.startswith("--")]
        problems += [f"{command.line}: no {word}" for word in words if word not in known]
        if command.whole:
            try:
                parser.parse_known_args(argv)
            except SystemExit as end:
                if end.code == 0:  # --help
                    continue
                problems.append(f"{command.line}: {capsys.readouterr().err}")
    assert not problems, "\n".join(problems)


def test_flags_that_sentences_name_exist():
    """Look up each `--flag` of the prose in the programs and the launchers."""
    from deepspeed.launcher import runner
    from torch.distributed.run import get_args_parser

    known = OF_OTHERS | flags_of(get_args_parser())
    for script in [*(ROOT / "launch").glob("*.py"), ROOT / "tests" / "helpers" / "chaos.py"]:
        if script.name != "__init__.py":
            known |= flags_of(parser_of(script, [])[0])
    known |= set(re.findall(r"\"(--\w+)\"", Path(runner.__file__).read_text()))
    unknown = {
        (page.name, flag)
        for page in GUIDES
        for span in re.findall(r"`([^`]+)`", split(page.read_text())[0])
        for flag in re.findall(r"(?<![\w-])--[a-z][\w-]*", span)
        if flag not in known
    }
    assert not unknown


def test_snippets_and_commands_are_found():
    """Check the tests above with a page of every form, and that they have much to do."""
    page = (
        "Call `launch/train.py --lr 1 ...`:\n\n    import os\n\n    os.getcwd()\n\nThen\n\n"
        "    DS_ACCELERATOR=cpu deepspeed --num_gpus 2 launch/train.py --lr 2 \\\n"
        "        --seed [--workers N]\n    ds-classifier convert IMAGES data  # twice\n\n"
        "```python\nprint(\n    1)\n```\n\n    A=1\n"
    )
    assert python_blocks(page) == ["import os\n\nos.getcwd()", "print(\n    1)"]
    assert [(c.script.name, c.argv, c.whole) for c in commands(page)] == [
        ("train.py", ["--lr", "2", "--seed", "--workers", "1"], True),
        ("make_shards.py", ["convert", "IMAGES", "data"], True),
        ("train.py", ["--lr", "1"], False),
    ]
    with pytest.raises(SyntaxError):
        is_python("", "import os\nprint(")
    texts = [page.read_text() for page in GUIDES]
    assert sum(len(python_blocks(text)) for text in texts) >= 4
    assert sum(len(commands(text)) for text in texts) >= 40
