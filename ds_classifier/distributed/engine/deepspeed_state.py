"""Read and set the whole state of a DeepSpeed engine: fp32 weights, and what its optimizer keeps.

ZeRO cuts both into flat shares, one or more per rank. The functions here gather one parameter from
all ranks, or give each rank its part, so that a checkpoint knows nothing of shares.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ds_classifier import distributed

# Implementations that keep the same state -> the name in checkpoints. Others go by their own name.
_KINDS = {
    "AdamW": "Adam",
    "FusedAdam": "Adam",
    "DeepSpeedCPUAdam": "Adam",
    "FusedLion": "Lion",
    "DeepSpeedCPULion": "Lion",
    "DeepSpeedCPUAdagrad": "Adagrad",
    "MuonWithAuxAdam": "Muon",
}
# An implementation's name of a state -> the name in checkpoints.
_OTHER_NAMES = {"DeepSpeedCPUAdagrad": {"exp_avg_sq": "sum"}}


def is_sharded(engine) -> bool:
    """Return whether the parameters themselves are cut into parts, as ZeRO 3 does."""
    return engine.zero_optimization_stage() == 3


def whole_shape(parameter: nn.Parameter) -> torch.Size:
    """Return the shape of a parameter; under ZeRO 3 the tensor itself may be empty."""
    return getattr(parameter, "ds_shape", parameter.shape)


def resumes_exactly(engine) -> bool:
    """Return whether the same number of ranks continue a run bit by bit on a CPU.

    ZeRO 3 of DeepSpeed 0.19.8 does not with torch_autocast, although its state is equal.
    """
    autocast = getattr(engine, "torch_autocast_enabled", lambda: False)
    return not (is_sharded(engine) and autocast())


def trained(module: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that are trained, by name; the others are frozen."""
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


def parameter_counts(engine) -> tuple[int, int]:
    """Return the numbers of the model's trained and of its frozen parameters."""
    everything = sum(whole_shape(p).numel() for p in engine.module.parameters())
    changing = sum(whole_shape(p).numel() for p in trained(engine.module).values())
    return changing, everything - changing


# ------------------------------------------------------------------------- weights


def whole_weight(parameter: nn.Parameter) -> Tensor:
    """Return the fp32 weight of a parameter, gathered from all ranks; every rank must call it."""
    from deepspeed.utils import safe_get_full_fp32_param

    return safe_get_full_fp32_param(parameter)


def set_whole_weight(parameter: nn.Parameter, value: Tensor) -> None:
    """Set the fp32 weight of a parameter; `update_copies` must follow.

    value: the same on all ranks, in the parameter's shape.
    """
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_local_fp32_param

    if hasattr(parameter, "ds_tensor"):
        safe_set_local_fp32_param(parameter, _own_part(parameter, value))
    else:
        safe_set_full_fp32_param(parameter, value)


def update_copies(engine) -> None:
    """Make the weights that the model computes with equal to the fp32 ones; all ranks call it."""
    optimizer = engine.optimizer
    if not is_sharded(engine):
        optimizer.update_lp_params()
        return
    optimizer._partition_all_parameters()
    for group in range(len(optimizer.fp16_groups)):
        optimizer._reassign_or_swap_out_partitioned_parameters(group)
    if optimizer.persistent_parameters:  # small ones, of which each rank has a copy
        optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)


def whole_copies(engine) -> dict[str, Tensor]:
    """Return the state dict that the model computes with; every rank must call it.

    Under ZeRO 3 it is gathered and copied, so that a rank can use it alone.
    """
    if not is_sharded(engine):
        return engine.module.state_dict()
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(engine.module.parameters())):
        return {name: value.clone() for name, value in engine.module.state_dict().items()}


def copies(engine) -> dict[str, Tensor]:
    """Return the trained parameters of which every rank holds a copy, by name.

    Without ZeRO 3 these are all of them.
    """
    named = trained(engine.module).items()
    return {name: p for name, p in named if p.numel() == whole_shape(p).numel()}


def fixed_copies(engine) -> dict[str, Tensor]:
    """Return the buffers, and the frozen parameters of which every rank holds a copy, by name."""
    frozen = {name: p for name, p in engine.module.named_parameters() if not p.requires_grad}
    whole = {name: p for name, p in frozen.items() if p.numel() == whole_shape(p).numel()}
    return whole | dict(engine.module.named_buffers())


