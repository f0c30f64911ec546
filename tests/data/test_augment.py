"""Augmentation: keyed by position, and torchvision's own under the same seed."""

import random

import numpy as np
import pytest
import torch
from torchvision.transforms import v2

from ds_classifier.common.keyed_random import fold, stream_key
from ds_classifier.config import Settings
from ds_classifier.data.arrays import Arrays
from ds_classifier.data.augment import TORCHVISION, Augmentation, create_augmentation
from ds_classifier.data.loader import ShardDataset, TrainingPositions, create_loader
from ds_classifier.data.order import SampleOrder
from ds_classifier.data.shards import open_shards
from ds_classifier.data.splits import settled_by_data
from ds_classifier.distributed import failures
from ds_classifier.evaluation.data import create_validation_loader

MODULE = """
import random
import numpy as np
import torch

def dotted(image):
    rows = (random.randrange(16), np.random.randint(16), int(torch.randint(16, ())))
    image[:, list(rows)] = torch.randint(256, (1, 3, 1), dtype=torch.uint8)
    return image

def doubled(image):
    return torch.cat([image, image], dim=1)

def halved(image):
    return image / 2

def listed(image):
    return image.tolist()

def failing(image):
    raise KeyError("no such image")

def of_dark_images(image):
    if image.float().mean() > BRIGHT:
        raise KeyError("too bright")
    return image
"""


