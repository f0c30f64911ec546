"""Arrays as training data: the bytes of .npy, x_0, bad arrays, manifests, batches and settings."""

import io
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from webdataset import WebDataset

from ds_classifier.config import Settings
from ds_classifier.data.arrays import Arrays, Tally, channels_first, to_npy, values_of
from ds_classifier.data.convert.convert import convert
from ds_classifier.data.convert.sources import open_source
from ds_classifier.data.loader import ShardDataset, ValidationPositions, create_loader
from ds_classifier.data.shards import Manifest, open_shards
from ds_classifier.data.splits import open_splits, settled_by_data
from ds_classifier.loss import RecentImages

LATENTS = Arrays(4, 8, "float16", [0.5, 1.0, 2.0, 1.0], [0.0, 0.0, 1.0, 0.0])


def made(number: int, channels: int = 4, side: int = 8, dtype="float16") -> np.ndarray:
    """Return [N, C, S, S] of numbers like a VAE's."""
    x = np.random.RandomState(number).standard_normal((number, channels, side, side)) * 3 + 0.5
    return x.astype(dtype)


@pytest.fixture
def latents(tmp_path):
    """Convert 40 latents in two classes, with a scale and shift; return OUT and the values."""
    x = made(40)
    np.savez(tmp_path / "set.npz", images=x, labels=np.arange(40) % 2)
    source = open_source(str(tmp_path / "set.npz"), scale=[0.25], shift=[0.5])
    convert(source, tmp_path / "out", samples_per_shard=15)
    return tmp_path / "out", x


