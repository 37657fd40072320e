"""The configuration of a run as plain values and back: what YAML files, checkpoints and Hydra hold.

Conversion itself is `data_pipeline.values`, which the launcher uses through this module.
"""

from __future__ import annotations

import typing
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, fields, is_dataclass
from typing import Any

from data_pipeline import values
from data_pipeline.values import convert, expand_home, from_text, how_to_quote, key_values, nearest
from train.config.errors import ConfigError

__all__ = [
    "all_keys",
    "convert",
    "defaults",
    "expand_home",
    "flatten",
    "from_mapping",
    "from_text",
    "from_words",
    "how_to_quote",
    "key_types",
    "key_values",
    "nearest",
    "to_mapping",
    "unknown_key",
]

T = typing.TypeVar("T")
MOVED = {"run.recompute": "memory.recompute"}  # keys that runs before 0.1.0 had, and what replaced them


def from_mapping(cls: type[T], mapping: Mapping[str, Any], prefix: str = "") -> T:
    """Dataclass `cls` from plain values, or `ConfigError`; `prefix`, such as "model.", is for messages."""
    return values.build(cls, mapping, prefix, ConfigError)


def from_words(cls: type[T], words: Sequence[str]) -> T:
    """Dataclass `cls` from the `key=value` words of a command, or `ConfigError`."""
    return values.from_words(cls, words, ConfigError)


def to_mapping(config: Any) -> dict[str, Any]:
    """Plain values, ready for YAML and JSON; inverse of `from_mapping`."""
    return _plain(asdict(config))


def defaults(cls: type) -> dict[str, Any]:
    """The default of every field of dataclass `cls` as plain values; fields without a default are left out."""
    hints = typing.get_type_hints(cls)
    found: dict[str, Any] = {}
    for f in fields(cls):
        if is_dataclass(hints[f.name]):
            found[f.name] = defaults(hints[f.name])  # type: ignore[arg-type]
        elif f.default is not MISSING:
            found[f.name] = _plain(f.default)
    return found


def all_keys(cls: type, prefix: str = "") -> list[str]:
    """Every dotted key of dataclass `cls`, sections included."""
    return list(key_types(cls, prefix))


def key_types(cls: type, prefix: str = "") -> dict[str, Any]:
    """Every dotted key of dataclass `cls`, sections included, and its type."""
    keys: dict[str, Any] = {}
    for name, hint in typing.get_type_hints(cls).items():
        keys[f"{prefix}{name}"] = hint
        if is_dataclass(hint):
            keys |= key_types(hint, f"{prefix}{name}.")  # type: ignore[arg-type]
    return keys


def flatten(mapping: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested values -> dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in mapping.items():
        flat.update(flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value})
    return flat


def unknown_key(key: str, known: list[str]) -> ValueError:
    """The `ConfigError` for a key that does not exist."""
    if key in MOVED:
        return ConfigError(f"{key} is not a configuration key; did you mean {MOVED[key]}?")
    return values.unknown_key(key, known, ConfigError)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value
