"""A classifier of arrays in use: predictions, export, pictures, and samples of its training set."""

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from made import PREDICTOR_SETTINGS
from PIL import Image

import ds_classifier
from ds_classifier.checkpoint import disk
from ds_classifier.checkpoint.weights import find_recorded
from ds_classifier.common.false_colours import FalseColours
from ds_classifier.common.keyed_noise import keyed_noise
from ds_classifier.data.arrays import Arrays
from ds_classifier.data.convert.convert import convert
from ds_classifier.data.convert.sources import open_source
from ds_classifier.data.loader import ShardDataset
from ds_classifier.data.shards import open_shards
from ds_classifier.data.splits import refuse_other_samples
from ds_classifier.diffusion import create_gaussian_diffusion
from ds_classifier.evaluation.data import open_validation_data
from ds_classifier.evaluation.evaluate import VALIDATION_SEED
from ds_classifier.evaluation.predictions import predict_grid
from ds_classifier.export.export import export
from ds_classifier.export.predictor import Predictor
from ds_classifier.guidance import sample_files
from ds_classifier.guidance.guided_sampling import load_guided_sampling
from ds_classifier.model import create_classifier
from ds_classifier.report.guidance import read_samples

COUNT, CHANNELS = 20, 5
SETTINGS = PREDICTOR_SETTINGS.replace(in_channels=CHANNELS, num_classes=2)


def made() -> np.ndarray:
    x = np.random.RandomState(3).standard_normal((COUNT, CHANNELS, 8, 8)) * 3 + 0.5
    return x.astype(np.float16)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("arrays")
    np.savez(folder / "set.npz", images=made(), labels=np.arange(COUNT) % 2)
    scaling = dict(scale=[0.25, 0.3, 0.2, 0.25, 0.35], shift=[0.5])
    convert(open_source(str(folder / "set.npz"), **scaling), folder / "out")
    return folder / "out" / "train"


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    """Write a run with a checkpoint of an untrained classifier of these arrays."""
    torch.manual_seed(0)
    classifier = create_classifier(**SETTINGS.model_kwargs())
    for parameter in classifier.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    manifest = open_shards(data).manifest
    state = dict(
        format=disk.FORMAT,
        version=disk.VERSION,
        step=7,
        settings=asdict(SETTINGS),
        classes=manifest.classes,
        data=manifest.fingerprint,
        arrays=manifest.arrays.to_json(),
    )
    home = tmp_path_factory.mktemp("run")
    (home / "checkpoints").mkdir()
    final = home / "checkpoints" / disk.step_name(7)
    disk.commit(final, model=classifier.state_dict(), optimizer={}, state=state)
    return home


def in_order(data) -> tuple[ShardDataset, list[int]]:
    """Return the training set, and the number of the array at each place."""
    shards = open_shards(data)
    numbers = [int(shards.key(i).rsplit("_", 1)[1]) for i in range(COUNT)]
    return ShardDataset(shards, image_size=8, channels=CHANNELS), numbers


def test_values_are_scaled_by_the_predictor(run, data):
    model = ds_classifier.load(run)
    assert "arrays   5 x 8 x 8 float16, x_0 = (value - 0.5) * [0.25, 0.3, " in repr(model)
    dataset, numbers = in_order(data)
    batch = dataset[np.arange(COUNT)]
    noise = keyed_noise(VALIDATION_SEED, "validation", batch.positions, (8, 8, CHANNELS))
    t = torch.full((COUNT,), 60)
    x_t = model.diffusion.q_sample(batch.images, t, noise).permute(0, 3, 1, 2)
    expected = model.classifier(x_t, model.diffusion.model_timesteps(t)).softmax(dim=1)
    values = made()[numbers]
    assert torch.equal(model.predict(values, t=60), expected)
    given = noise.permute(0, 3, 1, 2)
    assert torch.equal(model.predict(torch.from_numpy(values).float(), 60, given), expected)
    for wrong in (values.transpose(0, 2, 3, 1), values[:, :4], values.astype(np.uint8)):
        with pytest.raises(ValueError, match=r"need \[N, 5, 8, 8\] floating"):
            model.predict(wrong)
    assert model.gradient(x_t, 60, 1).shape == x_t.shape


