"""Raw text to token shards: `prepare(config)`. The command `data_pipeline/prepare.py` lists the files that are built.

The directory is named by the fingerprint of the request (files with size, time stamp and ranges of their content,
split, tokenizer). `PreparedData.fingerprint` is that of the result (tokenizer and tokens), so it does not change when a
corpus is copied to another machine.

Shards of both splits are closed together, at the end of a document, and then progress.json is replaced. If a process is
killed, what it wrote after that is written again, so no document is lost or doubled.
"""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.config import RAW, SPLITS, TRAIN, VALIDATION, DataConfig
from data_pipeline.errors import DataError
from data_pipeline.store import verify
from data_pipeline.store.files import build_once, fingerprint_of, read_json, sha256_of_file, write_json
from data_pipeline.store.manifest import FORMAT_VERSION, MANIFEST, TOKENIZER, check_format, damage_errors
from data_pipeline.store.remote import is_remote
from data_pipeline.store.shards import ShardWriter, token_dtype
from data_pipeline.text.cut import PIECE_CHARACTERS
from data_pipeline.text.encode import Encoded, encode_all
from data_pipeline.text.end_token import copy_tokenizer
from data_pipeline.text.readers import Position
from data_pipeline.text.sources import Corpus, Piece
from data_pipeline.text.tokenizer import (
    CHUNK_CHARACTERS,
    TRAINING_CHARACTERS,
    Tokenizer,
    check_trained,
    train_tokenizer,
)

_PROGRESS = "progress.json"


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
        """sha256 (hex) of the tokenizer and all tokens: the same for the same data in any directory."""
        splits = self.manifest["splits"]
        hashes = [[shard["sha256_bin"], shard["sha256_idx"]] for split in SPLITS for shard in splits[split]["shards"]]
        return fingerprint_of([self.manifest["tokenizer"]["fingerprint"], hashes])


def prepare(config: DataConfig, *, progress: bool = False) -> PreparedData:
    """Tokenize the corpus of `config` below `config.cache_dir`, or find it there.

    Several processes may call this at once: one does the work and the others wait. After an interruption, the next call
    continues after the last finished shards.

    Args:
        config: the corpus.
        progress: show a progress bar on stderr.

    Raises:
        DataError: the corpus, the tokenizer or the files in the cache cannot be read or do not fit together.
    """
    if config.source not in RAW:
        raise DataError(f"data.source={config.source} has no text to prepare; the sources of text are {', '.join(RAW)}")
    if is_remote(config.cache_dir):
        raise DataError(f"{config.cache_dir}: shards are written to a local directory; copy them from there")
    corpus = Corpus(config)
    check_trained(config)
    given = None if config.tokenizer is None else Tokenizer(config.tokenizer, config.end_token)
    given_tokenizer = None if given is None else given.fingerprint
    request = {
        "format": FORMAT_VERSION,
        "corpus": corpus.identity(),
        "tokenizer": given_tokenizer or [config.tokenizer_type, config.vocab_size, TRAINING_CHARACTERS],
        "chunk_characters": [CHUNK_CHARACTERS, PIECE_CHARACTERS],
        "max_document_tokens": config.max_document_tokens,
        "shard_mb": float(config.shard_mb),
        **({} if given is None else given.identity),
    }
    directory = Path(config.cache_dir) / f"{corpus.name}-{fingerprint_of(request)[:16]}"

    def announce_wait() -> None:
        if progress:
            print(f"waiting for another process that prepares {directory}", file=sys.stderr)

    build_once(
        directory,
        MANIFEST,
        lambda target: _build(target, config, corpus, progress),
        announce_wait,
        keep_partial=True,
    )
    prepared = open_prepared(directory, given_tokenizer)
    shards = [shard for split in SPLITS for shard in prepared.manifest["splits"][split]["shards"]]
    verify.check(directory, shards, config.cache_dir, everything=config.verify)
    return prepared


