"""Input files to records: one function per kind of file, each able to start in the middle. `sources.Corpus` calls them.

Memory does not grow with a file. It does not grow with a document either, except for Parquet and `hf`, whose libraries
return whole values.
"""

from __future__ import annotations

import codecs
import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

from data_pipeline.errors import DataError, library_errors
from data_pipeline.store.files import check_regular
from data_pipeline.store.remote import find_remote, is_remote, open_remote
from data_pipeline.text.compressed import HEAD_BYTES, Compression, binary_kind, compression_of, decompressed
from data_pipeline.text.jsonl import NullText, parse_line, stream_line

LONG_LINE_BYTES = 16 << 20
"""Longer JSONL lines are parsed as a stream, and the text of longer files is read as one."""
_BYTE_ORDER_MARK = "\ufeff"
"""Some editors begin a file with it. It is not part of the text."""
_BLOCK_BYTES = 1 << 20
_BATCH_BYTES = 8 << 20


@dataclass(frozen=True)
class InputFile:
    """One file of a corpus.

    Attributes:
        path: local path or URL.
        name: the path below the directory that was listed.
        num_bytes: size.
        stamp: changes when the file does (time, ETag).
        split: of its documents; None: the text of each document decides.
    """

    path: str
    name: str
    num_bytes: int
    stamp: str
    split: str | None


@dataclass(frozen=True, order=True)
class Position:
    """A point between two records of a corpus: file number, record number in it and, for JSONL, byte offset in it."""

    file: int = 0
    record: int = 0
    offset: int = 0


@dataclass
class Record:
    """One document as it is read. `end` and `num_bytes_read` are valid once `text` has been read to its end.

    Attributes:
        name: file and line or row, for messages.
        text: the text, or an iterator of its parts.
        end: where the next record begins.
        num_bytes_read: bytes of the input file that have been read so far.
        skip_reason: why the document is left out; None: it is not.
    """

    name: str
    text: str | Iterator[str]
    end: Position
    num_bytes_read: int
    skip_reason: str | None = None


def read_stdlib(file: InputFile, start: Position) -> Iterator[Record]:
    """One record: the whole file. A few of Python's own test files are not UTF-8 on purpose; they are skipped."""
    data = Path(file.path).read_bytes()
    end = Position(start.file + 1)
    try:
        yield Record(file.name, data.decode(), end, len(data))
    except UnicodeDecodeError:
        yield Record(file.name, "", end, len(data), "not_utf8")


def read_text(file: InputFile, start: Position, retries: int) -> Iterator[Record]:
    """One record: the whole file."""
    with _named_errors(file.path), open_input(file, retries) as (stream, raw):
        record = Record(file.name, "", Position(start.file + 1), 0)

        def parts() -> Iterator[str]:
            decoder: Any = codecs.getincrementaldecoder("utf-8")("strict")
            lines, at_start = 1, True
            while True:
                block = stream.read(_BLOCK_BYTES)
                record.num_bytes_read = raw.tell()
                try:
                    text = decoder.decode(block, final=not block)
                except UnicodeDecodeError as error:
                    line = lines + error.object.count(b"\n", 0, error.start)
                    raise DataError(
                        f"{file.path}:{line}: is not UTF-8 (byte {error.object[error.start]:#04x}); convert the file, "
                        f"or choose the text files with a glob in data.path"
                    ) from error
                if "\0" in text:
                    line = lines + text.count("\n", 0, text.index("\0"))
                    raise DataError(
                        f"{file.path}:{line}: holds a NUL byte: the file is binary or UTF-16, or has a hole; convert "
                        f"it, or choose the text files with a glob in data.path"
                    )
                lines += text.count("\n")
                if text and at_start:
                    text, at_start = text.removeprefix(_BYTE_ORDER_MARK), False
                if text:
                    yield text
                if not block:
                    return

        if file.num_bytes <= LONG_LINE_BYTES:
            record.text = "".join(parts())
        else:
            record.text = parts()
        yield record