@pytest.mark.parametrize("dtype", ["uint8", "float16", "float32", ">f4"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_the_bytes_of_numpy_are_read_as_numpy_reads_them(dtype, order):
    values = np.asarray(made(3)[0] * 10 + 40, dtype, order=order)
    file = io.BytesIO()
    np.save(file, values)
    found = values_of(file.getvalue())
    assert np.array_equal(found, values)
    assert found.dtype == values.dtype
    assert np.array_equal(np.load(io.BytesIO(to_npy(found))), values)


def saved(values, **options) -> bytes:
    file = io.BytesIO()
    np.save(file, values, **options)
    return file.getvalue()


WHOLE = saved(made(1)[0])
BAD = [
    (b"", "not the start of a .npy"),
    (b"\x89PNG\r\n", "not the start of a .npy"),
    (WHOLE[:100], "header is cut short"),
    (WHOLE[:-2], "holds 510 bytes of numbers; its header says 512"),
    (WHOLE + b"\0\0", "holds 514 bytes"),
    (WHOLE[:8] + b"\xff\xff" + WHOLE[10:], "header is cut short, or too long"),
    (WHOLE.replace(b"descr", b"dexcr"), "header cannot be read"),
    (WHOLE.replace(b"(4, 8, 8)", b"(4, 8,(8)"), "header cannot be read"),
    (b"\x93NUMPY\x09" + WHOLE[7:], "header is cut short, or too long"),
    (saved(np.array([{"a": 1}], dtype=object), allow_pickle=True), "need numbers"),
    (saved(np.zeros((4, 8, 8), bool)), "need numbers"),
    (saved(made(1)[0].astype("f4")), "holds 4 x 8 x 8 float32; need 4 x 8 x 8 float16"),
    (saved(made(1)[0, :3]), "holds 3 x 8 x 8 float16; need 4 x 8 x 8 float16"),
    (saved(made(1)[0].transpose(1, 2, 0)), "holds 8 x 8 x 4 float16"),
    (saved(np.where(np.arange(8) == 3, np.float16(np.nan), made(1)[0])), "32 numbers not finite"),
    (saved(np.where(np.arange(8) == 3, np.float16(np.inf), made(1)[0])), "32 numbers not finite"),
]


@pytest.mark.parametrize(("data", "words"), BAD, ids=range(len(BAD)))
def test_an_array_that_is_not_whole_finite_and_alike_is_refused(data, words):
    with pytest.raises(ValueError) as error:
        LATENTS.decode(data)
    assert words in str(error.value)


def test_x_0_is_shifted_and_scaled_in_fp32():
    values = made(1)[0]
    shift = np.array(LATENTS.shift, np.float32).reshape(4, 1, 1)
    scale = np.array(LATENTS.scale, np.float32).reshape(4, 1, 1)
    expected = (values.astype(np.float32) - shift) * scale
    x = LATENTS.decode(to_npy(values))
    assert x.dtype == np.float32
    assert np.array_equal(x, expected.transpose(1, 2, 0))
    assert np.allclose(LATENTS.values_of_x_0(x[None])[0], values, atol=1e-6)
    pixels = Arrays(4, 8, "uint8", None, None)
    bytes_ = (values * 10 + 100).astype("uint8")
    assert np.array_equal(pixels.decode(to_npy(bytes_)), bytes_.transpose(1, 2, 0))


def test_layouts_become_channels_first():
    x = made(1)[0]
    assert np.array_equal(channels_first(x.transpose(1, 2, 0)), x)
    assert channels_first(x[0]).shape == (1, 8, 8)
    assert np.array_equal(channels_first(x[:, :4, :4]), x[:, :4, :4])  # C = S: as they are
    for wrong in (x[:, :, :5], made(1, channels=65)[0], x[None], x.astype("i8"), x[:, :0, :0]):
        with pytest.raises(ValueError):
            channels_first(wrong)


def test_scale_and_shift_are_one_number_or_one_per_channel():
    assert LATENTS.with_scaling([3.0], None).scale == [3.0] * 4
    assert LATENTS.with_scaling(None, [3.0]).scale == LATENTS.scale
    assert Arrays(4, 8, "uint8", None, None).with_scaling([0.1], None).shift == [0.0] * 4
    for scale in ([1.0, 2.0], [0.0], [float("nan")]):
        with pytest.raises(ValueError, match="--scale: got"):
            LATENTS.with_scaling(scale, None)


def test_the_advised_scale_has_a_number_for_each_channel_in_order():
    """Scaled by one factor more, the spread over all channels is 1."""
    arrays = replace(LATENTS, scale=[4.0, 1.0, 2.0, 1.0], mean=[0.0] * 4, std=[8.0, 2.0, 4.0, 6.0])
    (line,) = (line for line in arrays.remarks(advise=True) if "--scale" in line)
    usual = (120 / 4) ** 0.5
    advised = line.split("--scale ")[1].replace(",", " ").split()
    assert [float(number) for number in advised[:4]] == [
        pytest.approx(s / usual, 1e-3) for s in (4, 1, 2, 1)
    ]
    even = replace(arrays, scale=[2.0] * 4)
    assert any(f"--scale {2 / usual:.4g}, after" in line for line in even.remarks(advise=True))


def test_a_tally_is_the_mean_and_the_standard_deviation():
    x = made(9)
    one, other = Tally(), Tally()
    for i, values in enumerate(x):
        (one if i < 4 else other).add(LATENTS.decode(to_npy(values)))
    one = Tally(*json.loads(json.dumps(one.to_json())))
    one.update(other)
    found = one.finish(LATENTS)
    x_0 = np.stack([LATENTS.decode(to_npy(values)) for values in x]).astype(np.float64)
    assert np.allclose(found.mean, x_0.mean(axis=(0, 1, 2)), atol=1e-12)
    assert np.allclose(found.std, x_0.std(axis=(0, 1, 2)), atol=1e-12)


# ------------------------------------------------------------------------------ shards and batches


def test_the_manifest_says_what_the_arrays_are(latents):
    out, x = latents
    manifest = open_shards(out / "train").manifest
    arrays = manifest.arrays
    assert (arrays.channels, arrays.size, arrays.dtype) == (4, 8, "float16")
    assert (arrays.scale, arrays.shift) == ([0.25] * 4, [0.5] * 4)
    x_0 = (x.astype(np.float64) - 0.5) * 0.25
    assert np.allclose(arrays.mean, x_0.mean(axis=(0, 2, 3)), atol=1e-6)
    assert np.allclose(arrays.std, x_0.std(axis=(0, 2, 3)), atol=1e-6)
    assert Manifest.from_json(manifest.to_json()) == manifest
    other = replace(manifest, arrays=arrays.with_scaling([0.3], None))
    assert other.fingerprint != manifest.fingerprint
    described = replace(manifest, arrays=replace(arrays, mean=[0.0] * 4))
    assert described.fingerprint == manifest.fingerprint  # only what training sees counts


def test_the_manifests_of_images_stay_as_they_were(digits):
    manifest = open_shards(digits / "train").manifest
    assert "arrays" not in json.loads(manifest.to_json())


DAMAGE = [
    {"channels": 0},
    {"channels": 65},
    {"size": 8.0},
    {"dtype": "float64"},
    {"scale": None},
    {"scale": [1.0]},
    {"mean": "0000"},
    {"std": [float("nan")] * 4},
    {"more": 1},
]


@pytest.mark.parametrize("damage", DAMAGE, ids=str)
def test_a_damaged_manifest_is_named(latents, damage):
    path = latents[0] / "train" / "manifest.json"
    fields = json.loads(path.read_text())
    fields["arrays"] |= damage
    path.write_text(json.dumps(fields))
    with pytest.raises(ValueError, match="not a manifest of this program"):
        open_shards(path.parent)


def test_stock_webdataset_reads_the_shards(latents):
    out, x = latents
    urls = sorted(map(str, (out / "train").glob("*.tar")))
    count = 0
    for sample in WebDataset(urls, shardshuffle=False):
        number = int(sample["__key__"].rsplit("_", 1)[1])
        assert np.array_equal(np.load(io.BytesIO(sample["npy"])), x[number])
        assert int(sample["cls"]) == number % 2
        count += 1
    assert count == 40


@pytest.mark.parametrize("workers", [0, 1])
def test_batches_are_x_0(latents, workers):
    out, x = latents
    shards = open_shards(out / "train")
    dataset = ShardDataset(shards, image_size=8, channels=4)
    positions = ValidationPositions(40, batch=16, rank=0, world_size=1)
    seen = 0
    for batch in create_loader(dataset, positions, workers=workers):
        assert batch.images.dtype == torch.float32
        for image, label, position, weight in zip(*batch[:4], strict=True):
            if weight == 0:
                continue
            number = int(shards.key(int(position)).rsplit("_", 1)[1])
            expected = (x[number].astype(np.float32) - np.float32(0.5)) * np.float32(0.25)
            assert np.array_equal(image.permute(2, 0, 1).numpy(), expected)
            assert int(label) == number % 2
            seen += 1
    assert seen == 40


def test_a_flip_mirrors_half_of_the_arrays(latents):
    shards = open_shards(latents[0] / "train")
    shape = dict(image_size=8, channels=4)
    plain = ShardDataset(shards, **shape)[np.arange(40)].images
    flipped = ShardDataset(shards, **shape, random_flip=True, seed=1)[np.arange(40)].images
    same = [torch.equal(a, b) for a, b in zip(plain, flipped, strict=True)]
    mirrored = [torch.equal(a, b.flip(1)) for a, b in zip(plain, flipped, strict=True)]
    assert all(a != b for a, b in zip(same, mirrored, strict=True))
    assert 8 < sum(same) < 32


def test_a_bad_array_keeps_its_place_with_weight_0(latents):
    out, _ = latents
    shards = open_shards(out / "train")
    row = shards.index[5]
    path = shards.path(int(row["shard"]))
    data = bytearray(path.read_bytes())
    nan = np.float16(np.nan).tobytes()
    end = int(row["offset"]) + int(row["length"])
    data[end - 2 : end] = nan
    path.write_bytes(data)
    batch = ShardDataset(shards, image_size=8, channels=4)[np.arange(10)]
    assert batch.weights.tolist() == [1.0] * 5 + [0.0] + [1.0] * 4
    assert batch.bad[0].error == "holds 1 number not finite"
    assert batch.bad[0].key == shards.key(5)
    assert (batch.images[5] == 0).all()


def test_recent_images_keep_floats():
    recent = RecentImages(
        4, image_shape=(2, 2, 3), num_classes=2, device="cpu", dtype=torch.float32
    )
    x = torch.randn(4, 2, 2, 3)
    labels = torch.tensor([0, 1, 0, 1])
    recent.add(x, labels, torch.arange(4))
    alpha, sigma = torch.full((4,), 0.9), torch.full((4,), 0.2)
    noise = torch.randn(4, 2, 2, 3)
    x_t = 0.9 * x + 0.2 * noise
    found = recent.class_posterior(x_t, x, labels, alpha, sigma)
    distances = (x_t[:, None] - 0.9 * x[None]).flatten(2).double().square().sum(2) / (2 * 0.2**2)
    distances = torch.cat([distances, distances.diagonal()[:, None]], dim=1)
    weights = (-distances).softmax(dim=1)
    expected = torch.stack(
        [
            (weights * (torch.cat([labels.expand(4, 4), labels[:, None]], 1) == k)).sum(1)
            for k in (0, 1)
        ],
        dim=1,
    )
    assert torch.allclose(found.double(), expected, atol=1e-5)


# ---------------------------------------------------------------------------------------- settings


def test_what_nobody_gave_follows_the_arrays(latents):
    manifest = open_shards(latents[0] / "train").manifest
    settled = settled_by_data(Settings(), manifest, given=())
    assert (settled.image_size, settled.in_channels, settled.num_classes) == (8, 4, 2)
    assert (settled.random_crop, settled.random_flip) == (False, False)
    asked = Settings(random_flip=True)
    assert settled_by_data(asked, manifest, given={"random_flip"}).random_flip
    for name, value, words in (
        ("image_size", 16, "need --image_size 8 --in_channels 4"),
        ("in_channels", 3, "need --image_size 8 --in_channels 4; do: give these flags"),
        ("random_crop", True, "--random_crop: got True for arrays"),
    ):
        with pytest.raises(ValueError, match=words):
            settled_by_data(Settings(**{name: value}), manifest, given={name})


def test_images_have_at_most_four_channels(digits):
    manifest = open_shards(digits / "train").manifest
    assert settled_by_data(Settings(), manifest, given=()).random_crop
    with pytest.raises(ValueError, match="--in_channels: got 5 for images; need 1 to 4"):
        settled_by_data(Settings(in_channels=5), manifest, given={"in_channels"})


def test_validation_arrays_have_the_scale_of_the_training_arrays(latents, tmp_path):
    np.savez(tmp_path / "other.npz", images=made(6), labels=np.arange(6) % 2)
    convert(open_source(str(tmp_path / "other.npz"), scale=[0.3]), tmp_path / "other")
    settings = Settings(
        data_dir=str(latents[0] / "train"), val_data_dir=str(tmp_path / "other" / "train")
    )
    with pytest.raises(ValueError, match=r"x_0 = value \* 0.3 .* and .*x_0 = \(value - 0.5\)"):
        open_splits(settings)
