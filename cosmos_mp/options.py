"""Configurations in and out: JSON files and the command line."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from cosmos_mp.config import STAGES, ConfigError, Run
from cosmos_mp.files import write_json

T = TypeVar("T")
DATA = "data_sha256"
"""Beside its options, a training run records the checksum of its store."""


def to_dict(config: Any) -> dict[str, Any]:
    """The configuration as plain JSON values, with its stage."""
    stage = next(name for name, kind in STAGES.items() if kind is type(config))
    return {"stage": stage, **dataclasses.asdict(config)}


def save(config: Run, path: Path) -> None:
    """Write the resolved configuration as JSON, visible at once and whole."""
    write_json(path, to_dict(config))


def load(path: Path) -> Run:
    """Read a configuration written by `save`.

    Raises:
        ConfigError: not JSON, an unknown or missing key, or a value of another type; the message names file and key.
    """
    try:
        values = json.loads(Path(path).read_text())
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path}: not valid JSON ({error}); restore it or start the run in another folder") from None
    stage = values.pop("stage", None) if isinstance(values, dict) else None
    if isinstance(values, dict):
        values.pop(DATA, None)
    if not isinstance(stage, str) or stage not in STAGES:
        raise ConfigError(f"{path}: stage is {stage!r}, expected one of {', '.join(STAGES)}")
    return _build(STAGES[stage], values, str(path))


def _build(kind: type[T], values: Any, where: str) -> T:
    if not isinstance(values, dict):
        raise ConfigError(f"{where}: expected a table of options, found {type(values).__name__}")
    hints = get_type_hints(kind)
    names = [f.name for f in dataclasses.fields(kind)]
    for key in values:
        if key not in names:
            raise ConfigError(f"{where}: unknown key {key!r}{_nearest(key, names)}")
    missing = [name for name in names if name not in values]
    if missing:
        raise ConfigError(f"{where}: missing key(s) {', '.join(missing)}")
    return kind(**{name: _value(hints[name], values[name], f"{where}: {name}") for name in names})


def _value(kind: Any, value: Any, where: str) -> Any:
    if dataclasses.is_dataclass(kind):
        return _build(kind, value, where)
    if get_origin(kind) is Literal:
        if value not in get_args(kind):
            raise ConfigError(f"{where}: {value!r} is none of {', '.join(map(str, get_args(kind)))}")
        return value
    if get_origin(kind) is tuple:
        args = get_args(kind)
        if not isinstance(value, list | tuple) or (args[-1] is not Ellipsis and len(args) != len(value)):
            raise ConfigError(f"{where}: {value!r} does not fit {kind}")
        return tuple(_value(args[0], item, where) for item in value)
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        raise ConfigError(f"{where}: {value!r} is {type(value).__name__}, expected {kind.__name__}")
    return value


def _nearest(name: str, names: list[str]) -> str:
    import difflib

    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(names)}"


def parse(kind: type[T], argv: list[str], *, prog: str | None = None) -> T:
    """`PRESET [--section.option value ...]` to a configuration of `kind`.

    The first word names a preset of that stage, or the config.json of an earlier run. tyro reports unknown and ill-typed options with the
    nearest name and exits with status 2.
    """
    import tyro

    from cosmos_mp import presets

    names = presets.names(kind)
    if not argv or argv[0].startswith("-"):
        raise SystemExit(f"usage: {prog or Path(sys.argv[0]).name} PRESET [--section.option value ...]\npresets: {', '.join(names)}")
    first, rest = argv[0], argv[1:]
    if first.endswith(".json"):
        if not Path(first).is_file():
            raise ConfigError(f"{first}: no such configuration file")
        default = load(Path(first))
        if not isinstance(default, kind):
            raise ConfigError(f"{first} configures stage {to_dict(default)['stage']!r}, this command runs {kind.__doc__.split(':')[0]}")
    elif first in names:
        default = presets.get(first)
    else:
        raise ConfigError(f"unknown preset {first!r}{_nearest(first, names)}")
    return tyro.cli(kind, default=default, args=rest, prog=f"{prog or Path(sys.argv[0]).name} {first}", use_underscores=True)
