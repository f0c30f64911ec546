"""The scripts of examples/ run as their first lines say, on little data."""

import shlex

from running import ROOT, run_python

FLAGS = shlex.split(
    "--image_size 8 --classifier_width 32 --classifier_channel_mult 1,2 --workers 0 "
    "--classifier_attention_resolutions 4 --global_batch 4 --iterations 2 --diffusion_steps 30"
)


def test_own_images_to_guided_samples(folder, tmp_path):
    command = [ROOT / "examples" / "own_images.py", folder, *FLAGS]
    done = run_python(*command, cwd=tmp_path, PYTHONPATH=str(ROOT))
    assert done.code == 0, done.output
    assert "classes  3: cat, dog, emu" in done.output
    looks_like = [line for line in done.lines if " looks like " in line]
    assert len(looks_like) == 6
    assert (tmp_path / done.lines[-1].split(": ")[-1]).stat().st_size
    assert (tmp_path / "own_images" / "run" / "DONE").exists()


def test_own_images_needs_a_folder(tmp_path):
    done = run_python(ROOT / "examples" / "own_images.py", cwd=tmp_path, PYTHONPATH=str(ROOT))
    assert done.code == 1
    assert done.output.startswith("From a folder of images to guided samples: `python examples/")
