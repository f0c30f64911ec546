"""Test exports: other tools read them, they are compared first, and their bytes never differ."""

import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from made import CLASS_NAMES, make_run
from running import ROOT, run_python
from safetensors.torch import load_file, save_file
from small_models import SMALL, filled

from ds_classifier import diffusion
from ds_classifier.checkpoint import disk
from ds_classifier.checkpoint.fitting import tensors_of
from ds_classifier.checkpoint.weights import find_recorded, load_classifier, open_weights
from ds_classifier.config import Settings
from ds_classifier.evaluation.format import EVALUATION_FORMAT, EVALUATION_VERSION
from ds_classifier.export import export
from ds_classifier.export.reference_flags import classifier_flags, flags_text, reference_obstacles
from ds_classifier.guidance.gradient import classifier_gradient
from ds_classifier.model import create_classifier
from launch import export as program


def write_evaluation(run: Path, step: int = 7, **changes) -> None:
    """Write what evaluate.py would, with the fields that an export reads."""
    final = run / "checkpoints" / disk.step_name(step)
    manifest = json.loads((final / disk.MANIFEST).read_text())
    settings = Settings(**disk.read_state(final)["settings"])
    numbers = {"acc@1": 0.75, "acc@5": 1.0, "loss": 0.5, "ece": 0.01, "grad_norm": 3.5}
    record = {
        "format": EVALUATION_FORMAT,
        "version": EVALUATION_VERSION,
        "weights_sha256": manifest["files"][disk.MODEL]["sha256"],
        "settings": settings.model_kwargs() | settings.diffusion_kwargs(),
        "precision": "fp32",
        "data": {"samples": 360, "fingerprint": "a" * 64, "location": "/home/someone/val"},
        "noise": "keyed",
        "classifier": {"uniform_t": numbers, "levels": [dict(numbers, t=0, log_snr=8.9)]},
    }
    (run / "eval").mkdir(exist_ok=True)
    (run / "eval" / f"{final.name}.json").write_text(json.dumps(record | changes))


def sums(folder: Path) -> dict[str, str]:
    """Return the sha256 of each file in a directory."""
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}


def test_stock_tools_read_it(tmp_path):
    run = make_run(tmp_path / "run")
    exported = export.export(run)
    names = ["model000007" + suffix for suffix in (".pt", ".safetensors", ".json", ".flags.txt")]
    assert [path.name for path in exported.paths] == [*names, "README.md"]
    assert sorted(p.name for p in (run / "export").iterdir()) == sorted([*names, "README.md"])
    assert exported.timesteps == [0, 250, 500, 749, 999]
    model = disk.read_model(run / "checkpoints" / "step-00000007")
    pickled = torch.load(run / "export" / names[0], weights_only=True)
    assert type(pickled) is dict
    live = create_classifier(**Settings(**SMALL).model_kwargs())
    assert list(pickled) == list(live.state_dict())  # optimizer states go by order
    for tensors in (pickled, load_file(run / "export" / names[1])):
        assert tensors.keys() == model.keys()
        assert all(torch.equal(tensors[name], value) for name, value in model.items())
        assert {value.dtype for value in tensors.values()} == {torch.float32}


@pytest.mark.parametrize("obstacles", [True, False])
def test_the_command_says_what_loads_the_export(tmp_path, monkeypatch, capsys, obstacles):
    """The digits' classifier needs edits there; that must not read as if the export had failed."""
    if not obstacles:
        monkeypatch.setattr(export, "reference_obstacles", lambda *_: [])
    assert program.main([str(make_run(tmp_path / "run"))]) == 0
    printed = capsys.readouterr().out
    assert "loads in: ds_classifier.load, sample.py, diffusers' schedulers" in printed
    assert ("and in guided-diffusion as it is" in printed) == (not obstacles)
    edits = "and in guided-diffusion after the edits to its code that model000007.flags.txt lists"
    assert (edits in printed) == obstacles
    assert "cannot use" not in printed


