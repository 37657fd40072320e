"""What is in an input file: compressed streams, which are all checked, and binary content, which is not text.

The standard library stops at the first later stream of a .bz2 or .xz file that it cannot read, as if the file ended
there. Here a file ends where its last stream does: anything else after a stream is an error.
"""

from __future__ import annotations

import bz2
import io
import lzma
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, BinaryIO, cast

HEAD_BYTES = 512
"""A file's kind shows in its first bytes: a tar archive's in byte 257."""
ZSTD_WINDOW_BYTES = 1 << 31
"""The largest window of zstd, `--long=31`. Reading takes as much memory. pyarrow alone reads up to 128 MiB."""
_BLOCK_BYTES = 1 << 20
_ZSTD_BLOCK_BYTES = 1 << 12  # its decoder returns all that a block becomes, which can be 30,000 times as much
_MAX_PADDING_BYTES = 1 << 20


@dataclass(frozen=True)
class Compression:
    """A format of compressed files.

    Attributes:
        name: for messages.
        ending: of the names of its files.
        magic: the bytes with which a stream begins.
        other_magics: with which a file may begin that is known to be of this format by its name.
        may_be_padded: whether zero bytes may stand between streams.
    """

    name: str
    ending: str
    magic: bytes
    other_magics: tuple[bytes, ...] = ()
    may_be_padded: bool = True


_SKIPPABLE = tuple(bytes([byte]) + b"\x2a\x4d\x18" for byte in range(0x50, 0x60))  # frames of other data in .zst files
COMPRESSIONS = (
    Compression("gzip", ".gz", b"\x1f\x8b\x08"),
    Compression("zstd", ".zst", b"\x28\xb5\x2f\xfd", _SKIPPABLE, may_be_padded=False),
    Compression("bzip2", ".bz2", b"BZh91AY&SY", (b"BZh",)),
    Compression("xz", ".xz", b"\xfd7zXZ\x00", (b"\x5d\x00\x00",)),
)
COMPRESSED = tuple(compression.ending for compression in COMPRESSIONS)
"""Endings of compressed files."""
_BINARY = (
    (257, b"ustar", "a tar archive"),
    (0, b"PK\x03\x04", "a zip archive"),
    (0, b"PK\x05\x06", "a zip archive"),
    (0, b"7z\xbc\xaf\x27\x1c", "a 7z archive"),
    (0, b"Rar!\x1a\x07", "a rar archive"),
    (0, b"\x04\x22\x4d\x18", "an lz4 file"),
    (0, b"\x1f\x9d", "a compress (.Z) file"),
    (0, b"%PDF-1.", "a PDF document"),
    (0, b"\x89PNG\r\n", "a PNG picture"),
    (0, b"\xff\xd8\xff", "a JPEG picture"),
    (0, b"PAR1\x15", "a Parquet file"),
    (0, b"ARROW1\x00", "an Arrow file"),
    (0, b"\x89HDF\r\n", "an HDF5 file"),
    (0, b"\x93NUMPY", "a NumPy file"),
    (0, b"SQLite format 3\x00", "an SQLite database"),
    (0, b"\x7fELF", "a program"),
    (0, b"MMIDIDX\x00", "the index of a token shard"),
)


def binary_kind(head: bytes) -> str | None:
    """What the first bytes of a file that is not text say that it is: `a tar archive`; None when they say nothing."""
    for start, magic, kind in _BINARY:
        if head.startswith(magic, start):
            return kind
    for compression in COMPRESSIONS:
        if head.startswith(compression.magic):
            return f"a file compressed with {compression.name}"
    return None


def compression_of(path: str, head: bytes) -> Compression | None:
    """How a file is compressed, by its name, or else by its first bytes: a URL may end in `?token=...`.

    Raises:
        OSError: the name and the content disagree.
    """
    for compression in COMPRESSIONS:
        if path.lower().endswith(compression.ending):
            if head.startswith((compression.magic, *compression.other_magics)):
                return compression
            if not head:
                raise OSError("it has 0 bytes, which a compressed file never has")
            found = binary_kind(head) or f"something that begins with {head[:8]!r}"
            raise OSError(f"its name ends with {compression.ending}, but it is {found}, not {compression.name}")
    return next((compression for compression in COMPRESSIONS if head.startswith(compression.magic)), None)


