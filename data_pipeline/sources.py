"""Where documents come from: the standard library's own source, text, JSONL and Parquet files, local or remote, and
Hugging Face datasets.

A corpus is a list of input files, found up front, and one pass over them that yields every document, in pieces where it
is long, with the split it belongs to. The list (names, sizes, time stamps) and stretches of the files' content identify
the corpus without reading all of it.
"""

from __future__ import annotations

import hashlib
import os
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipeline.config import DataConfig
from data_pipeline.errors import DataError
from data_pipeline.readers import (
    COMPRESSED,
    InputFile,
    Position,
    Record,
    read_hf,
    read_jsonl,
    read_parquet,
    read_stdlib,
    read_text,
)
from data_pipeline.remote import info_or_none, is_remote, stamp_of, with_retries
from data_pipeline.tokenizer import PIECE_CHARACTERS, cut_text

TRAIN, VALIDATION = "train", "validation"
SPLITS = (TRAIN, VALIDATION)
_JSONL = (".jsonl", ".ndjson", ".json")
_ENDINGS = {
    "jsonl": tuple(end + more for end in _JSONL for more in ("", *COMPRESSED)),
    "parquet": (".parquet", ".pq"),
    "text": ("",),
}
_KINDS = {
    "jsonl": f"no {'/'.join(_JSONL)} file in this directory",
    "parquet": "no .parquet/.pq file in this directory",
    "text": "no file in this directory",
}
_TEST_DIRECTORIES = {"test", "tests", "idle_test"}
_NOT_STDLIB = {"site-packages", "dist-packages", "__pycache__"}
_PROBED_FILES, _PROBES, _PROBE_BYTES = 1024, 2048, 4096


@dataclass(frozen=True)
class Piece:
    """A document, or a part of a long one, in reading order.

    Attributes:
        name: the place the document came from.
        text: what `tokenizer.cut_text` cut.
        first, last: whether it begins, and ends, its document.
        split: `train` or `validation`, alike on all pieces of a document.
        reason: why the document is left out (`empty`, `null`, `not_utf8`), None when it is not.
        end: the position after the document; holds on its last piece.
        num_read: bytes of input files read since the piece before.
    """

    name: str
    text: str
    first: bool
    last: bool
    split: str
    reason: str | None
    end: Position
    num_read: int


