"""--config: settings from a YAML or JSON file, among them the config.json of a run."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from ds_classifier.common import files
from ds_classifier.config.other_names import EPOCHS, TRAINING_ADVICE
from ds_classifier.config.parser import Malformed, boolean, did_you_mean, number, whole_number
from ds_classifier.config.recipes import RECIPES
from ds_classifier.config.settings import Settings

# Of a run's config.json, what belongs to that run alone, or follows from its ranks and its data.
# batch_size: that file has global_batch, which stays the same on any number of ranks.
OF_ONE_RUN = (
    "run_dir",
    "resume_checkpoint",
    "extend",
    "expect_world",
    "max_minutes",
    "profile",
    "batch_size",
    "num_classes",
)
RECORDED_SHARE = 0.75  # a file that names this share of all settings was written by a run
FLAGS_TOO = ("recipe", "deepspeed_config")  # flags that are no settings, and may be in a file


@dataclasses.dataclass(frozen=True)
class SettingsFile:
    """The content of a settings file.

    recorded: the file is a run's config.json, whose keys OF_ONE_RUN are left out of the values.
    unknown: its keys that are no settings; another version may have recorded them.
    """

    values: dict[str, Any] = dataclasses.field(default_factory=dict)
    recipe: str = ""
    deepspeed_config: str | None = None
    recorded: bool = False
    unknown: tuple[str, ...] = ()


def read_settings_file(path: Path) -> SettingsFile:
    """Read settings: {name of a flag: value}.

    null leaves a setting at its default; lists of numbers become text like 32,16,8.
    Raises ValueError with every problem: unknown names, wrong types, names given twice, no file.
    """
    fields = {field.name: field for field in dataclasses.fields(Settings)}
    raw = {name: value for name, value in _read(path).items() if value is not None}
    recorded = len(raw.keys() & fields.keys()) >= RECORDED_SHARE * len(fields)
    values, problems = {}, []
    for name, value in raw.items():
        if recorded and (name in OF_ONE_RUN or name not in fields):
            continue
        kind = "str" if name in FLAGS_TOO else str(fields[name].type) if name in fields else None
        try:
            if kind is None:
                raise Malformed(_unknown(name, [*fields, *FLAGS_TOO]))
            values[name] = _converted(value, kind)
            if name == "recipe" and value not in RECIPES:
                raise Malformed(
                    f"got {value!r}; need one of {', '.join(RECIPES)}; "
                    f"{did_you_mean(value, list(RECIPES))}".removesuffix("; ")
                )
        except Malformed as problem:
            problems.append(f"{name}: {problem}")
    if problems:
        raise ValueError("\n  ".join([f"got {path}, in which", *problems]))
    recipe, config = values.pop("recipe", ""), values.pop("deepspeed_config", None)
    unknown = tuple(name for name in raw if recorded and name not in fields)
    return SettingsFile(values, recipe, config, recorded, unknown)


def _unknown(name: str, known: list[str]) -> str:
    advice = TRAINING_ADVICE.get(name, "").replace("{script}", "SCRIPT")
    if name in EPOCHS:
        advice = "do: give iterations, which are epochs x images / global batch"
    return f"unknown setting; {advice or did_you_mean(name, known) or 'do: see train.py --help'}"


def _converted(value: Any, kind: str) -> Any:
    """Return a value of a file as a flag would give it. Raises Malformed.

    kind: a type as `Settings` names it.
    """
    if isinstance(value, list) and kind == "str" and value:
        return ",".join(_converted(part, kind) for part in value)
    of_file = isinstance(value, (bool, int, float, str))
    text = str(value)
    if kind == "str" and of_file and not isinstance(value, bool):
        return text
    if kind == "int" and isinstance(value, float) and value.is_integer():
        return int(value)
    # YAML takes 1e-3 for text. True is no number, and 1 is no truth.
    if kind == "int" and of_file and not isinstance(value, bool):
        return whole_number(text)
    if kind == "float" and of_file and not isinstance(value, bool):
        return number(text)
    if kind.startswith("bool") and isinstance(value, (bool, str)):
        return boolean(text)
    need = {"str": "text", "int": "a whole number", "float": "a number"}.get(kind, "true or false")
    raise Malformed(f"got {value!r}; need {need}")


def _read(path: Path) -> dict[str, Any]:
    """Return the mapping that a file holds; what does not end in .json is read as YAML."""
    try:
        text = files.read_text(path)
    except OSError as error:
        raise ValueError(f"got {files.problem(error)}; need a YAML or JSON file") from None
    try:
        raw = json.loads(text, object_pairs_hook=_once) if path.suffix == ".json" else _yaml(text)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"got {path}: not JSON: {error.msg} at line {error.lineno}, column {error.colno}"
        ) from None
    except ValueError as error:
        raise ValueError(f"got {path}: {error}") from None
    if not isinstance(raw, dict):
        raise ValueError(f"got {path}, which is no mapping; need lines like 'lr: 0.001'")
    return raw


def _yaml(text: str) -> Any:
    """Return the content of YAML. Raises ValueError if it is malformed, or gives a key twice."""
    import yaml

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
            return _once(self.construct_pairs(node, deep=True))

    try:
        return yaml.load(text, Loader)
    except yaml.YAMLError as error:
        raise ValueError("not YAML: " + " ".join(str(error).split())) from None


def _once(pairs: list[tuple[Any, Any]]) -> dict[str, Any]:
    """Return a dict of pairs, whose names may have dashes. Raises ValueError for a name twice."""
    names = [str(name).replace("-", "_") for name, _ in pairs]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"{name} is given twice; do: remove one")
    return dict(zip(names, (value for _, value in pairs), strict=True))
