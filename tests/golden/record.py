"""Record golden numbers from a guided-diffusion checkout: python tests/golden/record.py CHECKOUT.

What the suite compares with where no larger set of recorded cases is at hand. Recorded once, on
CPU in float32, from commit 22e0df8; run again only to add cases.
"""

import random
import sys
import types
import zlib
from pathlib import Path

import numpy as np
import torch
from PIL import Image

HERE = Path(__file__).parent


def fill(name: str, shape) -> np.ndarray:
    """Weights by name, so that none need to be stored; see `test_model.filled`."""
    n = np.random.RandomState(zlib.crc32(name.encode()) & 0x7FFFFFFF).standard_normal(shape)
    if len(shape) > 1:
        return (n / np.sqrt(np.prod(shape[1:]))).astype(np.float32)
    return (1 + 0.1 * n if name.endswith("weight") else 0.1 * n).astype(np.float32)


def main(checkout: str) -> None:
    sys.path.insert(0, checkout)
    for absent in ("mpi4py", "blobfile"):  # imported there, not used by what is recorded
        sys.modules[absent] = types.ModuleType(absent)
    sys.modules["mpi4py"].MPI = None
    from guided_diffusion.image_datasets import center_crop_arr, random_crop_arr
    from guided_diffusion.script_util import create_gaussian_diffusion
    from guided_diffusion.unet import EncoderUNetModel

    model = EncoderUNetModel(
        image_size=16,
        in_channels=3,
        model_channels=32,
        out_channels=7,
        num_res_blocks=1,
        attention_resolutions=(2,),
        channel_mult=(1, 2),
        num_head_channels=64,
        use_scale_shift_norm=True,
        resblock_updown=True,
        pool="attention",
    )
    model.load_state_dict(
        {
            name: torch.from_numpy(fill(name, value.shape))
            for name, value in model.state_dict().items()
        }
    )
    x = np.random.RandomState(7).standard_normal((2, 3, 16, 16)).astype(np.float32)
    x_in = torch.from_numpy(x).requires_grad_()
    t, y = torch.tensor([3, 750]), torch.tensor([1, 5])
    logits = model(x_in, t)
    logits.log_softmax(dim=-1)[range(2), y].sum().backward()
    numbers = {"t": t, "y": y, "logits": logits.detach(), "input_grad": x_in.grad}
    np.savez_compressed(HERE / "model.npz", **{k: np.asarray(v) for k, v in numbers.items()})

    schedules = {}
    for schedule in ("linear", "cosine"):
        for respacing in ("", "50", "ddim25"):
            diffusion = create_gaussian_diffusion(
                noise_schedule=schedule, timestep_respacing=respacing
            )
            name = f"{schedule}_{respacing}"
            schedules[f"{name}_betas"] = diffusion.betas[::40]
            schedules[f"{name}_alphas_cumprod"] = diffusion.alphas_cumprod[::40]
            schedules[f"{name}_timestep_map"] = np.array(diffusion.timestep_map)[::40]
    np.savez_compressed(HERE / "schedules.npz", **schedules)

    pixels = np.random.RandomState(5).randint(0, 256, (47, 61, 3)).astype(np.uint8)
    image = Image.fromarray(pixels)
    images = {"pixels": pixels, "center_16": center_crop_arr(image, 16)}
    tall = Image.fromarray(pixels.transpose(1, 0, 2))
    images["center_16_tall"] = center_crop_arr(tall, 16)
    for seed in range(3):
        random.seed(seed)
        images[f"random_16_{seed}"] = random_crop_arr(image, 16)
    np.savez_compressed(HERE / "images.npz", **images)


if __name__ == "__main__":
    main(sys.argv[1])
