"""Networks that are not the reference's encoder: what they must be, and how they are built.

A network is any nn.Module with forward(x [N, C, S, S], t [N]) -> logits [N, K], where x is in the
precision of its weights and t is int64, or fp32 for levels between the steps. It keeps the names of
its parameters, and trains in eval mode: batch norms keep their statistics and dropout draws
nothing, so that a step is the same on any number of ranks and after a resume.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import TorchDispatchMode

from ds_classifier.common.text import count
from ds_classifier.common.user_code import described, load_function
from ds_classifier.model.torchvision_networks import is_torchvision

aten = torch.ops.aten
OFFERED = ("num_classes", "image_size", "in_channels")  # keywords of a factory
FORWARD = "forward(x [N, C, S, S], t [N]) -> logits [N, K]"
TRIED = 2  # images of the first try
SHORT = (torch.float16, torch.bfloat16)
# Layers of torchvision and timm that leave out a path at random, by their class.
STOCHASTIC_DEPTH = ("StochasticDepth", "DropPath")


def names_own_code(classifier: str) -> bool:
    """Return whether a --classifier names a function of the user's, which is code to be run."""
    return bool(classifier) and not is_torchvision(classifier)


def create(name: str, arguments: dict[str, Any], sizes: Mapping[str, int]) -> nn.Module:
    """Return the network that a factory of the user's builds, with 16-bit weights as fp32.

    name: "package.module:factory". arguments: its keywords. sizes: the values of OFFERED, of which
        it gets those that its signature names, or all if it takes any keyword.
    Raises ValueError if it cannot be called so, raises an error, or returns no network.
    """
    factory = load_function("--classifier", name)
    try:
        signature = inspect.signature(factory)
    except (TypeError, ValueError):  # of compiled code
        signature = inspect.Signature()
    takes_all = any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values())
    offered = {k: v for k, v in sizes.items() if takes_all or k in signature.parameters}
    try:
        signature.bind(**offered | arguments)
    except TypeError as error:
        raise ValueError(
            f"--classifier_args: got {', '.join(arguments) or 'none'}; need those of "
            f"{name}{signature} ({error}); {', '.join(OFFERED)} are given to it if it names them"
        ) from None
    try:
        network = factory(**offered | arguments)
    except Exception as error:  # the user's code can raise anything
        raise ValueError(f"--classifier: got {name}, which raised {described(error)}") from error
    if not isinstance(network, nn.Module):
        raise ValueError(
            f"--classifier: got {name}, which returned a {type(network).__name__}; need an "
            f"nn.Module with {FORWARD}"
        )
    _check_parameters(network, name)
    # Weights in 16 bits would round those of a checkpoint, which are fp32, when it is loaded.
    return network._apply(lambda value: value.float() if value.dtype in SHORT else value)


def _check_parameters(network: nn.Module, name: str) -> None:
    """Raise ValueError for parameters that cannot be trained, cast or stored by their names."""
    parameters = dict(network.named_parameters())
    fault = "" if parameters else "has no parameters; need some to train"
    if other := [n for n, p in parameters.items() if not p.is_floating_point()]:
        fault = f"has {other[0]} of {parameters[other[0]].dtype}; need floating parameters; do: "
        fault += "make it a buffer"
    shared = dict(network.named_parameters(remove_duplicate=False)).keys() - parameters.keys()
    if shared:
        fault = f"has {min(shared)}, which is another parameter too; need one name for each"
    if lazy := [n for n, v in parameters.items() if is_lazy(v)]:
        fault = f"has {lazy[0]} without a shape; need layers that are not lazy"
    elif empty := [n for n, v in parameters.items() if not v.numel()]:
        shape = list(parameters[empty[0]].shape)
        fault = f"has {empty[0]} of the shape {shape}; need numbers in it"
    if fault:
        raise ValueError(f"--classifier: got {name}, which {fault}")


def load_weights(network: nn.Module, weights: Mapping[str, Tensor], *, strict: bool = True) -> None:
    """Set a network's state to tensors by name, which files hold without the versions of layers.

    strict: refuse missing and further names. Some layers, as those of torchvision's MNASNet, refuse
    a state without a version. It is that of the network, whose code wrote the weights.
    """
    state = network.state_dict()
    versions = state._metadata
    state.clear()
    state.update(weights)
    state._metadata = versions
    network.load_state_dict(state, strict=strict)