class Corpus:
    """The input files of a configuration and the documents in them.

    Attributes:
        name: short name for directories.
        files: the input files in reading order.
        split_rule: in words, how documents are held out.
        num_bytes: bytes of all input files, None where that is not known.
    """

    def __init__(self, config: DataConfig) -> None:
        self._config = config
        self._rows: Any = None
        if config.source == "stdlib":
            self.name = "stdlib"
            self.files, self.split_rule = _list_stdlib(sysconfig.get_path("stdlib"), config.validation_fraction)
        elif config.source == "hf":
            assert config.path is not None  # DataConfig refuses a missing path for all sources that need one
            self.name = _short_name(config.path)
            self._rows, stamp = _open_hf(config)
            self.files = (InputFile(config.path, config.path, 0, stamp, None),)
            self.split_rule = _hash_rule(config.validation_fraction)
        else:
            assert config.path is not None
            self.name = _short_name(config.path)
            self.files, self.split_rule = _list_path(config)
        self.num_bytes = None if config.source == "hf" else sum(file.num_bytes for file in self.files)

    def identity(self) -> dict[str, Any]:
        """What tells this corpus from another one: JSON-able, and cheap, for it reads little of the files.

        It holds no directory, so moving a corpus changes nothing.
        """
        config = self._config
        return {
            "source": config.source,
            "text_key": config.text_key if config.source in ("jsonl", "parquet", "hf") else None,
            "split_rule": self.split_rule,
            "files": [[file.name, file.num_bytes, file.stamp, file.split] for file in self.files],
            "content": None if config.source == "hf" else _probe(self.files),
        }

    def pieces(self, start: Position | None = None, order: Callable[[int], int] | None = None) -> Iterator[Piece]:
        """Every document from `start` on, always in the same order, also those that are left out.

        Args:
            start: the `end` of an earlier piece; None for the beginning.
            order: file n of the pass is `files[order(n)]`; None for the order of `files`.

        Raises:
            DataError: a file cannot be read, or a line or text is not what it should be; names the place.
        """
        start = start or Position()
        for number in range(start.file, len(self.files)):
            file = self.files[number if order is None else order(number)]
            num_read = 0
            for record in self._read(file, start if number == start.file else Position(number)):
                yield from self._cut(record, file.split, num_read)
                num_read = record.num_read

    def _read(self, file: InputFile, start: Position) -> Iterator[Record]:
        config = self._config
        if config.source == "stdlib":
            return read_stdlib(file, start)
        if config.source == "text":
            return read_text(file, start, config.retries)
        if config.source == "jsonl":
            return read_jsonl(file, start, config.text_key, config.retries)
        if config.source == "parquet":
            return read_parquet(file, start, config.text_key, config.retries)
        return read_hf(self._rows, start, config.text_key, file.name)

    def _cut(self, record: Record, split: str | None, num_read: int) -> Iterator[Piece]:
        if isinstance(record.text, str) and len(record.text) <= PIECE_CHARACTERS:
            reason = record.reason or (None if record.text else "empty")
            yield Piece(
                record.name,
                record.text,
                True,
                True,
                split or self._split_of(record.text),
                reason,
                record.end,
                record.num_read - num_read,
            )
            return
        name, first = record.name, True
        held: str | None = None  # one piece behind, for only the end of the text tells which one is the last
        parts = iter((record.text,)) if isinstance(record.text, str) else record.text
        for text in cut_text(parts):
            if held is None:
                split = split or self._split_of(text)
            else:
                more = record.num_read - num_read
                yield Piece(name, held, first, False, split or TRAIN, None, record.end, more)
                num_read, first = record.num_read, False
            held = text
        reason = None if held else "empty"
        split = split or self._split_of("")
        yield Piece(record.name, held or "", first, True, split, reason, record.end, record.num_read - num_read)

    def _split_of(self, text: str) -> str:
        # The (beginning of the) text itself is the identity: moving, renaming or reordering files moves no document
        # across the split, and a duplicate of a held-out document is held out too.
        digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
        held_out = int.from_bytes(digest, "little") < self._config.validation_fraction * 2**64
        return VALIDATION if held_out else TRAIN


