"""Find a network's tensors in what other trainers save around them.

DDP and DeepSpeed put `module.` before each name, torch.compile `_orig_mod.`, and Lightning the name
of an attribute, such as `model.`. Many save a dict in which the state dict is one value of several:
`state_dict` (Lightning), `module` (DeepSpeed's mp_rank_00_model_states.pt), `model`.
"""

from __future__ import annotations

import re
from typing import Any

import torch

# A name in guided-diffusion's networks, after whatever stands before it.
PREFIXED = re.compile(r"((?:[^.]+\.)*?)input_blocks\.")


def unwrap(content: Any) -> Any:
    """Return the state dict of the one network in a file, its names without a prefix.

    content: what the file holds. It is returned unchanged if no network is found, for another
    check to name the fault. Values of the file that are not below the network's prefix are left
    out: optimizer states, counters, weights of a loss.
    Raises ValueError if there are several networks, such as weights and their moving average.
    """
    if not isinstance(content, dict):
        return content
    inner = {key: value for key, value in content.items() if isinstance(value, dict)}
    places = [(key, value, prefix) for key, value in inner.items() for prefix in _prefixes(value)]
    places += [(None, content, prefix) for prefix in _prefixes(content)]
    if len(places) > 1:
        named = [prefix if key is None else f"{key!r} {prefix}" for key, _, prefix in places]
        raise ValueError(
            f"got {len(places)} networks ({', '.join(map(str.strip, named))}); need one; do: save "
            "its state dict alone"
        )
    for _, state, prefix in places:
        if state is not content or prefix:
            return {
                name.removeprefix(prefix): value
                for name, value in state.items()
                if isinstance(name, str) and name.startswith(prefix)
            }
    return content


def _prefixes(state: dict[Any, Any]) -> list[str]:
    """Return what stands before the names of the networks in a dict, each once."""
    names = (k for k, value in state.items() if isinstance(k, str) and torch.is_tensor(value))
    found = map(PREFIXED.match, names)
    return list(dict.fromkeys(match[1] for match in found if match))