def decompressed(raw: BinaryIO, compression: Compression) -> BinaryIO:
    """The content of all streams of a compressed file.

    Reading raises OSError or EOFError where a stream is damaged or cut, or where something else follows a stream.
    """
    block_bytes = _BLOCK_BYTES
    new_decoder: Callable[[], Any] = {"gzip": _Gzip, "bzip2": bz2.BZ2Decompressor, "xz": lzma.LZMADecompressor}.get(
        compression.name, _Zstd
    )
    if compression.name == "zstd":
        try:
            import zstandard  # noqa: F401
        except ImportError:  # it comes with the extra `hf`
            import pyarrow

            stream: Any = pyarrow.CompressedInputStream(pyarrow.PythonFile(raw, mode="r"), "zstd")
            return cast(BinaryIO, io.BufferedReader(stream, _BLOCK_BYTES))
        block_bytes = _ZSTD_BLOCK_BYTES
    return cast(BinaryIO, io.BufferedReader(_Streams(raw, compression, new_decoder, block_bytes), _BLOCK_BYTES))


class _Gzip:
    """zlib's decoder of a gzip member with the interface of `bz2.BZ2Decompressor`."""

    def __init__(self) -> None:
        self._inner = zlib.decompressobj(31)

    def decompress(self, data: bytes, max_length: int) -> bytes:
        return self._inner.decompress(self._inner.unconsumed_tail + data, max_length)

    @property
    def eof(self) -> bool:
        return self._inner.eof

    @property
    def unused_data(self) -> bytes:
        return self._inner.unused_data

    @property
    def needs_input(self) -> bool:
        return not self._inner.unconsumed_tail


class _Zstd:
    """zstandard's decoder of a frame with that interface. It returns all it has, however long."""

    needs_input = True

    def __init__(self) -> None:
        import zstandard

        self._inner = zstandard.ZstdDecompressor(max_window_size=ZSTD_WINDOW_BYTES).decompressobj()

    def decompress(self, data: bytes, max_length: int) -> bytes:
        import zstandard

        try:
            return self._inner.decompress(data) if data else b""
        except zstandard.ZstdError as error:
            raise OSError(str(error)) from error

    @property
    def eof(self) -> bool:
        return self._inner.eof

    @property
    def unused_data(self) -> bytes:
        return self._inner.unused_data


class _Streams(io.RawIOBase):
    """The content of consecutive compressed streams."""

    def __init__(self, raw: BinaryIO, compression: Compression, new_decoder: Callable[[], Any], block: int) -> None:
        self._raw, self._compression, self._new_decoder, self._block = raw, compression, new_decoder, block
        self._decoder: Any = None  # None: between streams
        self._input, self._output = b"", memoryview(b"")
        self._num_read, self._number, self._begin = 0, 0, 0  # `_begin`: where stream `_number`, from 1, begins

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        while not self._output:
            if self._decoder is None and not self._begin_stream():
                return 0
            self._output = memoryview(self._decode(len(view)))
        length = min(len(view), len(self._output))
        view[:length], self._output = self._output[:length], self._output[length:]
        return length

    def _begin_stream(self) -> bool:
        """Begin with the next stream; False at the end of the file."""
        num_padding = 0
        while True:
            if self._compression.may_be_padded and self._number:
                rest = self._input.lstrip(b"\0")
                num_padding += len(self._input) - len(rest)
                self._input = rest
            if num_padding > _MAX_PADDING_BYTES:
                raise OSError(f"more than {_MAX_PADDING_BYTES} zero bytes follow stream {self._number}")
            if self._input:
                break
            if not self._fill():
                return False
        self._number += 1
        self._begin = self._num_read - len(self._input)
        self._decoder = self._new_decoder()
        return True

    def _decode(self, max_length: int) -> bytes:
        decoder = self._decoder
        at_end = not self._input and decoder.needs_input and not self._fill()
        data, self._input = self._input, b""
        try:
            output: bytes = decoder.decompress(data, max_length)
        except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
            raise OSError(f"{self._place()}, is damaged, or is not {self._compression.name}: {error}") from error
        if decoder.eof:
            self._input, self._decoder = decoder.unused_data, None
        elif at_end and not output:
            raise EOFError(f"the file ends inside {self._place()}")
        return output

    def _place(self) -> str:
        return f"stream {self._number}, at byte {self._begin}"

    def _fill(self) -> bool:
        self._input = self._raw.read(self._block)
        self._num_read += len(self._input)
        return bool(self._input)
