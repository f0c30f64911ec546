"""Whole runs through the deepspeed launcher, compared with each other and the uninterrupted run."""

import json
import math
import re
import tarfile
from pathlib import Path

import pytest
import torch
from running import ROOT, read_log, run_python
from safetensors.torch import load_file
from tiny_run import (
    CONFIGS,
    TINY,
    TRAIN,
    assert_same_run,
    assert_same_state,
    losses,
    traced,
    train,
    without_clocks,
)

from ds_classifier.distributed.engine.deepspeed_versions import quiet_flag

# ------------------------------------------------------------------------- same run, other ranks


def test_ranks_and_accumulation_do_not_change_the_run(digits, tmp_path):
    """30 steps: 1 rank, 2 ranks, 2 ranks with accumulation 2; fp32, one global batch."""
    cuts = {"one": (1, "24"), "two": (2, "12"), "accumulated": (2, "6")}
    for name, (ranks, micro) in cuts.items():
        done = train(
            ranks,
            "zero1_fp32",
            digits,
            tmp_path / name,
            *["--global_batch", "24", "--microbatch", micro, "--iterations", "30"],
            environment={"TRACE": str(tmp_path / f"trace_{name}")}.items(),
        )
        accumulation = 24 // (ranks * int(micro))
        derivation = (
            f"global batch 24 = {micro} micro-batch x {accumulation} accumulation x {ranks}"
        )
        assert derivation in done.output
    expected, expected_trace = losses(tmp_path / "one"), traced(tmp_path / "trace_one")
    assert len(expected) == 30
    assert [row[1] for row in expected_trace] == list(range(30 * 24))
    for name in ("two", "accumulated"):
        assert losses(tmp_path / name) == pytest.approx(expected, rel=1e-5)
        assert traced(tmp_path / f"trace_{name}") == expected_trace
    assert expected[-1] < expected[0]


# ------------------------------------------------------------------------- resume


@pytest.mark.slow
@pytest.mark.parametrize(
    "config",
    [
        "zero1_bf16",
        pytest.param(
            "zero2_fp16",
            # Emulated, its starts take minutes; test_deepspeed_state resumes fp16 everywhere.
            marks=pytest.mark.skipif(
                not torch.ops.mkldnn._is_mkldnn_fp16_supported(), reason="this CPU has no fp16"
            ),
        ),
    ],
)
def test_a_killed_run_continues_bit_equal(digits, tmp_path, config):
    flags = ["--global_batch", "16", "--iterations", "30", "--save_interval", "15"]
    flags += ["--val_data_dir", digits / "val", "--schedule_sampler", "loss-second-moment"]
    flags += ["--diffusion_steps", "20"]  # few levels: the sampler is warm at step 15
    if config == "zero1_bf16":  # with accumulation DeepSpeed takes an optimizer of its own for it
        flags += ["--microbatch", "4"]
    golden, killed = tmp_path / "golden", tmp_path / "killed"
    train(2, config, digits, golden, *flags)
    done = train(
        2,
        config,
        digits,
        killed,
        *flags,
        environment={"KILL_AT": "18:0"}.items(),
        expect=247,
        launcher=True,
    )
    assert (killed / "checkpoints" / "latest").read_text() == "step-00000015\n"
    assert not (killed / "DONE").exists()
    done = train(2, config, digits, killed, *flags, launcher=True)
    assert "checkpoints/step-00000015, step 15" in done.output
    assert "Virtual Memory" not in done.output  # which DeepSpeed prints
    assert_same_run(golden, killed, 30)
    steps = [row["step"] for row in read_log(killed) if "train_loss" in row]
    assert steps == list(range(1, 31))
    assert len((killed / "progress.csv").read_text().splitlines()) == 1 + 30 + 2
    if config == "zero2_fp16":
        state = json.loads((golden / "checkpoints/step-00000030/state.json").read_text())
        assert state["loss_scaler"]["cur_scale"] <= 2**16


