"""The documents of a corpus of text: from Python's standard library, text, JSONL and Parquet files (local or remote),
or a Hugging Face dataset.

A corpus is a list of input files, found up front, and one pass over them that yields every document with its split,
long documents in pieces. The list (names, sizes, time stamps) and ranges of the files' content identify the corpus
without reading all of it.
"""

from __future__ import annotations

import hashlib
import os
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from data_pipeline.config import TRAIN, VALIDATION, DataConfig
from data_pipeline.errors import DataError
from data_pipeline.store.files import check_regular
from data_pipeline.store.remote import info_or_none, is_remote, stamp_of, with_retries
from data_pipeline.text.compressed import COMPRESSED
from data_pipeline.text.cut import cut_text
from data_pipeline.text.readers import (
    InputFile,
    Position,
    Record,
    check_head,
    read_hf,
    read_jsonl,
    read_parquet,
    read_stdlib,
    read_text,
)

_JSONL = (".jsonl", ".ndjson", ".json")
_ENDINGS = {
    "jsonl": tuple(end + more for end in _JSONL for more in ("", *COMPRESSED)),
    "parquet": (".parquet", ".pq"),
    "text": ("",),
}
_NO_FILES = {
    "jsonl": f"no {'/'.join(_JSONL)} file in this directory",
    "parquet": "no .parquet/.pq file in this directory",
    "text": "no file in this directory",
}
_TEST_DIRECTORIES = {"test", "tests", "idle_test"}
_NOT_STDLIB = {"site-packages", "dist-packages", "__pycache__"}
_HASHED_FILES, _HASHED_RANGES, _RANGE_BYTES = 1024, 2048, 4096


@dataclass(frozen=True)
class Piece:
    """A document, or a piece of a long one (see `text.cut`).

    Attributes:
        name: file and line or row of the document.
        text: the text of the piece.
        is_first, is_last: whether it begins, and ends, its document.
        split: `train` or `validation`, the same for all pieces of a document.
        skip_reason: why the document is left out (`empty`, `null`, `not_utf8`); None: it is not.
        end: the position after the document; valid on its last piece.
        num_bytes_read: bytes of input files read since the piece before.
    """

    name: str
    text: str
    is_first: bool
    is_last: bool
    split: str
    skip_reason: str | None
    end: Position
    num_bytes_read: int


