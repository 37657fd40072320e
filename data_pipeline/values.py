"""The one converter of configuration values: YAML, JSON and `key=value` words to the types that dataclasses declare.

It stands here because the data pipeline imports no other package of the project, and `train` and `launch` use it too
(through `train.config.conversion`). Every function takes the error class to raise; messages name the key, the value and
what it must be, and an unknown key is answered with the nearest one.
"""

from __future__ import annotations

import difflib
import math
import os
import types
import typing
from collections.abc import Collection, Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from typing import Any

import yaml

T = typing.TypeVar("T")
_WANTED = {int: "a whole number", float: "a number", str: "a string", bool: "true or false"}


def build(cls: type[T], mapping: Mapping[str, Any], prefix: str, error: type[ValueError]) -> T:
    """Dataclass `cls` from plain values. `prefix`, such as "model.", stands before its keys in messages."""
    hints = typing.get_type_hints(cls)
    known = {f.name: f for f in fields(cls)}  # type: ignore[arg-type]
    values = {}
    for key, value in mapping.items():
        if key not in known:
            raise unknown_key(f"{prefix}{key}", [f"{prefix}{name}" for name in known], error)
        values[key] = convert(hints[key], value, f"{prefix}{key}", error)
    missing = [
        f"{prefix}{name}"
        for name, f in known.items()
        if name not in values and f.default is MISSING and f.default_factory is MISSING
    ]
    if missing:
        raise error(f"{', '.join(missing)} must be given")
    return cls(**values)


def convert(hint: Any, value: Any, key: str, error: type[ValueError]) -> Any:
    """A value as YAML or JSON gives it -> the type `hint`. Numbers may be strings for float: YAML reads 1e-3 as one."""
    if is_dataclass(hint):
        if isinstance(value, hint):  # type: ignore[arg-type]
            return value
        if not isinstance(value, Mapping):
            raise error(f"{key}={value!r} must be a group of keys")
        return build(hint, value, f"{key}.", error)  # type: ignore[arg-type]
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if _is_union(hint):
        if value is None and type(None) in arguments:
            return None
        return convert(_member(hint, isinstance(value, (list, tuple))), value, key, error)
    if origin is tuple:
        return _tuple(arguments, value, key, error)
    if origin is not None:  # dict[str, X] and Mapping[str, X]
        if not isinstance(value, Mapping):
            raise error(f"{key}={value!r} must be a group of keys")
        return {name: convert(arguments[1], item, f"{key}.{name}", error) for name, item in value.items()}
    if hint is Any:
        return value
    if hint is float and isinstance(value, (int, str)) and not isinstance(value, bool):
        try:
            value = float(value)
        except ValueError:
            pass
    if isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
        if hint is float and not math.isfinite(value):
            raise error(f"{key}={value!r} must be {_WANTED[hint]}, and finite")
        return value
    raise error(f"{key}={value!r} must be {_WANTED[hint]}" + (how_to_quote(key, value) if hint is str else ""))


def expand_home(value: Any, prefix: str = "") -> Any:
    """A path with `~` or `~USER` at its beginning, or behind `prefix`, spelled out; anything else as it is.

    Shells leave a `~` behind `=` to the program: without this, `run.root=~/runs` would be a directory named `~`.
    """
    if not isinstance(value, str):
        return value
    path = value.removeprefix(prefix)
    return value[: len(value) - len(path)] + os.path.expanduser(path)


def how_to_quote(key: str, value: Any) -> str:
    """How to give a number, a truth value or a date as text, on a command line whose words are read as YAML."""
    if value is None or isinstance(value, (list, tuple, Mapping)):
        return ""
    shown = str(value).lower() if isinstance(value, bool) else str(value)
    return f"""; as text it is written with two pairs of quotes: '{key}="{shown}"'"""


