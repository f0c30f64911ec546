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
    """Weights by name, so that none need to be stored; see `test_encoder.filled`."""
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
    record_sampling()


UNETS = {
    "cond": dict(
        num_classes=7, num_head_channels=32, resblock_updown=True, use_new_attention_order=True
    ),
    "uncond": dict(num_heads=4, num_heads_upsample=2, use_scale_shift_norm=False),
}


def filled(model):
    state = model.state_dict()
    model.load_state_dict({k: torch.from_numpy(fill(k, v.shape)) for k, v in state.items()})
    return model.eval()


def record_sampling() -> None:
    """Outputs of two small UNets, and what guided DDPM and DDIM loops end in."""
    from guided_diffusion.script_util import create_gaussian_diffusion
    from guided_diffusion.unet import EncoderUNetModel, UNetModel

    common = dict(
        image_size=16,
        in_channels=3,
        model_channels=32,
        num_res_blocks=1,
        attention_resolutions=(2,),
        channel_mult=(1, 2),
    )
    x = torch.from_numpy(np.random.RandomState(7).standard_normal((2, 3, 16, 16))).float()
    t, y = torch.tensor([3, 750]), torch.tensor([1, 5])
    numbers = {"t": t.numpy(), "y": y.numpy()}
    unets = {}
    for name, settings in UNETS.items():
        channels = 6 if name == "cond" else 3
        own = {"use_scale_shift_norm": True} | settings
        unets[name] = filled(UNetModel(out_channels=channels, **common, **own))
        with torch.no_grad():
            output = unets[name](x, t, y if name == "cond" else None)
        numbers[f"output_{name}"] = output.numpy()
    classifier = filled(
        EncoderUNetModel(
            out_channels=7,
            num_head_channels=64,
            use_scale_shift_norm=True,
            resblock_updown=True,
            pool="attention",
            **common,
        )
    )

    def cond_fn(x, t, y=None):  # as in classifier_sample.py
        with torch.enable_grad():
            x_in = x.detach().requires_grad_(True)
            selected = classifier(x_in, t).log_softmax(dim=-1)[range(len(x)), y]
            return torch.autograd.grad(selected.sum(), x_in)[0] * 3.0

    plain = torch.randn_like
    for name, unet in unets.items():
        for loop, respacing in (("p_sample_loop", "10"), ("ddim_sample_loop", "ddim5")):
            diffusion = create_gaussian_diffusion(
                noise_schedule="linear", timestep_respacing=respacing, learn_sigma=name == "cond"
            )
            draws = np.random.RandomState(19)
            torch.randn_like = lambda x, draws=draws: torch.from_numpy(
                draws.standard_normal(tuple(x.shape))
            ).float()

            def model_fn(x, t, y=None, unet=unet):
                return unet(x, t, y if unet.num_classes else None)

            numbers[f"{loop}_{name}"] = getattr(diffusion, loop)(
                model_fn,
                tuple(x.shape),
                noise=torch.randn_like(x),
                model_kwargs={"y": y},
                cond_fn=cond_fn,
                device="cpu",
            ).numpy()
    torch.randn_like = plain
    np.savez_compressed(HERE / "sampling.npz", **numbers)


if __name__ == "__main__":
    main(sys.argv[1])
