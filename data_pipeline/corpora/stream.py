"""Training directly from raw text, local or remote, which is tokenized when it is needed.

The corpus is cut into slabs of about `slab_mb` of text at document boundaries. Each epoch reads the files in a new
order. A slab is tokenized into a shard and packed like any other, and its samples are shuffled. So sample i is a
function of (corpus, tokenizer, seed, seq_len, slab size, i). Where a slab begins is known only after the one before it
has been read: the state of a loader holds the beginning of its current slab, and resuming reads that slab again and
nothing before it.

All processes of a host share the slabs through the cache directory: one tokenizes with all its cores, the others wait.
A slab is made while the one before it is used, and deleted two slabs later. Every host tokenizes the whole stream: one
core tokenizes 1M tokens a second, more than most hosts train on.
"""

from __future__ import annotations

import shutil
import threading
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.config import TRAIN, VALIDATION, DataConfig
from data_pipeline.corpora.tokens import open_corpus
from data_pipeline.errors import DataError
from data_pipeline.packing.order import derive_key, permute
from data_pipeline.packing.plan import Plan, build_plan
from data_pipeline.packing.samples import PackedSample, Samples, TrainingData
from data_pipeline.store.files import build_once, fingerprint_of, lock_path, locked, read_json, write_json
from data_pipeline.store.shards import ShardSet, ShardWriter, token_dtype
from data_pipeline.text.cut import PIECE_CHARACTERS
from data_pipeline.text.encode import encode_all
from data_pipeline.text.readers import Position
from data_pipeline.text.sources import Corpus, Piece
from data_pipeline.text.tokenizer import CHUNK_CHARACTERS, Tokenizer

_FILE_ORDER, _SLAB_ORDER = 4, 5
_MARKER, _SHARD = "slab.json", "slab"
_ALGORITHM = 1


@dataclass(frozen=True)
class _Cursor:
    """Where a slab begins in the stream."""

    epoch: int
    position: Position

    def to_json(self) -> list[Any]:
        return [self.epoch, list(astuple(self.position))]


@dataclass(frozen=True)
class _Slab:
    """A slab: its number, its first sample, its bounds, and its plan (None: no document of at least 2 tokens)."""

    number: int
    first_sample: int
    begin: _Cursor
    end: _Cursor
    plan: Plan | None

    @property
    def num_samples(self) -> int:
        return 0 if self.plan is None else self.plan.num_samples


