"""Where documents come from: the standard library's own source, text files and JSONL files, local or remote.

A corpus is a list of input files, found up front, and one pass over them that yields every document with the split it
belongs to. The list (names, sizes, time stamps) identifies the corpus without reading it.
"""

from __future__ import annotations

import hashlib
import io
import json
import lzma
import os
import sysconfig
import zlib
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from data_pipeline.config import DataConfig
from data_pipeline.errors import DataError

TRAIN, VALIDATION = "train", "validation"
SPLITS = (TRAIN, VALIDATION)
_COMPRESSED = (".gz", ".zst", ".bz2", ".xz")
_JSONL = (".jsonl", ".ndjson", ".json")
_TEST_DIRECTORIES = {"test", "tests", "idle_test"}
_NOT_STDLIB = {"site-packages", "dist-packages", "__pycache__"}


@dataclass(frozen=True)
class Document:
    """A text, the place it came from (for messages), and the bytes it took in its (decompressed) file."""

    text: str
    name: str
    num_bytes: int


@dataclass(frozen=True)
class InputFile:
    """One file of a corpus. `stamp` changes when the file does; `split` is None where each document decides."""

    path: str
    name: str
    num_bytes: int
    stamp: str
    split: str | None


class Corpus:
    """The input files of a configuration and the documents in them.

    Attributes:
        name: short name for directories.
        files: the input files in reading order.
        split_rule: in words, how documents are held out.
        num_bytes: bytes that a full pass reads, or None when compressed files hide it.
    """

    def __init__(self, config: DataConfig) -> None:
        self._config = config
        if config.source == "stdlib":
            self.name = "stdlib"
            self.files, self.split_rule = _list_stdlib(sysconfig.get_path("stdlib"), config.validation_fraction)
        else:
            assert config.path is not None  # DataConfig refuses a missing path for these sources
            self.name = _short_name(config.path)
            self.files, self.split_rule = _list_path(config)
        compressed = any(file.path.endswith(_COMPRESSED) for file in self.files)
        self.num_bytes = None if compressed else sum(file.num_bytes for file in self.files)

    def identity(self) -> dict[str, Any]:
        """What tells this corpus from another one: JSON-able, and cheap, for it does not read the files."""
        config = self._config
        return {
            "source": config.source,
            "text_key": config.text_key if config.source == "jsonl" else None,
            "split_rule": self.split_rule,
            "files": [[file.name, file.num_bytes, file.stamp, file.split] for file in self.files],
        }

    def documents(self, skipped: Counter[str]) -> Iterator[tuple[str, Document]]:
        """Yield `(split, document)` for every non-empty document, always in the same order.

        Args:
            skipped: counts what is left out, by reason (`empty`, `not_utf8`).

        Raises:
            DataError: a file cannot be read, or a line or text is not what it should be; names the place.
        """
        read = {"stdlib": self._read_stdlib, "text": self._read_text, "jsonl": self._read_jsonl}[self._config.source]
        for file in self.files:
            for document in read(file, skipped):
                if not document.text:
                    skipped["empty"] += 1
                    continue
                yield file.split or self._split_of(document), document

    def _split_of(self, document: Document) -> str:
        # The text itself is the identity: moving, renaming or reordering files moves no document across the split, and
        # a duplicate of a held-out document is held out too.
        digest = hashlib.blake2b(document.text.encode(), digest_size=8).digest()
        held_out = int.from_bytes(digest, "little") < self._config.validation_fraction * 2**64
        return VALIDATION if held_out else TRAIN

    def _read_stdlib(self, file: InputFile, skipped: Counter[str]) -> Iterator[Document]:
        data = Path(file.path).read_bytes()
        try:
            yield Document(data.decode(), file.name, len(data))
        except UnicodeDecodeError:
            skipped["not_utf8"] += 1  # a few of Python's own test files are in other encodings on purpose

    def _read_text(self, file: InputFile, skipped: Counter[str]) -> Iterator[Document]:
        data = b"".join(_blocks(file.path))
        try:
            yield Document(data.decode(), file.name, len(data))
        except UnicodeDecodeError as error:
            line = data.count(b"\n", 0, error.start) + 1
            raise DataError(
                f"{file.path}:{line}: is not UTF-8 (byte {data[error.start]:#04x}); convert the file, or choose the "
                f"text files with a glob in data.path"
            ) from error

    def _read_jsonl(self, file: InputFile, skipped: Counter[str]) -> Iterator[Document]:
        for number, line in enumerate(_lines(file.path), start=1):
            if line.strip():
                place = f"{file.path}:{number}"
                yield Document(_parse_line(line, self._config.text_key, place), f"{file.name}:{number}", len(line))


