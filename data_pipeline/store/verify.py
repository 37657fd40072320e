"""Verify shards against the hashes in their manifest, but only those that may have changed.

Hashing terabytes at every start would take hours, and most starts find unchanged files. So the size and time stamp of
every verified shard are recorded below `cache_dir`. A shard with another stamp (edited, copied, restored) is hashed
when it is opened. `data.verify=true` hashes all shards: a failing disk changes bytes and not stamps.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from data_pipeline.errors import DataError
from data_pipeline.store.files import fingerprint_of, locked, read_json, sha256_of_file, write_json


def record(directory: Path, shards: Sequence[dict[str, Any]], cache_dir: str | Path) -> None:
    """Record shards of `directory` that have just been written as verified. `shards` are entries of the manifest."""
    path = _record_path(directory, cache_dir)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {name: _stamp(directory / name, wanted) for name, wanted in _files(shards)})


def check(directory: Path, shards: Sequence[dict[str, Any]], cache_dir: str | Path, *, everything: bool) -> None:
    """Hash the shards with an unknown stamp, or all. Of several processes one works and the others wait.

    Args:
        directory: the prepared directory.
        shards: entries of its manifest.
        cache_dir: verified stamps are recorded below it.
        everything: hash all shards.

    Raises:
        DataError: a file is missing or its content is not that of the manifest.
    """
    path = _record_path(directory, cache_dir)

    def unverified() -> dict[str, list[Any]]:
        known = read_json(path) if path.exists() else {}
        stamps = {name: _stamp(directory / name, wanted) for name, wanted in _files(shards)}
        return {name: stamp for name, stamp in stamps.items() if everything or known.get(name) != stamp}

    if not unverified():
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with locked(path.with_suffix(".lock")):
            wanted = dict(_files(shards))
            todo = unverified()
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                hashes = list(pool.map(lambda name: sha256_of_file(directory / name), todo))
            for name, found in zip(todo, hashes):
                if found != wanted[name]:
                    raise DataError(
                        f"{directory / name}: its content has changed: the manifest has sha256 {wanted[name]}, the "
                        f"file {found}; restore it, or delete {directory} to build it again"
                    )
            known = read_json(path) if path.exists() else {}
            write_json(path, {**known, **todo})
    except OSError as error:
        raise DataError(f"{directory}: cannot be verified ({error})") from error


def _record_path(directory: Path, cache_dir: str | Path) -> Path:
    return Path(cache_dir) / "verified" / f"{fingerprint_of(str(directory.resolve()))[:32]}.json"


def _files(shards: Sequence[dict[str, Any]]) -> list[tuple[str, str]]:
    return [(f"{shard['name']}.{ending}", shard[f"sha256_{ending}"]) for shard in shards for ending in ("bin", "idx")]


def _stamp(path: Path, wanted: str) -> list[Any]:
    try:
        status = path.stat()
    except OSError as error:
        raise DataError(f"{path}: is missing, although the manifest beside it lists it ({error.strerror})") from error
    return [status.st_size, status.st_mtime_ns, wanted]
