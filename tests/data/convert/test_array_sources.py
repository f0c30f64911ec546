"""Arrays as sources: folders of .npy, .npz, .npy with labels, parquet, foreign shards; refusals."""

import io
import shutil
import tarfile

import numpy as np
import pytest
from made import make_images
from PIL import Image

from ds_classifier.data.convert.convert import Encoding, convert
from ds_classifier.data.convert.hold_out import hold_out
from ds_classifier.data.convert.sources import open_source
from ds_classifier.data.foreign.index import index
from ds_classifier.data.foreign.verify import verify
from ds_classifier.data.loader import ShardDataset
from ds_classifier.data.shards import open_shards
from launch.make_shards import main

COUNT = 12
NAMES = ["cat", "dog", "emu"]


def made(channels=4, side=8, dtype="float16", seed=0) -> np.ndarray:
    x = np.random.RandomState(seed).standard_normal((COUNT, channels, side, side)) * 3 + 0.5
    return (x * 20 + 120).astype(dtype) if dtype == "uint8" else x.astype(dtype)


LABELS = np.arange(COUNT) % 3


def written(folder, split="train") -> dict[int, np.ndarray]:
    """Return the stored arrays of a split by their number, as NumPy and tarfile read them."""
    found = {}
    for path in sorted((folder / split).glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                if member.name.endswith(".npy"):
                    values = np.load(io.BytesIO(tar.extractfile(member).read()))
                    label = tar.extractfile(member.name[:-3] + "cls").read()
                    number = int(member.name.split(".")[0].rsplit("_", 1)[1])
                    found[number] = (values, int(label))
    return found


def assert_holds(folder, x, labels=LABELS, split="train"):
    found = written(folder, split)
    assert sorted(found) == list(range(len(x)))
    for number, (values, label) in found.items():
        assert np.array_equal(values, x[number])
        assert values.dtype == x.dtype
        assert label == labels[number]


def converted(tmp_path, *arguments, **options):
    source = open_source(*map(str, arguments), **options)
    convert(source, tmp_path / "out", samples_per_shard=5)
    return source


def test_a_scale_is_advised_once_by_the_training_split(tmp_path, capsys):
    x = 3 * made(dtype="float32")
    np.savez(tmp_path / "set.npz", images=x, labels=LABELS)
    np.savez(tmp_path / "val.npz", images=3 * x, labels=LABELS)
    words = [tmp_path / "set.npz", tmp_path / "out", "--val", tmp_path / "val.npz"]
    assert main(["convert", *map(str, words)]) == 0
    said = capsys.readouterr().out
    scale = 1 / x.astype(float).var(axis=(0, 2, 3)).mean() ** 0.5
    assert said.count("--scale") == 1
    assert f"give --scale {scale:.4g}, after you removed OUT or with another OUT" in said


@pytest.mark.parametrize("keys", ["images labels", "x y", "arr_0 arr_1", "latents targets"])
def test_an_npz_is_read_by_the_usual_names(tmp_path, keys):
    values, labels = keys.split()
    np.savez(tmp_path / "set.npz", **{values: made(), labels: LABELS, "more": np.zeros(2)})
    source = converted(tmp_path, tmp_path / "set.npz")
    assert source.classes == ["0", "1", "2"]
    assert_holds(tmp_path / "out", made())
    (remark,) = source.remarks
    assert remark.endswith(f"set.npz: train is '{values}' with labels '{labels}'; not taken: more")


@pytest.mark.parametrize("dtype", ["float16", "float32", "uint8"])
@pytest.mark.parametrize("channels", [1, 2, 5, 64])
def test_channels_and_types(tmp_path, dtype, channels):
    if (dtype, channels) == ("uint8", 1):
        return  # an image: see below
    x = made(channels, 8, dtype)
    np.savez_compressed(tmp_path / "set.npz", x=x, y=LABELS)
    converted(tmp_path, tmp_path / "set.npz")
    assert_holds(tmp_path / "out", x)
    arrays = open_shards(tmp_path / "out" / "train").manifest.arrays
    assert (arrays.channels, arrays.size, arrays.dtype) == (channels, 8, dtype)
    assert arrays.pixels == (dtype == "uint8")


def test_channels_last_are_stored_first_and_float64_as_float32(tmp_path):
    x = made(dtype="float64")
    np.savez(tmp_path / "set.npz", x=x.transpose(0, 2, 3, 1), y=LABELS)
    source = converted(tmp_path, tmp_path / "set.npz")
    assert "arrays of 8 x 8 x 4 float64: the channels are last, and are stored first" in (
        source.remarks
    )
    assert any("float64 is stored as float32" in remark for remark in source.remarks)
    assert_holds(tmp_path / "out", x.astype("float32"))


@pytest.mark.parametrize("layout", ["NHWC", "NCHW", "NHW"])
def test_pixels_become_images(tmp_path, layout):
    """guided-diffusion's samples: arr_0 [N, H, W, 3] uint8, arr_1."""
    pixels = made(1 if layout == "NHW" else 3, 8, "uint8").transpose(0, 2, 3, 1)
    laid = {"NHWC": pixels, "NCHW": pixels.transpose(0, 3, 1, 2), "NHW": pixels[..., 0]}
    np.savez(tmp_path / "samples.npz", laid[layout], LABELS)
    source = converted(tmp_path, tmp_path / "samples.npz")
    assert any("stored as images, PNG without loss" in remark for remark in source.remarks)
    shards = open_shards(tmp_path / "out" / "train")
    assert shards.manifest.arrays is None
    batch = ShardDataset(shards, image_size=8, channels=pixels.shape[3])[np.arange(COUNT)]
    for i in range(COUNT):
        number = int(shards.key(i).rsplit("_", 1)[1])
        assert np.array_equal(batch.images[i].numpy(), pixels[number])
        assert int(batch.labels[i]) == LABELS[number]


def test_pixels_with_a_scale_stay_arrays(tmp_path):
    pixels = made(3, 8, "uint8")
    np.savez(tmp_path / "set.npz", x=pixels, y=LABELS)
    converted(tmp_path, tmp_path / "set.npz", scale=[0.01])
    assert_holds(tmp_path / "out", pixels)


def test_an_npz_may_bring_its_splits(tmp_path):
    """MedMNIST's names, whose labels are [N, 1], and those of Keras."""
    parts = {name: made(seed=i) for i, name in enumerate(("train", "val", "test"))}
    members = {f"{name}_images": x for name, x in parts.items()}
    members |= {f"{name}_labels": LABELS[:, None] for name in parts}
    np.savez(tmp_path / "med.npz", **members)
    converted(tmp_path, tmp_path / "med.npz")
    assert_holds(tmp_path / "out", parts["train"])
    assert_holds(tmp_path / "out", parts["val"], split="val")
    shutil.rmtree(tmp_path / "out")
    keras = dict(x_train=parts["train"], y_train=LABELS, x_test=parts["test"], y_test=LABELS)
    np.savez(tmp_path / "keras.npz", **keras)
    converted(tmp_path, tmp_path / "keras.npz")
    assert_holds(tmp_path / "out", parts["test"], split="val")


def test_an_npy_has_its_labels_in_another_file(tmp_path):
    x = made()
    np.save(tmp_path / "latents.npy", x)
    np.save(tmp_path / "latents_labels.npy", np.array(NAMES)[LABELS])
    source = converted(tmp_path, tmp_path / "latents.npy")
    assert source.classes == NAMES
    assert_holds(tmp_path / "out", x)
    shutil.rmtree(tmp_path / "out")
    (tmp_path / "classes.txt").write_text("".join(f"{NAMES[2 - i]}\n" for i in LABELS))
    converted(tmp_path, tmp_path / "latents.npy", labels=str(tmp_path / "classes.txt"))
    assert_holds(tmp_path / "out", x, 2 - LABELS)
    shutil.rmtree(tmp_path / "out")
    np.save(tmp_path / "held.npy", made(seed=5))
    options = dict(labels=str(tmp_path / "classes.txt"))
    named = str(tmp_path / "classes.txt")
    converted(tmp_path, tmp_path / "latents.npy", tmp_path / "held.npy", named, **options)
    assert_holds(tmp_path / "out", made(seed=5), 2 - LABELS, split="val")


def test_a_folder_of_arrays_is_sorted_as_images_are(tmp_path):
    x, held = made(), made(seed=1)
    for split, values in (("train", x), ("val", held)):
        for i, (array, label) in enumerate(zip(values, LABELS, strict=True)):
            path = tmp_path / "set" / split / NAMES[label] / f"a_{i}.npy"
            path.parent.mkdir(parents=True, exist_ok=True)
            np.save(path, array)
    (tmp_path / "set/train/cat/notes.bin").write_bytes(b"x")
    source = converted(tmp_path, tmp_path / "set", scale=[0.5])
    assert source.classes == NAMES
    assert_holds(tmp_path / "out", x)
    assert_holds(tmp_path / "out", held, split="val")
    assert any("left out, since they are not arrays: 1 .bin" in r for r in source.remarks)
    lines = "".join(f"train/{NAMES[k]}/a_{i}.npy,{NAMES[k]}\n" for i, k in enumerate(LABELS))
    (tmp_path / "set" / "list.csv").write_text("path,label\n" + lines)
    shutil.rmtree(tmp_path / "out")
    converted(tmp_path, tmp_path / "set" / "list.csv")
    assert_holds(tmp_path / "out", x)


def test_arrays_beside_images_are_left_out_as_before(tmp_path):
    folder = make_images(tmp_path / "set", ["cat/0.png", "dog/1.png"])
    np.save(folder / "features.npy", made())
    source = converted(tmp_path, folder)
    assert source.arrays is None
    assert len(source.splits["train"]) == 2


@pytest.mark.parametrize("leaf", ["float16", "float32", "uint8"])
def test_parquet_may_hold_lists_of_lists(tmp_path, leaf):
    import pyarrow
    import pyarrow.parquet

    x = made(5, 8, leaf)
    kind = pyarrow.from_numpy_dtype(x.dtype)
    for _ in range(3):
        kind = pyarrow.list_(kind)
    table = pyarrow.table({"latent": pyarrow.array([a.tolist() for a in x], kind), "label": LABELS})
    pyarrow.parquet.write_table(table, tmp_path / "set.parquet", row_group_size=5)
    converted(tmp_path, tmp_path / "set.parquet")
    assert_holds(tmp_path / "out", x)


def test_shards_of_arrays_are_converted_again(tmp_path):
    np.savez(tmp_path / "set.npz", x=made(), y=LABELS)
    converted(tmp_path, tmp_path / "set.npz", scale=[0.5], shift=[1.0])
    again = open_source(str(tmp_path / "out"), shift=[2.0])
    assert (again.arrays.scale, again.arrays.shift) == ([0.5] * 4, [2.0] * 4)
    convert(again, tmp_path / "again")
    assert len(written(tmp_path / "again")) == COUNT


def test_a_share_is_held_out_by_the_bytes(tmp_path):
    np.savez(tmp_path / "set.npz", x=made(), y=LABELS)
    source = open_source(str(tmp_path / "set.npz"))
    held = hold_out(source, 30)
    assert held.arrays == source.arrays
    assert 0 < len(held.splits["val"]) < COUNT
    order = np.random.RandomState(0).permutation(COUNT)
    np.savez(tmp_path / "other.npz", x=made()[order], y=LABELS[order])
    other = hold_out(open_source(str(tmp_path / "other.npz")), 30)
    contents = [{s.read() for s in found.splits["val"]} for found in (held, other)]
    assert contents[0] == contents[1]


# ---------------------------------------------------------------------------------------- refusals


def refused(*arguments, **options) -> str:
    with pytest.raises(ValueError) as error:
        open_source(*map(str, arguments), **options)
    assert "\n" not in str(error.value)
    return str(error.value)


def saved(path, **members):
    np.savez(path, **members)
    return path


def test_what_cannot_be_read_is_named(tmp_path):
    x = made()
    at = tmp_path / "x.npz"
    assert "got images without labels (it has images)" in refused(saved(at, images=x))
    assert "add --labels LABELS.npy" in refused(saved(at, images=x))
    assert "got features, ids; need arrays (images, x" in refused(saved(at, features=x, ids=LABELS))
    assert not open_source(
        str(saved(at, features=x, ids=LABELS)), columns=dict(image="features", label="ids")
    ).arrays.pixels
    assert "--columns: got image=z" in refused(at, columns=dict(image="z", label="ids"))
    assert "got 11 labels for 12 arrays" in refused(saved(tmp_path / "a.npz", x=x, y=LABELS[1:]))
    one_hot = np.eye(3)[LABELS]
    assert "labels.argmax(axis=1)" in refused(saved(tmp_path / "b.npz", x=x, y=one_hot))
    assert "got label -1" in refused(saved(tmp_path / "c.npz", x=x, y=LABELS - 1))
    objects = np.array([{}] * COUNT, dtype=object)
    assert "need pickle" in refused(saved(tmp_path / "d.npz", x=objects, y=LABELS))
    flat = x.reshape(COUNT, -1)
    assert "got 12 x 256 float16 in x; need [N, C, S, S]" in refused(
        saved(tmp_path / "e.npz", x=flat, y=LABELS)
    )
    assert "need [C, S, S] or [S, S, C], square" in refused(
        saved(tmp_path / "f.npz", x=x[..., :5], y=LABELS)
    )
    assert "need uint8, float16, float32 or float64" in refused(
        saved(tmp_path / "g.npz", x=x.astype("int64"), y=LABELS)
    )
    (tmp_path / "h.npz").write_bytes(b"PK\x03\x04 cut")
    assert "cannot be read" in refused(tmp_path / "h.npz")
    np.save(tmp_path / "i.npy", x)
    assert "got an array without labels" in refused(tmp_path / "i.npy")
    assert "--labels: got" in refused("digits", labels="x.npy")
    assert "--scale: got it with images" in refused("digits", scale=[1.0])


def test_a_set_without_arrays_is_named(tmp_path):
    none = saved(tmp_path / "none.npz", x=made()[:0], y=LABELS[:0])
    words = "none.npz: got 0 x 4 x 8 x 8 float16 in x, which is empty; need at least one array"
    assert words in refused(none)
    assert words in refused(saved(tmp_path / "set.npz", x=made(), y=LABELS), none)
    halves = dict(x_train=made(), y_train=LABELS, x_val=made()[:0], y_val=LABELS[:0])
    assert "float16 in x_val, which is empty" in refused(saved(tmp_path / "both.npz", **halves))
    for name, values in (("x.npy", made()[:0]), ("y.npy", LABELS[:0])):
        np.save(tmp_path / name, values)
    assert "x.npy: got 0 x 4 x 8 x 8 float16, which" in refused(
        tmp_path / "x.npy", labels=str(tmp_path / "y.npy")
    )


def test_an_npy_of_objects_is_refused_as_an_npz_is(tmp_path):
    np.save(tmp_path / "y.npy", LABELS)
    np.save(tmp_path / "x.npy", np.array([{}] * COUNT, dtype=object), allow_pickle=True)
    for labels in ("y.npy", "x.npy"):
        assert "need pickle" in refused(tmp_path / "x.npy", labels=str(tmp_path / labels))


@pytest.mark.parametrize("train", ["float32", "uint8"])
def test_validation_arrays_of_another_shape_or_type_are_one_error(tmp_path, train):
    ours = saved(tmp_path / "train.npz", x=made(dtype=train), y=LABELS)
    others = (made(), made(3, dtype=train), made(side=4, dtype=train))
    for number, other in enumerate(others):
        message = refused(ours, saved(tmp_path / f"{number}.npz", x=other, y=LABELS))
        kind = f"{other.shape[1]} x {other.shape[2]} x {other.shape[2]} {other.dtype}"
        if str(other.dtype) == "uint8" and len(other[0]) == 3:
            kind = "pixels, stored as images"
        assert f"val with arrays of {kind}, and train with arrays of 4 x 8 x 8 {train}" in message
    last = saved(tmp_path / "val.npz", x=made(dtype=train).transpose(0, 2, 3, 1), y=LABELS)
    assert open_source(str(ours), str(last)).arrays.channels == 4
    pixels = [
        saved(tmp_path / f"{side}.npz", x=made(3, side, "uint8"), y=LABELS) for side in (8, 16)
    ]
    assert open_source(*map(str, pixels)).arrays is None  # images may have any size


def test_a_scale_that_fp32_does_not_hold_is_not_blamed_on_the_files(tmp_path):
    path = saved(tmp_path / "set.npz", x=made(), y=LABELS)
    for scale, shown in ((1e39, "1e+39"), (1e-50, "1e-50")):
        words = f"got {shown}; need numbers that are finite and not 0 in fp32"
        assert f"--scale: {words}" in refused(path, scale=[scale])
    with pytest.raises(ValueError, match=r"of which x_0 = value \* 3e\+38 is not finite in fp32"):
        convert(open_source(str(path), scale=[3e38]), tmp_path / "out")


def test_a_folder_names_the_set_in_it(tmp_path):
    np.save(tmp_path / "latents.npy", made())
    assert f"do: convert {tmp_path / 'latents.npy'} OUT" in refused(tmp_path)
    (tmp_path / "latents.npy").unlink()
    saved(tmp_path / "x.npz", x=made(), y=LABELS)
    assert f"do: convert {tmp_path / 'x.npz'} OUT" in refused(tmp_path)
    (tmp_path / "x.npz").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    assert "a pointer of Git LFS" in refused(tmp_path / "x.npz")


def test_arrays_that_differ_or_are_not_finite_stop_the_conversion(tmp_path):
    x = made()
    x[3, 0, 0, 0], x[7, 1, 2, 3] = np.nan, np.inf
    source = open_source(str(saved(tmp_path / "set.npz", x=x, y=LABELS)))
    with pytest.raises(ValueError) as error:
        convert(source, tmp_path / "out")
    message = str(error.value)
    assert "got 2 files that cannot be stored; need whole arrays of 4 x 8 x 8 float16" in message
    assert "set_000003: holds 1 number not finite" in message
    for i, array in enumerate(made()):
        path = tmp_path / "set" / NAMES[i % 3] / f"{i}.npy"
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path, array[:, :4, :4] if i == 5 else array)
    with pytest.raises(ValueError, match=r"5\.npy: holds 4 x 4 x 4 float16; need 4 x 8 x 8"):
        convert(open_source(str(tmp_path / "set")), tmp_path / "other")


