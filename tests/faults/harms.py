"""What a test does to a rank from inside its process. Each function is called in the rank before it trains.

None of them replaces code of the project: they change the clock, the results of a module, and when the process dies.
"""

from __future__ import annotations

import mmap
import os
import signal
import struct
import sys
import time
from pathlib import Path
from typing import Any

import torch


def wrong_clock(file: str) -> None:
    """Python's wall clock is off by the seconds that the eight bytes in `file` hold; `set_clock` changes them."""
    with open(file, "rb") as opened:
        seconds = mmap.mmap(opened.fileno(), 8, access=mmap.ACCESS_READ)
    wall, wall_ns = time.time, time.time_ns
    time.time = lambda: wall() + struct.unpack("d", seconds)[0]
    time.time_ns = lambda: wall_ns() + int(1e9 * struct.unpack("d", seconds)[0])


def set_clock(file: Path, seconds: float) -> None:
    """Set the clocks of the ranks that use `file`, which is created if necessary, off by `seconds`."""
    with open(file, "r+b" if file.exists() else "w+b") as opened:
        opened.write(struct.pack("d", seconds))


def quick_store() -> None:
    """An object store that fails is given up after tenths of a second: s3fs itself tries again less often."""
    from s3fs.core import S3FileSystem

    S3FileSystem.retries = 1


def nan_storm(rank: int, file: str) -> None:
    """While `file` exists, every loss of `rank` is NaN in training, as where a device computes garbage."""
    if rank != int(os.environ["RANK"]):
        return

    def poison(module: torch.nn.Module, _: Any, loss: Any) -> Any:
        if type(module).__name__ == "Decoder" and module.training and os.path.exists(file):
            return loss * float("nan")
        return None

    torch.nn.modules.module.register_module_forward_hook(poison)


def die_before(rank: int, path: str, number: int) -> None:
    """SIGKILL for `rank` right before its operation `number` (from 1 on) on a file whose name contains `path`.

    Operations are those that Python audits: to open, rename, remove, truncate, list, make or remove a directory.
    """
    if rank != int(os.environ["RANK"]):
        return
    left = number

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal left
        if event != "open" and not event.startswith("os."):
            return
        if any(isinstance(name, (str, bytes)) and path in os.fsdecode(name) for name in arguments):
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)
