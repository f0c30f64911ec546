"""What a step costs on many GPUs: computed from arithmetic and bytes, not measured.

Compute: training FLOPs over a share of the GPUs' peak (MFU, an assumption). Communication: what a
rank sends in a step as DeepSpeed 0.19 does it, which tests/traffic.py counted on a wire: gradients
are summed over all ranks in full, 2(W-1)/W of their bytes (Patarasuk & Yuan 2009), once a step with
ZeRO 1 and once a micro-batch with ZeRO 2; then the new weights are gathered, (W-1)/W.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

LATENCY_SECONDS = 15e-6  # of a hop between nodes, assumed
BUCKETS = 5  # reductions and gathers a step, as our configs cut the gradients


@dataclass(frozen=True)
class Job:
    """forward_flops: of a picture. bytes_a_value: 2 for 16 bits. wire: bytes a second and GPU."""

    parameters: int
    forward_flops: float
    global_batch: int
    peak_flops: float
    mfu: float
    wire: float
    bytes_a_value: int = 2


@dataclass(frozen=True)
class Step:
    """One optimizer step on W GPUs. Seconds; bytes are a rank's."""

    gpus: int
    micro_batch: int
    accumulation: int
    stage: int
    sent: float
    compute: float
    communication: float

    @property
    def seconds(self) -> float:
        """At worst: nothing of the communication is hidden behind the backward."""
        return self.compute + self.communication

    @property
    def efficiency(self) -> float:
        return self.compute / self.seconds


def step(job: Job, gpus: int, *, stage: int, largest_micro_batch: int) -> Step | None:
    """None where the global batch does not have a whole number of pictures for every GPU."""
    share, rest = divmod(job.global_batch, gpus)
    if rest or not share:
        return None
    micro = max(b for b in range(1, min(share, largest_micro_batch) + 1) if share % b == 0)
    accumulation = share // micro
    sent = bytes_sent(job.parameters * job.bytes_a_value, gpus, stage, accumulation)
    hops = 2 * math.ceil(math.log2(gpus)) if gpus > 1 else 0
    reductions = accumulation if stage == 2 else 1
    return Step(
        gpus=gpus,
        micro_batch=micro,
        accumulation=accumulation,
        stage=stage,
        sent=sent,
        compute=share * 3 * job.forward_flops / (job.mfu * job.peak_flops),
        communication=sent / job.wire + (reductions + 1) * BUCKETS * hops * LATENCY_SECONDS,
    )


def bytes_sent(weights: float, gpus: int, stage: int, accumulation: int) -> float:
    """By a rank, in a step. weights: bytes of all of them. stage: 0 (plain data parallel), 1, 2."""
    reductions = accumulation if stage == 2 else 1
    gathers = 0 if stage == 0 else 1
    return weights * (2 * reductions + gathers) * (gpus - 1) / gpus