def test_arrays_are_not_resized(tmp_path):
    source = open_source(str(saved(tmp_path / "set.npz", x=made(), y=LABELS)))
    with pytest.raises(ValueError, match="--image_size: got 4 for arrays"):
        convert(source, tmp_path / "out", encoding=Encoding(4))


# ---------------------------------------------------------------------------------- foreign shards


def tar(path, members):
    with tarfile.open(path, "w") as file:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
    return path


def npy(values) -> bytes:
    file = io.BytesIO()
    np.save(file, values)
    return file.getvalue()


def jpeg() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, format="JPEG")
    return file.getvalue()


@pytest.mark.parametrize("apart", [False, True])
def test_foreign_shards_of_arrays_are_indexed(tmp_path, apart):
    x = made()
    x[9, 0, 0, 0] = np.nan
    folder = tmp_path / "shards"
    folder.mkdir()
    for shard in range(2):
        members = []
        for i in range(6 * shard, 6 * shard + 6):
            members += [(f"{i:04d}.npy", npy(x[i])), (f"{i:04d}.cls", str(LABELS[i]).encode())]
        if apart:
            members.sort(key=lambda member: member[0][-3:])
        tar(folder / f"{shard:05d}.tar", members)
    found = index(str(folder), tmp_path / "out", scale=[0.5])["train"]
    assert found.bad_arrays == (1, "holds 1 number not finite")
    arrays = found.manifest.arrays
    assert (arrays.channels, arrays.size, arrays.scale) == (4, 8, [0.5] * 4)
    good = np.delete(x, 9, axis=0).astype(np.float64) * 0.5
    assert np.allclose(arrays.mean, good.mean(axis=(0, 2, 3)), atol=1e-3)
    shards = open_shards(tmp_path / "out" / "train")
    batch = ShardDataset(shards, image_size=8, channels=4)[np.arange(COUNT)]
    assert [bad.key for bad in batch.bad] == ["0009"]
    for i in range(COUNT):
        number = int(shards.key(i))
        if number != 9:
            expected = x[number].astype(np.float32) * np.float32(0.5)
            assert np.array_equal(batch.images[i].permute(2, 0, 1).numpy(), expected)
        assert int(batch.labels[i]) == LABELS[number]
    problems = verify(tmp_path / "out" / "train", check_decode=True)
    assert len(problems) == 1
    assert "0009 cannot be decoded (holds 1 number" in problems[0]