@pytest.fixture(autouse=True)
def mine(tmp_path, monkeypatch):
    """Write a module of the user's, which the tests import by its name."""
    (tmp_path / "my_changes.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)


def picture(channels=3, size=16):
    """Return an image, [S, S, C] uint8."""
    generator = torch.Generator().manual_seed(channels)
    return torch.randint(256, (size, size, channels), generator=generator, dtype=torch.uint8)


def dataset(digits, augment, **changes):
    shards = open_shards(digits / "train")
    order = SampleOrder(
        [s.samples for s in shards.manifest.shards], seed=4, lanes=8, shuffle_shards=1
    )
    more = dict(image_size=16, order=order, seed=4, random_crop=True, random_flip=True) | changes
    return ShardDataset(shards, augment=augment, **more)


@pytest.mark.parametrize("name", list(TORCHVISION))
@pytest.mark.parametrize("channels", [1, 3])
def test_equals_torchvisions_own_call_under_the_same_seed(name, channels):
    """40 positions, so that most of the operations occur."""
    augmentation, image = Augmentation(name, 5), picture(channels)
    own = {"trivialaugment": v2.TrivialAugmentWide(), "randaugment": v2.RandAugment()}[name]
    changed = 0
    for position in range(40):
        torch.manual_seed(fold(stream_key(5, "augment"), position))
        expected = own(image.permute(2, 0, 1)).permute(1, 2, 0)
        assert torch.equal(augmentation(image, position), expected)
        changed += not torch.equal(expected, image)
    assert changed > 20


@pytest.mark.parametrize("name", ["trivialaugment", "my_changes:dotted"])
def test_the_same_image_at_a_position_whatever_is_read_with_it(digits, name):
    whole = dataset(digits, Augmentation(name, 4))[np.arange(24)].images
    plain = dataset(digits, None)[np.arange(24)].images
    assert sum(not torch.equal(a, b) for a, b in zip(whole, plain, strict=True)) > 12
    for part in ([5, 17, 2], [17], [23, 22, 21, 20]):
        again = dataset(digits, Augmentation(name, 4))[np.array(part)].images
        assert torch.equal(again, whole[part])
    other = dataset(digits, Augmentation(name, 5))[np.arange(24)].images
    assert not torch.equal(other, whole)


@pytest.mark.parametrize(("workers", "micro"), [(0, 12), (2, 4), (1, 6)])
def test_workers_and_micro_batches_do_not_change_it(digits, workers, micro):
    data = dataset(digits, Augmentation("my_changes:dotted", 4))
    order = dict(first_step=0, steps=2, global_batch=12, rank=0, world_size=1)
    positions = TrainingPositions(data.order, micro_batch=micro, **order)
    read = [batch for batch in create_loader(data, positions, workers=workers)]
    images = torch.cat([batch.images for batch in read])[
        torch.cat([batch.positions for batch in read]).argsort()
    ]
    assert torch.equal(images, data[np.arange(24)].images)


def test_one_image_differs_by_position_and_by_seed():
    image = picture()
    at = [Augmentation("my_changes:dotted", 4)(image.clone(), q) for q in range(8)]
    assert len({picture.numpy().tobytes() for picture in at}) == 8
    assert not torch.equal(Augmentation("my_changes:dotted", 5)(image.clone(), 0), at[0])
    assert torch.equal(Augmentation("my_changes:dotted", 4)(image.clone(), 3), at[3])


@pytest.mark.parametrize("source", ["random.randrange", "np.random.randint", "torch.randint"])
def test_each_generator_is_keyed(source, tmp_path):
    """The draws of a function depend on the position, and not on the state that it finds."""
    name = f"my_fill_{source.split('.')[0]}"
    drawn = "torch.randint(256, ())" if source == "torch.randint" else f"{source}(256)"
    text = f"def fill(image):\n    return torch.full_like(image, int({drawn}))\n"
    (tmp_path / f"{name}.py").write_text(f"import random\nimport numpy as np\nimport torch\n{text}")
    augmentation = Augmentation(f"{name}:fill", 4)
    found = []
    for state in range(2):
        random.seed(state)
        np.random.seed(state)
        torch.manual_seed(state)
        found.append([int(augmentation(picture(), q)[0, 0, 0]) for q in range(8)])
    assert found[0] == found[1]
    assert len(set(found[0])) > 4


def test_the_generators_are_left_as_they_were():
    def state():
        numpys = np.random.get_state()
        return torch.get_rng_state().tolist(), numpys[1].tolist(), numpys[2], random.getstate()

    before = state()
    Augmentation("my_changes:dotted", 4)(picture(), 3)
    assert state() == before


def test_validation_is_not_augmented(digits):
    shards = open_shards(digits / "val")
    settings = Settings(image_size=16, augment="trivialaugment", num_classes=10)
    loader = create_validation_loader(shards, settings, batch_size=8, workers=0)
    assert loader.dataset.augment is None


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"augment": "best"}, "need trivialaugment, randaugment, or package.module:function"),
        ({"augment": "randaugment", "in_channels": 4}, "4 channels; need 1 or 3"),
        (
            {"augment": "my_changes:doubled"},
            r"returns \[3, 32, 16\] uint8 for an image \[3, 16, 16\]",
        ),
        ({"augment": "my_changes:halved"}, r"returns \[3, 16, 16\] float32"),
        ({"augment": "my_changes:listed"}, "returns list for"),
        ({"augment": "my_changes:failing"}, "KeyError: 'no such image'"),
        ({"augment": "my_changes:absent"}, "no such name"),
    ],
)
def test_what_cannot_change_images_is_refused(changes, problem):
    with pytest.raises(ValueError, match=f"--augment: .*{problem}"):
        create_augmentation(Settings(image_size=16, **changes))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_function_that_fails_on_one_image_names_it_and_not_its_traceback(
    digits, tmp_path, monkeypatch, workers
):
    """The brightest of 24 images; a worker's error holds its traceback, which is not shown."""
    plain = dataset(digits, None)
    means = plain[np.arange(24)].images.float().mean(dim=(1, 2, 3))
    two = means.topk(2).values.mean()
    (tmp_path / "my_bright.py").write_text(MODULE.replace("BRIGHT", f"{two}"))
    data = dataset(digits, Augmentation("my_bright:of_dark_images", 4))
    order = dict(first_step=0, steps=2, global_batch=12, rank=0, world_size=1)
    positions = TrainingPositions(data.order, micro_batch=4, **order)
    with pytest.raises(ValueError) as failed:
        list(create_loader(data, positions, workers=workers))
    key = data.key(int(means.argmax()))
    sample = data.order.samples(means.argmax().numpy()[None])[0]
    shard = data.shards.manifest.shards[data.shards.index["shard"][sample]].name
    assert failures.summary(failed.value) == (
        "--augment: my_bright:of_dark_images fails for an image [3, 16, 16]: KeyError: 'too "
        f"bright' (my_bright.py, line 25); the image is {key} in {shard}; do: correct the "
        "function, and run the same command again, which continues from the last checkpoint"
    )
    assert failures.exit_code(failed.value) == failures.WRONG_USE


def test_arrays_are_refused(digits):
    manifest = open_shards(digits / "train").manifest
    arrays = Arrays(channels=4, size=16, dtype="float32", scale=[1.0] * 4, shift=[0.0] * 4)
    latents = manifest.__class__(**{**vars(manifest), "arrays": arrays})
    given = Settings(augment="trivialaugment")
    with pytest.raises(ValueError, match="--augment: got trivialaugment for arrays"):
        settled_by_data(given, latents, given=["augment"])
    assert settled_by_data(given, manifest, given=["augment"]).augment == "trivialaugment"
