"""Combinations that DeepSpeed asserts against only when it builds its engine."""

from __future__ import annotations

from collections.abc import Iterator

from ds_classifier.config.deepspeed_json.draft import Draft, Path
from ds_classifier.config.deepspeed_json.known import silent

# (key, what is wrong and what to do, the value with which the check goes on)
Clash = tuple[Path, str, object]


def check_clashes(draft: Draft) -> None:
    """Refuse every combination that would end in an assertion after the check."""
    for path, message, mended in list(_clashes(draft)):
        draft.refuse(path, message, mended)


def _clashes(draft: Draft) -> Iterator[Clash]:
    stage = draft.get("zero_optimization", "stage", default=0)
    kind = draft.get("optimizer", "type").lower()
    scatters = draft.get("zero_optimization", "reduce_scatter", default=True)
    if scatters and stage >= 2:
        without = f"with ZeRO stage {stage} and reduce_scatter"
        if draft.get("prescale_gradients"):
            yield ("prescale_gradients",), f"got true; need false {without}", False
        if (factor := draft.get("gradient_predivide_factor", default=1)) != 1:
            yield ("gradient_predivide_factor",), f"got {factor}; need 1 {without}", 1
    if kind == "muon" and stage == 3 and scatters:
        key = ("zero_optimization", "reduce_scatter")
        yield key, "got true; need false with Muon in ZeRO stage 3", False
    if kind == "lamb" and not (draft.get("fp16", "enabled") and not _loss_scale(draft)):
        key = ("optimizer", "type")
        yield key, "got Lamb; it needs fp16 with dynamic loss scaling; do: use AdamW", "AdamW"
    if not (draft.get("zero_allow_untested_optimizer") or _is_tested(draft, kind)):
        name = draft.get("optimizer", "type")
        need = f"missing; need true for {name}, which DeepSpeed has not tested under ZeRO"
        yield ("zero_allow_untested_optimizer",), need, True
    yield from _offloading(draft, stage)


def _loss_scale(draft: Draft) -> float:
    return draft.get("fp16", "loss_scale", default=0)


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
        part = section.get(key, {})
        if part.get("device") != "nvme" or stage < 3:  # stages 1 and 2 offload to the CPU then
            continue
        if not part.get("nvme_path"):
            need = "missing; need the directory that the state is moved to"
            yield ("zero_optimization", key, "nvme_path"), need, "/tmp"
        if not _can_read_disks():
            need = 'got "nvme"; need libaio, which is not installed here; do: write "cpu"'
            yield ("zero_optimization", key, "device"), need, "cpu"
    ratio = section.get("offload_optimizer", {}).get("ratio", 1)
    if ratio < 1 and draft.get("optimizer", "params", "torch_adam"):
        key = ("zero_optimization", "offload_optimizer", "ratio")
        yield key, f"got {ratio}; need 1.0 with torch's Adam; or write torch_adam false", 1.0


def _can_read_disks() -> bool:
    from deepspeed.accelerator import get_accelerator

    with silent():
        builder = get_accelerator().create_op_builder("AsyncIOBuilder")
        return builder is not None and builder.is_compatible(False)
