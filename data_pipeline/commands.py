"""How every command ends: 0, or one line on standard error and an exit code, whatever was raised."""

from __future__ import annotations

import io
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

BAD_INPUT = 2


def run(
    command: Callable[[], int | None],
    arguments: Sequence[str],
    errors: tuple[type[Exception], ...],
    takes_signals: bool = True,
) -> int:
    """Run a command and return its exit code.

    Args:
        command: does the work; returns an exit code, or None for 0.
        arguments: the words of the command line, for messages.
        errors: what bad input raises; their messages are one line. They end in exit code 2, and so do errors of the
            operating system and a lack of memory. Anything else is a fault of the program and keeps its traceback.
        takes_signals: whether SIGTERM ends the command as Ctrl-C does: with a line, and 128 plus its number.
    """
    robust_streams()
    try:
        with _stop_at_sigterm() if takes_signals else nullcontext():
            code = command()
            sys.stdout.flush()
    except errors as error:
        return fail(str(error))
    except BrokenPipeError:  # `| head` has read enough
        sys.stdout = open(os.devnull, "w")  # Python flushes it at exit
        return 128 + signal.SIGPIPE
    except OSError as error:  # of a place that names no key itself
        if error.filename is None and not takes_signals:
            raise  # a launcher watches processes for days: what fails then is no bad input
        return fail(_os_error(error, arguments))
    except MemoryError as error:
        return fail(f"the machine has not enough memory ({error}); choose smaller sizes")
    except KeyboardInterrupt as error:
        number = error.args[0] if error.args else signal.SIGINT
        print(f"stopped by {signal.Signals(number).name}; the same command goes on, or begins again", file=sys.stderr)
        return 128 + number
    return code or 0


def robust_streams() -> None:
    """Letters that a standard stream cannot encode are written with a backslash, and end no command.

    Under `LC_ALL=C` these are all that are not ASCII; anywhere, a path may hold bytes that are no UTF-8.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def fail(message: str) -> int:
    """Print `message` as the one line of an error; returns the exit code."""
    print(f"error: {printable(message)}", file=sys.stderr)
    return BAD_INPUT


def printable(text: str) -> str:
    """`text` in one line: a line break or another control character, as a path may hold, is written as in Python."""
    return re.sub(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]", lambda found: repr(found[0])[1:-1], text.strip())


def _os_error(error: OSError, arguments: Sequence[str]) -> str:
    """One line for an error of the operating system: the word of the command line with its path, and the reason."""
    path = error.filename.decode(errors="replace") if isinstance(error.filename, bytes) else str(error.filename or "")
    values = [(word, word.partition("=")[2] or word) for word in arguments]
    words = [word for word, value in values if value and path.startswith(value)]
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