def test_the_best_checkpoint_goes_by_its_name(tmp_path):
    """Check that checkpoints/best and latest, which hold a name, stand for that checkpoint."""
    run = make_run(tmp_path / "run", step=7)
    make_run(tmp_path / "run", step=9)
    best = run / "checkpoints" / "best"
    best.write_text("step-00000007 val_loss 0.25\n")
    assert find_recorded(best).step == 7
    (run / "checkpoints" / "latest").write_text("step-00000009\n")
    assert find_recorded(run / "checkpoints" / "latest").step == 9
    best.write_text("../../elsewhere val_loss 0.25\n")
    with pytest.raises(ValueError, match="best"):
        open_weights(best)


def test_same_bytes_in_another_place_and_process(tmp_path):
    """Check with another directory, hash seed, process and clock, and over an earlier export."""
    first, second = (make_run(tmp_path / name) for name in ("here", "there/deeper"))
    export.export(first)
    code = "from pathlib import Path; from ds_classifier.export.export import export"
    code = f"{code}; export({second!r})"
    code = code.replace("PosixPath", "Path")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONHASHSEED": "3", "TZ": "Asia/Tokyo"}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)
    assert sums(first / "export") == sums(second / "export")
    texts = "".join(p.read_text() for p in (second / "export").glob("*[dnt]") if p.suffix != ".pt")
    assert str(tmp_path) not in texts
    before = sums(first / "export")
    export.export(first)
    assert sums(first / "export") == before


@pytest.mark.parametrize("step", ["torch.save", "save_file", "width", "schedule", "timesteps"])
def test_files_that_differ_get_no_name(tmp_path, monkeypatch, step):
    """Check with one number changed in a file, or a setting that builds the same tensors."""
    run = make_run(tmp_path / "run")
    before = export.export(run).paths[0].parent
    (before / "model000007.pt").write_bytes(b"of before")
    kept = sums(before)

    def perturbed(write):
        def changed(tensors, *rest, **keywords):
            tensors = {name: value.clone() for name, value in tensors.items()}
            bias = tensors["out.0.bias"]
            bias[0] = torch.nextafter(bias[0], torch.tensor(9.0))
            write(tensors, *rest, **keywords)

        return changed

    describe = export.describe

    def other_settings(*arguments):
        description = describe(*arguments)
        wrong = {
            "width": ("classifier", "classifier_width", 64),
            "schedule": ("diffusion", "noise_schedule", "linear"),
            "timesteps": ("diffusion", "diffusion_steps", 999),
        }
        section, name, value = wrong[step]
        description[section][name] = value
        return description

    if step == "torch.save":
        monkeypatch.setattr(torch, "save", perturbed(torch.save))
    elif step == "save_file":
        monkeypatch.setattr(export, "save_file", perturbed(export.save_file))
    else:
        monkeypatch.setattr(export, "describe", other_settings)
    with pytest.raises(RuntimeError):
        export.export(run)
    assert sums(before) == kept


def test_only_an_evaluation_of_these_weights_is_recorded(tmp_path):
    run = make_run(tmp_path / "run")
    for changes in (dict(weights_sha256="0" * 64), dict(version=2), dict(format="other")):
        write_evaluation(run, **changes)
        assert not export.export(run).evaluated
        assert "Not measured" in (run / "export" / "README.md").read_text()
    write_evaluation(run)
    assert export.export(run).evaluated
    described = json.loads((run / "export" / "model000007.json").read_text())
    assert described["evaluation"]["levels"][0]["acc@1"] == 0.75
    assert "/home/someone" not in json.dumps(described)
    card = (run / "export" / "README.md").read_text()
    assert "| 0 | 8.90 | 75.0 | 100.0 | 0.500 | 1.0 | 3.5 |" in card