def read_jsonl(file: InputFile, start: Position, text_key: str, retries: int) -> Iterator[Record]:
    """A record per line that is not blank. `start.record` counts all lines before it, blank ones too."""
    with _named_errors(file.path), open_input(file, retries) as (stream, raw):
        _skip_to(stream, start.offset, compressed=stream is not raw)
        number, offset = start.record, start.offset
        while line := stream.readline(LONG_LINE_BYTES):
            number += 1
            location, name = f"{file.path}:{number}", f"{file.name}:{number}"
            is_whole = line.endswith(b"\n") or len(line) < LONG_LINE_BYTES
            if not offset and line.startswith(mark := _BYTE_ORDER_MARK.encode()):
                line, offset = line[len(mark) :], len(mark)
            if is_whole:
                offset += len(line)
                if line.strip():
                    text = parse_line(line, text_key, location)
                    end, skip_reason = Position(start.file, number, offset), "null" if text is None else None
                    yield Record(name, text or "", end, raw.tell(), skip_reason)
                continue
            rest = _RestOfLine(stream, line)
            record = Record(name, "", Position(start.file, number, offset), raw.tell())
            record.text = _long_text(record, rest, raw, text_key, location)
            yield record
            offset += rest.num_bytes


class _RestOfLine:
    """The blocks of a long line, whose first block has been read. `num_bytes` counts those that were taken."""

    def __init__(self, stream: BinaryIO, first: bytes) -> None:
        self._stream, self._block, self.num_bytes = stream, first, 0

    def __iter__(self) -> Iterator[bytes]:
        block = self._block
        while block:
            self.num_bytes += len(block)
            yield block
            block = b"" if block.endswith(b"\n") else self._stream.readline(_BLOCK_BYTES)


def _long_text(record: Record, line: _RestOfLine, raw: BinaryIO, text_key: str, location: str) -> Iterator[str]:
    try:
        for part in stream_line(iter(line), text_key, location):
            record.num_bytes_read = raw.tell()
            yield part
    except NullText:
        record.skip_reason = "null"
    record.end = Position(record.end.file, record.end.record, record.end.offset + line.num_bytes)


def read_parquet(file: InputFile, start: Position, text_key: str, retries: int) -> Iterator[Record]:
    """A record per row, one row group after the other; nulls are skipped. Needs memory for a page of the column."""
    import pyarrow

    with _named_errors(file.path), _open_raw(file, retries) as raw:
        try:
            yield from _parquet_rows(file, raw, start, text_key)
        except pyarrow.ArrowException as error:
            detail = " ".join(str(error).split())
            raise DataError(f"{file.path}: cannot be read as a Parquet file ({detail}); it may be damaged") from error


def _parquet_rows(file: InputFile, raw: BinaryIO, start: Position, text_key: str) -> Iterator[Record]:
    import pyarrow.parquet

    table = pyarrow.parquet.ParquetFile(raw, pre_buffer=False, buffer_size=_BLOCK_BYTES)
    schema = table.schema_arrow
    if text_key not in schema.names:
        columns = ", ".join(schema.names[:8])
        raise DataError(f"{file.path}: has no column {text_key!r} (its columns: {columns}); set data.text_key")
    if schema.names.count(text_key) > 1:
        raise DataError(f"{file.path}: has more than one column {text_key!r}; rename the others")
    kind = schema.field(text_key).type
    if not _is_text(kind):
        raise DataError(f"{file.path}: the column {text_key!r} is of type {kind}, not text; set data.text_key")
    column = min(schema.names.index(text_key), table.metadata.num_columns - 1)
    row = 0
    for group in range(table.num_row_groups):
        meta = table.metadata.row_group(group)
        if not meta.num_rows or row + meta.num_rows <= start.record:
            row += meta.num_rows
            continue
        mean_bytes = max(meta.column(column).total_uncompressed_size, 1) / meta.num_rows
        batch_rows = int(min(max(_BATCH_BYTES / mean_bytes, 1), 4096))
        for batch in table.iter_batches(batch_rows, row_groups=[group], columns=[text_key], use_threads=False):
            for value in batch.column(0):
                row += 1
                if row <= start.record:
                    continue
                try:
                    text = value.as_py()
                except UnicodeDecodeError as error:
                    byte = error.object[error.start]
                    raise DataError(f"{file.path}: row {row}: is not UTF-8 (byte {byte:#04x})") from error
                num_bytes_read = file.num_bytes * row // table.metadata.num_rows
                skip_reason = "null" if text is None else None
                yield Record(f"{file.name}:{row}", text or "", Position(start.file, row), num_bytes_read, skip_reason)