@pytest.mark.slow
def test_one_signalled_rank_stops_all_and_the_run_goes_on(digits, tmp_path):
    flags = ["--global_batch", "16", "--iterations", "20", "--schedule_sampler", "uniform"]
    flags += ["--muon_lr_scale", "10"]
    golden, stopped = tmp_path / "golden", tmp_path / "stopped"
    train(2, "zero1_fp32", digits, golden, *flags)
    done = train(
        2,
        "zero1_fp32",
        digits,
        stopped,
        *flags,
        environment={"TERM_AT": "7:1"}.items(),
        expect=75,
        launcher=True,
    )
    assert "stopped by SIGTERM after step 8" in done.output
    train(2, "zero1_fp32", digits, stopped, *flags, launcher=True)
    assert_same_state(
        golden / "checkpoints" / "step-00000020", stopped / "checkpoints" / "step-00000020"
    )
    assert (stopped / "DONE").read_text() == "step 20\n"
    again = train(2, "zero1_fp32", digits, stopped, *flags, launcher=True)
    assert "is finished (step 20)" in again.output
    changed = train(1, "zero1_fp32", digits, stopped, *flags, "--lr", "2e-3", expect=2)
    assert "lr: 0.001 in the checkpoint, 0.002 now" in changed.output


@pytest.mark.slow
def test_world_size_precision_and_stage_may_change(digits, tmp_path):
    """The same samples and noise; losses near those of the uninterrupted run."""
    flags = ["--global_batch", "16", "--iterations", "16", "--save_interval", "8"]
    golden, moved = tmp_path / "golden", tmp_path / "moved"
    trace = {"TRACE": str(tmp_path / "trace")}
    train(1, "zero1_fp32", digits, golden, *flags)
    train(
        2,
        "zero1_fp32",
        digits,
        moved,
        *flags,
        environment={"KILL_AT": "10:1"}.items(),
        expect=247,
        launcher=True,
    )
    done = train(1, "zero2_bf16", digits, moved, *flags, environment=trace.items())
    assert "step-00000008, step 8" in done.output
    assert [row[1] for row in traced(tmp_path / "trace")] == list(range(8 * 16, 16 * 16))
    assert losses(moved)[:8] == pytest.approx(losses(golden)[:8], rel=1e-5)
    assert losses(moved)[8:] == pytest.approx(losses(golden)[8:], rel=0.02)


def test_changed_settings_are_refused_with_a_diff(digits, tmp_path):
    flags = ["--global_batch", "4", "--iterations", "4", "--save_interval", "2"]
    run = tmp_path / "run"
    train(1, "zero1_fp32", digits, run, *flags, environment={"KILL_AT": "4:0"}.items(), expect=247)
    done = train(1, "zero1_fp32", digits, run, *flags, "--lr", "2e-3", "--seed", "1", expect=2)
    for line in ("lr: 0.001 in the checkpoint, 0.002 now", "seed: 0 in the checkpoint, 1 now"):
        assert line in done.output
    clipped = json.loads((CONFIGS / "zero1_fp32.json").read_text()) | {"gradient_clipping": 0.5}
    (tmp_path / "clipped.json").write_text(json.dumps(clipped))
    done = train(1, tmp_path / "clipped", digits, run, *flags, expect=2)
    assert "gradient_clipping of the JSON: 0 in the checkpoint, 0.5 now" in done.output
    done = train(1, "zero1_fp32", digits, run, *flags, "--global_batch", "8", expect=2)
    assert "global_batch: 4 in the checkpoint, 8 now" in done.output
    for file in (run / "checkpoints").glob("step-*/model.safetensors"):
        file.write_bytes(file.read_bytes()[:-1])
    done = train(1, "zero1_fp32", digits, run, *flags, expect=2)
    assert "no checkpoint is whole" in done.output


# ------------------------------------------------------------------------- numbers


def label_in_shards(split: Path, key: str) -> int:
    """A sample's class, as a stock tar reader finds it."""
    for shard in split.glob("*.tar"):
        with tarfile.open(shard) as tar:
            if f"{key}.cls" in tar.getnames():
                return int(tar.extractfile(f"{key}.cls").read())
    raise AssertionError(f"no {key}")


