"""Ask the installed DeepSpeed what it knows of a JSON, section by section.

DeepSpeed reads its JSON in two ways. Some sections are pydantic models, which refuse keys that
they do not know (older versions ignored them); the rest are dicts, of which it takes what it asks
for and ignores all else. So each section is handed to DeepSpeed's own reader in a dict that notes
what is asked of it. With it come the types, which are those of the defaults that DeepSpeed gives.
"""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Collection, Iterator, KeysView
from typing import Any

from ds_classifier.config.batch_sizes import AUTO
from ds_classifier.config.deepspeed_json.draft import (
    BOOL,
    INT,
    NUMBER,
    STR,
    Draft,
    Path,
    shown,
    type_of,
)

_ONE_BATCH = {"train_micro_batch_size_per_gpu": 1}  # without a size, DeepSpeed reads nothing
# What other programs call a key -> DeepSpeed's name.
ELSEWHERE = {
    "zero": "zero_optimization",
    "max_grad_norm": "gradient_clipping",
    "learning_rate": "lr",
}
COMMON = ("lr", "betas", "eps", "weight_decay")  # what most optimizers take, in optimizer.params
# Sections whose parameters go to an optimizer or a scheduler, which are asked elsewhere.
_WITH_PARAMS = ("optimizer", "scheduler")
SECTION = "a section {...}"
# How pydantic's names of errors begin -> what is needed.
_TYPES = {
    "bool": BOOL,
    "int_": INT,
    "float_": NUMBER,
    "string_": STR,
    "dict_": SECTION,
    "model_": SECTION,
    "path_": "a path",
}


class Asked(dict):
    """A section of the JSON that notes the keys that are asked for, and their defaults.

    asked: {key: the default that came with the question, or None}.
    """

    def __init__(self, values: dict[str, Any]):
        super().__init__({k: Asked(v) if isinstance(v, dict) else v for k, v in values.items()})
        self.asked: dict[str, Any] = {}

    def get(self, key: str, default: Any = None) -> Any:
        if self.asked.get(key) is None:
            self.asked[key] = default
        return super().get(key, default)

    def __getitem__(self, key: str) -> Any:
        self.asked.setdefault(key)
        return super().__getitem__(key)

    def __contains__(self, key: object) -> bool:
        self.asked.setdefault(str(key))
        return super().__contains__(key)

    def __iter__(self) -> Iterator[str]:
        yield from super().__iter__()  # without this, Model(**section) would not ask __getitem__

    def keys(self) -> KeysView[str]:
        return KeysView(self)  # whose `in` asks for one key, as `if "fp16" in config.keys()` does

    def items(self) -> Any:
        return [(key, self[key]) for key in self]

    def __copy__(self) -> Asked:
        return self  # DeepSpeed reads a copy


def version() -> str:
    """Return the version of the installed DeepSpeed."""
    import deepspeed

    return deepspeed.__version__


@contextlib.contextmanager
def silent() -> Iterator[None]:
    """Keep DeepSpeed's logger silent: it would repeat its warnings at each question."""
    logger = logging.getLogger("DeepSpeed")
    disabled, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = disabled


def _read(values: dict[str, Any]) -> tuple[Asked, Exception | None]:
    """Let DeepSpeed read a JSON; return what it asked for, and the error that it ended with."""
    from deepspeed.runtime.config import DeepSpeedConfig

    asked = Asked(_ONE_BATCH | values)
    try:
        with silent():
            DeepSpeedConfig(asked)
    except Exception as error:  # DeepSpeed asserts, and raises errors of many types
        return asked, error
    return asked, None


def keys_of_top_level() -> dict[str, Any]:
    """Return the keys that DeepSpeed reads at the top level, with the defaults that it has."""
    return _read({})[0].asked