def _is_text(kind: Any) -> bool:
    """Whether a type of Arrow is text: a string in any layout, a dictionary of strings, or nothing but nulls."""
    from pyarrow import types

    if isinstance(kind, types.lib.BaseExtensionType):
        return _is_text(kind.storage_type)
    if types.is_dictionary(kind):
        return _is_text(kind.value_type)
    is_view = getattr(types, "is_string_view", lambda kind: False)  # since pyarrow 16
    return types.is_string(kind) or types.is_large_string(kind) or is_view(kind) or types.is_null(kind)


def read_hf(rows: Any, start: Position, text_key: str, name: str) -> Iterator[Record]:
    """A record per row of a Hugging Face streaming dataset; nulls are skipped."""
    if start.record:
        rows = rows.skip(start.record)
    num_bytes_read, number, rows = 0, start.record, iter(rows)
    while True:
        with library_errors(f"{name}: row {number + 1} cannot be read"):  # the library and its readers raise many
            row = next(rows, None)
        if row is None:
            return
        number += 1
        if text_key not in row:
            columns = ", ".join(list(row)[:8])
            raise DataError(f"{name}: has no column {text_key!r} (its columns: {columns}); set data.text_key")
        text = row[text_key]
        if not isinstance(text, (str, type(None))):
            raise DataError(f"{name}: row {number}: {text_key!r} is not a text but of type {type(text).__name__}")
        num_bytes_read += len(text or "")  # characters: the library does not tell the bytes
        skip_reason = "null" if text is None else None
        yield Record(f"{name}:{number}", text or "", Position(start.file, number), num_bytes_read, skip_reason)


@contextmanager
def open_input(file: InputFile, retries: int) -> Iterator[tuple[BinaryIO, BinaryIO]]:
    """The decompressed content of a file, and the file itself, whose position shows the progress.

    Raises:
        DataError: its first bytes show that it is no text.
    """
    with _open_raw(file, retries) as raw:
        compression = compression_of(file.path, _head(raw))
        stream = raw if compression is None else decompressed(raw, compression)
        _check_text(file.path, _head(stream), compression)
        yield stream, raw


def check_head(path: str, head: bytes) -> None:
    """Raise DataError if the first bytes of a file show that it is no text, before hours are spent on other files."""
    with _named_errors(path):
        compression = compression_of(path, head)
    if compression is not None:
        try:
            head = _head(decompressed(cast(BinaryIO, io.BytesIO(head)), compression))
        except (OSError, EOFError):  # the first bytes do not suffice for a block
            return
    _check_text(path, head, compression)


def _check_text(path: str, head: bytes, compression: Compression | None) -> None:
    kind = binary_kind(head)
    if kind is not None:
        inside = "" if compression is None else f", compressed with {compression.name}"
        raise DataError(
            f"{path}: is {kind}{inside}, not text; unpack or convert it, or choose the files with a glob in data.path"
        )


def _head(stream: Any) -> bytes:
    """The first bytes of a buffered stream, which stay unread."""
    return stream.peek(HEAD_BYTES)[:HEAD_BYTES]


def _open_raw(file: InputFile, retries: int) -> BinaryIO:
    if is_remote(file.path):
        found = find_remote(file.path, retries)
        _check_unchanged(file, found.size, found.stamp)
        return open_remote(found)
    status = os.stat(file.path)
    check_regular(status.st_mode, file.path)
    # The listing gives a link the time of the link itself, so `file.stamp` cannot be compared for links.
    _check_unchanged(file, status.st_size, file.stamp if os.path.islink(file.path) else str(status.st_mtime))
    return open(file.path, "rb", buffering=_BLOCK_BYTES)


def _check_unchanged(file: InputFile, size: int, stamp: str) -> None:
    if (size, stamp) != (file.num_bytes, file.stamp):
        raise DataError(f"{file.path}: has changed since the corpus was listed; run it again")


def _skip_to(stream: BinaryIO, offset: int, compressed: bool) -> None:
    if not compressed:
        stream.seek(offset)
        return
    while offset:
        offset -= len(stream.read(min(offset, _BLOCK_BYTES))) or offset


@contextmanager
def _named_errors(path: str) -> Iterator[None]:
    try:
        yield
    except (OSError, EOFError, ImportError) as error:
        if "requires too much memory" in str(error):  # pyarrow's limit
            raise DataError(
                f"{path}: its zstd window is larger than 128 MiB; pip install zstandard, which reads windows up to 2 "
                f"GiB, or compress the file without --long"
            ) from error
        raise DataError(f"{path}: cannot be read to its end ({error}); the file may be damaged") from error
