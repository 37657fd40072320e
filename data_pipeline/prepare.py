"""Raw text to token shards: `prepare(config)`, or `python -m data_pipeline.prepare source=jsonl path=... out=...`.

What is built, below `cache_dir`:

    <corpus>-<fingerprint>/tokenizer.model
                           train-00000.bin .idx, validation-00000.bin .idx, ...
                           manifest.json          written last: its presence means that all the rest is there

The fingerprint is that of the request (files with size and time stamp, split, tokenizer); `PreparedData.fingerprint`
is that of the result (tokenizer and tokens), so it stays the same when a corpus is copied to another machine.
"""

from __future__ import annotations

import difflib
import os
import shutil
import sys
import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.config import DataConfig
from data_pipeline.errors import DataError
from data_pipeline.shards import ShardInfo, ShardWriter, token_dtype
from data_pipeline.sources import SPLITS, TRAIN, VALIDATION, Corpus, Document
from data_pipeline.storage import build_once, fingerprint_of, read_json, sha256_of_file, write_json
from data_pipeline.tokenizer import CHUNK_CHARACTERS, TRAINING_CHARACTERS, Tokenizer, train_tokenizer

MANIFEST = "manifest.json"
TOKENIZER = "tokenizer.model"
_FORMAT = 1
_SHARD_BYTES = 1 << 29
_BATCH_CHARACTERS = 1 << 18


@dataclass(frozen=True)
class PreparedData:
    """A tokenized corpus on disk. `train` and `validation` list shard prefixes; `validation` may be empty."""

    directory: Path
    manifest: dict[str, Any]
    tokenizer_path: Path
    vocab_size: int
    train: list[Path]
    validation: list[Path]

    @property
    def fingerprint(self) -> str:
        """sha256 (hex) of the tokenizer and all tokens: equal for equal data, wherever it lies."""
        splits = self.manifest["splits"]
        hashes = [[shard["sha256_bin"], shard["sha256_idx"]] for split in SPLITS for shard in splits[split]["shards"]]
        return fingerprint_of([self.manifest["tokenizer"]["fingerprint"], hashes])


def prepare(config: DataConfig, *, progress: bool = False) -> PreparedData:
    """Tokenize the corpus of `config` below `config.cache_dir`, or find it there.

    Any number of processes may call this at once: one does the work and the others wait for it. What a killed process
    left half-done is done again.

    Args:
        config: the corpus.
        progress: show a progress bar on stderr.

    Raises:
        DataError: the corpus, the tokenizer or the files found in the cache are not what they should be.
    """
    corpus = Corpus(config)
    wanted = None if config.tokenizer is None else Tokenizer(config.tokenizer).fingerprint
    request = {
        "format": _FORMAT,
        "corpus": corpus.identity(),
        "tokenizer": wanted or [config.tokenizer_type, config.vocab_size, TRAINING_CHARACTERS],
        "chunk_characters": CHUNK_CHARACTERS,
    }
    directory = Path(config.cache_dir) / f"{corpus.name}-{fingerprint_of(request)[:16]}"

    def announce_wait() -> None:
        if progress:
            print(f"waiting for another process that prepares {directory}", file=sys.stderr)

    build_once(directory, MANIFEST, lambda target: _build(target, config, corpus, progress), announce_wait)
    return open_prepared(directory, wanted)


def open_prepared(directory: str | Path, tokenizer_fingerprint: str | None = None) -> PreparedData:
    """Open what `prepare` made.

    Args:
        directory: the directory with the manifest.
        tokenizer_fingerprint: the tokenizer that the caller will use, if it has a say.

    Raises:
        DataError: the manifest, the tokenizer or a shard is missing or does not fit the others.
    """
    directory = Path(directory)
    manifest = read_json(directory / MANIFEST)
    if manifest.get("format") != _FORMAT:
        raise DataError(f"{directory / MANIFEST}: has format {manifest.get('format')!r}, expected {_FORMAT}; delete it")
    tokenizer_path = directory / TOKENIZER
    recorded = manifest["tokenizer"]["fingerprint"]
    if not tokenizer_path.is_file():
        raise DataError(f"{tokenizer_path}: is missing; delete {directory} to build it again")
    for place, found in ((tokenizer_path, sha256_of_file(tokenizer_path)), ("tokenizer", tokenizer_fingerprint)):
        if found is not None and found != recorded:
            asked = "the file" if place == tokenizer_path else "the tokenizer asked for"
            raise DataError(
                f"{place}: does not fit the shards in {directory}: they were made with tokenizer sha256 {recorded}, "
                f"{asked} has {found}; use that tokenizer, or prepare the corpus again"
            )
    prefixes: dict[str, list[Path]] = {}
    for split in SPLITS:
        prefixes[split] = [directory / shard["name"] for shard in manifest["splits"][split]["shards"]]
    return PreparedData(
        directory=directory,
        manifest=manifest,
        tokenizer_path=tokenizer_path,
        vocab_size=manifest["tokenizer"]["vocab_size"],
        train=prefixes[TRAIN],
        validation=prefixes[VALIDATION],
    )