@pytest.mark.parametrize(
    "other",
    [
        dict(noise_schedule="cosine"),
        dict(diffusion_steps=500),
        dict(timestep_respacing="250"),
        dict(rescale_timesteps=True),
    ],
)
def test_accuracies_under_another_noise_process_are_not_recorded(tmp_path, monkeypatch, other):
    """Check a bare file, which does not record its noise process, with an evaluation of one."""
    monkeypatch.setattr(export, "_compare", lambda *_: ([], 0.0))  # not tested here
    torch.save(filled(tensors_of(Settings(**SMALL))), tmp_path / "bare.pt")
    make_run(tmp_path / "run", noise_schedule="linear")
    write_evaluation(tmp_path / "run")
    record = json.loads((tmp_path / "run/eval/step-00000007.json").read_text())
    record["weights_sha256"] = hashlib.sha256((tmp_path / "bare.pt").read_bytes()).hexdigest()
    (tmp_path / "eval").mkdir()
    (tmp_path / "eval" / "bare.json").write_text(json.dumps(record))
    for given, expected in ((SMALL, True), (SMALL | other, False)):
        assert export.export(tmp_path / "bare.pt", given).evaluated == expected
        card = (tmp_path / "export" / "README.md").read_text()
        assert ("Not measured" in card, "type: accuracy" in card) == (not expected, expected)


def test_of_several_precisions_the_highest_is_recorded(tmp_path):
    run = make_run(tmp_path / "run")
    source, _ = open_weights(run)
    for name, precision in (("-fp16", "fp16"), ("-bf16", "bf16"), ("", "fp32")):
        write_evaluation(run, precision=precision)
        written = run / "eval" / "step-00000007.json"
        written.rename(written.with_name(f"step-00000007{name}.json"))
        assert export.find_evaluation(source)["precision"] == precision


def test_a_damaged_evaluation_breaks_no_export(tmp_path, monkeypatch):
    """Check with every value in turn missing or of another type, and with text that is no JSON."""
    monkeypatch.setattr(export, "_compare", lambda *_: ([], 0.0))  # not tested here
    run = make_run(tmp_path / "run")
    write_evaluation(run)
    path = run / "eval" / "step-00000007.json"
    whole = json.loads(path.read_text())
    records: list = [[], None]
    for key in whole:
        records += [whole | {key: value} for value in (None, [], {}, 7, [None])]
        records.append({k: v for k, v in whole.items() if k != key})
    numbers = whole["classifier"]["uniform_t"]
    for key in numbers:
        for row in (numbers | {key: "x"}, {k: v for k, v in numbers.items() if k != key}):
            records.append(whole | {"classifier": {"uniform_t": row, "levels": []}})
            level = dict(row, t=0, log_snr=8.9)
            records.append(whole | {"classifier": {"uniform_t": numbers, "levels": [level]}})
    source, _ = open_weights(run)
    assert export.find_evaluation(source) is not None
    for text in ("", "[" * 100_000, "\0", *map(json.dumps, records)):
        path.write_text(text)
        assert export.find_evaluation(source) is None, text
    path.write_text(json.dumps(records[-1]))
    assert not export.export(run).evaluated


def test_the_json_has_what_guidance_needs(tmp_path):
    run = make_run(tmp_path / "run")
    export.export(run)
    described = json.loads((run / "export" / "model000007.json").read_text())
    assert list(described["reference_flags"])[:8] == [
        "image_size",
        "classifier_use_fp16",
        "classifier_width",
        "classifier_depth",
        "classifier_attention_resolutions",
        "classifier_use_scale_shift_norm",
        "classifier_resblock_updown",
        "classifier_pool",
    ]
    assert described["classes"] == CLASS_NAMES
    assert described["diffusion"]["noise_schedule"] == "cosine"
    assert described["input"]["mean"] == described["input"]["std"] == 127.5
    assert described["training"]["lr"] == 1e-3