def test_files_are_read_as_they_are(run, tmp_path):
    model = ds_classifier.load(run)
    values = made()
    np.save(tmp_path / "a.npy", values[0])
    np.save(tmp_path / "b.npy", values[1].transpose(1, 2, 0))
    found = model.read([tmp_path / "a.npy", tmp_path / "b.npy"])
    assert torch.equal(found, torch.from_numpy(values[:2]))
    assert torch.equal(model.read(tmp_path / "a.npy")[0], torch.from_numpy(values[0]))
    np.save(tmp_path / "c.npy", values[0, :3])
    with pytest.raises(ValueError, match=r"images\[0\].*holds 3 x 8 x 8 float16; need 5 x 8 x 8"):
        model.read([tmp_path / "c.npy"])


def predictor(arrays: Arrays) -> Predictor:
    """Return a classifier of arrays that was not trained."""
    settings = SETTINGS.replace(in_channels=arrays.channels)
    torch.manual_seed(0)
    classifier = create_classifier(**settings.model_kwargs())
    for parameter in classifier.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    diffusion = create_gaussian_diffusion(**settings.diffusion_kwargs())
    return Predictor(classifier, diffusion, settings, None, None, Path(), arrays)


def test_uint8_with_a_scale_is_read_and_predicted(tmp_path):
    arrays = Arrays(3, 8, "uint8", [0.02] * 3, [100.0] * 3)
    model = predictor(arrays)
    values = np.random.RandomState(0).randint(0, 256, (2, 3, 8, 8)).astype(np.uint8)
    np.save(tmp_path / "a.npy", values[0])
    np.save(tmp_path / "b.npy", values[1])
    read = model.read([tmp_path / "a.npy", tmp_path / "b.npy"])
    assert np.array_equal(read.numpy(), values)
    x_0 = (torch.from_numpy(values).float() - 100) * 0.02
    of_floats = predictor(Arrays(3, 8, "float32", [1.0] * 3, [0.0] * 3))
    assert torch.allclose(model.predict(read, 60), of_floats.predict(x_0, 60), atol=1e-6)
    with pytest.raises(ValueError, match=r"need \[N, 3, 8, 8\] torch.uint8"):
        model.predict(values.astype(np.float32))


def test_read_changes_no_values(tmp_path):
    """Floats do not become bytes, and float32 does not become float16, in which it may be inf."""
    path = tmp_path / "a.npy"
    floats = np.linspace(-1, 1, 192, dtype=np.float32).reshape(3, 8, 8)
    large = floats * 1e5
    for scaling in ((None, None), ([0.1] * 3, [0.0] * 3)):
        np.save(path, floats)
        with pytest.raises(ValueError, match="holds 3 x 8 x 8 float32; need 3 x 8 x 8 uint8; do:"):
            predictor(Arrays(3, 8, "uint8", *scaling)).read(path)
    model = predictor(Arrays(3, 8, "float16", [1.0] * 3, [0.0] * 3))
    for values in (large, large.astype(">f4"), floats.astype(np.float16), large.astype(float)):
        np.save(path, values)
        assert np.array_equal(model.read(path)[0].numpy(), values.astype(np.float32))
    assert model.read([path] * 70).shape == (70, 3, 8, 8)
    assert model.read([]).shape == (0, 3, 8, 8)
    np.save(path, floats.astype(np.uint8))
    with pytest.raises(ValueError, match="holds 3 x 8 x 8 uint8; need 3 x 8 x 8 float16"):
        model.read(path)
    np.save(path, floats * np.float32(np.inf))
    with pytest.raises(ValueError, match=r"a.npy: holds 192 numbers not finite"):
        model.read(path)


@pytest.mark.parametrize("pack", [list, tuple, lambda one: one[0]])
def test_an_array_classifier_reads_no_pictures(pack):
    model = predictor(Arrays(3, 8, "float16", [1.0] * 3, [0.0] * 3))
    with pytest.raises(ValueError, match=r"images\[0\]: got a Image; need the path of an .npy"):
        model.read(pack([Image.new("RGB", (8, 8))]))


