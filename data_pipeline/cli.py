"""Command lines of the form `key=value ...`. The keys are the fields of DataConfig and the command's own."""

from __future__ import annotations

import io
import os
import signal
import sys
import threading
import typing
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

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
        command: takes the words; raises DataError for bad input, which ends in one line on stderr and exit code 2. So
            do errors of the operating system. A signal ends it with 128 and its number, as in a shell.
        arguments: the words; None for those of the process.
    """
    words = sys.argv[1:] if arguments is None else arguments
    return printing(lambda: _run(description, command, words))


def robust_streams() -> None:
    """Letters that a standard stream cannot encode are written with a backslash, and end no command.

    Under `LC_ALL=C` these are all that are not ASCII; anywhere, a path may hold bytes that are no UTF-8.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def printing(command: Callable[[], int]) -> int:
    """Run a command that prints, and return its exit code: 128 + SIGPIPE where its reader has read enough."""
    robust_streams()
    try:
        code = command()
        sys.stdout.flush()
    except BrokenPipeError:  # `| head`
        sys.stdout = open(os.devnull, "w")  # Python flushes it at exit
        return 128 + signal.SIGPIPE
    return code


def _run(description: str, command: Callable[[Sequence[str]], None], arguments: Sequence[str]) -> int:
    """`run` without its care for standard streams."""
    if not arguments or any(argument in ("-h", "--help", "help") for argument in arguments):
        print(f"{description.strip()}\n\nKeys with their defaults, see data_pipeline/config.py:\n")
        for field in fields(DataConfig):
            print(f"  {field.name:22} {field.default!r}")
        return 0
    try:
        with _stop_at_sigterm():
            command(arguments)
    except DataError as error:
        return _fail(str(error))
    except BrokenPipeError:
        raise
    except OSError as error:  # of a place that names no key itself
        return _fail(_os_error(error, arguments))
    except MemoryError as error:
        return _fail(f"the machine has not enough memory ({error}); choose smaller sizes")
    except KeyboardInterrupt as error:
        number = error.args[0] if error.args else signal.SIGINT
        print(f"stopped by {signal.Signals(number).name}; the same command goes on, or begins again", file=sys.stderr)
        return 128 + number
    return 0


def _fail(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return 2


def _os_error(error: OSError, arguments: Sequence[str]) -> str:
    """One line for an error of the operating system: the word of the command line with its path, and the reason."""
    path = str(error.filename or "")
    words = [word for word in arguments if word.partition("=")[2] and path.startswith(word.partition("=")[2])]
    place = f"{max(words, key=len)}: " if words else ""
    return f"{place}{error.strerror or error}" + (f" ({path})" if path else "") + "; name another file or directory"


@contextmanager
def _stop_at_sigterm() -> Iterator[None]:
    """SIGTERM ends the command as Ctrl-C does, so that temporary files are removed and the user is told."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, _: Any) -> None:
        raise KeyboardInterrupt(number)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
