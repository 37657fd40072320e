"""Files that are either complete or absent, and directories that one process builds while the others wait."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from data_pipeline.errors import DataError

_READ_BYTES = 1 << 20


@contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """Open a temporary binary file. It replaces `path` when the block ends without error and its bytes are on disk."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_directory(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write `content` as readable JSON, atomically."""
    # In a path, a byte that is not UTF-8 is half a surrogate pair. "backslashreplace" writes it as JSON escapes it.
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    with atomic_write(path) as file:
        file.write(text.encode(errors="backslashreplace"))


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object written by `write_json`. Raises DataError when the file holds anything else."""
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read ({error}); delete its directory to build it again") from error
    if not isinstance(content, dict):
        raise DataError(f"{path}: is not a JSON object; delete its directory to build it again")
    return content


def write_array(path: Path, array: np.ndarray) -> None:
    """Write a `.npy` file, atomically."""
    with atomic_write(path) as file:
        np.lib.format.write_array(file, array, allow_pickle=False)


def fingerprint_of(content: Any) -> str:
    """The sha256 (hex) of content that JSON can express, independent of the order of keys."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def sha256_of_file(path: Path) -> str:
    """The sha256 (hex) of a file's bytes."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(_READ_BYTES):
            digest.update(block)
    return digest.hexdigest()


@contextmanager
def locked(path: Path, on_wait: Callable[[], None] | None = None) -> Iterator[None]:
    """Hold the lock file `path`. The kernel's lock (`flock`) is released when the process ends, however it ends.

    `on_wait` is called when another process holds it.
    """
    with open(path, "ab") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if on_wait is not None:
                on_wait()
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def lock_path(directory: Path) -> Path:
    """The lock file that `build_once` holds while it fills a directory."""
    return directory.with_name(directory.name + ".lock")


def build_once(
    directory: Path,
    marker: str,
    build: Callable[[Path], None],
    on_wait: Callable[[], None] | None = None,
    *,
    keep_partial: bool = False,
) -> None:
    """Fill `directory` with `build` once, however many processes ask at the same time.

    Args:
        directory: what is built.
        marker: the file that `build` writes last. A directory without it was left by a process that was killed.
        build: called with the directory.
        on_wait: called when another process is building.
        keep_partial: keep the files of a killed process for `build`, except unfinished ones (`.tmp`); else delete all.

    Raises:
        DataError: the directory cannot be written (disk full, no permission, ...).
    """
    try:
        if (directory / marker).exists():
            return
        directory.parent.mkdir(parents=True, exist_ok=True)
        with locked(lock_path(directory), on_wait):
            if (directory / marker).exists():
                return
            if directory.exists() and not keep_partial:
                shutil.rmtree(directory)
            directory.mkdir(exist_ok=True)
            for leftover in directory.glob("*.tmp"):
                leftover.unlink()
            build(directory)
    except OSError as error:
        raise DataError(f"{directory}: cannot be built ({error}); check the disk, or set another cache_dir") from error


def check_regular(mode: int, name: str) -> None:
    """Raise DataError unless `mode` is that of a file. Opening a pipe waits for its writer; a device may have no end.

    Args:
        mode: `st_mode` of a path.
        name: the path or setting, for messages.
    """
    if stat.S_ISREG(mode):
        return
    kinds = ((stat.S_ISFIFO, "pipe"), (stat.S_ISSOCK, "socket"), (stat.S_ISDIR, "directory"))
    kind = next((kind for is_kind, kind in kinds if is_kind(mode)), "device")
    raise DataError(f"{name}: is a {kind}, not a file; write what it holds to a file, and name that")


def sync_directory(directory: str | Path) -> None:
    """Write the entries of a local directory to the disk: a rename in it is durable only then."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