def test_an_export_tells_channels_scale_and_shift(run, data, tmp_path):
    exported = export(run, out=tmp_path / "export")
    described = json.loads((tmp_path / "export" / "model000007.json").read_text())
    arrays = open_shards(data).manifest.arrays
    assert described["arrays"] == arrays.to_json()
    assert described["input"]["shape"] == "[N, 5, 8, 8]"
    card = (tmp_path / "export" / "README.md").read_text()
    assert "x_0 = (value - 0.5) * [0.25, 0.3, 0.2, 0.25, 0.35]" in card
    assert "8-bit" not in card
    model = ds_classifier.load(exported.paths[1])
    assert torch.equal(model.predict(made(), 60), ds_classifier.load(run).predict(made(), 60))


def test_other_samples_are_refused(run, data, digits):
    manifest = open_shards(data).manifest
    arrays = manifest.arrays.to_json()
    refuse_other_samples(manifest, "HERE", arrays, "weights")
    with pytest.raises(ValueError, match="got images in HERE; need arrays of 5 x 8 x 8 float16"):
        refuse_other_samples(open_shards(digits / "train").manifest, "HERE", arrays, "weights")
    with pytest.raises(ValueError, match="need images, which weights was trained on"):
        refuse_other_samples(manifest, "HERE", None, "weights")
    arrays["scale"][0] = 1.0
    with pytest.raises(ValueError, match=r"in HERE; .* with the same --scale and --shift"):
        refuse_other_samples(manifest, "HERE", arrays, "weights")


@pytest.mark.parametrize(
    ("channels", "words"),
    [
        (1, "the channel"),
        (2, "the first channel"),
        (3, "the first three channels"),
        (5, "three principal components of 5 channels"),
    ],
)
def test_colours_are_the_first_channels_or_principal_components(channels, words):
    x = np.random.RandomState(0).standard_normal((30, 4, 4, channels))
    x[..., -1] *= 7  # the first component is the last channel
    colours = FalseColours(x)
    pixels = colours(x)
    assert colours.words == words
    assert pixels.shape == (30, 4, 4, 3)
    shown = x[..., -1 if channels > 3 else 0]
    expected = (shown - shown.mean()) / shown.std() / 2.5
    expected = ((expected + 1) * 127.5).clip(0, 255)
    tolerance = 12 if channels > 3 else 1  # the component is not exactly the channel
    assert np.abs(pixels[..., 0] - expected).max() < tolerance
    if channels < 3:
        assert (pixels == pixels[..., :1]).all()


def test_pictures_of_arrays_are_in_colours(run, data):
    model = ds_classifier.load(run)
    grid = predict_grid(
        *(model.classifier, model.diffusion, open_shards(data)),
        image_size=8,
        channels=CHANNELS,
        device=torch.device("cpu"),
    )
    assert grid.predictions.colours == "three principal components of 5 channels"
    dataset, _ = in_order(data)
    images = dataset[np.array(grid.predictions.positions)].images.numpy()
    clean = FalseColours(images)(images)
    nearly = np.abs(grid.tiles[:, 0].astype(int) - clean)  # t = 0, where little noise is added
    assert np.median(nearly) <= 8
    assert grid.tiles.std() > 20


@pytest.fixture
def alone():
    """Make this process the only rank of a process group."""
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("alone")
def test_the_directory_of_another_scale_is_named(run, tmp_path):
    np.savez(tmp_path / "set.npz", images=made(), labels=np.arange(COUNT) % 2)
    convert(open_source(str(tmp_path / "set.npz")), tmp_path / "out")
    place = str(tmp_path / "out" / "train")
    of_place = f"got arrays of 5 x 8 x 8 float16 with x_0 = value in {place}; need"
    cpu = torch.device("cpu")
    source = find_recorded(run)
    with pytest.raises(ValueError) as error:
        open_validation_data(source, place, cache_dir=None, cache_gb=None, device=cpu)
    assert f"--val_data_dir: {of_place}" in str(error.value)
    with pytest.raises(ValueError) as error:
        load_guided_sampling(
            run,
            {},
            data_dir=place,
            model_path="",
            unet={},
            classifier_fp16=False,
            unet_fp16=False,
            device=cpu,
        )
    assert f"--data_dir: {of_place}" in str(error.value)


