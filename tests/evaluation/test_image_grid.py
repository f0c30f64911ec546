"""Images with predictions, and counts of confused classes, compared with direct computations."""

import math

import numpy as np
import pytest
import torch

from ds_classifier import distributed
from ds_classifier.common.keyed_noise import keyed_noise
from ds_classifier.data.shards import open_shards
from ds_classifier.diffusion import create_gaussian_diffusion
from ds_classifier.evaluation.image_grid import (
    ImageGrid,
    Predictions,
    load_grid,
    marked_sheet,
    save_grid,
)
from ds_classifier.evaluation.levels import Confusion
from ds_classifier.evaluation.predictions import choose_positions, predict_grid


def test_confusion_counts_each_sample_once(monkeypatch):
    monkeypatch.setattr(distributed, "all_reduce_sum", lambda tensor: tensor)
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 4, (50,), generator=generator)
    log_p = torch.randn(50, 4, generator=generator).log_softmax(dim=1)
    weights = (torch.rand(50, generator=generator) < 0.8).float()
    log_p[weights == 0] = math.nan
    expected = {}
    for label, row, weight in zip(labels.tolist(), log_p.tolist(), weights.tolist(), strict=True):
        if weight:
            pair = (label, max(range(4), key=row.__getitem__))
            expected[pair] = expected.get(pair, 0) + 1
    counted = Confusion(50, "cpu")
    for part in torch.randperm(50, generator=generator).split(7):
        padded = torch.cat([part, part[:2]])  # padding repeats a sample, at position -1
        positions = torch.cat([part, torch.full((len(part[:2]),), -1)])
        counted.add(
            log_p=log_p[padded],
            labels=labels[padded],
            positions=positions,
            weights=weights[padded],
        )
    read = counted.read()
    pairs = zip(read["label"], read["predicted"], strict=True)
    assert dict(zip(pairs, read["samples"], strict=True)) == expected


class Brightness(torch.nn.Module):
    """A classifier whose prediction depends only on the mean of the image and on t."""

    def forward(self, x, timesteps):
        scores = x.mean(dim=(1, 2, 3))[:, None] * torch.arange(10.0) + timesteps[:, None] / 1000
        return scores * torch.tensor([1.0, -1.0] * 5)


def test_images_are_those_of_the_evaluation(digits):
    shards = open_shards(digits / "val")
    diffusion = create_gaussian_diffusion(noise_schedule="cosine")
    model = Brightness()
    where = dict(image_size=8, channels=3, device=torch.device("cpu"), step=7)
    grid = predict_grid(model, diffusion, shards, **where)
    predictions = grid.predictions
    assert model.training  # as before
    assert predictions.labels == list(range(10))
    assert [predictions.t[0], predictions.t[-1]] == [0, 999]
    labels = shards.index["label"].tolist()
    assert predictions.positions == [labels.index(k) for k in range(10)]
    for row in (0, 9):
        position, t = predictions.positions[row], predictions.t[3]
        noise = keyed_noise(0, "validation", torch.tensor([position]), (8, 8, 3))[0]
        # The image at t = 0 is clean except for a little noise.
        alpha = diffusion.alphas_cumprod[t]
        clean = torch.from_numpy(grid.tiles[row, 0].copy()).double() / 127.5 - 1
        x_t = math.sqrt(alpha) * clean + math.sqrt(1 - alpha) * noise.double()
        shown = grid.tiles[row, 3].astype(float)
        assert np.abs(shown - ((x_t + 1) * 127.5).clamp(0, 255).numpy()).max() < 9
        scores = model(x_t.permute(2, 0, 1)[None].float(), torch.tensor([float(t)]))[0]
        assert predictions.predicted[row][3] == int(scores.argmax())
        assert predictions.confidence[row][3] == pytest.approx(
            float(scores.softmax(0).max()), abs=0.02
        )


def test_images_are_chosen_from_distant_classes(digits):
    shards = open_shards(digits / "val")
    labels = shards.index["label"]
    assert labels[choose_positions(shards, rows=3)].tolist() == [0, 4, 9]
    assert labels[choose_positions(shards, rows=1)].tolist() == [0]


def test_a_grid_is_loaded_as_it_was_saved(tmp_path):
    tiles = np.random.RandomState(0).randint(0, 256, (3, 2, 5, 5, 3)).astype(np.uint8)
    predictions = Predictions(
        None, [0, 9], [1.0, -1.0], 1, [4, 5, 6], [0, 1, 2], [[0, 1]] * 3, [[0.5, None]] * 3
    )
    save_grid(ImageGrid(tiles, predictions), tmp_path / "x.pictures.png")
    again = load_grid(tmp_path / "x.pictures.png")
    assert (again.tiles == tiles).all()
    assert again.predictions == predictions
    sheet = marked_sheet(again, ["a long name indeed", "", "c"])
    assert sheet.dtype == np.uint8
    assert sheet.shape[2] == 3
    frames = {tuple(pixel) for pixel in sheet.reshape(-1, 3)[::1].tolist()}
    assert {(0, 114, 178), (213, 94, 0)} <= frames
    assert load_grid(tmp_path / "none.png") is None
    (tmp_path / "text.png").write_text("x")
    assert load_grid(tmp_path / "text.png") is None