def _probe(files: Sequence[InputFile]) -> str:
    """A hash of stretches of the local files' content, their ends among them.

    Two corpora in different directories may agree in all names, sizes and times (a reproducible archive sets one time).
    Remote files are left out: their stamps come from their content. At most 1024 files, evenly spread, are looked into,
    with 2 to 32 stretches of 4 KiB each: a second or so of reading, however large the corpus is.
    """
    local = [file for file in files if not is_remote(file.path)]
    chosen = local[:: -(-len(local) // _PROBED_FILES) or 1]
    each = min(max(_PROBES // max(len(chosen), 1), 2), 32)
    digest = hashlib.sha256()
    for file in chosen:
        last = max(file.num_bytes - _PROBE_BYTES, 0)
        try:
            with open(file.path, "rb", buffering=0) as stream:
                for start in sorted({last * number // (each - 1) for number in range(each)}):
                    stream.seek(start)
                    digest.update(stream.read(_PROBE_BYTES))
        except OSError as error:
            raise DataError(f"{file.path}: cannot be read ({error}); leave it out, or allow reading it") from error
    return digest.hexdigest()


def _hash_rule(fraction: float) -> str:
    return f"documents are held out by a hash of their text, fraction {float(fraction)!r}"


def _open_hf(config: DataConfig) -> tuple[Any, str]:
    """The rows of a Hugging Face dataset, streaming, and a stamp of its files."""
    try:
        import datasets
    except ImportError as error:
        raise DataError(f"data.source=hf needs the package datasets: pip install 'ksa-train[hf]' ({error})") from error
    place = f"data.path={config.path} data.subset={config.subset} data.split={config.split}"
    datasets.utils.logging.set_verbosity_error()

    def load() -> tuple[Any, str]:
        builder = datasets.load_dataset_builder(config.path, config.subset)
        rows = builder.as_streaming_dataset(split=config.split)
        data_files = getattr(builder.config, "data_files", None) or {}
        listed = data_files.get(config.split.split("[")[0]) if hasattr(data_files, "get") else None
        origin = getattr(listed, "origin_metadata", None)
        return rows, repr([builder.config.name, str(builder.config.version), list(listed or []), origin])

    try:
        rows, stamp = load()
    except Exception as error:  # the library's errors are many; each ends here as one line
        raise DataError(f"{place}: cannot be opened ({' '.join(str(error).split())[:300]})") from error
    return rows, hashlib.sha256(stamp.encode()).hexdigest()


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
    return undecided, _hash_rule(fraction)


def _list_path(config: DataConfig) -> tuple[tuple[InputFile, ...], str]:
    assert config.path is not None
    if config.validation_path is None:
        return tuple(_find(config.path, "path", config, None)), _hash_rule(config.validation_fraction)
    held_out = _find(config.validation_path, "validation_path", config, VALIDATION)
    # A directory may hold both; what is named for validation is never trained on.
    taken = {file.path for file in held_out}
    train = [file for file in _find(config.path, "path", config, TRAIN) if file.path not in taken]
    if not train:
        raise DataError(f"data.path={config.path}: all its files are also in data.validation_path")
    return tuple(train + held_out), "files of data.validation_path are held out"


def _find(path: str, field: str, config: DataConfig, split: str | None) -> list[InputFile]:
    """The files that a path, directory or glob names, sorted; DataError when there is none with any content."""

    def look() -> tuple[list[InputFile], str]:
        import fsspec

        system, root = fsspec.core.url_to_fs(path)
        system.invalidate_cache()
        found = info_or_none(system, root)
        kind = found["type"] if found else None
        if kind == "directory":
            base = root.rstrip("/")
            below = system.find(root) if is_remote(path) else find_local(root)
            paths = [item for item in below if _is_wanted(item[len(base) + 1 :], _ENDINGS[config.source])]
            nothing = _KINDS[config.source]
        elif kind is not None:
            base, paths, nothing = root.rpartition("/")[0], [root], ""
        else:
            paths = [item for item in system.glob(root) if system.isfile(item)]
            base = os.path.commonpath([item.rpartition("/")[0] for item in paths]) if paths else ""
            nothing = "no such file or directory, and no file matches it as a glob"
        files = []
        for item in sorted(paths):
            info = system.info(item)
            address = system.unstrip_protocol(item) if is_remote(path) else item
            name = item[len(base) :].lstrip("/")
            files.append(InputFile(address, name, int(info["size"] or 0), stamp_of(info), split))
        return files, nothing

    place = f"data.{field}={path}:"
    if is_remote(path):
        files, nothing = with_retries(look, place, config.retries)
    else:
        try:
            files, nothing = look()
        except (OSError, ImportError, ValueError) as error:
            raise DataError(f"{place} cannot be listed ({error})") from error
    if not files:
        raise DataError(f"{place} {nothing}")
    if not any(file.num_bytes for file in files):
        raise DataError(f"{place} is empty (0 bytes in {len(files)} file{'s' * (len(files) > 1)})")
    return files


def find_local(root: str) -> list[str]:
    """All files below a local directory but those in hidden ones. Links to directories are followed; a directory that
    is met again is left out, so that a link to one above it ends."""
    found: list[str] = []
    seen: set[tuple[int, int]] = set()
    for directory, names, files in os.walk(root, followlinks=True):
        status = os.stat(directory)
        if (status.st_dev, status.st_ino) in seen:
            names.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        # Sorted, so that the disk has no say in which of two ways to a directory counts.
        names[:] = sorted(name for name in names if not name.startswith("."))
        found += [os.path.join(directory, file) for file in files]
    return sorted(found)


def _is_wanted(name: str, endings: tuple[str, ...]) -> bool:
    return name.lower().endswith(endings) and not any(part.startswith(".") for part in name.split("/"))


def _short_name(path: str) -> str:
    """A directory name that a human recognises: the last telling part of the path, plain characters only."""
    parts = [part for part in path.replace("*", "").split("/") if part.strip(".")]
    stem = parts[-1].split(".")[0] if parts else ""
    return "".join(char if char.isalnum() and char.isascii() else "-" for char in stem).strip("-")[:40] or "corpus"
