"""Test DDPM and DDIM steps and guided loops against guided-diffusion's, and launch/sample.py."""

import dataclasses
import json
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
import torch
from made import write_run
from PIL import Image
from running import GOLDEN, ROOT, launch, run_python
from small_models import (
    DEFAULT,
    GOLDEN_UNETS,
    SMALL_UNET,
    filled,
    relative_error,
    small_unet,
)

from ds_classifier import distributed
from ds_classifier.diffusion import create_gaussian_diffusion
from ds_classifier.guidance import fidelity, sample_files
from ds_classifier.guidance.gradient import classifier_gradient
from ds_classifier.guidance.guided_sampling import load_guide, load_guided_sampling
from ds_classifier.guidance.sampling import (
    Prediction,
    ReverseProcess,
    prediction_of_output,
    sample,
    to_pixels,
    unet_denoiser,
)
from ds_classifier.guidance.unet import create_unet, load_unet
from ds_classifier.model import create_classifier

BAYES = ["--classifier_path", "bayes", "--data_dir", "x"]
STEP = 1e-6  # error of a single step, relative to its largest number


def test_single_steps_equal_the_reference(reference):
    cases = json.loads((reference / "sampling_cases.json").read_text())["sampling"]
    recorded = np.load(reference / "sampling.npz")
    x = torch.from_numpy(np.random.RandomState(13).standard_normal((3, 3, 8, 8)).astype(np.float32))
    for number, case in enumerate(cases):
        key = f"p{number}_"
        diffusion = create_gaussian_diffusion(
            noise_schedule=case["noise_schedule"], timestep_respacing=case["timestep_respacing"]
        )
        process = ReverseProcess(diffusion)
        t = torch.from_numpy(recorded[key + "t"])
        shown = []

        def cond_fn(x, t, y=None, shown=shown):
            shown.append(t)
            return 0.2 * torch.sin(x)

        output = 0.3 * x
        if case["learn_sigma"]:
            output = torch.cat([output, 0.5 * torch.tanh(x)], dim=1)
        prediction = prediction_of_output(process, x, t, output)
        prediction = Prediction(prediction.x_start.clamp(-1, 1), prediction.variance_share)
        mean, log_variance = process.mean_log_variance(x, t, prediction)
        guided = process.guided_mean(mean, log_variance.exp(), x, t, cond_fn, None)
        ddim, x_start = process.ddim_step(x, t, prediction, cond_fn=cond_fn)
        found = {
            "mean": mean,
            "variance": log_variance.exp(),
            "pred_xstart": prediction.x_start,
            "guided_mean": guided,
            "ddim_sample": ddim,
            "ddim_pred_xstart": x_start,
        }
        for name, value in found.items():
            error = [
                relative_error(v.numpy(), r)
                for v, r in zip(value, recorded[key + name], strict=True)
            ]
            assert max(error) < STEP, (number, name, error)
        assert all(np.array_equal(s.numpy(), recorded[key + "t_model"]) for s in shown)


@pytest.mark.parametrize("name", ["cond", "uncond"])
@pytest.mark.parametrize("ddim", [False, True])
def test_guided_loops_end_where_the_reference_does(name, ddim):
    recorded = np.load(GOLDEN / "sampling.npz")
    classifier = create_classifier(**DEFAULT)
    classifier.load_state_dict(filled(classifier.state_dict()))
    process = ReverseProcess(
        create_gaussian_diffusion(timestep_respacing="ddim5" if ddim else "10")
    )
    draws = np.random.RandomState(19)
    pixels, broke = sample(
        process,
        unet_denoiser(small_unet(name), process),
        lambda i: torch.from_numpy(draws.standard_normal((2, 3, 16, 16)).astype(np.float32)),
        torch.from_numpy(recorded["y"]),
        cond_fn=classifier_gradient(classifier, scale=3.0),
        ddim=ddim,
    )
    loop = "ddim_sample_loop" if ddim else "p_sample_loop"
    assert relative_error(pixels.numpy(), recorded[f"{loop}_{name}"]) < 1e-4
    assert broke.tolist() == [-1, -1]


