"""Standard streams that may be files on a full disk."""

from __future__ import annotations

import contextlib
from typing import Any, TextIO


class Unbreakable:
    """A stream that drops what cannot be written. Equal to the stream itself, so that tqdm knows it again.

    tqdm keeps its lock when a write fails, and the next thread that prints a line would wait for it for ever.
    """

    def __init__(self, stream: TextIO):
        self._stream = stream

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            self._stream.flush()

    def __eq__(self, other: object) -> bool:
        return self._stream is (other._stream if isinstance(other, Unbreakable) else other)

    def __hash__(self) -> int:
        return hash(self._stream)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