@pytest.mark.slow
def test_a_step_without_a_finite_gradient_is_skipped_on_all_ranks(digits, tmp_path):
    for config, fault in (("zero1_fp32", "NAN_AT"), ("zero2_bf16", "INF_AT")):
        run, trace = tmp_path / config, tmp_path / f"trace_{config}"
        flags = ["--global_batch", "8", "--iterations", "5"]
        environment = {fault: "3:1", "TRACE": str(trace)}
        done = train(2, config, digits, run, *flags, environment=environment.items())
        rows = [row for row in read_log(run) if "train_loss" in row]
        assert [row["skipped_steps"] for row in rows] == [0, 0, 1, 1, 1]
        assert rows[2]["train_loss"] is None  # not hidden: null stands for not-a-number
        assert "1 step skipped" in done.output
        assert "loss not finite at 17, 19, 21, 23, see" in done.output
        (listed,) = map(json.loads, (run / "skipped_steps.jsonl").read_text().splitlines())
        assert (listed["step"], listed["positions"]) == (3, [16, 24])
        labels = {row[1]: row[2] for row in traced(trace)}
        for sample, position in zip(listed["not_finite"], (17, 19, 21, 23), strict=True):
            assert sample["position"] == position
            assert label_in_shards(digits / "train", sample["key"]) == labels[position]
        state = json.loads((run / "checkpoints/step-00000005/state.json").read_text())
        assert (state["step"], state["optimizer"]["scalars"]["step"]) == (5, 4)


def test_a_run_that_only_skips_gives_up(digits, tmp_path):
    flags = ["--global_batch", "8", "--iterations", "9", "--max_skipped_steps", "1"]
    done = train(
        1,
        "zero1_fp32",
        digits,
        tmp_path / "run",
        *flags,
        environment={"NAN_AT": "3:0"}.items(),
        expect=1,
    )
    assert "are not finite" in done.output
    assert "Traceback" not in done.output


@pytest.mark.slow
def test_clean_images_with_the_references_anneal(digits, tmp_path):
    """--noised False trains at t = 0 alone; --anneal_lr True runs step k at lr * (1 - k / n)."""
    flags = ["--global_batch", "8", "--iterations", "8", "--noised", "False", "--anneal_lr", "True"]
    train(
        1,
        "zero1_fp32",
        digits,
        tmp_path / "run",
        *flags,
        environment={"TRACE": str(tmp_path / "trace")}.items(),
    )
    rows = read_log(tmp_path / "run")
    assert [row["lr"] for row in rows] == pytest.approx([1e-3 * (1 - k / 8) for k in range(8)])
    assert all("train_loss_q0" in row and "train_loss_q1" not in row for row in rows)
    assert all(t == 0 and noise is None for _, _, _, t, _, noise in traced(tmp_path / "trace"))


# ------------------------------------------------------------------------- what a user meets


def test_the_screen_of_a_run(digits, tmp_path):
    """Nothing is printed that a user cannot act on, and every row fits 100 columns."""
    flags = ["--global_batch", "16", "--iterations", "4", "--val_data_dir", digits / "val"]
    done = train(2, "zero2_bf16", digits, tmp_path / "run", *flags, script=TRAIN, launcher=True)
    kinds = ["classifier", "noise", "data", "validation", "batch", "engine", "lr", "start"]
    kinds += ["run", "step", "q0..q3:"]
    lines = done.lines
    if not quiet_flag():  # an older launcher, whose own log comes in between
        lines = [
            line for line in lines if not re.match(r"\[\d{4}-.*\[(launch|runner|real_acc)", line)
        ]
    for line, kind in zip(lines, kinds, strict=False):
        assert line.split()[0] == kind
    rows = lines[len(kinds) :]
    assert [line.split()[0] for line in rows] == ["1", "2", "3", "4", "4", "4", "finished:"]
    assert ", near ln 10: nothing learnt yet" in rows[4]
    assert max(map(len, [*lines[len(kinds) - 2 : len(kinds)], *rows[:-1]])) <= 100, done.output
    assert "\x1b" not in done.output  # no live line outside a terminal
    run = tmp_path / "run"
    assert {p.name for p in run.iterdir()} == {
        *("checkpoints", "command.sh", "config.json", "deepspeed.json", "env.json", "DONE"),
        *("log.jsonl", "progress.csv", "tb", "events.jsonl", "eval", "report.html"),
    }
    assert json.loads((run / "config.json").read_text())["num_classes"] == 10
    validation = read_log(run)[-1]
    assert {"val_loss", "val_acc@1", "val_acc@5", "val_acc@1_q0", "val_loss_q3"} <= set(validation)
    *_, last = (row for row in read_log(run) if "param_norm" in row)
    weights = load_file(run / "checkpoints" / "step-00000004" / "model.safetensors").values()
    norm = math.sqrt(sum(float(w.double().square().sum()) for w in weights))
    assert last["param_norm"] == pytest.approx(norm, rel=1e-5)
    assert sum(last[f"window_samples_q{q}"] for q in range(4)) == last["window_samples"]