class Corpus:
    """The input files of a configuration and the documents in them.

    Attributes:
        name: short name, used in the names of directories.
        files: the input files in reading order.
        split_rule: how documents are held out, in words; part of the corpus's identity.
        num_bytes: bytes of all input files; None: unknown.
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
        """What distinguishes this corpus from others, as JSON. Reads little of the files.

        It holds no directories, so a corpus that is moved keeps its identity.
        """
        config = self._config
        return {
            "source": config.source,
            "text_key": config.text_key if config.source in ("jsonl", "parquet", "hf") else None,
            "split_rule": self.split_rule,
            "files": [[file.name, file.num_bytes, file.stamp, file.split] for file in self.files],
            "content": None if config.source == "hf" else _content_hash(self.files, config.source in ("text", "jsonl")),
        }

    def pieces(self, start: Position | None = None, order: Callable[[int], int] | None = None) -> Iterator[Piece]:
        """Every document from `start` on in a fixed order, including those with a `skip_reason`.

        Args:
            start: the `end` of an earlier piece; None: the beginning.
            order: file n of the pass is `files[order(n)]`; None: the order of `files`.

        Raises:
            DataError: a file cannot be read, or a line or text is invalid. The message names file and line.
        """
        start = start or Position()
        for number in range(start.file, len(self.files)):
            file = self.files[number if order is None else order(number)]
            num_bytes_read = 0
            for record in self._read(file, start if number == start.file else Position(number)):
                yield from self._cut(record, file.split, num_bytes_read)
                num_bytes_read = record.num_bytes_read

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

    def _cut(self, record: Record, split: str | None, num_bytes_read: int) -> Iterator[Piece]:
        """The pieces of a record.

        Args:
            record: the document.
            split: of the file; None: the document's text decides.
            num_bytes_read: `record.num_bytes_read` of the record before.
        """
        parts = (record.text,) if isinstance(record.text, str) else record.text
        is_first = True
        held: str | None = None  # one piece behind: only the end of the text shows which piece is the last

        def piece(text: str, is_last: bool) -> Piece:
            nonlocal is_first, num_bytes_read
            result = Piece(
                name=record.name,
                text=text,
                is_first=is_first,
                is_last=is_last,
                split=split or TRAIN,
                skip_reason=record.skip_reason or (None if text else "empty"),
                end=record.end,
                num_bytes_read=record.num_bytes_read - num_bytes_read,
            )
            is_first, num_bytes_read = False, record.num_bytes_read
            return result

        for text in cut_text(parts):
            if held is None:
                split = split or self._split_of(text)
            else:
                yield piece(held, is_last=False)
            held = text
        split = split or self._split_of("")
        yield piece(held or "", is_last=True)

    def _split_of(self, text: str) -> str:
        # The text (its first piece) is hashed and not its location: moving or renaming files moves no document to the
        # other split, and a duplicate of a held-out document is held out too.
        digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
        is_held_out = int.from_bytes(digest, "little") < self._config.validation_fraction * 2**64
        return VALIDATION if is_held_out else TRAIN


def _content_hash(files: Sequence[InputFile], is_text: bool) -> str:
    """A hash of evenly spread ranges of the local files' content, including their first and last bytes.

    Two corpora may agree in all names, sizes and times: a reproducible archive gives all files one time. Remote files
    are left out, because their stamps depend on their content. At most 1024 evenly spread files are read, 2 to 32
    ranges of 4 KiB from each, which takes about a second for a corpus of any size. Where `is_text`, DataError names a
    file whose first bytes are not those of a text.
    """
    local = [file for file in files if not is_remote(file.path)]
    chosen = local[:: -(-len(local) // _HASHED_FILES) or 1]
    num_ranges = min(max(_HASHED_RANGES // max(len(chosen), 1), 2), 32)
    digest = hashlib.sha256()
    for file in chosen:
        last = max(file.num_bytes - _RANGE_BYTES, 0)
        try:
            with open(file.path, "rb", buffering=0) as stream:
                for start in sorted({last * number // (num_ranges - 1) for number in range(num_ranges)}):
                    stream.seek(start)
                    content = stream.read(_RANGE_BYTES)
                    if is_text and not start:
                        check_head(file.path, content)
                    digest.update(content)
        except OSError as error:
            raise DataError(
                f"{file.path}: cannot be read ({error}); leave it out, or change its permissions"
            ) from error
    return digest.hexdigest()


def _hash_rule(fraction: float) -> str:
    return f"documents are held out by a hash of their text, fraction {float(fraction)!r}"


def _open_hf(config: DataConfig) -> tuple[Any, str]:
    """The rows of a Hugging Face dataset, streamed, and a stamp that changes with its files."""
    try:
        import datasets
    except ImportError as error:
        raise DataError(f"data.source=hf needs the package datasets: pip install 'ksa-train[hf]' ({error})") from error
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
    except Exception as error:  # the library raises many classes
        keys = f"data.path={config.path} data.subset={config.subset} data.split={config.split}"
        raise DataError(f"{keys}: cannot be opened ({' '.join(str(error).split())[:300]})") from error
    return rows, hashlib.sha256(stamp.encode()).hexdigest()


def _list_stdlib(root: str, fraction: float) -> tuple[tuple[InputFile, ...], str]:
    found: list[InputFile] = []
    for directory, names, files in os.walk(root):
        names[:] = sorted(name for name in names if name not in _NOT_STDLIB)
        for file in sorted(files):
            path = os.path.join(directory, file)
            if file.endswith(".py") and os.path.isfile(path):  # some distributions have dangling links
                status = os.stat(path)
                name = os.path.relpath(path, root)
                is_test = not _TEST_DIRECTORIES.isdisjoint(Path(name).parts[:-1])
                stamp = str(status.st_mtime_ns)
                found.append(InputFile(path, name, status.st_size, stamp, VALIDATION if is_test else TRAIN))
    found.sort(key=lambda file: file.name)
    if not found:
        raise DataError(f"{root}: holds no .py file of the standard library; set data.source to text or jsonl")
    if any(file.split == VALIDATION for file in found):
        return tuple(found), "files below a test directory are held out"
    # Slim container images have no tests of Python's: hold out a share of the documents there.
    return tuple(replace(file, split=None) for file in found), _hash_rule(fraction)


def _list_path(config: DataConfig) -> tuple[tuple[InputFile, ...], str]:
    assert config.path is not None
    if config.validation_path is None:
        return tuple(_find(config.path, "path", config, None)), _hash_rule(config.validation_fraction)
    held_out = _find(config.validation_path, "validation_path", config, VALIDATION)
    # `path` may be a directory above `validation_path`.
    held_out_paths = {file.path for file in held_out}
    train = [file for file in _find(config.path, "path", config, TRAIN) if file.path not in held_out_paths]
    if not train:
        raise DataError(f"data.path={config.path}: all its files are also in data.validation_path")
    return tuple(train + held_out), "files of data.validation_path are held out"


def _find(path: str, field: str, config: DataConfig, split: str | None) -> list[InputFile]:
    """The files of a path, directory or glob, sorted. Raises DataError when there are none or all are empty.

    Args:
        path: file, directory or glob; local or a URL.
        field: the field of DataConfig that `path` comes from, for messages.
        config: the kind of files and the retries.
        split: of the files; None: each document's text decides.
    """

    def find() -> tuple[list[InputFile], str]:
        import fsspec

        system, root = fsspec.core.url_to_fs(path)
        system.invalidate_cache()
        found = info_or_none(system, root)
        kind = found["type"] if found else None
        below: list[str] = []
        if is_remote(path) and found and (kind == "directory" or found["size"] == 0):
            # Object stores have no directories: an empty object, named as the directory or with "/", may stand for one.
            below = [item for item in system.find(root.rstrip("/") + "/") if not item.endswith("/") and item != root]
        elif kind == "directory":
            below = list_local_files(root)
        if kind == "directory" or below:
            base = root.rstrip("/")
            paths = [item for item in below if _is_wanted(item[len(base) + 1 :], _ENDINGS[config.source])]
            problem = _NO_FILES[config.source]
        elif kind is not None:
            if not is_remote(path):
                check_regular(os.stat(root).st_mode, setting.removesuffix(":"))
            base, paths, problem = root.rpartition("/")[0], [root], ""
        else:
            matches = system.glob(root)
            paths = [item for item in matches if system.isfile(item)]
            if not paths:  # a pattern of directories, such as the `day=*.parquet` that Spark writes
                inside = system.find if is_remote(path) else list_local_files
                paths = [
                    item
                    for directory in matches
                    for item in inside(directory)
                    if _is_wanted(item[len(directory) :], _ENDINGS[config.source])
                ]
            base = os.path.commonpath([item.rpartition("/")[0] for item in paths]) if paths else ""
            problem = "no such file or directory, and no file matches it as a glob"
        files = []
        for item in sorted(paths):
            info = system.info(item)
            url = system.unstrip_protocol(item) if is_remote(path) else item
            name = item[len(base) :].lstrip("/")
            files.append(InputFile(url, name, int(info["size"] or 0), stamp_of(info), split))
        return files, problem

    setting = f"data.{field}={path}:"
    if is_remote(path):
        files, problem = with_retries(find, setting, config.retries)
    else:
        try:
            files, problem = find()
        except DataError:
            raise
        except (OSError, ImportError, ValueError) as error:
            raise DataError(f"{setting} cannot be listed ({error})") from error
    if not files:
        raise DataError(f"{setting} {problem}")
    if not any(file.num_bytes for file in files):
        raise DataError(f"{setting} is empty (0 bytes in {len(files)} file{'s' * (len(files) > 1)})")
    return files


def list_local_files(root: str) -> list[str]:
    """All files below a local directory except those in hidden directories, sorted. Pipes and devices are left out.

    Links to directories are followed. Each directory is listed once, so a link to a parent does no harm.
    """
    found: list[str] = []
    seen: set[tuple[int, int]] = set()
    for directory, names, files in os.walk(root, followlinks=True):
        status = os.stat(directory)
        if (status.st_dev, status.st_ino) in seen:
            names.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        # Sorted: of two paths to one directory, the same one counts on every disk.
        names[:] = sorted(name for name in names if not name.startswith("."))
        # A link to nothing is kept: the file that it names is missed when it is read.
        paths = (os.path.join(directory, file) for file in files)
        found += [path for path in paths if os.path.isfile(path) or not os.path.exists(path)]
    return sorted(found)


def _is_wanted(name: str, endings: tuple[str, ...]) -> bool:
    return name.lower().endswith(endings) and not any(part.startswith(".") for part in name.split("/"))


def _short_name(path: str) -> str:
    """A directory name for a corpus: the last part of its path that is a name, in ASCII letters, digits and "-"."""
    parts = [part for part in path.replace("*", "").split("/") if part.strip(".")]
    stem = parts[-1].split(".")[0] if parts else ""
    return "".join(char if char.isalnum() and char.isascii() else "-" for char in stem).strip("-")[:40] or "corpus"