def test_pixels_are_truncated_not_rounded():
    x = torch.tensor([-1.2, -1.0, 0.0, 0.999, 1.0, 3.0]).view(1, 1, 2, 3)
    assert to_pixels(x).flatten().tolist() == [0, 0, 127, 254, 255, 255]


@pytest.fixture(scope="module")
def classifier_file(tmp_path_factory):
    """Write a small, untrained classifier of digits as a .pt; return the command's flags for it."""
    settings = DEFAULT | dict(num_classes=10)
    classifier = create_classifier(**settings)
    path = tmp_path_factory.mktemp("classifier") / "model.pt"
    torch.save(filled(classifier.state_dict()), path)
    return ["--classifier_path", path, "--noise_schedule", "cosine"]


def test_two_ranks_draw_the_images_of_one(digits, classifier_file, tmp_path):
    """Draw seven samples in batches of two: the second rank has fewer than the first."""
    arguments = [*classifier_file, "--data_dir", digits / "val", "--num_samples", "7"]
    arguments += ["--batch_size", "2", "--timestep_respacing", "4", "--classes", "3,8"]
    arguments += ["--classifier_scale", "0", "2"]
    for ranks in (1, 2):
        out = tmp_path / str(ranks)
        out.mkdir()
        (out / "fidelity.json").write_text("of other samples")
        arguments += ["--out_dir", out]
        done = launch(ranks, *arguments, cwd=tmp_path, script=ROOT / "launch/sample.py")
        assert done.code == 0, done.output
    for scale in ("scale_0", "scale_2"):
        one, two = (np.load(tmp_path / n / scale / "samples_7x16x16x3.npz") for n in "12")
        assert one["arr_0"].shape == (7, 16, 16, 3)
        assert one["arr_0"].dtype == np.uint8
        assert np.array_equal(one["arr_0"], two["arr_0"])
        assert one["arr_1"].tolist() == two["arr_1"].tolist() == [3, 8, 3, 8, 3, 8, 3]
        assert one["arr_1"].dtype == np.int64
        # Each sample has its own noise, in any batch.
        assert len(np.unique(one["arr_0"].reshape(7, -1), axis=0)) == 7
        first = one["arr_0"][1].repeat(4, 0).repeat(4, 1)  # of class 8; sheets enlarge to 64 px
        assert np.array_equal(
            np.asarray(Image.open(tmp_path / f"1/{scale}/class_0008.png"))[:64, :64], first
        )
    assert (tmp_path / "1/overview.png").is_file()
    assert not (tmp_path / "1/fidelity.json").exists()
    facts = json.loads((tmp_path / "1/samples.json").read_text())
    assert facts["classifier"]["path"] == str(classifier_file[1])
    assert facts["classifier"]["sha256"] == sha256(classifier_file[1].read_bytes()).hexdigest()
    assert facts["denoiser"] == {"data_dir": str(digits / "val")}
    assert facts["diffusion"]["noise_schedule"] == "cosine"
    assert facts["diffusion"]["timestep_respacing"] == "4"
    recorded = [
        facts[k] for k in ("classes", "classifier_scale", "num_samples", "seed", "use_ddim")
    ]
    assert recorded == [[3, 8], [0.0, 2.0], 7, 0, False]


