"""Combinations that DeepSpeed asserts against only when it builds its engine."""

from __future__ import annotations

from collections.abc import Iterator

from ds_classifier.config.deepspeed_json.draft import Draft, Path
from ds_classifier.config.deepspeed_json.known import silent

# (key, what is wrong and what to do, the value with which the check goes on)
Clash = tuple[Path, str, object]


def check_clashes(draft: Draft, accumulation: int) -> None:
    """Refuse every combination that would end in an assertion after the check.

    accumulation: micro-batches per rank and step.
    """
    if draft.settings.muon_lr_scale:
        _make_room_for_muon(draft, accumulation)
    for path, message, mended in list(_clashes(draft, accumulation)):
        draft.refuse(path, message, mended)


def _make_room_for_muon(draft: Draft, accumulation: int) -> None:
    """Change what Muon cannot run with in a JSON that was written for AdamW, and say so."""
    if _flattens_matrices(draft, accumulation):
        draft.set("zero_optimization", "stage", 2)
        draft.notes.append(
            "ZeRO stage 1: run as stage 2, in which Muon can sum bf16 gradients in fp32"
        )
    if _scatters_matrices(draft):
        draft.set("zero_optimization", "reduce_scatter", False)
        draft.notes.append(
            "zero_optimization.reduce_scatter: run as false, since Muon needs whole gradients"
        )


def _clashes(draft: Draft, accumulation: int) -> Iterator[Clash]:
    stage = draft.get("zero_optimization", "stage", default=0)
    kind = draft.get("optimizer", "type").lower()
    scatters = draft.get("zero_optimization", "reduce_scatter", default=True)
    if scatters and stage >= 2:
        without = f"with ZeRO stage {stage} and reduce_scatter"
        if draft.get("prescale_gradients"):
            yield ("prescale_gradients",), f"got true; need false {without}", False
        if (factor := draft.get("gradient_predivide_factor", default=1)) != 1:
            yield ("gradient_predivide_factor",), f"got {factor}; need 1 {without}", 1
    if _scatters_matrices(draft):
        key = ("zero_optimization", "reduce_scatter")
        yield key, "got true; need false with Muon in ZeRO stage 3", False
    if _flattens_matrices(draft, accumulation):
        key = ("zero_optimization", "stage")
        zero = draft.advised.get("zero_optimization")
        asked = int(zero.get("stage", 0) if isinstance(zero, dict) else bool(zero))
        got = "1" if asked == 1 else "0, which is run as 1"
        need = "with Muon, bf16 and gradients that are summed in fp32"
        yield key, f"got {got}; need 2 or 3 {need}", 2
    if not (draft.get("zero_allow_untested_optimizer") or _is_tested(draft, kind)):
        name = draft.get("optimizer", "type")
        need = f"missing; need true for {name}, which DeepSpeed has not tested under ZeRO"
        yield ("zero_allow_untested_optimizer",), need, True
    yield from _offloading(draft, stage)


def _scatters_matrices(draft: Draft) -> bool:
    """Return True if Muon would get parts of gradients, in stage 3."""
    zero = draft.section("zero_optimization")
    return draft.has_muon and zero.get("stage") == 3 and zero.get("reduce_scatter", True)


def _flattens_matrices(draft: Draft, accumulation: int) -> bool:
    """Return True if Muon would get flat gradients, from DeepSpeed's optimizer for bf16.

    That is the one of stage 1 where bf16 is summed in fp32.
    """
    from deepspeed.runtime.config import DtypeEnum

    if not draft.has_muon or draft.get("zero_optimization", "stage") != 1:
        return False
    if not draft.get("bf16", "enabled") or draft.section("zero_optimization", "offload_optimizer"):
        return False
    sums = draft.get("data_types", "grad_accum_dtype")
    return accumulation > 1 if sums is None else DtypeEnum(sums).name == "fp32"


def _is_tested(draft: Draft, kind: str) -> bool:
    """Return True if DeepSpeed lets ZeRO divide the state of an optimizer."""
    from deepspeed.runtime.zero import utils

    with silent():
        tested = {made.__name__.lower() for made in utils.ZERO_SUPPORTED_OPTIMIZERS}
    muon = hasattr(utils, "is_zero_supported_optimizer") and kind == "muon"
    return muon or any(kind in name for name in tested)


def _offloading(draft: Draft, stage: int) -> Iterator[Clash]:
    section = draft.section("zero_optimization")
    for key in ("offload_optimizer", "offload_param"):
        # Stages 1 and 2 offload to the CPU then. In stage 3 the flat tensors, which a checkpoint
        # reads and sets, are empty between steps.
        if stage == 3 and section.get(key, {}).get("device") == "nvme":
            need = (
                'got "nvme"; need "cpu": checkpoints are made of what is in memory, not on a disk'
            )
            yield ("zero_optimization", key, "device"), need, "cpu"
    if stage == 3 and section.get("offload_optimizer", {}).get("super_offload"):
        from deepspeed.accelerator import get_accelerator

        if (device := get_accelerator().device_name()) != "cuda":
            key = ("zero_optimization", "offload_optimizer", "super_offload")
            yield key, f"got true; need false on {device}: it is for NVIDIA GPUs alone", False
    ratio = section.get("offload_optimizer", {}).get("ratio", 1)
    if ratio < 1 and draft.get("optimizer", "params", "torch_adam"):
        key = ("zero_optimization", "offload_optimizer", "ratio")
        yield key, f"got {ratio}; need 1.0 with torch's Adam, or torch_adam false", 1.0