def open_prepared(directory: str | Path, tokenizer_fingerprint: str | None = None) -> PreparedData:
    """Open a directory that `prepare` wrote.

    Args:
        directory: the directory with the manifest.
        tokenizer_fingerprint: of the tokenizer that the configuration names; None: it names none.

    Raises:
        DataError: the manifest or the tokenizer is missing, damaged, or not the one the shards were made with.
    """
    directory = Path(directory)
    manifest = read_json(directory / MANIFEST)
    check_format(manifest, str(directory / MANIFEST))
    tokenizer_path = directory / TOKENIZER
    recorded = manifest["tokenizer"]["fingerprint"]
    if not tokenizer_path.is_file():
        raise DataError(f"{tokenizer_path}: is missing; delete {directory} to build it again")
    on_disk = sha256_of_file(tokenizer_path)
    for name, described, found, advice in (
        (tokenizer_path, "the file", on_disk, f"restore it, or delete {directory} to build it again"),
        (
            "tokenizer",
            "the configured tokenizer",
            tokenizer_fingerprint,
            "use that tokenizer, or prepare the corpus again",
        ),
    ):
        if found is not None and found != recorded:
            raise DataError(
                f"{name}: does not fit the shards in {directory}: they were made with tokenizer sha256 {recorded}, "
                f"{described} has {found}; {advice}"
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


def inexact_lines(manifest: dict[str, Any]) -> list[str]:
    """What the tokenizer of a prepared corpus lost, for the user; empty where every document comes back exactly."""
    inexact = manifest.get("tokenizer", {}).get("inexact", {})
    if not inexact.get("documents"):
        return []
    unknown = inexact.get("unknown_tokens", 0)
    return [
        f"changed: {inexact['documents']:,} documents do not come back exactly from their tokens, because the "
        f"tokenizer drops or changes characters ({unknown:,} unknown tokens)"
    ]


def _build(directory: Path, config: DataConfig, corpus: Corpus, progress: bool) -> None:
    tokenizer_path = directory / TOKENIZER
    if config.tokenizer is not None:
        copy_tokenizer(config.tokenizer, tokenizer_path, end_token=config.end_token)
    elif not tokenizer_path.exists():
        with _progress_bar(corpus, "reading for the tokenizer", progress) as bar:
            texts = (piece.text for piece in _count_bytes(corpus.pieces(), bar) if piece.split == TRAIN)
            train_tokenizer(texts, tokenizer_path, config.vocab_size, config.tokenizer_type)
    tokenizer = Tokenizer(tokenizer_path)
    dtype = token_dtype(tokenizer.vocab_size)
    with ExitStack() as stack:
        output = stack.enter_context(_ShardOutput(directory, dtype, config))
        bar = stack.enter_context(_progress_bar(corpus, "encoding", progress))
        bar.update(sum(file.num_bytes for file in corpus.files[: output.position.file]) + output.position.offset)
        started, num_text_bytes = time.perf_counter(), 0
        pieces = _count_bytes(corpus.pieces(output.position), bar)
        for encoded in encode_all(pieces, tokenizer, dtype, compare=not tokenizer.lossless):
            output.add(encoded)
            num_text_bytes += encoded.num_bytes
            rate = num_text_bytes / 1e6 / max(time.perf_counter() - started, 1e-9)
            bar.set_postfix_str(f"{rate:.1f} MB/s of text", refresh=False)
        output.commit()
    if not output.splits[TRAIN].documents:
        raise DataError(
            f"data.source={config.source} data.path={config.path}: no document is left to train on "
            f"({output.splits[VALIDATION].documents} held out, {output.skipped['empty']} empty); set "
            f"data.validation_fraction=0, or add documents"
        )
    manifest = {
        "format": FORMAT_VERSION,
        "source": {
            "kind": config.source,
            "path": config.path,
            "validation_path": config.validation_path,
            "split_rule": corpus.split_rule,
            "files": len(corpus.files),
            "file_bytes": corpus.num_bytes,
            "max_document_tokens": config.max_document_tokens,
            "skipped": dict(output.skipped),
        },
        "tokenizer": {
            "fingerprint": tokenizer.fingerprint,
            "kind": tokenizer.kind,
            "vocab_size": tokenizer.vocab_size,
            "eos_id": tokenizer.eos_id,
            "vocabulary_sha256": tokenizer.vocabulary_sha256,
            "description": tokenizer.description,
            "inexact": dict(output.inexact),
            "chunk_characters": CHUNK_CHARACTERS,
            "piece_characters": PIECE_CHARACTERS,
        },
        "dtype": dtype.name,
        "splits": {split: output.splits[split].summary() for split in SPLITS},
    }
    shards = [shard for split in SPLITS for shard in output.splits[split].shards]
    verify.record(directory, shards, config.cache_dir)
    write_json(directory / MANIFEST, manifest)
    (directory / _PROGRESS).unlink()


class _SplitCounts:
    """Counts of the finished shards of one split. `summary()` is the manifest's entry, from which it is restored."""

    def __init__(self, summary: dict[str, Any] | None = None) -> None:
        # Bucket b counts documents (and their tokens) of 2**(b-1) < length <= 2**b tokens.
        self._buckets = np.zeros((64, 2), dtype=np.int64)
        self.text_bytes, self.shards = 0, list[dict[str, Any]]()
        if summary is not None:
            self.text_bytes, self.shards = summary["text_bytes"], summary["shards"]
            for bucket in summary["length_histogram"]:
                row = (bucket["at_most_tokens"] - 1).bit_length()
                self._buckets[row] = bucket["documents"], bucket["tokens"]

    @property
    def documents(self) -> int:
        return int(self._buckets[:, 0].sum())

    def count(self, num_tokens: int, num_bytes: int) -> None:
        self._buckets[(num_tokens - 1).bit_length()] += 1, num_tokens
        self.text_bytes += num_bytes

    def summary(self) -> dict[str, Any]:
        return {
            "documents": self.documents,
            "tokens": int(self._buckets[:, 1].sum()),
            "text_bytes": self.text_bytes,
            "length_histogram": [
                {"at_most_tokens": 1 << row, "documents": int(documents), "tokens": int(tokens)}
                for row, (documents, tokens) in enumerate(self._buckets.tolist())
                if documents
            ],
            "shards": self.shards,
        }


class _ShardOutput:
    """The shards of all splits and the record of what is finished; a context manager.

    Attributes:
        position: where the next document begins in the corpus.
        skipped: number of documents left out, by reason.
        inexact: number of `documents` that do not come back from their tokens, and of `unknown_tokens`.
    """

    def __init__(self, directory: Path, dtype: np.dtype, config: DataConfig) -> None:
        self._directory, self._dtype = directory, dtype
        self._shard_bytes = int(config.shard_mb * 1e6)
        self._max_document_tokens = config.max_document_tokens
        self._open = ExitStack()
        self._writers: dict[str, ShardWriter] = {}
        self._open_bytes = 0  # of the text of the document that is not closed yet
        self._open_inexact = Counter[str]()  # of that document
        self.position, self.skipped, self.inexact, self._group = Position(), Counter[str](), Counter[str](), 0
        self.splits = {split: _SplitCounts() for split in SPLITS}
        if (directory / _PROGRESS).exists():
            done = read_json(directory / _PROGRESS)
            with damage_errors(str(directory / _PROGRESS), "delete its directory to build it again"):
                self.position, self._group = Position(*done["position"]), done["group"]
                self.skipped.update(done["skipped"])
                self.inexact.update(done.get("inexact", {}))
                self.splits = {split: _SplitCounts(done["splits"][split]) for split in SPLITS}
        listed = {shard["name"] for counts in self.splits.values() for shard in counts.shards}
        for path in [*directory.glob("*.bin"), *directory.glob("*.idx")]:
            if path.stem not in listed:
                path.unlink()

    def __enter__(self) -> _ShardOutput:
        return self

    def __exit__(self, *error: Any) -> None:
        self._open.__exit__(*error)

    def add(self, encoded: Encoded) -> None:
        """Append the next piece of the corpus."""
        piece = encoded.piece
        if piece.is_first:
            self._open_bytes, self._open_inexact = 0, Counter()
        if piece.skip_reason is not None:
            self.skipped[piece.skip_reason] += 1
        else:
            writer = self._writer(piece.split)
            writer.append(encoded.tokens)
            self._open_bytes += encoded.num_bytes
            if not encoded.is_exact:
                self._open_inexact["documents"] = 1
            self._open_inexact["unknown_tokens"] += encoded.num_unknown
            if piece.is_last:
                num_tokens = writer.end_document()
                if num_tokens is None:
                    self.skipped["too_long"] += 1
                else:
                    self.splits[piece.split].count(num_tokens, self._open_bytes)
                    self.inexact += self._open_inexact  # which leaves zeros out
        if piece.is_last:
            self.position = piece.end
            if any(writer.num_bytes >= self._shard_bytes for writer in self._writers.values()):
                self.commit()

    def commit(self) -> None:
        """Finish the open shards and record them."""
        self._open.close()
        for split, writer in self._writers.items():
            if writer.info is not None and writer.info.num_documents:
                self.splits[split].shards.append(asdict(writer.info))
            else:  # all documents were too long
                writer.remove()
        self._writers, self._open = {}, ExitStack()
        self._group += 1
        progress = {
            "position": astuple(self.position),
            "group": self._group,
            "skipped": dict(self.skipped),
            "inexact": dict(self.inexact),
            "splits": {split: counts.summary() for split, counts in self.splits.items()},
        }
        write_json(self._directory / _PROGRESS, progress)

    def _writer(self, split: str) -> ShardWriter:
        if split not in self._writers:
            prefix = self._directory / f"{split}-{self._group:05d}"
            writer = ShardWriter(prefix, self._dtype, self._max_document_tokens)
            self._writers[split] = self._open.enter_context(writer)
        return self._writers[split]


def _progress_bar(corpus: Corpus, activity: str, progress: bool) -> Any:
    from tqdm import tqdm

    title = f"{corpus.name}: {activity}"
    return tqdm(total=corpus.num_bytes, desc=title, unit="B", unit_scale=True, leave=False, disable=not progress)


def _count_bytes(pieces: Iterator[Piece], bar: Any) -> Iterator[Piece]:
    for piece in pieces:
        bar.update(piece.num_bytes_read)
        yield piece
