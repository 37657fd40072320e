"""The errors of the data pipeline."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class DataError(ValueError):
    """Bad input. The message is one line: the value, where it comes from (key, file, line) and what to do about it."""


class StoreError(DataError):
    """A store that does not answer, after all retries. The data may well be good: reading them later may succeed."""


@contextmanager
def library_errors(subject: str, advice: str = "") -> Iterator[None]:
    """Whatever a library raises inside becomes a DataError: `subject`, the library's words in one line, and `advice`.

    Libraries raise classes of their own, and a panic of one that is written in Rust is not even an Exception. A
    DataError passes, and so does what stops a program.
    """
    try:
        yield
    except (DataError, KeyboardInterrupt, SystemExit, GeneratorExit, MemoryError):
        raise
    except BaseException as error:
        detail = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"{subject} ({detail[:300]})" + (f"; {advice}" if advice else "")) from error
