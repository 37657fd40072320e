"""Command lines of the form `key=value ...`. The keys are the fields of DataConfig and the command's own."""

from __future__ import annotations

import sys
import typing
from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any

from data_pipeline import commands
from data_pipeline.config import DataConfig
from data_pipeline.errors import DataError
from data_pipeline.values import from_text, key_values


def parse(
    arguments: Sequence[str],
    extra: dict[str, Any] | None = None,
    exclude: Sequence[str] = (),
    rename: dict[str, str] | None = None,
) -> tuple[DataConfig, dict[str, Any]]:
    """Parse a command line into a configuration and the values of the extra keys.

    Args:
        arguments: words `key=value`, read by `data_pipeline.values.from_text`.
        extra: the command's own keys with their defaults; a value has the type of its default.
        exclude: fields of DataConfig that the command does not take.
        rename: field -> its key on the command line.

    Raises:
        DataError: an unknown key (the message names the nearest) or a value of the wrong type.
    """
    extra, rename = dict(extra or {}), rename or {}
    hints = typing.get_type_hints(DataConfig)
    names = {rename.get(f.name, f.name): f.name for f in fields(DataConfig) if f.name not in exclude}
    values: dict[str, Any] = {}
    for key, text in key_values(arguments, [*extra, *names], DataError):
        if key in extra:
            extra[key] = from_text(type(extra[key]), text, key, DataError)
        else:
            values[names[key]] = from_text(hints[names[key]], text, key, DataError)
    return DataConfig(**values), extra


def run(description: str, command: Callable[[Sequence[str]], None], arguments: Sequence[str] | None) -> int:
    """Run a command and return its exit code.

    Args:
        description: the usage text, printed for `--help` and for a command line without words.
        command: takes the words; raises DataError for bad input. See `data_pipeline.commands.run`.
        arguments: the words; None for those of the process.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or any(argument in ("-h", "--help", "help") for argument in arguments):
        print(f"{description.strip()}\n\nKeys with their defaults, see data_pipeline/config.py:\n")
        for field in fields(DataConfig):
            print(f"  {field.name:22} {field.default!r}")
        return 0
    return commands.run(lambda: command(arguments), arguments, (DataError,))
