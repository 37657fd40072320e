"""Remote files (s3://, gs://, https://, hf://, ...) through fsspec, read in ranges. Failed requests are retried.

Credentials and endpoints come from the environment only, as each protocol's library reads them.
"""

from __future__ import annotations

import io
import random
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, BinaryIO, TypeVar

from data_pipeline.errors import DataError, StoreError

T = TypeVar("T")
# Keys of `info` that change with the content, the most reliable first: S3's and Google's, then HTTP headers.
_STAMPS = ("mtime", "ETag", "etag", "Content-MD5", "Digest", "LastModified", "Last-Modified", "blob_id")
_FIRST_WAIT_SECONDS, _LONGEST_WAIT_SECONDS = 0.1, 8.0
_BUFFER_BYTES = 4 << 20
# Retrying does not help with these. Any other may be a broken connection: every protocol's library has its own errors.
_PERMANENT_ERRORS = (
    FileNotFoundError,
    IsADirectoryError,
    NotADirectoryError,
    PermissionError,
    ImportError,
    NotImplementedError,
    ValueError,
    TypeError,
)
_PERMANENT_ERROR_NAMES = {"NoCredentialsError", "PartialCredentialsError", "ParamValidationError", "InvalidRegionError"}


def is_remote(path: str) -> bool:
    """Whether a path is a URL that is not of this machine's file system."""
    return "://" in path and not path.startswith(("file://", "local://"))


def with_retries(action: Callable[[], T], subject: str, retries: int) -> T:
    """The result of `action`, which is retried up to `retries` times with growing pauses.

    Raises:
        DataError: it never succeeded, or failed with a permanent error. The message begins with `subject`.
    """
    wait = _FIRST_WAIT_SECONDS
    for attempt in range(retries + 1):
        try:
            return action()
        except DataError:
            raise
        except Exception as error:
            is_known = isinstance(error, _PERMANENT_ERRORS) or type(error).__name__ in _PERMANENT_ERROR_NAMES
            is_permanent = is_known and not _hides_failure(error)
            if is_permanent or attempt == retries:
                attempts = "" if is_permanent else f" after {attempt + 1} attempts"
                cause = error.__cause__ if _hides_failure(error) else error
                detail = " ".join(f"{type(cause).__name__}: {cause}".split())
                kind = DataError if is_permanent else StoreError
                raise kind(f"{subject} cannot be read{attempts} ({detail})") from error
        time.sleep(wait * random.uniform(0.5, 1.0))  # ranks must not all retry at the same moment
        wait = min(2 * wait, _LONGEST_WAIT_SECONDS)
    raise AssertionError("unreachable")


@dataclass(frozen=True)
class RemoteObject:
    """One remote file: its size when it was found, and a stamp (ETag, time) that changes when it does."""

    url: str
    size: int
    stamp: str
    retries: int

    def read(self, start: int, stop: int) -> bytes:
        """Bytes `start : stop` (up to the end of the file). Raises DataError after the last retry."""
        stop = min(stop, self.size)
        if start >= stop:
            return b""

        def get() -> bytes:
            system, path = _file_system(self.url)
            data: bytes = system.cat_file(path, start=start, end=stop)
            if len(data) != stop - start:
                raise OSError(f"got {len(data)} of {stop - start} bytes")
            return data

        return with_retries(get, f"{self.url}: bytes {start}-{stop}", self.retries)


def find_remote(url: str, retries: int) -> RemoteObject:
    """Find one remote file. Raises DataError when it does not exist or cannot be reached."""

    def find() -> RemoteObject:
        system, path = _file_system(url)
        info = system.info(path, refresh=True) if "s3" in _protocols(system) else system.info(path)
        if info.get("type") == "directory":
            raise IsADirectoryError(url)
        if info.get("size") is None:
            raise OSError("the server does not report its size")
        return RemoteObject(url, int(info["size"]), stamp_of(info), retries)

    return with_retries(find, url, retries)


def info_or_none(system: Any, path: str) -> dict[str, Any] | None:
    """fsspec's `info` of a path; None when nothing is there. Other failures are raised."""
    try:
        info: dict[str, Any] = system.info(path)
    except FileNotFoundError as error:
        if _hides_failure(error):
            raise
        return None
    return info


def stamp_of(info: dict[str, Any]) -> str:
    """The version of a file by its `info`: ETag, time or hash; "" when the file system gives none."""
    # A time of 0.0 (1970, as in reproducible archives) is a stamp like any other.
    return next((str(info[key]) for key in _STAMPS if info.get(key) not in (None, "")), "")


def open_remote(file: RemoteObject) -> BinaryIO:
    """A buffered, seekable reader of a remote file. It requests the next range while the last one is used."""
    return io.BufferedReader(_RemoteReader(file), _BUFFER_BYTES)


class _RemoteReader(io.RawIOBase):
    def __init__(self, file: RemoteObject) -> None:
        self._file = file
        self._position = 0
        self._pool = ThreadPoolExecutor(1, "read-ahead")
        self._ahead: tuple[int, Future[bytes]] | None = None

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._file.size}[whence]
        self._position = max(base + offset, 0)
        return self._position

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        start, wanted = self._position, len(view)
        if self._ahead is not None and self._ahead[0] == start:
            data = self._ahead[1].result()[:wanted]
        else:
            data = self._file.read(start, start + wanted)
        self._ahead = None
        view[: len(data)] = data
        self._position = start + len(data)
        if wanted >= _BUFFER_BYTES and self._position < self._file.size:
            following = self._position
            future = self._pool.submit(self._file.read, following, following + _BUFFER_BYTES)
            self._ahead = (following, future)
        return len(data)

    def readall(self) -> bytes:
        # The base class would request 8 KiB at a time.
        start, self._position = self._position, max(self._position, self._file.size)
        stops = range(start, self._file.size, _BUFFER_BYTES)
        return b"".join(self._file.read(at, at + _BUFFER_BYTES) for at in stops)

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)
        super().close()


def _hides_failure(error: Exception) -> bool:
    # fsspec's HTTP raises FileNotFoundError for every failed request; the cause shows a server's error.
    cause = error.__cause__
    from_server = cause is not None and type(cause).__module__.startswith("aiohttp")
    return from_server and getattr(cause, "status", 500) >= 500


def _file_system(url: str) -> tuple[Any, str]:
    import fsspec

    return fsspec.core.url_to_fs(url)


def _protocols(system: Any) -> tuple[str, ...]:
    return (system.protocol,) if isinstance(system.protocol, str) else tuple(system.protocol)