def shard_hashes(prefixes: Sequence[str | Path]) -> list[list[str]]:
    """`[tokenizer, .bin, .idx]` sha256 of each shard, as the manifests beside them record; nothing is hashed anew."""
    known: dict[Path, list[str]] = {}
    paths = [Path(prefix) for prefix in prefixes]
    for directory in {path.parent for path in paths}:
        manifest = read_json(directory / MANIFEST)
        for split in SPLITS:
            for shard in manifest["splits"][split]["shards"]:
                hashes = [manifest["tokenizer"]["fingerprint"], shard["sha256_bin"], shard["sha256_idx"]]
                known[directory / shard["name"]] = hashes
    for path in paths:
        if path not in known:
            raise DataError(f"{path}: is not a shard that {path.parent / MANIFEST} lists")
    return [known[path] for path in paths]


def _build(directory: Path, config: DataConfig, corpus: Corpus, progress: bool) -> None:
    tokenizer_path = directory / TOKENIZER
    if config.tokenizer is not None:
        shutil.copyfile(config.tokenizer, tokenizer_path)
    else:
        with _bar(corpus, "reading for the tokenizer", progress) as bar:
            texts = (document.text for split, document in _watched(corpus, Counter(), bar) if split == TRAIN)
            train_tokenizer(texts, tokenizer_path, config.vocab_size, config.tokenizer_type)
    tokenizer = Tokenizer(tokenizer_path)
    dtype = token_dtype(tokenizer.vocab_size)
    skipped: Counter[str] = Counter()
    with ExitStack() as stack:
        writers = {split: stack.enter_context(_SplitWriter(directory, split, dtype)) for split in SPLITS}
        bar = stack.enter_context(_bar(corpus, "encoding", progress))
        for split, num_bytes, tokens in _encode_all(_watched(corpus, skipped, bar), tokenizer, dtype):
            writers[split].add(tokens, num_bytes)
    splits = {split: writer.summary() for split, writer in writers.items()}
    if not splits[TRAIN]["documents"]:
        held_out = splits[VALIDATION]["documents"]
        raise DataError(
            f"data.source={config.source} data.path={config.path}: no document is left to train on ({held_out} held "
            f"out, {skipped['empty']} empty); set data.validation_fraction=0, or add documents"
        )
    manifest = {
        "format": _FORMAT,
        "source": {
            "kind": config.source,
            "path": config.path,
            "validation_path": config.validation_path,
            "split_rule": corpus.split_rule,
            "files": len(corpus.files),
            "file_bytes": sum(file.num_bytes for file in corpus.files),
            "skipped": dict(skipped),
        },
        "tokenizer": {
            "fingerprint": tokenizer.fingerprint,
            "vocab_size": tokenizer.vocab_size,
            "eos_id": tokenizer.eos_id,
            "chunk_characters": CHUNK_CHARACTERS,
        },
        "dtype": dtype.name,
        "splits": splits,
    }
    write_json(directory / MANIFEST, manifest)


class _SplitWriter:
    """The shards of one split: a context manager that starts a new shard whenever the last one is large enough."""

    def __init__(self, directory: Path, split: str, dtype: np.dtype, shard_bytes: int = _SHARD_BYTES) -> None:
        self._prefix = directory / split
        self._dtype = dtype
        self._shard_bytes = shard_bytes
        self._open = ExitStack()
        self._writer: ShardWriter | None = None
        self._writers: list[ShardWriter] = []
        self._text_bytes = 0
        # By bits of the length: bucket b counts documents of 2**(b-1) < length <= 2**b tokens.
        self._documents = np.zeros(64, dtype=np.int64)
        self._tokens = np.zeros(64, dtype=np.int64)

    def __enter__(self) -> _SplitWriter:
        return self

    def add(self, tokens: np.ndarray, num_bytes: int) -> None:
        if self._writer is None:
            self._writer = self._open.enter_context(
                ShardWriter(self._prefix.with_name(f"{self._prefix.name}-{len(self._writers):05d}"), self._dtype)
            )
            self._writers.append(self._writer)
        self._writer.add(tokens)
        self._text_bytes += num_bytes
        bucket = (tokens.size - 1).bit_length()
        self._documents[bucket] += 1
        self._tokens[bucket] += tokens.size
        if self._writer.num_bytes >= self._shard_bytes:
            self._open.close()
            self._writer = None

    def __exit__(self, *error: Any) -> None:
        self._open.__exit__(*error)

    def summary(self) -> dict[str, Any]:
        shards: list[ShardInfo] = [writer.info for writer in self._writers if writer.info is not None]
        return {
            "documents": int(self._documents.sum()),
            "tokens": int(self._tokens.sum()),
            "text_bytes": self._text_bytes,
            "length_histogram": [
                {"at_most_tokens": 1 << b, "documents": int(self._documents[b]), "tokens": int(self._tokens[b])}
                for b in np.flatnonzero(self._documents).tolist()
            ],
            "shards": [asdict(shard) for shard in shards],
        }