class Stream(TrainingData):
    """The data of `data.stream=true`. `validation_path` is prepared as usual; without it nothing is held out.

    Raises:
        DataError: the corpus cannot be listed, or the tokenizer cannot be used.
    """

    def __init__(self, config: DataConfig, *, progress: bool = False) -> None:
        assert config.tokenizer is not None  # DataConfig refuses a stream without one
        self.config, self._progress = config, progress
        self.corpus = Corpus(replace(config, validation_fraction=0.0))
        self.corpus.files = tuple(file for file in self.corpus.files if file.split != VALIDATION)
        self.tokenizer_path = Path(config.tokenizer)
        self.tokenizer = Tokenizer(self.tokenizer_path, config.end_token)
        self.vocab_size = self.tokenizer.vocab_size
        self.identity = {
            "corpus": fingerprint_of(self.corpus.identity()),
            "tokenizer": self.tokenizer.fingerprint,
            **self.tokenizer.identity,
            "seed": config.seed,
            "slab_mb": float(config.slab_mb),
            "max_document_tokens": config.max_document_tokens,
            "algorithm": [_ALGORITHM, CHUNK_CHARACTERS, PIECE_CHARACTERS],
        }
        self.fingerprint = fingerprint_of(self.identity)
        self.directory = Path(config.cache_dir) / f"stream-{self.fingerprint[:16]}"

    def _samples(self, split: str, seq_len: int, alignment: int) -> Samples | None:
        if split == TRAIN:
            return StreamSamples(self, self.config, seq_len, alignment)
        if self.config.validation_path is None:
            return None
        held_out = replace(
            self.config, stream=False, path=self.config.validation_path, validation_path=None, validation_fraction=0.0
        )
        return open_corpus(held_out, progress=self._progress).samples(TRAIN, seq_len, alignment)

    def report(self) -> list[str]:
        """See `TrainingData`."""
        files = self.corpus.files
        size = sum(file.num_bytes for file in files) / 1e6
        return [f"stream of {len(files):,} files, {size:,.1f} MB, in slabs of {self.config.slab_mb:g} MB of text"]

    def write_slab(self, directory: Path, begin: _Cursor) -> None:
        """Tokenize the slab that begins at a cursor into a shard in `directory`; the marker file is written last."""
        config, tokenizer = self.config, self.tokenizer
        dtype = token_dtype(tokenizer.vocab_size)
        key = derive_key(config.seed, _FILE_ORDER, begin.epoch)
        num_files = len(self.corpus.files)
        cutter = _SlabCutter(int(config.slab_mb * 1e6), begin.epoch)

        def file_at(number: int) -> int:
            return int(permute(np.array([number]), num_files, key)[0])

        skipped: Counter[str] = Counter()
        with ShardWriter(directory / _SHARD, dtype, config.max_document_tokens) as writer:
            pieces = cutter.take(self.corpus.pieces(begin.position, file_at))
            for piece, tokens, *_ in encode_all(pieces, tokenizer, dtype):
                if piece.skip_reason is not None:
                    skipped[piece.skip_reason] += 1
                    continue
                writer.append(tokens)
                if piece.is_last and writer.end_document() is None:
                    skipped["too_long"] += 1
        assert writer.info is not None
        content = {
            "end": cutter.end.to_json(),
            "skipped": dict(skipped),
            "documents": writer.info.num_documents,
            "hashes": [tokenizer.fingerprint, writer.info.sha256_bin, writer.info.sha256_idx],
        }
        write_json(directory / _MARKER, content)


class _SlabCutter:
    """Takes documents from a corpus until they make a slab. `end` is then the beginning of the next one."""

    def __init__(self, num_characters: int, epoch: int) -> None:
        self._num_characters, self._epoch = num_characters, epoch
        self.end = _Cursor(epoch + 1, Position())  # if the corpus ends first

    def take(self, pieces: Iterator[Piece]) -> Iterator[Piece]:
        num_taken = 0
        for piece in pieces:
            num_taken += len(piece.text)
            yield piece
            if piece.is_last and num_taken >= self._num_characters:
                self.end = _Cursor(self._epoch, piece.end)
                return