def check_keys(draft: Draft) -> None:
    """Refuse what DeepSpeed refuses, and note what it ignores, of all sections of the draft.

    What it refuses or ignores is removed. A key that is "auto" is left to DeepSpeed's default.
    """
    known, ignored = draft.known, []
    for key in [key for key in draft.ds if key not in known]:
        _unknown(draft, (key,), known, ignored)
    for key in list(draft.ds):
        if key in _WITH_PARAMS:
            if not isinstance(draft.ds[key], dict):
                draft.refuse((key,), f"got {shown(draft.ds[key])}; need {SECTION}")
            for inner in list(draft.section(key)):
                if inner not in ("type", "params", "legacy_fusion"):
                    _outside_params(draft, (key, inner))
        else:
            if (kind := type_of(known[key])) is not None:
                draft.check_type((key,), kind)
            draft.check_type((key, "enabled"), BOOL)  # models of DeepSpeed take "yes" for true
            _check_section(draft, key, ignored)
    if ignored:
        draft.notes.append(f"DeepSpeed {version()} has no {', '.join(ignored)}: ignored")
    if misplaced := [key for key in ignored if key in COMMON]:
        draft.notes.append(f"DeepSpeed reads {', '.join(misplaced)} in optimizer.params alone")


def _check_section(draft: Draft, key: str, ignored: list[str]) -> None:
    """Ask DeepSpeed about one section until it takes what is left of it."""
    while key in draft.ds:
        asked, error = _read({key: draft.ds[key]})
        if draft.ds[key] == AUTO:
            if error is not None and _need(error) == SECTION:
                choice = [{"enabled": AUTO}] if key in ("fp16", "bf16") else []
                draft.refuse((key,), f'got "auto"; need {SECTION}', *choice)
            return
        if error is None:
            if isinstance(asked[key], Asked) and asked[key].asked:
                _check_plain(draft, (key,), asked[key], ignored)
            return
        errors = getattr(error, "errors", None)
        if errors is None or not _refuse_fields(draft, key, errors(), ignored):
            path = _culprit(draft, key)
            draft.refuse(path, f"got {shown(draft.get(*path))}; need {_need(error)}")


def _culprit(draft: Draft, key: str) -> Path:
    """Return the key of a section without which DeepSpeed takes the rest; else the section."""
    section = draft.section(key)
    for name in [name for name in section if name != "enabled"]:  # what is off is never wrong
        if _read({key: {k: v for k, v in section.items() if k != name}})[1] is None:
            return key, name
    return (key,)


def _need(error: Exception) -> str:
    """Return what DeepSpeed wants in place of a value that it failed on."""
    text = " ".join(str(error).split()) or type(error).__name__
    if re.search(r"attribute '(keys|get|items)'|must be a mapping|not iterable", text):
        return SECTION
    if found := re.search(r"(?:Assertion failed|Value error), (.+?) \[type=", text):
        text = found[1]  # without pydantic's frame
    return f"what DeepSpeed takes: {text}"


def _check_plain(draft: Draft, path: Path, asked: Asked, ignored: list[str]) -> None:
    """Check the keys of a section that DeepSpeed takes without looking at all of them."""
    for key in [key for key in draft.section(*path) if key not in asked.asked]:
        _unknown(draft, (*path, key), asked.asked, ignored)
    for key in list(draft.section(*path)):
        if (kind := type_of(asked.asked[key])) is not None:
            draft.check_type((*path, key), kind)


def _refuse_fields(
    draft: Draft, key: str, errors: list[dict[str, Any]], ignored: list[str]
) -> bool:
    """Refuse the fields that a model of DeepSpeed refuses; return False if it names none.

    Fields that it does not know are ignored here, as older versions of DeepSpeed ignore them.
    """
    found = False
    for error in errors:
        where = tuple(str(part) for part in error["loc"])
        path = (key, *where)
        parent = draft.section(*path[:-1])
        if len(path) < 2 or path[-1] not in parent:
            continue
        found = True
        if error["type"] == "extra_forbidden":
            fields = _fields_of(path).items()
            names = [field.alias or name for name, field in fields]
            _unknown(draft, path, names, ignored)
        else:
            draft.refuse(path, f"got {shown(parent[path[-1]])}; need {_field_need(error)}")
    return found