@pytest.mark.parametrize("ddim", [False, True])
@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_the_first_level_without_finite_numbers_is_found(ddim, number):
    """Check a gradient that breaks sample 0 at t = 2 and sample 2 at t = 0, in one pixel."""
    process = ReverseProcess(create_gaussian_diffusion(timestep_respacing="4"))
    breaks_at = {0: process.diffusion.timestep_map[2], 2: process.diffusion.timestep_map[0]}

    def cond_fn(x, t, y):
        gradient = torch.zeros_like(x)
        for i, level in breaks_at.items():
            gradient[i, 1, 3, 2] = number if t[i] == level else 0.0
        return gradient

    x, broke = sample(
        process,
        lambda x, t, y: Prediction(torch.zeros_like(x), None),
        lambda i: torch.ones(3, 3, 8, 8),
        torch.zeros(3, dtype=torch.int64),
        cond_fn=cond_fn,
        ddim=ddim,
    )
    assert broke.tolist() == [2, -1, 0]
    assert x.isfinite().flatten(1).all(dim=1).tolist() == [False, True, False]


def test_a_scale_with_samples_that_are_not_finite_is_not_written(digits, classifier_file, tmp_path):
    """Check scale 1e30 between two others, on two ranks, after an earlier run."""
    folder = sample_files.scale_folder(tmp_path, 1e30)
    black = np.zeros((1, 8, 8, 3), np.uint8)
    earlier = sample_files.write_samples(folder, black + 9, np.zeros(1, np.int64))
    arguments = [*classifier_file, "--data_dir", digits / "val", "--num_samples", "5"]
    arguments += ["--batch_size", "2", "--timestep_respacing", "4", "--out_dir", tmp_path]
    arguments += ["--classifier_scale", "0", "1e30", "2"]
    done = launch(2, *arguments, cwd=tmp_path, script=ROOT / "launch/sample.py")
    assert done.code == 1
    assert "Traceback" not in done.output
    (line,) = [line for line in done.output.splitlines() if "error" in line]
    assert line.startswith(
        "error: scale 1e+30: 4 of the samples 0 to 3 are not finite (sample 0 from"
    )
    assert line.endswith("none of this scale is written; do: choose a scale nearer to 0")
    assert [path.name for path in folder.glob("*.npz")] == [earlier.name]
    assert np.load(earlier)["arr_0"].max() == 9
    for scale in ("scale_0", "scale_2"):
        assert len(np.load(tmp_path / scale / "samples_5x16x16x3.npz")["arr_0"]) == 5
    assert json.loads((tmp_path / "samples.json").read_text())["classifier_scale"] == [0, 2]
    # The overview has the rows' names, a block of 64 px for each of two scales, 8 between them; a
    # third scale would add another 72.
    assert 2 * 64 + 8 < Image.open(tmp_path / "overview.png").size[0] < 3 * 64 + 2 * 8


def test_what_to_do_about_samples_that_are_not_finite():
    from launch import sample as command

    unet = ["--classifier_path", "c", "--model_path", "m", "--use_fp16", "--classifier_use_fp16"]
    unet.insert(5, "True")
    unet.append("True")
    for flags, scale, words in (
        (unet, 1, "drop --use_fp16 and --classifier_use_fp16"),
        (unet, 0, "drop --use_fp16, whose"),
        ([*BAYES, "--use_fp16", "True", "--classifier_use_fp16", "True"], 1, "choose a scale near"),
        (unet[:4], 0, "choose another UNet"),
    ):
        assert command._remedy(command.parse(flags)[0], scale).startswith(words)


def test_networks_that_are_not_finite_are_refused(tmp_path):
    weights = small_unet("cond").state_dict()
    weights["out.2.bias"][0] = torch.nan
    torch.save(weights, tmp_path / "unet.pt")
    with pytest.raises(ValueError, match=r"unet\.pt, whose weights are not all finite"):
        load_unet(tmp_path / "unet.pt", **SMALL_UNET | GOLDEN_UNETS["cond"])
    classifier = create_classifier(**DEFAULT).state_dict()
    classifier["out.0.bias"][0] = torch.nan
    torch.save(classifier, tmp_path / "model.pt")
    with pytest.raises(ValueError, match=r"model\.pt, whose weights are not all finite"):
        load_guide(tmp_path / "model.pt", {})


