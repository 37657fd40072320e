"""Writing a run's `metrics.jsonl`: nothing is lost in it, and nothing that happens to it ends a run."""

from __future__ import annotations

import json
import math
import os
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

from train.logs.metrics import drop_records_after


def as_line(record: dict[str, Any]) -> str:
    """`record` as one line of JSON, which has no NaN and no infinity: keys of such values stand in `not_finite`."""
    bad = sorted(k for k, value in record.items() if isinstance(value, float) and not math.isfinite(value))
    if bad:
        record = {k: value for k, value in record.items() if k not in bad} | {"not_finite": bad}
    return json.dumps(record, allow_nan=False) + "\n"


class MetricsFile:
    """Appends records to a file, each at once, so that a reader finds whole lines.

    What cannot be written, because the disk is full or the file system is gone, waits in memory and is written in its
    order once that is possible again. The user is told once.
    """

    def __init__(self, path: Path, say: Callable[[str], None]):
        """`say` takes a line for the user."""
        self._path, self._say = path, say
        self._waiting: deque[bytes | int] = deque()  # lines to append, and steps to rewind to
        self._descriptor: int | None = None
        self._is_torn = False  # whether part of a line could neither be completed nor taken back
        self._has_failed = False

    def append(self, record: dict[str, Any]) -> None:
        """Append `record`."""
        self._do(as_line(record).encode())

    def rewind(self, step: int) -> None:
        """Set the records after `step` aside; see `train.logs.metrics.drop_records_after`."""
        self._do(step)

    def close(self) -> None:
        """Write what waits, if that is possible now, and close the file."""
        self._work()
        if lines := sum(isinstance(item, bytes) for item in self._waiting):
            self._say(f"{lines} records of {self._path} are lost: it could not be written to the end")
        self._close()

    def _do(self, item: bytes | int) -> None:
        self._waiting.append(item)
        self._work()

    def _work(self) -> None:
        """Do what waits, in its order, until something fails."""
        try:
            while self._waiting:
                item = self._waiting[0]
                if isinstance(item, bytes):
                    self._write(item)
                else:
                    self._close()
                    drop_records_after(self._path, item)
                self._waiting.popleft()
        except OSError as error:
            self._close()
            if not self._has_failed:
                self._say(
                    f"{self._path} cannot be written ({error.strerror or error}): training goes on, and its records "
                    "wait in memory until it can"
                )
            self._has_failed = True
            return
        if self._has_failed:
            self._has_failed = False
            self._say(f"{self._path} is written again, with the records that waited")

    def _write(self, line: bytes) -> None:
        if self._descriptor is None:
            self._descriptor = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        begin = os.fstat(self._descriptor).st_size
        content = b"\n" + line if self._is_torn else line
        written = 0
        try:
            while written < len(content):
                written += os.write(self._descriptor, content[written:])
        except OSError:
            self._is_torn = self._is_torn or written > 0
            if written and os.fstat(self._descriptor).st_size == begin + written:
                os.ftruncate(self._descriptor, begin)  # back to whole lines
                self._is_torn = content is not line
            raise
        self._is_torn = False

    def _close(self) -> None:
        if self._descriptor is not None:
            descriptor, self._descriptor = self._descriptor, None
            try:
                os.close(descriptor)
            except OSError:  # a network file system may report here what it could not write; later lines will tell
                pass