def test_arrays_beside_images_in_shards_are_no_samples(tmp_path):
    members = [("stats.npy", npy(made()[0]))]
    for i in range(4):
        members += [
            (f"{i}.npy", npy(made()[i])),
            (f"{i}.jpg", jpeg()),
            (f"{i}.cls", b"%d" % (i % 2)),
        ]
    for order in (members, members[::-1]):
        folder = tmp_path / f"shards{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        tar(folder / "00000.tar", order)
        manifest = index(str(folder), tmp_path / f"{folder.name}-out")["train"].manifest
        assert manifest.arrays is None
        assert manifest.samples == 4
    tar(folder / "00001.tar", [("9.npy", npy(made()[0])), ("9.cls", b"0")])
    with pytest.raises(ValueError, match=r"images in 00000.tar and arrays in 00001.tar"):
        index(str(folder), tmp_path / "mixed")


def shards_of(folder, *shards) -> str:
    """Write tars of arrays, a list for each; return the folder."""
    folder.mkdir()
    for number, arrays in enumerate(shards):
        members = []
        for i, values in enumerate(arrays):
            key = f"{number}_{i:04d}"
            members += [(f"{key}.npy", npy(values)), (f"{key}.cls", b"%d" % (i % 2))]
        tar(folder / f"{number:05d}.tar", members)
    return str(folder)