def test_samples_of_an_earlier_run_are_deleted(tmp_path):
    """Write fewer images of other classes, after a killed run; other files must stay."""
    folder = sample_files.scale_folder(tmp_path, 3.0)
    black = np.zeros((6, 8, 8, 3), np.uint8)
    sample_files.write_samples(folder, black, np.arange(6))
    for name in ("samples_9x8x8x3.staging.npz", "notes.txt"):
        (folder / name).write_text("")
    sample_files.write_samples(folder, black[:4] + 9, np.array([1, 7, 1, 7]))
    assert sorted(path.name for path in folder.iterdir()) == [
        *("class_0001.png", "class_0007.png", "notes.txt", "samples_4x8x8x3.npz")
    ]
    assert np.load(folder / "samples_4x8x8x3.npz")["arr_0"].max() == 9


def test_the_overview_names_its_rows(tmp_path):
    """Every row has its name's ink beside it, however long; no name covers an image."""
    names = ["cat", "W" * 400, "a b " * 90, "", "dog", *map(str, range(5, 40))]
    pixels = np.random.RandomState(0).randint(0, 255, (80, 40, 40, 3)).astype(np.uint8)
    labels = np.arange(80) % 40
    path = tmp_path / "overview.png"
    assert sample_files.write_overview(path, [0, 3], [pixels, pixels], labels, names) == 10
    shown = np.asarray(Image.open(path))[sample_files.HEADER :]
    block = sample_files.sheet([pixels[labels == k] for k in range(10)])
    assert np.array_equal(shown[:, -block.shape[1] :], block)
    left = shown[:, : shown.shape[1] - 2 * block.shape[1] - 4 * sample_files.GAP] < 128
    ink = [left[42 * row : 42 * row + 40].any(axis=(1, 2)) for row in range(10)]
    assert [rows.any() for rows in ink] == [name != "" for name in names[:10]]
    assert not any(rows[edge] for rows in ink for edge in (0, -1))  # names do not meet
    named = np.asarray(Image.open(path))
    sample_files.write_overview(path, [0, 3], [pixels, pixels], labels, ["cow", *names[1:]])
    other = np.asarray(Image.open(path))
    assert np.argwhere((named != other).any(axis=2))[:, 0].max() < sample_files.HEADER + 40


def guided_digits(digits, classifier_file, device="cpu"):
    """Return guided sampling of the digits' exact denoiser by the small classifier."""
    from launch import sample as command

    words = [*classifier_file, "--data_dir", digits / "val"]
    arguments, given = command.parse(list(map(str, words)))
    return load_guided_sampling(
        Path(arguments.classifier_path),
        given,
        data_dir=arguments.data_dir,
        model_path="",
        unet={},
        classifier_fp16=False,
        unet_fp16=False,
        device=torch.device(device),
    )