def _field_need(error: dict[str, Any]) -> str:
    """Return what a field of a model must be, in the words of the other checks."""
    for kind, need in _TYPES.items():
        if error["type"].startswith(kind):
            return need
    need = error["msg"].removeprefix("Input should be ")
    need = re.sub(r"^Value error, (\S+ must be )?", "", need)
    return re.sub(r", (\w+) or \1$", r" or \1", need)  # an alias in DeepSpeed's stages


def default_of(path: Path, known: dict[str, Any]) -> Any:
    """Return DeepSpeed's default of a key."""
    if len(path) == 1:
        return known.get(path[0])
    for name, field in _fields_of(path).items():
        if path[-1] in (name, field.alias):
            return field.default
    return "DeepSpeed's default"


def _fields_of(path: Path) -> dict[str, Any]:
    """Return the fields of DeepSpeed's model of the section that a key is in; {} if it has none."""
    from deepspeed.runtime.zero import config, offload_config

    models = {
        ("zero_optimization",): config.DeepSpeedZeroConfig,
        ("zero_optimization", "offload_param"): offload_config.DeepSpeedZeroOffloadParamConfig,
        (
            "zero_optimization",
            "offload_optimizer",
        ): offload_config.DeepSpeedZeroOffloadOptimizerConfig,
    }
    try:  # older versions have no model of them
        from deepspeed.runtime import precision_config

        models["fp16",] = precision_config.DeepSpeedFP16Config
        models["bf16",] = precision_config.DeepSpeedBF16Config
    except ImportError:
        pass
    model = models.get(path[:-1])
    return model.model_fields if model is not None else {}


def _unknown(draft: Draft, path: Path, known: Collection[str], ignored: list[str]) -> None:
    """Refuse a key that DeepSpeed ignores if it is a slip of the keyboard; else note it."""
    if near := nearest(path[-1], known):
        draft.rename(path, "unknown key", near)
    else:
        ignored.append(".".join(path))
        draft.drop(*path)


def _outside_params(draft: Draft, path: Path) -> None:
    """Refuse a key beside `params`, where DeepSpeed does not look for it."""
    if near := nearest(path[-1], ("type", "params")):
        draft.rename(path, "unknown key", near)
    else:
        draft.refuse(
            path,
            "unknown key; DeepSpeed reads type and params alone",
            advice="do: remove it, or write it into params",
        )


def refuse_name(draft: Draft, path: Path, kind: str, known: Collection[str]) -> None:
    """Refuse a parameter that the optimizer or the scheduler does not take.

    kind: "optimizer" or "scheduler".
    """
    unknown = f"unknown to this {kind} in DeepSpeed {version()}"
    if near := nearest(path[-1], known):
        draft.rename(path, unknown, near)
    else:
        draft.refuse(path, unknown, advice="do: remove it")


def nearest(key: str, known: Collection[str]) -> str | None:
    """Return the known key of which this one is a misspelling: one letter more, less or other.

    Short names, and those that differ in a digit, are no slips: fp16 and bf16 are two things. A
    name in capitals, a plural and the names of ELSEWHERE are slips at any length.
    """
    plain = key.lower().replace("-", "_").strip()
    for candidate in known:
        if candidate in (plain, ELSEWHERE.get(plain)) or plain == candidate + "s":
            return candidate
    for candidate in known:
        if min(len(plain), len(candidate)) >= 6 and _one_apart(plain, candidate):
            return candidate
    return None


def _one_apart(one: str, other: str) -> bool:
    """Return True if at most one letter was added, left out, replaced or swapped with the next."""
    if one == other:
        return True
    shorter, longer = sorted((one, other), key=len)
    at = next((i for i, letter in enumerate(shorter) if letter != longer[i]), len(shorter))
    if any(c.isdigit() for c in (shorter[at : at + 1] + longer[at : at + 1])):
        return False
    if len(shorter) < len(longer):
        return shorter[at:] == longer[at + 1 :]
    swapped = shorter[:at] + shorter[at : at + 2][::-1] + shorter[at + 2 :]
    return shorter[at + 1 :] == longer[at + 1 :] or swapped == longer