@pytest.mark.usefixtures("alone")
def test_samples_are_values_that_convert_reads(run, data, tmp_path):
    """Draw from the exact denoiser of the training set, which returns members of it."""
    guided = load_guided_sampling(
        run,
        {"timestep_respacing": "10"},
        data_dir=str(data),
        model_path="",
        unet={},
        classifier_fp16=False,
        unet_fp16=False,
        device=torch.device("cpu"),
    )
    labels = np.arange(6) % 2
    drawn = guided.draw(
        *(labels, 1.0),
        joint_temperature=1.0,
        marginal_temperature=1.0,
        batch_size=6,
        use_ddim=True,
        clip_denoised=False,
        seed=0,
        progress=lambda done, total: None,
    )
    assert drawn.dtype == np.float32
    values = guided.arrays.values_of_x_0(drawn)
    distance = np.abs(values[:, None] - made()[None].astype(np.float32)).mean(axis=(2, 3, 4))
    assert (distance.min(axis=1) < 0.2).all()  # in units of the source, whose spread is 3
    colours = guided.colours(drawn)
    folder = sample_files.scale_folder(tmp_path, 0.0)
    path = sample_files.write_samples(folder, colours(drawn), labels, values)
    assert path.name == "samples_6x5x8x8.npz"
    source = open_source(str(path))
    assert (source.arrays.channels, source.arrays.dtype) == (5, "float32")
    found, classes = read_samples(tmp_path, 0.0)
    assert np.array_equal(found, values)
    assert np.array_equal(classes, labels)
    with pytest.raises(ValueError, match=r"need --image_size 8 --in_channels 5"):
        load_guided_sampling(
            None,
            {"in_channels": 3},
            unguided=True,
            data_dir=str(data),
            model_path="",
            unet={},
            classifier_fp16=False,
            unet_fp16=False,
            device=torch.device("cpu"),
        )


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("channels", [2, 4, 5])
def test_samples_of_uint8_arrays_are_values_and_pictures_in_colours(tmp_path, channels):
    x = np.random.RandomState(channels).randint(0, 256, (8, channels, 8, 8)).astype(np.uint8)
    np.savez(tmp_path / "set.npz", images=x, labels=np.arange(8) % 2)
    convert(open_source(str(tmp_path / "set.npz")), tmp_path / "out")
    guided = load_guided_sampling(
        None,
        {"timestep_respacing": "10", "noise_schedule": "cosine"},
        unguided=True,
        data_dir=str(tmp_path / "out" / "train"),
        model_path="",
        unet={},
        classifier_fp16=False,
        unet_fp16=False,
        device=torch.device("cpu"),
    )
    labels = np.arange(4) % 2
    drawn = guided.draw(
        *(labels, 0.0),
        joint_temperature=1.0,
        marginal_temperature=1.0,
        batch_size=4,
        use_ddim=True,
        clip_denoised=guided.pixels,
        seed=0,
        progress=lambda done, total: None,
    )
    values, colours = guided.arrays.values_of_x_0(drawn), guided.colours(drawn)
    folder = sample_files.scale_folder(tmp_path, 0.0)
    path = sample_files.write_samples(folder, colours(drawn), labels, values)
    with np.load(path) as written:
        found = written["arr_0"]
    assert (found.shape, found.dtype) == ((4, channels, 8, 8), np.uint8)
    distance = np.abs(found[:, None].astype(int) - x.astype(int)).max(axis=(2, 3, 4))
    assert (distance.min(axis=1) <= 2).all()  # the exact denoiser draws the training set
    with Image.open(folder / "class_0000.png") as picture:
        assert picture.mode == "RGB"
    assert np.array_equal(read_samples(tmp_path, 0.0)[0], found)