def test_measures_of_samples_with_known_classes(digits, classifier_file, monkeypatch):
    """Check samples that are images of the asked class at one scale, of the next at another."""
    pytest.importorskip("sklearn")
    monkeypatch.setattr(fidelity, "LEVELS", 2)
    monkeypatch.setattr(fidelity, "LEVEL_IMAGES", 6)
    guided = guided_digits(digits, classifier_file)
    pixels = guided.images[:40].permute(0, 2, 3, 1).numpy()
    samples = [pixels, pixels[(np.arange(40) + 1) % 40]]
    calls = []
    measures = fidelity.measure(
        guided,
        [0.0, 2.0],
        samples,
        guided.labels[:40].numpy(),
        seed=0,
        progress=lambda *call: calls.append(call),
    )
    assert measures.shares["0"] > 0.95
    assert measures.shares["2"] < 0.5
    assert [level["t"] for level in measures.as_json()["levels"]] == [0, 500, 999]
    assert calls == [(1, 3), (2, 3), (3, 3)]
    assert [line.split()[0] for line in measures.lines()[2:4]] == ["0", "2"]
    assert [line.split()[0] for line in measures.lines()[-3:]] == ["0", "500", "999"]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--num_samples", "5"], "one of --model_path and --data_dir"),
        (["--data_dir", "x", "--model_path", "y"], "one of --model_path and --data_dir"),
        (["--model_path", "y", "--measure"], "--measure: need --data_dir"),
        (["--model_path", "y", "--predict_xstart", "True"], "predicts the noise"),
        (["--model_path", "y", "--classifier_scale", "1", "nan"], "got 'nan'; need a finite"),
        (["--model_path", "y", "--classifier_scale", "inf"], "got 'inf'; need a finite"),
        (["--model_path", "y", "--joint_temperature", "inf"], "got 'inf'; need a finite"),
        (["--model_path", "y", "--classifier_scale", "3", "1", "3.0"], "got 3 twice"),
        (["--model_path", "y", "--classifier_scale", "1", "1.0000001"], "got 1 twice"),
        (["--model_path", "y", "--seed", "-1"], "got '-1'; need a whole number from 0 to 2^64"),
        (["--model_path", "y", "--seed", str(2**64)], "need a whole number from 0 to 2^64 - 1"),
        ([*BAYES, "--joint_temperature", "2"], "--joint_temperature: got 2; need 1"),
        ([*BAYES, "--marginal_temperature", "0.5"], "--marginal_temperature: got 0.5; need 1"),
    ],
)
def test_wrong_flags_are_refused(flags, words, capsys):
    from launch import sample as command

    with pytest.raises(SystemExit):
        command.parse(["--classifier_path", "c", *flags])
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], "got no --classifier_path; need one to guide by"),
        (["--classifier_scale", "0", "1"], "--classifier_scale 0 alone to sample unguided"),
        (["--classifier_scale", "0", "--measure"], "--measure: got no --classifier_path"),
    ],
)
def test_only_unguided_samples_need_no_classifier(flags, words, capsys):
    from launch import sample as command

    with pytest.raises(SystemExit):
        command.parse(["--data_dir", "x", *flags])
    assert words in capsys.readouterr().err
    assert command.parse(["--data_dir", "x", "--classifier_scale", "0"])


def test_unguided_samples_are_those_at_scale_0(digits, classifier_file, tmp_path):
    """No classifier, and a classifier at scale 0, give the same samples; the record says which."""
    process = ["--noise_schedule", "cosine"]
    common = ["--data_dir", digits / "val", "--classifier_scale", "0", "--num_samples", "3"]
    pixels = []
    for name, own in (("with", classifier_file), ("without", ["--image_size", "16", *process])):
        out = tmp_path / name
        words = [*own, *common, "--timestep_respacing", "3", "--classes", "3,7", "--out_dir", out]
        done = run_python(ROOT / "launch/sample.py", *words, cwd=tmp_path)
        assert done.code == 0, done.output
        (path,) = out.glob("scale_0/*.npz")
        pixels.append(np.load(path))
        origin = json.loads((out / "samples.json").read_text())["classifier"]
        assert (origin is None) == (name == "without")
    assert (pixels[0]["arr_0"] == pixels[1]["arr_0"]).all()
    assert pixels[1]["arr_1"].tolist() == [3, 7, 3]