def _parse_line(line: bytes, text_key: str, place: str) -> str:
    """The text of one JSONL line; DataError naming the place when there is none."""
    try:
        value = json.loads(line.decode().rstrip())
    except UnicodeDecodeError as error:
        raise DataError(f"{place}: is not UTF-8 (byte {line[error.start]:#04x} in column {error.start + 1})") from error
    except (ValueError, RecursionError) as error:
        detail = f"{error.msg} in column {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)
        raise DataError(f"{place}: is not a JSON object ({detail})") from error
    if not isinstance(value, dict):
        raise DataError(f"{place}: is not a JSON object but of type {type(value).__name__}")
    if text_key not in value:
        keys = ", ".join(sorted(value)[:8]) or "none"
        raise DataError(f"{place}: lacks the key {text_key!r} (its keys: {keys}); set data.text_key")
    text = value[text_key]
    if not isinstance(text, str):
        raise DataError(f"{place}: the value of {text_key!r} is not a text but of type {type(text).__name__}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        # JSON can spell half of a surrogate pair ("\ud800"), which is no character and has no UTF-8.
        raise DataError(f"{place}: the text holds half a surrogate pair at character {error.start}") from error
    return text


def _list_stdlib(root: str, fraction: float) -> tuple[tuple[InputFile, ...], str]:
    found: list[InputFile] = []
    for directory, names, files in os.walk(root):
        names[:] = sorted(name for name in names if name not in _NOT_STDLIB)
        for file in sorted(files):
            path = os.path.join(directory, file)
            if file.endswith(".py") and os.path.isfile(path):  # some distributions leave dangling links
                status = os.stat(path)
                name = os.path.relpath(path, root)
                held_out = not _TEST_DIRECTORIES.isdisjoint(Path(name).parts[:-1])
                stamp = str(status.st_mtime_ns)
                found.append(InputFile(path, name, status.st_size, stamp, VALIDATION if held_out else TRAIN))
    found.sort(key=lambda file: file.name)
    if not found:
        raise DataError(f"{root}: holds no .py file of the standard library; set data.source to text or jsonl")
    if any(file.split == VALIDATION for file in found):
        return tuple(found), "files below a test directory are held out"
    # Slim container images delete Python's tests; hold out a share of the documents there.
    undecided = tuple(InputFile(file.path, file.name, file.num_bytes, file.stamp, None) for file in found)
    return undecided, f"documents are held out by a hash of their text, fraction {float(fraction)!r}"


def _list_path(config: DataConfig) -> tuple[tuple[InputFile, ...], str]:
    assert config.path is not None
    if config.validation_path is None:
        rule = f"documents are held out by a hash of their text, fraction {float(config.validation_fraction)!r}"
        return tuple(_find(config.path, "path", config.source, None)), rule
    held_out = _find(config.validation_path, "validation_path", config.source, VALIDATION)
    # A directory may hold both; what is named for validation is never trained on.
    taken = {file.path for file in held_out}
    train = [file for file in _find(config.path, "path", config.source, TRAIN) if file.path not in taken]
    if not train:
        raise DataError(f"data.path={config.path}: all its files are also in data.validation_path")
    return tuple(train + held_out), "files of data.validation_path are held out"


def _find(path: str, field: str, source: str, split: str | None) -> list[InputFile]:
    """The files that a path, directory or glob names, sorted; DataError when there is none with any content."""
    import fsspec

    try:
        system, root = fsspec.core.url_to_fs(path)
        if system.isdir(root):
            wanted = tuple(end + more for end in _JSONL for more in ("", *_COMPRESSED)) if source == "jsonl" else ("",)
            base = root.rstrip("/")
            paths = [item for item in system.find(root) if _is_wanted(item[len(base) + 1 :], wanted)]
            kind = f"no {'/'.join(_JSONL)} file in this directory" if source == "jsonl" else "no file in this directory"
        elif system.isfile(root):
            base, paths, kind = root.rpartition("/")[0], [root], ""
        else:
            paths = [item for item in system.glob(root) if system.isfile(item)]
            base = os.path.commonpath([item.rpartition("/")[0] for item in paths]) if paths else ""
            kind = "no such file or directory, and no file matches it as a glob"
        files = []
        for item in sorted(paths):
            info = system.info(item)
            stamp = next((str(info[key]) for key in ("mtime", "ETag", "etag", "LastModified") if key in info), "")
            local = "file" in ((system.protocol,) if isinstance(system.protocol, str) else system.protocol)
            name = item[len(base) :].lstrip("/")
            address = item if local else system.unstrip_protocol(item)
            files.append(InputFile(address, name, int(info["size"] or 0), stamp, split))
    except (OSError, ImportError, ValueError) as error:
        raise DataError(f"data.{field}={path}: cannot be listed ({error})") from error
    if not files:
        raise DataError(f"data.{field}={path}: {kind}")
    if not any(file.num_bytes for file in files):
        raise DataError(f"data.{field}={path}: is empty (0 bytes in {len(files)} file{'s' * (len(files) > 1)})")
    return files


def _is_wanted(name: str, endings: tuple[str, ...]) -> bool:
    return name.endswith(endings) and not any(part.startswith(".") for part in name.split("/"))


def _short_name(path: str) -> str:
    """A directory name that a human recognises: the last telling part of the path, plain characters only."""
    parts = [part for part in path.replace("*", "").split("/") if part.strip(".")]
    stem = parts[-1].split(".")[0] if parts else ""
    return "".join(char if char.isalnum() and char.isascii() else "-" for char in stem).strip("-")[:40] or "corpus"


def _open(path: str) -> BinaryIO:
    import fsspec

    if path.endswith(".zst"):
        # Arrow's stream reads all frames of a file and refuses a truncated one; the usual reader of the zstandard
        # package returns what it has, so that a cut-off download would lose documents without a word.
        import pyarrow

        raw = fsspec.open(path, "rb", compression=None).open()
        return io.BufferedReader(pyarrow.CompressedInputStream(pyarrow.PythonFile(raw, mode="r"), "zstd"), 1 << 20)
    return fsspec.open(path, "rb", compression="infer").open()


def _lines(path: str) -> Iterator[bytes]:
    with _named_errors(path), _open(path) as file:
        yield from file


def _blocks(path: str) -> Iterator[bytes]:
    with _named_errors(path), _open(path) as file:
        while block := file.read(1 << 20):
            yield block


@contextmanager
def _named_errors(path: str) -> Iterator[None]:
    try:
        yield
    except (OSError, EOFError, zlib.error, lzma.LZMAError, ImportError) as error:
        raise DataError(f"{path}: cannot be read to its end ({error}); the file may be damaged") from error
