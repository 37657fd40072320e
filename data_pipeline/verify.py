"""Whether shards are still what their manifest says: by their hash, when there is a reason to look.

Hashing terabytes at every start would take hours, and most starts find files that nobody has touched. So the size and
the time stamp of every shard whose hash was right are remembered below `cache_dir`; a shard with another stamp (edited,
copied, restored) is hashed when it is opened, and `data.verify=true` hashes all of them (a failing disk changes bytes
without changing stamps).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from data_pipeline.errors import DataError
from data_pipeline.storage import fingerprint_of, locked, read_json, sha256_of_file, write_json


def remember(directory: Path, shards: Sequence[dict[str, Any]], cache_dir: str | Path) -> None:
    """Note that the shards of `directory` are right as they lie, because they have just been written."""
    record = _record(directory, cache_dir)
    record.parent.mkdir(parents=True, exist_ok=True)
    write_json(record, {name: _stamp(directory / name, wanted) for name, wanted in _files(shards)})


def check(directory: Path, shards: Sequence[dict[str, Any]], cache_dir: str | Path, *, everything: bool) -> None:
    """Hash the shards with an unknown stamp, or all. Of several processes one works and the others wait.

    Raises:
        DataError: a file is missing or its content is not that of the manifest.
    """
    record = _record(directory, cache_dir)

    def unknown() -> dict[str, list[Any]]:
        known = read_json(record) if record.exists() else {}
        stamps = {name: _stamp(directory / name, wanted) for name, wanted in _files(shards)}
        return {name: stamp for name, stamp in stamps.items() if everything or known.get(name) != stamp}

    if not unknown():
        return
    try:
        record.parent.mkdir(parents=True, exist_ok=True)
        with locked(record.with_suffix(".lock")):
            wanted = dict(_files(shards))
            todo = unknown()
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                hashes = list(pool.map(lambda name: sha256_of_file(directory / name), todo))
            for name, found in zip(todo, hashes):
                if found != wanted[name]:
                    raise DataError(
                        f"{directory / name}: its content has changed: the manifest has sha256 {wanted[name]}, the "
                        f"file {found}; restore it, or delete {directory} to build it again"
                    )
            known = read_json(record) if record.exists() else {}
            write_json(record, {**known, **todo})
    except OSError as error:
        raise DataError(f"{directory}: cannot be verified ({error})") from error


def _record(directory: Path, cache_dir: str | Path) -> Path:
    return Path(cache_dir) / "verified" / f"{fingerprint_of(str(directory.resolve()))[:32]}.json"


def _files(shards: Sequence[dict[str, Any]]) -> list[tuple[str, str]]:
    return [(f"{shard['name']}.{ending}", shard[f"sha256_{ending}"]) for shard in shards for ending in ("bin", "idx")]


def _stamp(path: Path, wanted: str) -> list[Any]:
    try:
        status = path.stat()
    except OSError as error:
        raise DataError(f"{path}: is missing, although the manifest beside it lists it ({error.strerror})") from error
    return [status.st_size, status.st_mtime_ns, wanted]