@pytest.mark.parametrize("class_cond", [False, True])
def test_a_unet_is_sampled_without_a_classifier(class_cond, tmp_path, monkeypatch):
    monkeypatch.setattr(distributed, "all_gather", lambda tensor: tensor[None])
    flags = {**SMALL_UNET, "class_cond": class_cond}
    size, channels = flags.pop("image_size"), flags.pop("in_channels", 3)
    flags["num_classes"] = 1000
    unet = create_unet(**flags, image_size=size, in_channels=channels)
    torch.save(unet.state_dict(), tmp_path / "unet.pt")
    del flags["num_classes"]
    guided = load_guided_sampling(
        None,
        dict(image_size=size, in_channels=channels, timestep_respacing="2"),
        unguided=True,
        data_dir="",
        model_path=str(tmp_path / "unet.pt"),
        unet=flags,
        classifier_fp16=False,
        unet_fp16=False,
        device=torch.device("cpu"),
    )
    assert len(guided.asked("", None)) == (1000 if class_cond else 1)
    drawing = dict(joint_temperature=1, marginal_temperature=1, batch_size=2, seed=0)
    drawn = guided.draw(
        guided.asked("", None)[:1].repeat(2),
        0.0,
        **drawing,
        use_ddim=False,
        clip_denoised=True,
        progress=lambda done, total: None,
    )
    assert drawn.shape == (2, size, size, channels)


def test_the_largest_seed_is_accepted():
    from launch import sample as command

    arguments, _ = command.parse([*BAYES, "--seed", str(2**64 - 1)])
    assert arguments.seed == 2**64 - 1


@pytest.mark.parametrize("text", ["10", "-1", "\u00b2", "\u0663", "1,,2", "1.0", "9" * 5000])
def test_classes_are_numbers_of_classes(digits, classifier_file, text):
    guided = guided_digits(digits, classifier_file)
    assert guided.asked("3, 7", None).tolist() == [3, 7]
    named = dataclasses.replace(guided, names=[*"abcdefgh", "cat", "9"])
    assert named.asked("cat,1,9", None).tolist() == [8, 1, 9]
    assert guided.asked("", None).tolist() == list(range(10))
    with pytest.raises(ValueError, match=r"--classes: got .*; need numbers from 0 to 9"):
        guided.asked(text, None)


def test_the_process_of_a_run_cannot_be_contradicted(tmp_path):
    """Check that flags may respace the process of the run and change nothing else."""
    from launch import sample as command

    run = write_run(tmp_path / "run")
    flags = ["--classifier_path", str(run), "--data_dir", "x"]

    def given(*more):
        return command.parse([*flags, *more])[1]

    for wrong in (["--noise_schedule", "linear"], ["--diffusion_steps", "500"]):
        with pytest.raises(ValueError, match=f"got {wrong[0]}; need none for .*, in which it is"):
            load_guide(run, given(*wrong))
    agreed = ["--noise_schedule", "cosine", "--timestep_respacing", "20"]
    settings, _, _ = load_guide(run, given(*agreed))
    assert (settings.noise_schedule, settings.timestep_respacing) == ("cosine", "20")
    settings, _, _ = load_guide(run, given())
    assert settings.timestep_respacing == "250"
    recipe = given("--recipe", "digits32")
    assert recipe["noise_schedule"] == "cosine"
    assert "log_interval" not in recipe


def test_a_unet_file_is_read_with_its_flags(tmp_path):
    from launch import sample as command

    path = tmp_path / "diffusion.pt"
    torch.save(small_unet("cond").state_dict(), path)
    flags = ["--classifier_path", "c", "--model_path", path, "--image_size", "16"]
    flags += ["--num_channels", "32", "--num_res_blocks", "1", "--channel_mult", "1,2"]
    flags += ["--attention_resolutions", "8", "--class_cond", "True", "--learn_sigma", "True"]
    flags += ["--num_head_channels", "32", "--use_new_attention_order", "True", "--dropout", "0.1"]
    for extra in (["--resblock_updown", "True"], []):
        arguments, _ = command.parse(list(map(str, flags + extra)))
        architecture = {name: getattr(arguments, name) for name in command.UNET}
        architecture |= dict(image_size=16, num_classes=7)
        if extra:
            unet = load_unet(path, **architecture)
            x, t, y = torch.randn(2, 3, 16, 16), torch.tensor([3, 750]), torch.tensor([1, 5])
            assert torch.equal(unet(x, t, y), small_unet("cond")(x, t, y))
        else:
            with pytest.raises(ValueError, match="other flags"):
                load_unet(path, **architecture)