class StreamSamples(Samples):
    """The endless samples of a stream. `at` is fast near the last index, and reads all slabs between when it jumps."""

    num_samples = 1 << 62

    def __init__(self, stream: Stream, config: DataConfig, seq_len: int, alignment: int) -> None:
        self._stream, self._config = stream, config
        self.seq_len, self._alignment = seq_len, alignment
        self.identity = {**stream.identity, "seq_len": seq_len, "alignment": alignment}
        self.fingerprint = fingerprint_of(self.identity)
        self._lock = threading.RLock()
        # (first sample, beginning) of consecutive slabs, from slab number `_base` on.
        self._base = 0
        self._begins: list[tuple[int, _Cursor]] = [(0, _Cursor(0, Position()))]
        self._slab: _Slab | None = None
        self._ahead: tuple[int, Future[_Slab]] | None = None
        self._pool = ThreadPoolExecutor(1, "slab")

    def at(self, index: int) -> PackedSample:
        """See `Samples`."""
        slab = self._slab
        if slab is None or not slab.first_sample <= index < slab.first_sample + slab.num_samples:
            slab = self._find(index)
        assert slab.plan is not None
        key = derive_key(self._config.seed, _SLAB_ORDER, slab.number)
        row = int(permute(np.array([index - slab.first_sample]), slab.num_samples, key)[0])
        return replace(slab.plan.sample(row), index=index)

    def bookmark(self, index: int) -> dict[str, Any]:
        """See `Samples`. A bookmark is the beginning of the slab with sample `index`."""
        with self._lock:
            row = max(bisect_right([first for first, _ in self._begins], index) - 1, 0)
            first, cursor = self._begins[row]
            return {"stream": {"slab": self._base + row, "first_sample": first, "begin": cursor.to_json()}}

    def restore(self, bookmark: Mapping[str, Any]) -> None:
        """See `Samples`."""
        try:
            entry = bookmark["stream"]
            epoch, position = entry["begin"]
            begin = (int(entry["first_sample"]), _Cursor(int(epoch), Position(*position)))
            base = int(entry["slab"])
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"the loader state holds no usable position in the stream: {dict(bookmark)!r}") from error
        with self._lock:
            row = base - self._base
            if not (0 <= row < len(self._begins) and self._begins[row] == begin):
                self._base, self._begins = base, [begin]
                self._slab, self._ahead = None, None

    def _find(self, index: int) -> _Slab:
        """The slab with sample `index`. Starts to make the next one, and deletes the one two slabs back."""
        with self._lock:
            firsts = [first for first, _ in self._begins]
            if index < firsts[0]:
                raise DataError(f"sample {index} comes before sample {firsts[0]}, at which this stream was resumed")
            number = self._base + bisect_right(firsts, index) - 1
        empty_since = number
        while True:
            slab = self._open(number)
            if slab.first_sample <= index < slab.first_sample + slab.num_samples:
                break
            if slab.num_samples:
                empty_since = number + 1
            elif slab.end.epoch - self._begins[empty_since - self._base][1].epoch > 1:
                raise DataError(f"data.path={self._config.path}: no document of at least 2 tokens in a whole epoch")
            number += 1
        self._slab = slab
        self._ahead = (number + 1, self._pool.submit(self._make, number + 1))
        self._delete(number - 2)
        return slab

    def _open(self, number: int) -> _Slab:
        if self._ahead is not None and self._ahead[0] == number:
            return self._ahead[1].result()
        return self._make(number)

    def _make(self, number: int) -> _Slab:
        """Find slab `number` in the cache or build it, and record where the next one begins."""
        with self._lock:
            first_sample, begin = self._begins[number - self._base]
        directory = self._directory(begin)
        opened = None
        while opened is None:  # again, if a process that is ahead deleted it (`_delete`) before it was opened
            build_once(directory, _MARKER, lambda target: self._stream.write_slab(target, begin))
            with locked(lock_path(directory)):
                opened = self._read(directory)
        content, plan = opened
        epoch, position = content["end"]
        slab = _Slab(number, first_sample, begin, _Cursor(epoch, Position(*position)), plan)
        with self._lock:
            if number - self._base == len(self._begins) - 1:
                self._begins.append((first_sample + slab.num_samples, slab.end))
        return slab

    def _read(self, directory: Path) -> tuple[dict[str, Any], Plan | None] | None:
        """The marker file of a finished slab, and its plan if any document has 2 tokens; None if it was deleted.

        The caller holds its lock.
        """
        if not (directory / _MARKER).exists():
            return None
        content = read_json(directory / _MARKER)
        shards = ShardSet([directory / _SHARD])
        if not (shards.lengths > 1).any():
            return content, None
        plan = build_plan(
            [directory / _SHARD],
            self.seq_len,
            self._alignment,
            self._config.seed,
            directory,
            hashes=[content["hashes"]],
            shards=shards,
        )
        return content, plan

    def _delete(self, number: int) -> None:
        """Delete a slab that is no longer used. A process that is behind keeps the files that it has open."""
        if number < self._base:
            return
        directory = self._directory(self._begins[number - self._base][1])
        try:
            with locked(lock_path(directory)):
                if directory.exists():
                    old = directory.with_name(directory.name + ".old")
                    shutil.rmtree(old, ignore_errors=True)
                    directory.rename(old)
                    shutil.rmtree(old, ignore_errors=True)
        except OSError:
            pass  # another process was faster; leftovers only take disk space

    def _directory(self, begin: _Cursor) -> Path:
        return self._stream.directory / f"slab-{fingerprint_of(begin.to_json())[:16]}"
