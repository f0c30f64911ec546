"""From a folder of images to guided samples: `python examples/own_images.py FOLDER [flags]`.

FOLDER has one directory per class. The flags are those of launch/train.py: the settings below suit
some thousand small images and minutes on a CPU; docs/recipes.md has others. The same command again
continues. The results are in own_images/.
"""

import random
import subprocess
import sys
from pathlib import Path

import ds_classifier

ROOT = Path(__file__).resolve().parents[1]
OUT = Path("own_images")
DATA, RUN = OUT / "shards", OUT / "run"


def program(name: str, *arguments: object) -> None:
    """Run a program of launch/; if it fails, end with its exit code."""
    command = [sys.executable, ROOT / "launch" / f"{name}.py", *arguments]
    if code := subprocess.run(list(map(str, command)), check=False).returncode:
        sys.exit(code)


def main(folder: str, *flags: str) -> None:
    """Make shards, train, look at some images, and sample."""
    program("make_shards", "convert", folder, DATA, "--val", "10%")
    of_run = ["--data_dir", DATA / "train", "--run_dir", RUN]
    of_training = ["--recipe", "digits32", "--random_flip", True, *flags]
    program("train", *of_run, *of_training)

    model = ds_classifier.load(RUN)
    print(model)
    paths = random.Random(0).sample([p for p in Path(folder).glob("*/*") if p.is_file()], 3)
    for t in (0, model.diffusion.num_timesteps // 2):  # clean, and half way to noise
        p = model.predict(model.read(paths), t)  # [3, K]
        for path, k in zip(paths, p.argmax(dim=1), strict=True):
            print(f"t = {t}: {path} looks like {model.classes[k]}")

    # From the exact denoiser of these images: a diffusion model needs no training here.
    guided = ["--classifier_path", RUN, "--data_dir", DATA / "train", "--classifier_scale", 0, 10]
    number = ["--num_samples", 8 * len(model.classes), "--timestep_respacing", 25]
    program("sample", *guided, *number, "--out_dir", OUT / "samples")
    print(f"a row per class, unguided on the left, guided on the right: {OUT}/samples/overview.png")


if __name__ == "__main__":
    if len(sys.argv) < 2 or not Path(sys.argv[1]).is_dir():
        sys.exit(__doc__)
    main(*sys.argv[1:])
