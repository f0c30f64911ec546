"""The report's guided samples: images of the npz with class names, shares, half-written files."""

import base64
import io
import json
import re

import numpy as np
import pytest
from PIL import Image
from report_page import HOSTILE, opened, record, training_row, write_log, write_record

from ds_classifier.guidance.sample_files import scale_folder, write_samples
from ds_classifier.report.page import write_report

CLASSES = ["cat", HOSTILE, "dog"]


def write_drawn(run, scales=(0.0, 10.0), *, side=8, channels=3, measured=True, number=12):
    """Write what sample.py leaves in a run: each sample has one color. Return the colors."""
    folder = run / "samples"
    labels = np.arange(number) % 3
    colors = {}
    for scale in scales:
        colors[scale] = (20 * np.arange(number) + scale).astype(np.uint8)
        pixels = np.zeros((number, side, side, channels), np.uint8)
        pixels[:] = colors[scale][:, None, None, None]
        write_samples(scale_folder(folder, scale), pixels, labels)
    facts = {
        "classifier": {"path": "x", "step": 20, "sha256": ""},
        "denoiser": {"data_dir": "data/train"},
        "classes": [0, 1, 2],
        "classifier_scale": list(scales),
        "num_samples": number,
    }
    (folder / "samples.json").write_text(json.dumps(facts))
    level = {"t": 899, "kl": 0.5, "accuracy": 0.25, "bayes_accuracy": 0.75, "compared": 1.0}
    level |= {"cosine": 0.5, "length_ratio": None}
    shares = {f"{scale:g}": 0.25 + scale / 20 for scale in scales}
    if measured:
        found = {"shares": shares, "levels": [level]}
        (folder / "fidelity.json").write_text(json.dumps(found))
    return colors


def images_of(run):
    """Return per row of samples: the class's name, and the images."""
    html = write_report(run).read_text().split('id="guides"')[1].split("</section>")[0]
    rows = re.findall(r'<div class="samples".*?</div>', html, flags=re.S)
    decoded = []
    for row in rows:
        sources = re.findall(r'src="data:image/\w+;base64,([^"]*)"', row)
        decoded.append([np.asarray(Image.open(io.BytesIO(base64.b64decode(s)))) for s in sources])
    return rows, decoded


def test_samples_by_scale_and_class(run):
    write_record(run, record(20, CLASSES, {(k, k): 4 for k in range(3)}))
    write_log(run, [training_row(20, 1.0)])
    colors = write_drawn(run)
    text = opened(run).sections["guides"]
    for words in ("12 samples per scale", "step 20, from data/train", "25 % at scale 0, 75 % at "):
        assert words in text
    assert "75 % of the class asked for" in text
    assert HOSTILE in text
    assert "KL(Bayes, model)" in text
    rows, images = images_of(run)
    assert len(rows) == 2 * 3
    assert ">cat<" in rows[0]
    assert ">dog<" in rows[5]
    assert [int(image[0, 0, 0]) for image in images[0]] == colors[0.0][[0, 3, 6, 9]].tolist()
    assert [int(image[0, 0, 0]) for image in images[5]] == colors[10.0][[2, 5, 8, 11]].tolist()


def test_without_samples_the_command_is_named(run):
    text = opened(run).sections["guides"]
    assert f"ds-classifier sample --classifier_path {run} --data_dir data/train" in text


def test_large_and_grey_samples_are_shown_small(run):
    write_drawn(run, scales=(1.0, 2.0, 3.0, 4.0), side=256, channels=1, measured=False)
    text = opened(run).sections["guides"]
    assert "3 of 4 scales are shown" in text
    assert "was not measured: ds-classifier sample --measure" in text
    _, images = images_of(run)
    assert {image.shape for row in images for image in row} == {(64, 64, 3)}


@pytest.mark.parametrize("name", ["samples.json", "fidelity.json", "npz"])
@pytest.mark.parametrize("content", [b"", b'{"shares": [1', b"[]", b'{"classes": 3}'])
def test_half_written_files(run, name, content):
    write_drawn(run)
    path = run / "samples" / name
    if name == "npz":
        (path,) = (run / "samples" / "scale_10").glob("*.npz")
    path.write_bytes(content)
    parsed = opened(run)
    if name == "samples.json":
        assert "No samples yet" in parsed.sections["guides"]
    elif name == "npz":
        assert len(images_of(run)[0]) == 3  # those of the other scale
    else:
        assert "was not measured" in parsed.sections["guides"]
