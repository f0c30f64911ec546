"""Run launch/evaluate.py on several validation sets, one after another in one process group.

Arguments: the weights; then, for each set, its shards, its batch size and the output directory.
"""

import shlex
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from ds_classifier import distributed
from launch import evaluate

FLAGS = shlex.split(
    "--image_size 8 --classifier_width 32 --classifier_channel_mult 1,2 --classifier_depth 1 "
    "--classifier_attention_resolutions 4 --noise_schedule cosine --timestep_respacing 50 "
    "--rescale_timesteps True --diffusion_steps 500 --levels 3"
)

if __name__ == "__main__":
    device = distributed.init()
    distributed.init = lambda: device
    leave, distributed.finish = distributed.finish, lambda: None
    weights, *sets = [word for word in sys.argv[1:] if not word.startswith("--local_rank")]
    for shards, batch, out in zip(*[iter(sets)] * 3, strict=True):
        options = ["--val_data_dir", shards, "--batch_size", batch, "--out", out]
        code = evaluate.main([weights, *options, *FLAGS])
        if code:
            sys.exit(code)
    leave()
