"""One start of a run at a time in a directory: a second one would remove the first one's unfinished saves.

This is about processes that live at the same time, on local file systems. `train.checkpoint.owner` is about which run
a directory of checkpoints belongs to, whether it runs or not.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from train.config.errors import ConfigError

LOCK = ".lock"  # its name inside the directory; it says who holds it, or held it last
_PATIENCE = 2.0  # seconds for a process of this host that is just ending
_PATIENCE_ELSEWHERE = 120.0  # a server of NFS keeps the locks of a host that has crashed for about a minute and a half


@contextlib.contextmanager
def only_one(directory: Path, key: str, say: Callable[[str], object]) -> Iterator[None]:
    """Hold `directory` for this process; it is created if necessary, and removed in the end if it is empty then.

    The system's lock is released when the process ends, however it ends, and no child inherits it. Raises
    `ConfigError` if another process holds it. `key` names the directory in messages; `say` takes a line for the user.
    """
    made = [path for path in (directory, *directory.parents) if not path.exists()]
    descriptor = _open_and_lock(directory, key, say)
    try:
        yield
    finally:
        if made:
            _remove_if_empty(directory, made)
        os.close(descriptor)


def _open_and_lock(directory: Path, key: str, say: Callable[[str], object]) -> int:
    """The locked file of `directory`, as a descriptor."""
    while True:
        try:
            directory.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(directory / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise ConfigError(
                f"{key}: cannot write below {directory} ({error.strerror or error}): name a place that can be written"
            ) from error
        try:
            _lock(descriptor, directory, key, say)
            if _is_the_file_of(descriptor, directory / LOCK):
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # its holder removed the file while this process waited for it


def _is_the_file_of(descriptor: int, path: Path) -> bool:
    """Whether an open file is still the one at `path`."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def _lock(descriptor: int, directory: Path, key: str, say: Callable[[str], object]) -> None:
    """Lock an open file, and write into it who holds it."""
    began, waits = time.monotonic(), False
    while True:
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except (BlockingIOError, PermissionError):  # the two that POSIX allows for a lock that is held
            holder = _holder(descriptor)
            elsewhere = holder.get("host") not in (None, socket.gethostname())
            who = f"process {holder.get('process', 'unknown')} on {holder.get('host', 'a host unknown')}"
            if time.monotonic() - began >= (_PATIENCE_ELSEWHERE if elsewhere else _PATIENCE):
                raise ConfigError(
                    f"{key}: {directory} is in use: {who} has trained there since {holder.get('since', 'unknown')}; "
                    "wait until it has ended or stop it, or choose another run.name"
                ) from None
            if elsewhere and not waits:
                waits = True
                say(f"{directory} is in use by {who}; waiting up to {_PATIENCE_ELSEWHERE:.0f} s for its end")
            time.sleep(0.1)
        except OSError as error:  # a file system without locks
            say(f"{directory} cannot be locked ({error.strerror}): take care that no second start of this run uses it")
            return
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    own = json.dumps({"process": os.getpid(), "host": socket.gethostname(), "since": now})
    with contextlib.suppress(OSError):  # a full disk: the lock holds all the same
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, own.encode(), 0)


def _remove_if_empty(directory: Path, made: list[Path]) -> None:
    """Remove what a start has `made` that was refused, or that has not come to its run directory."""
    with contextlib.suppress(OSError):
        if os.listdir(directory) == [LOCK]:
            (directory / LOCK).unlink()
            for empty in made:
                empty.rmdir()


def _holder(descriptor: int) -> dict[str, Any]:
    """Who holds the lock of an open file, by what it says."""
    try:
        holder = json.loads(os.pread(descriptor, 4096, 0))
    except (OSError, ValueError):
        return {}
    return holder if isinstance(holder, dict) else {}