@pytest.mark.slow
def test_validation_does_not_depend_on_ranks(digits, tmp_path):
    """One checkpoint's numbers on 1 and 3 ranks, 360 samples: the counts are equal."""
    rows = []
    for ranks in (1, 3):
        run = tmp_path / f"on_{ranks}"
        flags = ["--global_batch", "21", "--iterations", "1", "--lr", "1e-9"]
        train(ranks, "zero1_fp32", digits, run, *flags, "--val_data_dir", digits / "val")
        rows.append(read_log(run)[-1])
    assert rows[0].keys() == rows[1].keys()
    for key in rows[0]:
        if "acc" in key:
            assert rows[0][key] == rows[1][key]
        elif "loss" in key:
            assert rows[0][key] == pytest.approx(rows[1][key], rel=1e-6)


@pytest.mark.slow
def test_weights_of_another_run_or_a_reference_file(digits, tmp_path):
    """--init_from: the exported .pt starts a run at the same weights; another head starts anew."""
    first = tmp_path / "first"
    train(1, "zero1_fp32", digits, first, "--global_batch", "4", "--iterations", "2")
    done = run_python(ROOT / "launch" / "export.py", first, cwd=tmp_path)
    assert done.code == 0, done.output
    exported = first / "export" / "model000002.pt"
    weights = torch.load(exported, weights_only=True)
    for name, value in load_file(first / "checkpoints/step-00000002/model.safetensors").items():
        assert torch.equal(weights[name], value)
    # In fp32 the validation before the first step is evaluate.py's of the file, under uniform t.
    bare = tmp_path / "bare.pt"
    bare.write_bytes(exported.read_bytes())  # no settings beside it, as a reference file has none
    # What shapes the classifier: TINY's flags up to its noise schedule.
    flags = [*TINY[: TINY.index("--random_flip")], "--timesteps", "0", "--workers", "1"]
    flags += ["--val_data_dir", digits / "val"]
    done = run_python(ROOT / "launch" / "evaluate.py", bare, *flags, cwd=tmp_path)
    assert done.code == 0, done.output
    numbers = json.loads((tmp_path / "eval" / "bare.json").read_text())["classifier"]
    run = tmp_path / "continued"
    flags = ["--global_batch", "20", "--iterations", "1", "--init_from", bare]
    train(1, "zero1_fp32", digits, run, *flags, "--val_data_dir", digits / "val")
    row = read_log(run)[0]
    assert row["step"] == 0
    for name in ("loss", "acc@1", "acc@5"):
        assert row[f"val_{name}"] == pytest.approx(numbers["uniform_t"][name], rel=1e-6)
        assert row[f"val_{name}_t0"] == pytest.approx(numbers["levels"][0][name], rel=1e-6)
    for source in (exported, first):
        run = tmp_path / f"from_{source.name}"
        flags = ["--global_batch", "4", "--iterations", "1", "--lr", "1e-12"]
        done = train(2, "zero1_fp32", digits, run, *flags, "--init_from", source)
        assert f"start       from weights from {source}" in done.output.replace("from from", "from")
        after = load_file(run / "checkpoints/step-00000001/model.safetensors")
        assert all(torch.allclose(after[k], v, atol=1e-9) for k, v in weights.items())
    other_head = {
        k: torch.zeros(5, *v.shape[1:]) if "c_proj" in k else v for k, v in weights.items()
    }
    torch.save(other_head, tmp_path / "five.pt")
    flags = ["--global_batch", "4", "--iterations", "1", "--init_from", tmp_path / "five.pt"]
    done = train(1, "zero1_fp32", digits, tmp_path / "five", *flags)
    assert "  NOTE      another number of classes, 5 there and 10 here" in done.output
    torch.save({"model": print}, tmp_path / "evil.pt")
    flags[-1] = tmp_path / "evil.pt"
    done = train(1, "zero1_fp32", digits, tmp_path / "evil", *flags, expect=2)
    assert "not a plain state dict" in done.output
    assert "Traceback" not in done.output