def weight_share(engine) -> Iterator[Tensor]:
    """Yield this rank's share of the fp32 weights, in flat pieces."""
    if not is_sharded(engine):
        yield from (share.weights.detach() for share in _shares(engine))
        return
    from deepspeed.utils import safe_get_local_fp32_param

    for parameter in trained(engine.module).values():
        # What fills the last rank's part up to the length of the others is not initialised.
        yield safe_get_local_fp32_param(parameter).detach()[: _own_range(parameter)[1]]


def optimizer_share(engine) -> Iterator[Tensor]:
    """Yield this rank's share of the fp32 weights and of the optimizer's state, in flat pieces."""
    yield from weight_share(engine)
    state = OptimizerState(engine)
    for share in state.shares:
        yield from state.tensors(share).values()


def _own_range(parameter: nn.Parameter) -> tuple[int, int]:
    """Return where this rank's part of a ZeRO 3 parameter begins, and the number of its weights."""
    length = parameter.ds_tensor.numel()
    begin = length * distributed.rank()
    return begin, max(0, min(length, parameter.ds_numel - begin))


def _own_part(parameter: nn.Parameter, value: Tensor) -> Tensor:
    """Return this rank's part of a ZeRO 3 parameter's value, filled up with zeros."""
    begin, length = _own_range(parameter)
    part = value.new_zeros(parameter.ds_tensor.numel())
    part[:length] = value.reshape(-1)[begin : begin + length]
    return part


# ------------------------------------------------------------------------- optimizer state


class Share(NamedTuple):
    """A flat part of the fp32 weights that this rank updates.

    weights: [n], the tensor that the optimizer knows. parameters: all that have a part of it on
    some rank. wholes: None, or the parameters of which this rank keeps the state whole, one after
    the other: Muon under ZeRO 1 and 2 needs matrices.
    """

    weights: Tensor
    parameters: list[nn.Parameter]
    wholes: list[nn.Parameter] | None


def _shares(engine) -> list[Share]:
    """Return this rank's shares; every rank has the same number of them."""
    zero = engine.optimizer
    if is_sharded(engine):
        pairs = zip(zero.fp32_partitioned_groups_flat, zero.fp16_groups, strict=True)
        return [Share(weights, parameters, None) for weights, parameters in pairs]
    if hasattr(zero, "bf16_groups"):  # the optimizer for bf16 under ZeRO 1
        pairs = zip(zero.fp32_groups_flat_partition, zero.bf16_groups, strict=True)
        return [Share(weights, parameters, None) for weights, parameters in pairs]
    shares = []
    for i, weights in enumerate(zero.single_partition_of_fp32_groups):
        parameters = zero.bit16_groups[i]
        whole = getattr(parameters[0], "use_muon", False) and not zero.cpu_offload
        shares.append(Share(weights, parameters, zero.params_in_partition[i] if whole else None))
    return shares