def cast_floating(network: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Cast the floating parameters and buffers of a network, in place, and return it.

    nn.Module.to casts complex buffers as well, and so drops their imaginary parts.
    """
    return network._apply(lambda value: value.to(dtype) if value.is_floating_point() else value)


def as_classifier(network: nn.Module, name: str, num_classes: int) -> nn.Module:
    """Return a network in eval mode that casts its input, returns fp32, and checks the shape.

    name: its --classifier, for errors.
    """

    def cast(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        # Contiguous, since many networks flatten with view.
        x = args[0].to(next(module.parameters()).dtype)
        return (x.contiguous(), *args[1:])

    def check(module: nn.Module, args: tuple[Any, ...], logits: Any) -> Tensor:
        need = [len(args[0]), num_classes]
        if not torch.is_tensor(logits) or list(logits.shape) != need:
            got = list(logits.shape) if torch.is_tensor(logits) else f"a {type(logits).__name__}"
            raise ValueError(
                f"--classifier: got {got} from {name}; need logits [N, num_classes], {need} here"
            )
        return logits.float()

    for value in (*network.parameters(), *network.buffers()):
        # An expanded buffer cannot be written to, and DeepSpeed cannot send channels_last.
        value.data = value.data.contiguous()
    network.register_forward_pre_hook(cast)
    network.register_forward_hook(check)
    return network.eval()


def try_once(
    network: nn.Module, name: str, *, image_size: int, in_channels: int, dtype: torch.dtype
) -> None:
    """Run a network's forward and backward once, on shapes alone where that works.

    name: its --classifier. dtype: of the weights in training.
    Raises ValueError if the forward raises an error or gives another shape, or if its logits have
    no gradient for x, which guidance needs.
    """
    # A CPU may lack fp16; types that do not match are found with bf16 as well.
    dtype = dtype if dtype == torch.float32 else torch.bfloat16
    try:
        problem = _problem(network, image_size, in_channels, dtype, "meta")
    except Exception:  # what computes with numbers cannot run there, and may be right
        try:
            problem = _problem(network, image_size, in_channels, dtype, "cpu")
        except Exception as error:
            if isinstance(error, ValueError) and str(error).startswith("--classifier"):
                raise
            precision = "" if dtype == torch.float32 else " with 16-bit weights"
            cast = "" if dtype == torch.float32 else (
                "; need one that casts what it makes from t to x.dtype"
            )  # fmt: skip
            raise ValueError(
                f"--classifier: got {name}, whose forward{precision} raised {described(error)} for "
                f"x [{TRIED}, {in_channels}, {image_size}, {image_size}] and t [{TRIED}]{cast}"
            ) from error
    if problem:
        raise ValueError(f"--classifier: got {name}, {problem}")


def _problem(
    network: nn.Module, image_size: int, in_channels: int, dtype: torch.dtype, device: str
) -> str:
    """Return what is wrong with the gradient of a network's logits; "" if nothing is."""

    def there(value: Tensor) -> Tensor:
        kind = dtype if value.is_floating_point() else value.dtype
        if device == "meta":
            moved = torch.empty_like(value, dtype=kind, device=device)
        else:
            moved = value.detach().to(kind)
        return moved.requires_grad_(value.requires_grad)

    tensors = {n: there(v) for n, v in (*network.named_parameters(), *network.named_buffers())}
    x = torch.zeros(TRIED, in_channels, image_size, image_size, device=device, requires_grad=True)
    t = torch.zeros(TRIED, dtype=torch.int64, device=device)
    versions = {name: tensors[name]._version for name, _ in network.named_buffers()}
    with _SameTypes():
        logits = functional_call(network, tensors, (x, t))
    for name, version in versions.items():
        if tensors[name]._version != version:
            return (
                f"whose forward changes the buffer {name} in eval mode; need buffers that stay, as "
                "ranks and checkpoints have them; do: change it only if self.training"
            )
    need = "need it for guidance, which follows that gradient"
    if not logits.requires_grad:
        return (
            f"whose logits have no gradient; {need}; do: drop no_grad and detach from its forward"
        )
    (gradient,) = torch.autograd.grad(logits.sum(), x, allow_unused=True)
    return "" if gradient is not None else f"whose logits do not depend on x; {need}"


class _SameTypes(TorchDispatchMode):
    """A mode in which products of tensors of two types fail, as they do on every real device."""

    PRODUCTS = (aten.mm, aten.addmm, aten.bmm, aten.baddbmm, aten.convolution)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        floating = (a for a in args if torch.is_tensor(a) and a.is_floating_point())
        if func.overloadpacket in self.PRODUCTS and len({a.dtype for a in floating}) > 1:
            raise RuntimeError("got tensors of two types")
        return func(*args, **(kwargs or {}))


def eval_mode_notes(network: nn.Module) -> list[str]:
    """Return lines on the layers of a network that eval mode changes; empty if there are none."""
    norms = [m for m in network.modules() if isinstance(m, _BatchNorm)]
    random = [m for m in network.modules() if _draws(m)]
    lines = []
    if norms:
        keep = "keep their" if len(norms) > 1 else "keeps its"
        lines.append(f"{count(len(norms), 'batch norm')} {keep} statistics, as in eval mode")
    if random:
        kinds = ", ".join(sorted({type(m).__name__ for m in random}))
        draw = "draw" if len(random) > 1 else "draws"
        lines.append(f"{count(len(random), 'layer')} ({kinds}) {draw} nothing, as in eval mode")
    kept = [m for m in norms if m.running_mean is not None]
    if kept and not any(bool(m.running_mean.any()) for m in kept):
        lines.append(
            "these statistics are those of a new network, mean 0 and variance 1, so that its norms "
            "do not normalise; do: start it from trained weights with --init_from, or build it "
            "with group norms"
        )
    return lines


def _draws(module: nn.Module) -> bool:
    """Return whether a layer draws random numbers in training mode."""
    if type(module).__name__ in STOCHASTIC_DEPTH:
        return bool(getattr(module, "p", None) or getattr(module, "drop_prob", None))
    return isinstance(module, _DropoutNd) and module.p > 0