ZERO2 = CONFIGS / "zero2_bf16.json"
BAD_INPUT = {
    "no data": (["--deepspeed_config", ZERO2], ["data/train", "ds-classifier convert"]),
    "a folder of images": (
        ["--deepspeed_config", ZERO2, "--data_dir", "images"],
        ["folder of images", "ds-classifier convert images"],
    ),
    "no such config": (["--deepspeed_config", "x.json"], ["x.json", "zero2_fp16"]),
    "an unknown key": (
        ["--deepspeed_config", "unknown.json"],
        ["gradient_cliping", "'gradient_clipping'"],
    ),
    "a wrong type": (["--deepspeed_config", "type.json"], ["4.5", "whole number"]),
    "misplaced auto": (["--deepspeed_config", "auto.json"], ["stage", '"auto"']),
    "batch sizes": (["--deepspeed_config", "batch.json"], ["train_micro_batch_size_per_gpu"]),
    "classes": (
        ["--deepspeed_config", ZERO2, "--data_dir", "DIGITS", "--num_classes", "1000"],
        ["--num_classes", "1000", "need 10"],
    ),
    "image size": (
        ["--deepspeed_config", ZERO2, "--data_dir", "DIGITS", "--image_size", "100"],
        ["image_size: got 100", "96 or 104"],
    ),
    "a run directory that cannot be": (
        ["--deepspeed_config", ZERO2, "--data_dir", "DIGITS", "--run_dir", "images/cat/1.png"],
        ["--run_dir", "images/cat/1.png", "nothing can be written", "choose another"],
    ),
    "wrong world": (["--deepspeed_config", ZERO2, "--expect_world", "8"], ["--expect_world", "8"]),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_one_clear_message(case, digits, tmp_path):
    from PIL import Image

    (tmp_path / "images" / "cat").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(tmp_path / "images/cat/1.png")
    base = json.loads(ZERO2.read_text())
    batches = {"train_micro_batch_size_per_gpu": 3, "train_batch_size": 8}
    for name, change in (
        ("unknown", {"gradient_cliping": 1.0}),
        ("type", {"train_micro_batch_size_per_gpu": 4.5}),
        ("auto", {"zero_optimization": {"stage": "auto"}}),
        ("batch", batches),
    ):
        (tmp_path / f"{name}.json").write_text(json.dumps(base | change))
    flags, words = BAD_INPUT[case]
    flags = [digits / "train" if flag == "DIGITS" else flag for flag in flags]
    done = run_python(TRAIN, *flags, cwd=tmp_path)
    assert done.code == 2
    assert done.output.startswith("error: ")
    assert len(done.lines) == 1, done.output
    for word in words:
        assert word in done.output
    assert not (tmp_path / "runs").exists()


def test_a_world_that_does_not_divide_the_batch_is_told_once(digits, tmp_path):
    done = train(
        2,
        "zero2_bf16",
        digits,
        tmp_path / "run",
        "--global_batch",
        "9",
        script=TRAIN,
        expect=2,
        launcher=True,
    )
    errors = [line for line in done.lines if line.startswith("error:")]
    assert len(errors) == 1
    assert "got 9 on 2 ranks" in errors[0]
    assert "1 or 3 ranks" in errors[0]
    assert "Traceback" not in done.output
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(
    torch.cuda.is_available() or torch.ops.mkldnn._is_mkldnn_fp16_supported(),
    reason="this device has fp16",
)
def test_fp16_where_there_is_none(digits, tmp_path):
    """Trains with fp16 emulated, which one line says."""
    flags = ["--iterations", "2", "--batch_size", "2"]
    done = train(1, "zero2_fp16", digits, tmp_path / "run", *flags, script=TRAIN)
    (line,) = [line for line in done.lines if "fp16 is emulated" in line]
    assert "faster" in line
    assert len(losses(tmp_path / "run")) == 2


# ------------------------------------------------------------------------- shards by URL


@pytest.mark.slow
def test_shards_by_url_train_as_local_ones(digits, tmp_path):
    """Two ranks of a node share one download of each shard, and see the same samples."""
    import functools
    import http.server
    import threading

    asked = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            asked.append(self.path)

    handler = functools.partial(Handler, directory=str(digits))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/train"
        flags = ["--global_batch", "16", "--iterations", "6"]
        train(2, "zero1_fp32", digits, tmp_path / "local", *flags)
        flags += ["--data_dir", url, "--cache_dir", tmp_path / "cache", "--cache_gb", "1"]
        train(2, "zero1_fp32", digits, tmp_path / "remote", *flags)
        server.shutdown()
    assert losses(tmp_path / "remote") == losses(tmp_path / "local")
    tars = [path for path in asked if path.endswith(".tar")]
    assert len(tars) == len(set(tars)) == 2


# ------------------------------------------------------------------------- bad samples


def shards_with_bad_images(folder: Path, bad: set[int]) -> Path:
    """40 digits as a training split; some of them cut short."""
    from ds_classifier.data.convert.convert import convert
    from ds_classifier.data.convert.sources import DataSource, Sample, digits

    whole = digits().splits["train"][:40]
    cut = [
        Sample(s.name, s.label, s.content[:60] if i in bad else s.content)
        for i, s in enumerate(whole)
    ]
    convert(DataSource("cut", [str(n) for n in range(10)], {"train": cut}), folder)
    return folder


@pytest.mark.slow
def test_bad_samples_are_counted_listed_and_limited(tmp_path):
    """Two epochs over 40 images, 3 of them bad: 6 in all, on whichever rank they fell.

    The limit is per epoch: 3 bad images, met again and again, stay 3. The counts of bad samples
    and skipped steps, and all else, are the same where a loader worker and then a rank is killed.
    """
    data = shards_with_bad_images(tmp_path / "data", {5, 6, 30})
    flags = ["--global_batch", "8", "--iterations", "10", "--save_interval", "6"]
    flags += ["--max_bad_samples", "3"]
    nan, run, killed = {"NAN_AT": "3:1"}, tmp_path / "run", tmp_path / "killed"
    done = train(2, "zero1_fp32", data, run, *flags, environment=nan.items())
    row = read_log(run)[-1]
    assert (row["samples"], row["bad_samples"], row["skipped_steps"]) == (80, 6, 1)
    counted = r" samples seen so far, 6 bad samples \(listed in .*\), 1 step skipped \(gradient not"
    assert re.search(counted, done.output)
    lists = [p.read_text().splitlines() for p in run.glob("bad_samples.rank*.jsonl")]
    listed = [json.loads(line) for lines in lists for line in lines]
    assert sorted(row["key"].split("_")[-1] for row in listed) == sorted(
        2 * ["0005", "0006", "0030"]
    )
    assert all(0 <= row["position"] < 80 and row["error"] for row in listed)

    # Batches handed over before the kill are still read, so it is noticed some steps later.
    faults = nan | {"KILL_WORKERS_AT": "4:1", "KILL_AT": "10:0"}
    done = train(2, "zero1_fp32", data, killed, *flags, environment=faults.items(), expect=247)
    assert "killed a worker" in done.output
    assert "rank 1: a loader worker died (SIGKILL); new workers continue" in done.output
    train(2, "zero1_fp32", data, killed, *flags)
    assert without_clocks(read_log(killed)) == without_clocks(read_log(run))
    last = "checkpoints/step-00000010"
    assert_same_state(killed / last, run / last)

    done = train(
        2, "zero1_fp32", data, tmp_path / "limited", *flags[:-1], "2", script=TRAIN, expect=2
    )
    assert "3 samples could not be decoded" in done.output
    assert (tmp_path / "limited" / "checkpoints" / "latest").exists()
    assert done.output.count("error:") == 1
    assert "Traceback" not in done.output
    done = train(2, "zero1_fp32", data, tmp_path / "limited", *flags)
    assert "start       from checkpoint" in done.output
    assert (tmp_path / "limited" / "DONE").exists()
