"""Memory of a rank: how much is in use, and what to say when there is too little."""

from __future__ import annotations

import resource

import torch


def memory_in_use(device: torch.device) -> int:
    """Peak bytes of this rank: allocated on the GPU, or resident in memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on a GPU or on the CPU."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    )


class MemoryAdvice:
    """What to do when a micro-batch does not fit, from what the run has used so far.

    Made when the engine stands and before the first step: what is in use then does not grow with
    the micro-batch.
    """

    def __init__(self, device: torch.device, *, micro_batch: int, image_size: int):
        self._device, self._micro, self._size = device, micro_batch, image_size
        self._resting = memory_in_use(device)

    def __call__(self, error: BaseException) -> str | None:
        """The message for an error that is about memory, or None."""
        if not is_out_of_memory(error):
            return None
        used = memory_in_use(self._device) - self._resting
        each = used / self._micro
        fits = self._micro // 2
        if self._device.type == "cuda" and each > 0:
            total = torch.cuda.get_device_properties(self._device).total_memory
            fits = min(fits, int(0.9 * (total - self._resting) / each))
        reason = str(error).strip().splitlines()[0] if str(error).strip() else "MemoryError"
        text = (
            f"out of memory: got micro-batch {self._micro} at {self._size} px, which had taken "
            f"{each / 2**20:.1f} MB an image when it failed, beside {self._resting / 2**30:.2f} GB "
            "for everything else"
        )
        if fits < 1:
            return f"{text}; do: train on a device with more memory ({reason})"
        return (
            f"{text}; need less; do: set train_micro_batch_size_per_gpu in the JSON to {fits} or "
            f"less (the accumulation makes up for it under --global_batch) ({reason})"
        )
