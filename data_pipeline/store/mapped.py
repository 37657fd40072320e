"""Memory-mapped files, of which a process may use more than it may have open.

A mapping holds a file descriptor, and `ulimit -n` is 1024 on many machines. A corpus has thousands of shards, and a
mixture a packing plan of two files for every draw of every stage.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_pipeline.errors import DataError


@dataclass(frozen=True)
class MappedFile:
    """A local file as it was when `open` saw it. One that was replaced under the same path is another `MappedFile`."""

    path: str
    inode: int
    modified_ns: int
    num_bytes: int

    @classmethod
    def open(cls, path: Path) -> MappedFile:
        """Raises OSError if there is no such file."""
        status = path.stat()
        return cls(str(path), status.st_ino, status.st_mtime_ns, status.st_size)

    @property
    def content(self) -> np.ndarray:
        """Its bytes, uint8 [num_bytes], read-only. Raises DataError if the file is gone or was replaced meanwhile."""
        return _OPEN.get(self)


@dataclass(frozen=True)
class MappedArray:
    """A `.npy` file of one dimension.

    Attributes:
        file: the file.
        dtype, size: of the array.
        offset: byte at which its values begin.
    """

    file: MappedFile
    dtype: np.dtype
    size: int
    offset: int

    @classmethod
    def open(cls, path: Path) -> MappedArray:
        """Raises OSError or ValueError if there is no such file, or it is of another kind or cut short."""
        with open(path, "rb") as stream:
            version = np.lib.format.read_magic(stream)
            read_header = {
                (1, 0): np.lib.format.read_array_header_1_0,
                (2, 0): np.lib.format.read_array_header_2_0,
            }.get(version)
            if read_header is None:
                raise ValueError(f"{path.name} is of version {version}")
            shape, _, dtype = read_header(stream)
            offset = stream.tell()
        file = MappedFile.open(path)
        if len(shape) != 1 or offset + shape[0] * dtype.itemsize != file.num_bytes:
            raise ValueError(f"{path.name} has {file.num_bytes} bytes, which its shape {shape} does not take")
        return cls(file, dtype, shape[0], offset)

    @property
    def values(self) -> np.ndarray:
        """The array, read-only. Raises DataError as `MappedFile.content`."""
        return self.file.content[self.offset :].view(self.dtype)


class _OpenFiles:
    """The `limit` most recently used mappings. A mapping ends once it has left here and no array shows it any more."""

    def __init__(self, limit: int) -> None:
        self._limit, self._lock = limit, threading.Lock()
        self._recent: OrderedDict[MappedFile, np.ndarray] = OrderedDict()

    def get(self, file: MappedFile) -> np.ndarray:
        with self._lock:
            mapped = self._recent.pop(file, None)
            if mapped is None:
                mapped = _map(file)
            self._recent[file] = mapped
            if len(self._recent) > self._limit:
                self._recent.popitem(last=False)
            return mapped


def _map(file: MappedFile) -> np.ndarray:
    try:
        if MappedFile.open(Path(file.path)) != file:
            raise DataError(f"{file.path}: has changed since it was opened; put the old file back, or start again")
        return np.memmap(file.path, dtype=np.uint8, mode="r") if file.num_bytes else np.zeros(0, dtype=np.uint8)
    except OSError as error:
        raise DataError(f"{file.path}: cannot be read ({error.strerror or error})") from error


_OPEN = _OpenFiles(limit=256)