def test_the_commonest_arrays_in_shards_are_the_standard(tmp_path):
    x = made()
    odd = [x[0, :3], x[1].astype(np.float32), *x[2:]]
    for scale in (None, [0.5, 1.0, 2.0, 1.0]):  # four numbers do not fit three channels
        found = index(
            shards_of(tmp_path / f"a{scale}", odd, x), tmp_path / f"o{scale}", scale=scale
        )
        arrays = found["train"].manifest.arrays
        assert str(arrays) == "4 x 8 x 8 float16"
        assert found["train"].bad_arrays[0] == 2
        good = np.concatenate([x[2:], x]) * np.array(scale or 1.0).reshape(-1, 1, 1)
        assert np.allclose(arrays.mean, good.mean(axis=(0, 2, 3)), atol=1e-3)
    assert index(shards_of(tmp_path / "b", odd), tmp_path / "b2")["train"].bad_arrays == (
        2,
        "holds 3 x 8 x 8 float16; need 4 x 8 x 8 float16",
    )


def test_shards_without_one_standard_are_refused(tmp_path):
    x = made()
    mixed = [*x[:4, :3], *x[4:9], *x[9:].astype(np.float32)]
    cases = [
        ([mixed], None, "12 arrays, of which no more than 5 can be read alike (another holds 3 x"),
        ([x, x[:, :3]], None, "float16 in train's 00000.tar and arrays of 3 x 8 x 8 float16 in tr"),
        ([x * np.float16(np.nan)], None, "train: holds 256 numbers not finite"),
        ([x], [1.0, 2.0], "train: --scale: got 2 numbers for arrays of 4 x 8 x 8 float16; need 1"),
    ]
    for number, (shards, scale, words) in enumerate(cases):
        place = shards_of(tmp_path / str(number), *shards)
        with pytest.raises(ValueError) as error:
            index(place, tmp_path / "out", scale=scale)
        assert words in str(error.value)
    assert not (tmp_path / "out").exists()