def _encode_all(
    documents: Iterator[tuple[str, Document]], tokenizer: Tokenizer, dtype: np.dtype
) -> Iterator[tuple[str, int, np.ndarray]]:
    """Yield `(split, text bytes, tokens with the end token)` of each document, in order, encoded on all cores.

    Threads, not processes: SentencePiece releases the interpreter while it encodes, so they reach the same rate, and
    neither a fork of a threaded trainer nor a second import of it is needed. Only a few batches are in memory.
    """
    end = np.array([tokenizer.eos_id], dtype=dtype)

    def encode(batch: list[tuple[str, Document]]) -> list[tuple[str, int, np.ndarray]]:
        result = []
        for split, document in batch:
            tokens = np.concatenate([tokenizer.encode(document.text).astype(dtype), end])
            result.append((split, len(document.text.encode()), tokens))
        return result

    workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    pending: deque[Future[list[tuple[str, int, np.ndarray]]]] = deque()
    with ThreadPoolExecutor(workers) as pool:
        for batch in _batches(documents):
            pending.append(pool.submit(encode, batch))
            if len(pending) > 2 * workers:
                yield from pending.popleft().result()
        while pending:
            yield from pending.popleft().result()


def _batches(documents: Iterator[tuple[str, Document]]) -> Iterator[list[tuple[str, Document]]]:
    batch: list[tuple[str, Document]] = []
    size = 0
    for split, document in documents:
        batch.append((split, document))
        size += len(document.text)
        if size >= _BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _bar(corpus: Corpus, what: str, progress: bool) -> Any:
    from tqdm import tqdm

    title = f"{corpus.name}: {what}"
    return tqdm(total=corpus.num_bytes, desc=title, unit="B", unit_scale=True, leave=False, disable=not progress)


def _watched(corpus: Corpus, skipped: Counter[str], bar: Any) -> Iterator[tuple[str, Document]]:
    for split, document in corpus.documents(skipped):
        bar.update(document.num_bytes)
        yield split, document


# The command line: every key is a field of DataConfig that preparing depends on; `out` is its `cache_dir`.
_KEYS = {
    ("out" if field.name == "cache_dir" else field.name): field
    for field in fields(DataConfig)
    if field.name not in ("seed", "prefetch_samples")
}


def _parse_arguments(arguments: Sequence[str]) -> DataConfig:
    values: dict[str, Any] = {}
    for argument in arguments:
        key, equals, text = argument.partition("=")
        if not equals:
            raise DataError(f"argument {argument!r} must have the form key=value; the keys are {', '.join(_KEYS)}")
        if key not in _KEYS:
            near = difflib.get_close_matches(key, _KEYS, n=1, cutoff=0)[0]
            raise DataError(f"unknown key {key!r}, the nearest is {near!r}; the keys are {', '.join(_KEYS)}")
        field = _KEYS[key]
        convert = type(field.default)
        try:
            values[field.name] = convert(text) if convert in (int, float) else text
        except ValueError as error:
            raise DataError(f"{key}={text!r} must be a number") from error
    return DataConfig(**values)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line. Returns the exit code: 0, or 2 after one line on stderr that says what is wrong."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if any(argument in ("-h", "--help") for argument in arguments):
        print("python -m data_pipeline.prepare key=value ...\n\n" + (__doc__ or "").split("\n\n")[0] + "\n")
        for key, field in _KEYS.items():
            print(f"  {key:20} default {field.default!r}")
        return 0
    started = time.perf_counter()
    try:
        data = prepare(_parse_arguments(arguments), progress=True)
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    seconds = time.perf_counter() - started
    print(f"{data.directory}: vocabulary {data.vocab_size}, {seconds:.1f} s")
    for split in SPLITS:
        part = data.manifest["splits"][split]
        rate = part["text_bytes"] / max(part["tokens"], 1)
        print(f"  {split:10} {part['documents']:>9} documents  {part['tokens']:>12} tokens  {rate:.2f} bytes/token")
    return 0


if __name__ == "__main__":
    # The package has imported this module under its own name already; that one does the work.
    from data_pipeline.prepare import main as run

    sys.exit(run())
