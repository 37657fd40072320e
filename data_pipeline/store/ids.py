"""Check that every token of local Megatron shards is an id of the tokenizer, as no manifest says.

A shard is read once: its least and greatest id are recorded below `cache_dir`, beside the records of `verify`, until
its size, time stamp or hash changes. Tokens of remote shards are checked when they are read (`ShardSet`).
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.errors import DataError
from data_pipeline.store.files import fingerprint_of, locked, read_json, write_json
from data_pipeline.store.shards import ShardReader

_CHUNK_TOKENS = 1 << 24


def check(hashes: Mapping[str, list[str]], vocab_size: int, cache_dir: str | Path) -> None:
    """Read the shards with an unknown stamp. Of several processes one works and the others wait.

    Args:
        hashes: prefix of each shard -> hashes of its content.
        vocab_size: ids are in `range(vocab_size)`.
        cache_dir: the least and greatest ids are recorded below it.

    Raises:
        DataError: an id is not in the range. The message names shard, document and id.
    """
    directories: dict[Path, list[str]] = {}
    for prefix in hashes:
        directories.setdefault(Path(prefix).parent, []).append(prefix)
    for directory, prefixes in directories.items():
        record = Path(cache_dir) / "verified" / f"ids-{fingerprint_of(str(directory.resolve()))[:32]}.json"
        try:
            record.parent.mkdir(parents=True, exist_ok=True)
            with locked(record.with_suffix(".lock")):
                limits = _limits({prefix: hashes[prefix] for prefix in prefixes}, record)
        except OSError as error:
            raise DataError(f"{directory}: its token ids cannot be checked ({error})") from error
        for prefix, (least, greatest) in limits.items():
            if least < 0 or greatest >= vocab_size:
                reader = ShardReader(prefix)
                for start, tokens in _chunks(reader):
                    reader.check_ids(tokens, start, vocab_size)


def _limits(hashes: Mapping[str, list[str]], record: Path) -> dict[str, tuple[int, int]]:
    """The least and greatest id of each shard, as recorded or else as read and then recorded."""
    known: dict[str, Any] = read_json(record) if record.exists() else {}
    stamps = {prefix: _stamp(prefix, hashes[prefix]) for prefix in hashes}
    todo = [prefix for prefix in hashes if known.get(Path(prefix).name, {}).get("stamp") != stamps[prefix]]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for prefix in todo:
            found = list(
                pool.map(lambda chunk: (int(chunk[1].min()), int(chunk[1].max())), _chunks(ShardReader(prefix)))
            )
            least, greatest = min((low for low, _ in found), default=0), max((high for _, high in found), default=0)
            known[Path(prefix).name] = {"stamp": stamps[prefix], "least": least, "greatest": greatest}
    if todo:
        write_json(record, known)
    entries = {prefix: known[Path(prefix).name] for prefix in hashes}
    return {prefix: (entry["least"], entry["greatest"]) for prefix, entry in entries.items()}


def _chunks(reader: ShardReader) -> Iterator[tuple[int, np.ndarray]]:
    total = int(reader.lengths.sum())
    for start in range(0, total, _CHUNK_TOKENS):
        yield start, reader.read_range(start, min(start + _CHUNK_TOKENS, total))


def _stamp(prefix: str, hashes: list[str]) -> list[Any]:
    status = Path(prefix + ".bin").stat()
    return [status.st_size, status.st_mtime_ns, *hashes]
