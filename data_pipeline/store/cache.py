"""A cache of blocks of remote files on the local disk, of bounded size, shared by all processes of a host.

A block file holds a block and its checksum, and gets its name when it is complete: what a killed process or a full or
failing disk leaves is never read as a block. Reading a block renews its time stamp; when the bound is reached, the
least recently read blocks are deleted first.
"""

from __future__ import annotations

import hashlib
import os
import threading
import time
import zlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from data_pipeline.errors import DataError
from data_pipeline.store.files import atomic_write, locked, sha256_of_file
from data_pipeline.store.remote import RemoteObject

BLOCK_BYTES = 1 << 20
_CHECKSUM_BYTES = 4
_NUM_LOCKS = 64
_CONNECTIONS = 16
_PREFETCH_PAUSE_SECONDS = 30.0


class BlockCache:
    """Reads ranges of remote files through a directory of blocks.

    Args:
        directory: the blocks; processes and runs may share it.
        max_bytes: bound of all block files together, at least four blocks.

    Attributes:
        num_fetched: number of blocks that this object has fetched.

    Raises:
        DataError: the bound is too small, or the directory cannot be written.
    """

    def __init__(self, directory: str | Path, max_bytes: int) -> None:
        self._directory = Path(directory)
        self._max_bytes = max_bytes
        if max_bytes < 4 * BLOCK_BYTES:
            raise DataError(f"data.cache_gb={max_bytes / 1e9:g} is less than four blocks of {BLOCK_BYTES} bytes")
        try:
            (self._directory / "locks").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise self._unwritable(error) from error
        self._pool = ThreadPoolExecutor(_CONNECTIONS, "fetch")
        self._pending: set[tuple[str, int]] = set()
        self._pending_lock = threading.Lock()
        self._prefetch_paused_until = 0.0
        self.num_fetched = 0

    def read(self, file: RemoteObject, start: int, stop: int) -> bytes:
        """Bytes `start : stop` of a file; missing blocks are fetched in parallel. DataError after the last retry."""
        numbers = range(start // BLOCK_BYTES, -(-stop // BLOCK_BYTES)) if stop > start else range(0)
        if len(numbers) == 1:
            blocks = [self._block(file, numbers[0])]
        else:
            blocks = list(self._pool.map(lambda number: self._block(file, number), numbers))
        whole = b"".join(blocks)
        offset = start - numbers.start * BLOCK_BYTES if blocks else 0
        return whole[offset : offset + stop - start]

    def prefetch(self, file: RemoteObject, ranges: Iterable[tuple[int, int]]) -> None:
        """Start to fetch the blocks of byte ranges without waiting. An error is raised when they are read."""
        for start, stop in ranges:
            for number in range(start // BLOCK_BYTES, -(-stop // BLOCK_BYTES)):
                key = (file.url, number)
                with self._pending_lock:
                    if key in self._pending:
                        continue
                    self._pending.add(key)
                self._pool.submit(self._fetch_ahead, file, number, key)

    def whole_file(self, file: RemoteObject, sha256: str | None = None) -> Path:
        """A local copy of a small file (an index), not counted in the bound, and checked against `sha256` if given."""
        path = self._directory / f"{_key(file)}-whole"
        try:
            with locked(self._lock_path(path.name)):
                if not path.exists() or path.stat().st_size != file.size:
                    with atomic_write(path) as copy:
                        for start in range(0, file.size, 4 * BLOCK_BYTES):
                            copy.write(file.read(start, start + 4 * BLOCK_BYTES))
                if sha256 is not None and (found := sha256_of_file(path)) != sha256:
                    path.unlink()
                    raise DataError(f"{file.url}: has sha256 {found}, but its manifest says {sha256}; upload it again")
        except OSError as error:
            raise self._unwritable(error) from error
        return path

    def _fetch_ahead(self, file: RemoteObject, number: int, key: tuple[str, int]) -> None:
        try:
            if time.monotonic() >= self._prefetch_paused_until:
                self._block(file, number)
        except DataError:
            # `read` will raise it. Other waiting blocks would fail too, each after all its retries.
            self._prefetch_paused_until = time.monotonic() + _PREFETCH_PAUSE_SECONDS
        finally:
            with self._pending_lock:
                self._pending.discard(key)

    def _block(self, file: RemoteObject, number: int) -> bytes:
        start = number * BLOCK_BYTES
        length = min(BLOCK_BYTES, file.size - start)
        path = self._directory / f"{_key(file)}-{number:08d}.block"
        if (block := _load(path, length)) is not None:
            return block
        try:
            # One process fetches the block; others that need it wait.
            with locked(self._lock_path(path.name)):
                if (block := _load(path, length)) is not None:
                    return block
                block = file.read(start, start + length)
                self.num_fetched += 1
                self._store(path, block + zlib.crc32(block).to_bytes(_CHECKSUM_BYTES, "little"))
                return block
        except OSError as error:
            raise self._unwritable(error) from error

    def _store(self, path: Path, content: bytes) -> None:
        """Write a block file. If it would exceed the bound, first delete old ones down to nine tenths of the bound."""
        with locked(self._directory / "locks" / "room"):
            record = self._directory / "used"
            try:
                used = int(record.read_text())
            except (OSError, ValueError):
                used = self._max_bytes  # unknown: count the files below
            if used + len(content) > self._max_bytes:
                entries = [entry for entry in os.scandir(self._directory) if entry.name.endswith((".block", ".tmp"))]
                found = sorted((entry.stat().st_mtime_ns, entry.stat().st_size, entry.path) for entry in entries)
                used = sum(size for _, size, _ in found)
                for _, size, old in found:
                    if used + len(content) <= self._max_bytes * 9 // 10:
                        break
                    Path(old).unlink(missing_ok=True)
                    used -= size
            # The count is written first: a kill in between leaves it too high, which the next deletion corrects.
            _replace(record, str(used + len(content)).encode())
            _replace(path, content)

    def _lock_path(self, name: str) -> Path:
        return self._directory / "locks" / str(zlib.crc32(name.encode()) % _NUM_LOCKS)

    def _unwritable(self, error: OSError) -> DataError:
        return DataError(
            f"{self._directory}: the cache of remote shards cannot be written ({error}); make room on the disk, set a "
            f"smaller data.cache_gb, or another data.cache_dir"
        )


def _key(file: RemoteObject) -> str:
    return hashlib.sha256(f"{file.url}\n{file.size}\n{file.stamp}".encode()).hexdigest()[:24]


def _replace(path: Path, content: bytes) -> None:
    temporary = path.with_name(f"{path.name}.{os.getpid()}.{threading.get_ident()}.tmp")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _load(path: Path, length: int) -> bytes | None:
    """A block from the disk; None when it is absent or damaged."""
    try:
        content = path.read_bytes()
        if len(content) != length + _CHECKSUM_BYTES:
            return None
        block, checksum = content[:length], content[length:]
        if zlib.crc32(block).to_bytes(_CHECKSUM_BYTES, "little") != checksum:
            return None
        os.utime(path)
    except FileNotFoundError:
        return None
    return block