def from_text(hint: Any, text: str, key: str, error: type[ValueError]) -> Any:
    """The text of a `key=text` word -> the type `hint`.

    A string is taken as it is. `null` or nothing is None where `hint` allows it. Lists are written `A,B` or, as in
    YAML, `[A,"B,C"]`; groups of keys as in YAML, of which JSON is a part.
    """
    if _is_union(hint):
        if text in ("null", "") and type(None) in typing.get_args(hint):
            return None
        return from_text(_member(hint, text.startswith("[")), text, key, error)
    if hint is str:
        return text
    if hint is bool and text.lower() in ("true", "false"):
        return text.lower() == "true"
    if hint in (int, float):
        try:
            number = hint(text)
        except ValueError:
            pass
        else:
            if isinstance(number, float) and not math.isfinite(number):
                raise error(f"{key}={text!r} must be a number, and finite")
            return number
    if hint in _WANTED:
        raise error(f"{key}={text!r} must be {_WANTED[hint]}")
    if typing.get_origin(hint) is tuple:
        return _list_from_text(typing.get_args(hint), text, key, error)
    try:
        return convert(hint, yaml.safe_load(text), key, error)
    except yaml.YAMLError as problem:
        raise error(f"{key}={text!r} cannot be read: {' '.join(str(problem).split())}") from problem


def from_words(cls: type[T], arguments: Sequence[str], error: type[ValueError]) -> T:
    """Dataclass `cls` from the `key=text` words of a command."""
    hints = typing.get_type_hints(cls)
    words = key_values(arguments, [f.name for f in fields(cls)], error)  # type: ignore[arg-type]
    return build(cls, {key: from_text(hints[key], text, key, error) for key, text in words}, "", error)


def key_values(arguments: Sequence[str], known: Collection[str], error: type[ValueError]) -> list[tuple[str, str]]:
    """The `key=text` words of a command as pairs, each key one of `known`."""
    pairs = []
    for argument in arguments:
        key, equals, text = argument.partition("=")
        if not equals:
            raise error(f"argument {argument!r} must have the form key=value; the keys are {', '.join(known)}")
        if key not in known:
            raise unknown_key(key, list(known), error)
        pairs.append((key, text))
    return pairs


def unknown_key(key: str, known: list[str], error: type[ValueError]) -> ValueError:
    """The error for a key that does not exist: names the nearest one, or all keys beside it."""
    beside = [name for name in known if name.rpartition(".")[0] == key.rpartition(".")[0]]
    known = beside or known  # in a section that exists, only its own keys help
    near = nearest(key, known)
    return error(f"{key} is not a configuration key" + (near or f"; the keys there are {', '.join(sorted(known))}"))


def nearest(name: str, known: Collection[str], prefix: str = "") -> str:
    """`; did you mean ...?` with the member of `known` that is most like `name`, or nothing where none is like it."""
    found = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean {prefix}{found[0]}?" if found else ""


def _tuple(hints: tuple[Any, ...], value: Any, key: str, error: type[ValueError]) -> tuple[Any, ...]:
    count = None if hints[-1] is ... else len(hints)
    if not isinstance(value, (list, tuple)) or (count is not None and len(value) != count):
        raise error(f"{key}={value!r} must be a list" + ("" if count is None else f" of {count} values"))
    return tuple(convert(hints[0], item, f"{key}[{i}]", error) for i, item in enumerate(value))


def _list_from_text(hints: tuple[Any, ...], text: str, key: str, error: type[ValueError]) -> tuple[Any, ...]:
    if not text.startswith("["):
        items = [from_text(hints[0], item.strip(), key, error) for item in text.split(",") if item.strip()]
        return _tuple(hints, items, key, error)
    try:  # the base loader reads every scalar as a string
        entries = yaml.load(text, yaml.BaseLoader if hints[0] is str else yaml.SafeLoader)
    except yaml.YAMLError:
        entries = None
    if not isinstance(entries, list) or (hints[0] is str and not all(isinstance(item, str) for item in entries)):
        raise error(
            f'{key}={text!r} must be a list such as [A,B]; quote an entry that has one of , : [ ] {{ }} # in it: "B,C"'
        )
    return _tuple(hints, entries, key, error)


def _is_union(hint: Any) -> bool:
    return typing.get_origin(hint) in (typing.Union, types.UnionType)


def _member(hint: Any, is_list: bool) -> Any:
    """The member of a union for a value: its tuple for a list, otherwise its first other type."""
    members = [member for member in typing.get_args(hint) if member is not type(None)]
    return next((m for m in members if (typing.get_origin(m) is tuple) == is_list), members[0])
