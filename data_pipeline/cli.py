"""Command lines of the form `key=value ...`, where the keys are fields of DataConfig and a few more."""

from __future__ import annotations

import difflib
import json
import sys
import typing
from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any

from data_pipeline.config import DataConfig
from data_pipeline.errors import DataError


def parse(
    arguments: Sequence[str],
    extra: dict[str, Any] | None = None,
    leave_out: Sequence[str] = (),
    rename: dict[str, str] | None = None,
    defaults: dict[str, Any] | None = None,
) -> tuple[DataConfig, dict[str, Any]]:
    """The configuration that arguments spell, and the values of the extra keys.

    Args:
        arguments: `key=value` each; lists (corpora, stages, tasks) in JSON, `null` for nothing.
        extra: further keys with their defaults, whose types they keep.
        leave_out: fields of DataConfig that this command does not take.
        rename: field -> key on the command line.
        defaults: values of fields that differ from DataConfig's own.

    Raises:
        DataError: an unknown key, naming the nearest; or a value of the wrong type.
    """
    extra, rename = dict(extra or {}), rename or {}
    hints = typing.get_type_hints(DataConfig)
    names = {rename.get(f.name, f.name): f.name for f in fields(DataConfig) if f.name not in leave_out}
    known = [*extra, *names]
    values: dict[str, Any] = dict(defaults or {})
    for argument in arguments:
        key, equals, text = argument.partition("=")
        if not equals:
            raise DataError(f"argument {argument!r} must have the form key=value; the keys are {', '.join(known)}")
        if key in extra:
            kinds: tuple[Any, ...] = (type(extra[key]),)
            extra[key] = _convert(key, text, kinds)
        elif key in names:
            hint = hints[names[key]]
            values[names[key]] = _convert(key, text, typing.get_args(hint) if _is_union(hint) else (hint,))
        else:
            near = difflib.get_close_matches(key, known, n=1, cutoff=0)[0]
            raise DataError(f"unknown key {key!r}, the nearest is {near!r}; the keys are {', '.join(known)}")
    return DataConfig(**values), extra


def run(description: str, command: Callable[[Sequence[str]], None], arguments: Sequence[str] | None) -> int:
    """Run a command. Returns the exit code: 0, or 2 after one line on stderr that says what is wrong."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or any(argument in ("-h", "--help", "help") for argument in arguments):
        print(f"{description.strip()}\n\nKeys with their defaults, see data_pipeline/config.py:\n")
        for field in fields(DataConfig):
            print(f"  {field.name:22} {field.default!r}")
        return 0
    try:
        command(arguments)
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _is_union(hint: Any) -> bool:
    return type(None) in typing.get_args(hint)


def _convert(key: str, text: str, kinds: tuple[Any, ...]) -> Any:
    if type(None) in kinds and text in ("null", ""):
        return None
    kind = next(kind for kind in kinds if kind is not type(None))
    if kind is str:
        return text
    try:
        if kind is bool:
            return {"true": True, "false": False}[text.lower()]
        return kind(text) if kind in (int, float) else json.loads(text)
    except (ValueError, KeyError) as error:
        wanted = {bool: "true or false", int: "a whole number", float: "a number"}.get(kind, "a list in JSON")
        raise DataError(f"{key}={text!r} must be {wanted}") from error