class OptimizerState:
    """The state that an engine's optimizer keeps per weight, such as Adam's exp_avg; for one use.

    Parameters are those of the engine's module. kind: the optimizer's name in checkpoints, such as
    "Adam": the same for every implementation of it.
    """

    def __init__(self, engine):
        self._engine, self._optimizer = engine, engine.optimizer.optimizer
        name = type(self._optimizer).__name__
        self.kind = _KINDS.get(name, name)
        self.shares = _shares(engine)
        self._share_of = {p: share for share in self.shares for p in share.parameters}
        # Muon leaves some parameters to an Adam.
        self._stepping = getattr(self._optimizer, "aux_optimizer", None) or self._optimizer
        self._names = _OTHER_NAMES.get(name, {})  # own name -> name in checkpoints
        self._own_names = {ours: own for own, ours in self._names.items()}
        self._link()

    def _link(self) -> None:
        """Show DeepSpeed's access to whole tensors the tensors that the optimizer has now.

        DeepSpeed does it once, after the first step, but Muon's momentum is replaced later.
        """
        if not is_sharded(self._engine):
            self._engine.optimizer._hp_optimizer_states_linked = False
            self._engine.optimizer._lazy_init_hp_params_optimizer_state()

    def tensors(self, share: Share) -> dict[str, Tensor]:
        """Return what is kept per weight of a share, by the names in checkpoints."""
        return {
            self._names.get(name, name): value
            for name, value in self._optimizer.state.get(share.weights, {}).items()
            if torch.is_tensor(value)
            and (share.wholes is not None or value.shape == share.weights.shape)
        }

    def names(self) -> dict[nn.Parameter, list[str]]:
        """Return the names of what is kept, for each parameter; every rank must call it.

        There are none before the optimizer's first step.
        """
        # A rank without a whole matrix in its share has no momentum for it.
        ranks = distributed.gather_json(
            [list(self.tensors(share)) for share in self.shares], self._engine.device
        )
        return {
            parameter: sorted({name for names in ranks for name in names[i]})
            for i, share in enumerate(self.shares)
            for parameter in share.parameters
        }

    def scalars(self) -> dict[str, float]:
        """Return the numbers that are kept besides, such as the count of steps."""
        return {
            name: float(value)
            for share in self.shares
            for name, value in self._optimizer.state.get(share.weights, {}).items()
            if isinstance(value, (int, float)) or (torch.is_tensor(value) and value.dim() == 0)
        }

    def begin(self, names: dict[nn.Parameter, list[str]], scalars: dict[str, float]) -> None:
        """Give the optimizer what a run under way has: these numbers, and zeros for each name.

        names, scalars: the same on all ranks. Tensors that are there already stay as they are;
        `set_whole` sets them.
        """
        for share in self.shares:
            state = self._optimizer.state[share.weights]
            for name in names.get(share.parameters[0], []):
                if (own := self._own_names.get(name, name)) not in state:
                    wholes = share.wholes
                    size = (
                        share.weights.numel() if wholes is None else sum(p.numel() for p in wholes)
                    )
                    state[own] = share.weights.detach().new_zeros(size)
            if not getattr(share.parameters[0], "use_muon", False):  # its momentum has no count
                for name, value in scalars.items():
                    state[name] = self._number(share, value)
        self._count_steps(int(scalars.get("step", 0)))
        self._link()

    def _count_steps(self, steps: int) -> None:
        """Let DeepSpeedCPUAdam count the steps of a run under way, if it is the optimizer.

        It multiplies its bias corrections by the betas at each step. The power that it takes when
        it begins at a later step differs in the last bit.
        """
        adam = self._stepping
        if not hasattr(adam, "ds_opt_adam"):
            return
        group, nothing = adam.param_groups[0], [torch.zeros(1) for _ in range(4)]
        for step in range(1, steps + 1):
            adam.ds_opt_adam.adam_update(
                adam.opt_id, step, 0.0, *group["betas"], 1e-8, 0.0, True, *nothing
            )

    def _number(self, share: Share, value: float) -> Any:
        """Return a number of the state as this optimizer keeps it: a tensor, or an int or float."""
        optimizer = self._stepping
        if not type(optimizer).__module__.startswith("torch."):
            return int(value) if value == int(value) else value
        group = optimizer.param_groups[0]
        on_device = group.get("fused") or group.get("capturable")
        device = share.weights.device if on_device else "cpu"
        return torch.tensor(value, dtype=torch.float32, device=device)

    def whole(self, parameter: nn.Parameter, name: str) -> Tensor:
        """Return what is kept of a parameter under a name, gathered from all ranks.

        It has the parameter's shape, in fp32. Every rank must call it.
        """
        share = self._share_of[parameter]
        if share.wholes is None:
            from deepspeed.utils import safe_get_full_optimizer_state

            own = self._own_names.get(name, name)
            return safe_get_full_optimizer_state(parameter, own).float()
        # Of the ranks that keep it, the one whose share has the parameter's begin sends it.
        whole = torch.zeros_like(parameter, dtype=torch.float32)
        kept, mapping = self._kept_whole(share, parameter, name), parameter._hp_mapping
        if kept is not None and mapping is not None and mapping.lp_fragment_address.start == 0:
            whole.view(-1).copy_(kept)
        return distributed.all_reduce_sum(whole)

    def set_whole(self, parameter: nn.Parameter, name: str, value: Tensor) -> None:
        """Set what is kept of a parameter; value: the same on all ranks, in its shape."""
        from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

        own, share = self._own_names.get(name, name), self._share_of[parameter]
        if share.wholes is not None:
            if (kept := self._kept_whole(share, parameter, own)) is not None:
                kept.copy_(value.reshape(-1))
        elif hasattr(parameter, "ds_tensor"):
            safe_set_local_optimizer_state(parameter, _own_part(parameter, value), own)
        else:
            safe_set_full_optimizer_state(parameter, value, own)

    def _kept_whole(self, share: Share, parameter: nn.Parameter, name: str) -> Tensor | None:
        """Return this rank's state of a whole parameter, flat; None if it keeps none."""
        begin = 0
        for other in share.wholes or []:
            if other is parameter:
                return self._optimizer.state[share.weights][name][begin : begin + other.numel()]
            begin += other.numel()
        return None