@pytest.mark.parametrize(("extend", "lines"), [(0, []), (900, ["    extend: 900"])])
def test_the_card_says_how_far_a_run_was_extended(tmp_path, extend, lines):
    export.export(make_run(tmp_path / "run", extend=extend), out=tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text().splitlines()
    assert [line for line in card if line.startswith("    extend")] == lines
    source, _ = open_weights(tmp_path / "out")
    assert source.settings.extend == extend


def test_the_card_can_be_read_and_its_python_runs(tmp_path, monkeypatch):
    run = make_run(tmp_path / "run")
    write_evaluation(run)
    export.export(run)
    card = (run / "export" / "README.md").read_text()
    assert all(json.dumps(name, ensure_ascii=False) in card for name in CLASS_NAMES)
    monkeypatch.chdir(run / "export")
    names: dict = {}
    exec(re.search("```python\n(.*?)```", card, re.DOTALL).group(1), names)
    x, t, y = torch.randn(2, 3, 16, 16), torch.tensor([3, 900]), torch.tensor([0, 4])
    source, weights = open_weights(run)
    live = create_classifier(**source.settings.model_kwargs())
    live.load_state_dict(weights)
    assert torch.equal(names["cond_fn"](x, t, y=y), classifier_gradient(live)(x, t, y=y))


def test_hugging_face_reads_the_front_matter(tmp_path):
    hub = pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed")
    run = make_run(tmp_path / "run")
    write_evaluation(run)
    export.export(run)
    data = hub.ModelCard((run / "export" / "README.md").read_text()).data
    assert data.library_name == "ds_classifier"
    assert [r.metric_value for r in data.eval_results] == [0.75, 0.75]
    assert data.eval_results[1].metric_name == "accuracy, t = 0"


def test_an_export_records_what_its_run_does(tmp_path):
    """Check settings, step and classes of the directory (its newest step), .safetensors and .pt."""
    run = make_run(tmp_path / "run", classifier_attention_resolutions="", rescale_timesteps=True)
    export.export(run)
    make_run(tmp_path / "run", step=20)
    export.export(run)
    source, live = load_classifier(run / "checkpoints" / "step-00000007")
    folder = run / "export"
    assert open_weights(folder)[0].step == 20
    for path in (folder / "model000007.pt", folder / "model000007.safetensors"):
        found, rebuilt = load_classifier(path)
        assert (found.kind, found.step, found.name, found.home) == (
            "export",
            7,
            "model000007",
            folder,
        )
        assert (found.classes, found.data) == (CLASS_NAMES, "f" * 64)
        assert found.settings.diffusion_kwargs() == source.settings.diffusion_kwargs()
        assert found.contradicted_by({"image_size": 16, "classifier_depth": 2}) == [
            "classifier_depth"
        ]
        x, t = torch.randn(2, 3, 16, 16), torch.tensor([3, 900])
        assert torch.equal(live(x, t), rebuilt(x, t))
    # Weights that are not those of their JSON, and a JSON of a later version.
    (folder / "model000007.pt").write_bytes((folder / "model000020.pt").read_bytes())
    with pytest.raises(ValueError, match="is not the file"):
        open_weights(folder / "model000007.pt")
    later = folder / "model000020.json"
    later.write_text(later.read_text().replace('"version": 1', '"version": 2'))
    with pytest.raises(ValueError, match="got version 2; need 1"):
        open_weights(folder)
    # A JSON of another program records nothing: the file is bare.
    later.write_text("{}")
    assert open_weights(folder / "model000020.pt", SMALL)[0].kind == "file"


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_damaged_json_is_named(tmp_path, suffix):
    """Check that each single fault in a JSON gives one line with the JSON and the fault."""
    export.export(make_run(tmp_path / "run"))
    path = tmp_path / "run" / "export" / "model000007.json"
    whole = json.loads(path.read_text(encoding="utf-8"))
    for key, value, words in [
        *((key, None, f"{key}: got none") for key in ("files", "step", "classes", "data")),
        *((key, None, f"{key}: got none") for key in ("classifier", "diffusion", "training")),
        ("files", [], "files: got []; need dict"),
        ("files", {"model000007.pt": "5f"}, "files: got '5f' for model000007.pt"),
        ("files", {"model000007.pt": {}}, "files: got {} for model000007.pt"),
        ("step", "7", "step: got '7'; need int or null"),
        ("step", True, "step: got True"),
        ("data", 7, "data: got 7"),
        ("classes", "abcde", "classes: got 'abcde'"),
        ("classes", [1, 2, 3, 4, 5], "classes: got a name that is not text"),
        ("classes", CLASS_NAMES[:4], "classes: got 4 names; need num_classes, 5"),
        ("diffusion", whole["diffusion"] | {"noise_schedule": "quartic"}, "got 'quartic'"),
        ("diffusion", whole["diffusion"] | {"noise_schedule": 3}, "noise_schedule: got 3"),
        ("diffusion", whole["diffusion"] | {"diffusion_steps": 0}, "diffusion_steps: got 0"),
        ("diffusion", {}, "diffusion_steps: got none"),
        ("classifier", whole["classifier"] | {"image_size": "16"}, "image_size: got '16'"),
        ("classifier", whole["classifier"] | {"classifier_depth": 2}, "do not build the tensors"),
        ("classifier", whole["classifier"] | {"classifier_width": 33}, "do not build the tensors"),
        ("training", whole["training"] | {"lr": "fast"}, "lr: got 'fast'; need float"),
    ]:
        damaged = {k: v for k, v in whole.items() if k != key}
        damaged |= {} if value is None else {key: value}
        path.write_text(json.dumps(damaged), encoding="utf-8")
        with pytest.raises(ValueError) as caught:
            open_weights(path.with_suffix(suffix))
        assert str(caught.value).startswith(str(path))
        assert words in str(caught.value)
        assert "\n" not in str(caught.value)
    path.write_text(json.dumps(whole | {"training": {"lr": 1, "unknown": 2}}), encoding="utf-8")
    assert open_weights(path.with_suffix(suffix))[0].settings.lr == 1


def test_the_json_is_utf_8_whatever_the_locale(tmp_path):
    export.export(make_run(tmp_path / "run"))
    code = (
        "from pathlib import Path; from ds_classifier.checkpoint.weights import find_recorded\n"
        "print(ascii(find_recorded(Path('run/export/model000007.pt')).classes))"
    )
    ascii_only = dict(LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0", PYTHONPATH=str(ROOT))
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=os.environ | ascii_only,
        capture_output=True,
        text=True,
    )
    assert done.stdout.strip() == ascii(CLASS_NAMES), done.stderr


def test_a_bare_file_is_exported_without_flags_for_its_architecture(tmp_path):
    """Check that the output names what was inferred, and the noise process, which was not."""
    settings = Settings(**SMALL)
    torch.save(filled(tensors_of(settings)), tmp_path / "64x64.v2.pt")
    script, out = ROOT / "launch" / "export.py", tmp_path / "out"
    done = run_python(
        script, "64x64.v2.pt", "--out", out, "--noise_schedule", "cosine", cwd=tmp_path
    )
    assert done.code == 0, done.output
    assert "inferred from the tensors in 64x64.v2.pt: --image_size 16, --" in done.output
    assert "from flags and their defaults: cosine noise, 1000 steps\n" in done.output
    assert "5 classes: create_classifier always builds 1000" in done.output
    assert "names are not recorded" in (out / "README.md").read_text()
    source, _ = open_weights(out)
    assert (source.kind, source.step, source.name) == ("export", None, "64x64.v2")
    assert source.settings.classifier_width == 32
    done = run_python(script, "64x64.v2.pt", "--image_size", 64, cwd=tmp_path)
    assert (done.code, "Traceback" in done.output) == (2, False)
    assert "  --image_size: got 64; need 16\n" in done.output


def test_a_flag_that_contradicts_a_checkpoint_is_refused(tmp_path):
    run = make_run(tmp_path / "run")
    done = run_python(ROOT / "launch" / "export.py", run, "--image_size", 64, cwd=tmp_path)
    assert (done.code, "Traceback" in done.output) == (2, False)
    assert "got --image_size; need none for" in done.output
    assert "in which it is 16; do: drop it" in done.output
    assert not (run / "export").exists()
    done = run_python(ROOT / "launch" / "export.py", run, "--image_size", 16, cwd=tmp_path)
    assert done.code == 0, done.output


@pytest.mark.parametrize(
    "name",
    [
        "README.md",
        "model000007.pt",
        "model000007.safetensors",
        "model000007.json",
        "model000007.flags.txt",
    ],
)
@pytest.mark.parametrize("content", [b"mine", b"---\nlicense: mit\n---\n", b"{}", b"\xff"])
def test_files_of_others_are_not_replaced(tmp_path, name, content):
    run, out = make_run(tmp_path / "run"), tmp_path / "out"
    out.mkdir()
    (out / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"^--out: got {out}, which holds {name} of another"):
        export.export(run, out=out)
    assert {p.name: p.read_bytes() for p in out.iterdir()} == {name: content}


def test_an_earlier_export_is_replaced(tmp_path):
    """Check with an edited card, a JSON of another version and weights that are cut short."""
    run = make_run(tmp_path / "run")
    folder = export.export(run).paths[0].parent
    whole = sums(folder)
    card, described = folder / "README.md", folder / "model000007.json"
    card.write_text(card.read_text(encoding="utf-8").replace("---\n", "---\nlicense: mit\n", 1))
    described.write_text(described.read_text().replace('"version": 1', '"version": 0'))
    (folder / "model000007.pt").write_bytes(b"")
    export.export(run)
    assert sums(folder) == whole


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_the_exported_file_is_not_replaced(tmp_path, suffix):
    """Check with a bare file of another precision, and an export onto itself."""
    half = {name: value.half() for name, value in filled(tensors_of(Settings(**SMALL))).items()}
    path = tmp_path / f"model{suffix}"
    torch.save(half, path) if suffix == ".pt" else save_file(half, path)
    before = sums(tmp_path)
    with pytest.raises(
        ValueError, match=rf"^--out: got .*, in which model\{suffix} is what is exp"
    ):
        export.export(path, SMALL, tmp_path)
    assert sums(tmp_path) == before
    export.export(path, SMALL)
    folder = tmp_path / "export"
    before = sums(folder)
    with pytest.raises(ValueError, match="is what is exported"):
        export.export(folder / path.name, out=folder)
    assert sums(folder) == before


def test_file_modes_follow_the_umask(tmp_path):
    run = make_run(tmp_path / "run")
    for umask, mode in ((0o022, 0o644), (0o007, 0o660)):
        before = os.umask(umask)
        try:
            paths = export.export(run, out=tmp_path / f"{mode:o}").paths
        finally:
            os.umask(before)
        assert {path.stat().st_mode & 0o777 for path in paths} == {mode}


def test_weights_that_are_not_finite_are_refused(tmp_path):
    weights = filled(tensors_of(Settings(**SMALL)))
    weights["out.0.bias"][3] = float("nan")
    torch.save(weights, tmp_path / "nan.pt")
    with pytest.raises(ValueError, match="not all finite"):
        export.export(tmp_path / "nan.pt", SMALL)
    assert not (tmp_path / "export").exists()


def test_logits_that_are_not_finite_are_refused_for_what_they_are(tmp_path):
    """Check finite weights: the files would read back right, but nan equals nothing."""
    weights = filled(tensors_of(Settings(**SMALL)))
    weights["out.2.c_proj.weight"].fill_(3e38)
    torch.save(weights, tmp_path / "big.pt")
    assert all(value.isfinite().all() for value in weights.values())
    with pytest.raises(ValueError, match="got big, whose logits or input gradients are not finite"):
        export.export(tmp_path / "big.pt", SMALL)
    assert list((tmp_path / "export").iterdir()) == []


def test_guided_diffusion_can_read_the_flag_for_no_attention():
    """Check the flag for no attention: a side larger than the image, as an empty list fails."""
    flags = classifier_flags(Settings(classifier_attention_resolutions=""))
    assert 64 // int(flags["classifier_attention_resolutions"]) == 0


def test_flags_are_words_of_a_command_line():
    text = flags_text(Settings(num_classes=1000, noised=False), "model.pt")
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    assert all(len(line.split(" ")) == 2 for line in lines)
    assert "--timestep_respacing" not in text
    assert "clean images" in text
    respaced = flags_text(Settings(num_classes=1000, timestep_respacing="250"), "model.pt")
    assert "--timestep_respacing 250" in respaced
    assert "cannot use" not in respaced


def test_a_new_noise_schedule_is_an_obstacle(monkeypatch):
    """Check that it is listed: guided-diffusion would build another process silently."""
    monkeypatch.setitem(diffusion.NOISE_SCHEDULES, "quadratic", None)
    settings = Settings(num_classes=1000, noise_schedule="quadratic")
    (obstacle,) = reference_obstacles(settings)
    assert "quadratic" in obstacle.reason
    assert "cannot use" in flags_text(settings, "model.pt")
    assert reference_obstacles(settings.replace(noise_schedule="cosine")) == []
