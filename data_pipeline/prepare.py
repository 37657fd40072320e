"""Raw text to token shards: `prepare(config)`, or `python -m data_pipeline.prepare source=jsonl path=... out=...`.

What is built, below `cache_dir`:

    <corpus>-<fingerprint>/tokenizer.model
                           train-00000.bin .idx, validation-00000.bin .idx, ...
                           progress.json          while it is built: what is finished, and where in the corpus to go on
                           manifest.json          written last: its presence means that all the rest is there

The fingerprint is that of the request (files with size, time stamp and probes of their content, split, tokenizer);
`PreparedData.fingerprint` is that of the result (tokenizer and tokens), so it stays the same when a corpus is copied to
another machine.

Shards of both splits are closed together, at a document, and then progress.json is replaced. What was written after it
when a process was killed is written again, so no document is lost or doubled.
"""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline import cli, verify
from data_pipeline.config import RAW, DataConfig
from data_pipeline.encode import encode_all
from data_pipeline.errors import DataError
from data_pipeline.readers import Position
from data_pipeline.remote import is_remote
from data_pipeline.shards import ShardWriter, token_dtype
from data_pipeline.sources import SPLITS, TRAIN, VALIDATION, Corpus, Piece
from data_pipeline.storage import aside, build_once, fingerprint_of, read_json, sha256_of_file, write_json
from data_pipeline.tokenizer import CHUNK_CHARACTERS, PIECE_CHARACTERS, TRAINING_CHARACTERS, Tokenizer, train_tokenizer

MANIFEST = "manifest.json"
TOKENIZER = "tokenizer.model"
_PROGRESS = "progress.json"
_FORMAT = 2
_SHARD_KEYS = ("name", "sha256_bin", "sha256_idx")


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

    Any number of processes may call this at once: one does the work and the others wait for it. After a kill, the next
    call goes on at the last finished shard.

    Args:
        config: the corpus.
        progress: show a progress bar on stderr.

    Raises:
        DataError: the corpus, the tokenizer or the files found in the cache are not what they should be.
    """
    if config.source not in RAW:
        raise DataError(f"data.source={config.source} has no text to prepare; the sources of text are {', '.join(RAW)}")
    if is_remote(config.cache_dir):
        raise DataError(f"{config.cache_dir}: shards are written to a local directory; copy them from there")
    corpus = Corpus(config)
    wanted = None if config.tokenizer is None else Tokenizer(config.tokenizer).fingerprint
    request = {
        "format": _FORMAT,
        "corpus": corpus.identity(),
        "tokenizer": wanted or [config.tokenizer_type, config.vocab_size, TRAINING_CHARACTERS],
        "chunk_characters": [CHUNK_CHARACTERS, PIECE_CHARACTERS],
        "max_document_tokens": config.max_document_tokens,
        "shard_mb": float(config.shard_mb),
    }
    directory = Path(config.cache_dir) / f"{corpus.name}-{fingerprint_of(request)[:16]}"

    def announce_wait() -> None:
        if progress:
            print(f"waiting for another process that prepares {directory}", file=sys.stderr)

    build_once(directory, MANIFEST, lambda target: _build(target, config, corpus, progress), announce_wait, keep=True)
    prepared = open_prepared(directory, wanted)
    shards = [shard for split in SPLITS for shard in prepared.manifest["splits"][split]["shards"]]
    verify.check(directory, shards, config.cache_dir, everything=config.verify)
    return prepared


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
    check_format(manifest, str(directory / MANIFEST))
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


def check_format(manifest: dict[str, Any], place: str) -> None:
    """Refuse a manifest of another version of this package, and one that lacks what is read from it."""
    if manifest.get("format") != _FORMAT:
        raise DataError(f"{place}: has format {manifest.get('format')!r}, expected {_FORMAT}; prepare it again")
    with _whole(place, "prepare it again"):
        _ = [manifest["tokenizer"][key] for key in ("fingerprint", "vocab_size")]
        for split in (manifest["splits"][split] for split in SPLITS):
            _ = split["text_bytes"], [shard[key] for shard in split["shards"] for key in _SHARD_KEYS]


@contextmanager
def _whole(place: str, way_out: str) -> Iterator[None]:
    """A key that is missing inside, or of another type, is an error of the file at `place`."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        detail = f"lacks {error}" if isinstance(error, KeyError) else f"holds a wrong value ({error})"
        raise DataError(f"{place}: {detail}, so it is damaged; {way_out}") from error


def shard_hashes(prefixes: Sequence[str | Path]) -> list[list[str]]:
    """`[tokenizer, .bin, .idx]` sha256 of each shard, as the manifests beside them record; nothing is hashed anew."""
    known: dict[Path, list[str]] = {}
    paths = [Path(prefix) for prefix in prefixes]
    for directory in {path.parent for path in paths}:
        manifest = read_json(directory / MANIFEST)
        check_format(manifest, str(directory / MANIFEST))
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
        with aside(tokenizer_path) as file:
            file.write(Path(config.tokenizer).read_bytes())
    elif not tokenizer_path.exists():
        with _bar(corpus, "reading for the tokenizer", progress) as bar:
            texts = (piece.text for piece in _watched(corpus.pieces(), bar) if piece.split == TRAIN)
            train_tokenizer(texts, tokenizer_path, config.vocab_size, config.tokenizer_type)
    tokenizer = Tokenizer(tokenizer_path)
    dtype = token_dtype(tokenizer.vocab_size)
    with ExitStack() as stack:
        output = stack.enter_context(_Output(directory, dtype, config))
        bar = stack.enter_context(_bar(corpus, "encoding", progress))
        bar.update(sum(file.num_bytes for file in corpus.files[: output.position.file]) + output.position.offset)
        began, num_text_bytes = time.perf_counter(), 0
        for piece, tokens, num_bytes in encode_all(_watched(corpus.pieces(output.position), bar), tokenizer, dtype):
            output.add(piece, tokens, num_bytes)
            num_text_bytes += num_bytes
            rate = num_text_bytes / 1e6 / max(time.perf_counter() - began, 1e-9)
            bar.set_postfix_str(f"{rate:.1f} MB/s of text", refresh=False)
        output.commit()
    if not output.splits[TRAIN].documents:
        raise DataError(
            f"data.source={config.source} data.path={config.path}: no document is left to train on "
            f"({output.splits[VALIDATION].documents} held out, {output.skipped['empty']} empty); set "
            f"data.validation_fraction=0, or add documents"
        )
    manifest = {
        "format": _FORMAT,
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
            "chunk_characters": CHUNK_CHARACTERS,
            "piece_characters": PIECE_CHARACTERS,
        },
        "dtype": dtype.name,
        "splits": {split: output.splits[split].summary() for split in SPLITS},
    }
    shards = [shard for split in SPLITS for shard in output.splits[split].shards]
    verify.remember(directory, shards, config.cache_dir)
    write_json(directory / MANIFEST, manifest)
    (directory / _PROGRESS).unlink()


class _SplitCounts:
    """What the finished shards of one split hold; `summary()` is its part of the manifest, and restores it."""

    def __init__(self, summary: dict[str, Any] | None = None) -> None:
        # By bits of the length: bucket b counts documents of 2**(b-1) < length <= 2**b tokens.
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


class _Output:
    """The shards of all splits and the record of what is finished; a context manager.

    Attributes:
        position: where in the corpus the next document is.
        skipped: documents left out, by reason.
    """

    def __init__(self, directory: Path, dtype: np.dtype, config: DataConfig) -> None:
        self._directory, self._dtype = directory, dtype
        self._shard_bytes = int(config.shard_mb * 1e6)
        self._most_tokens = config.max_document_tokens
        self._open = ExitStack()
        self._writers: dict[str, ShardWriter] = {}
        self._open_bytes, self._dropping = 0, False
        self.position, self.skipped, self._group = Position(), Counter[str](), 0
        self.splits = {split: _SplitCounts() for split in SPLITS}
        if (directory / _PROGRESS).exists():
            done = read_json(directory / _PROGRESS)
            with _whole(str(directory / _PROGRESS), "delete its directory to build it again"):
                self.position, self._group = Position(*done["position"]), done["group"]
                self.skipped.update(done["skipped"])
                self.splits = {split: _SplitCounts(done["splits"][split]) for split in SPLITS}
        listed = {shard["name"] for counts in self.splits.values() for shard in counts.shards}
        for path in [*directory.glob("*.bin"), *directory.glob("*.idx")]:
            if path.stem not in listed:
                path.unlink()

    def __enter__(self) -> _Output:
        return self

    def __exit__(self, *error: Any) -> None:
        self._open.__exit__(*error)

    def add(self, piece: Piece, tokens: np.ndarray, num_bytes: int) -> None:
        """Take the next piece of the corpus."""
        if piece.first:
            self._open_bytes, self._dropping = 0, False
        if piece.reason is not None:
            self.skipped[piece.reason] += 1
        elif not self._dropping:
            writer = self._writer(piece.split)
            writer.append(tokens)
            self._open_bytes += num_bytes
            if self._most_tokens is not None and writer.open_tokens > self._most_tokens:
                writer.drop_document()
                self.skipped["too_long"] += 1
                self._dropping = True
            elif piece.last:
                self.splits[piece.split].count(writer.end_document(), self._open_bytes)
        if piece.last:
            self.position = piece.end
            if any(writer.num_bytes >= self._shard_bytes for writer in self._writers.values()):
                self.commit()

    def commit(self) -> None:
        """Finish the open shards and record them."""
        self._open.close()
        for split, writer in self._writers.items():
            if writer.info is not None and writer.info.num_documents:
                self.splits[split].shards.append(asdict(writer.info))
            else:  # all its documents were too long
                writer.remove()
        self._writers, self._open = {}, ExitStack()
        self._group += 1
        progress = {
            "position": astuple(self.position),
            "group": self._group,
            "skipped": dict(self.skipped),
            "splits": {split: counts.summary() for split, counts in self.splits.items()},
        }
        write_json(self._directory / _PROGRESS, progress)

    def _writer(self, split: str) -> ShardWriter:
        if split not in self._writers:
            prefix = self._directory / f"{split}-{self._group:05d}"
            self._writers[split] = self._open.enter_context(ShardWriter(prefix, self._dtype))
        return self._writers[split]


def _bar(corpus: Corpus, what: str, progress: bool) -> Any:
    from tqdm import tqdm

    title = f"{corpus.name}: {what}"
    return tqdm(total=corpus.num_bytes, desc=title, unit="B", unit_scale=True, leave=False, disable=not progress)


def _watched(pieces: Iterator[Piece], bar: Any) -> Iterator[Piece]:
    for piece in pieces:
        bar.update(piece.num_read)
        yield piece


# Keys of the command line: the fields of DataConfig that preparing depends on; `out` is its `cache_dir`.
_NOT_HERE = tuple(
    "seed prefetch_samples cache_gb stream slab_mb accept_changes corpora temperature stages tasks probe_tokens".split()
)


def _command(arguments: Sequence[str]) -> None:
    started = time.perf_counter()
    config, _ = cli.parse(arguments, leave_out=_NOT_HERE, rename={"cache_dir": "out"})
    data = prepare(config, progress=True)
    seconds = time.perf_counter() - started
    print(f"{data.directory}: vocabulary {data.vocab_size}, {seconds:.1f} s")
    for split in SPLITS:
        part = data.manifest["splits"][split]
        rate = part["text_bytes"] / max(part["tokens"], 1)
        print(f"  {split:10} {part['documents']:>9} documents  {part['tokens']:>12} tokens  {rate:.2f} bytes/token")
    for reason, count in sorted(data.manifest["source"]["skipped"].items()):
        print(f"  left out   {count:>9} documents  {reason}")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    return cli.run(__doc__ or "", _command, arguments)


if __name__ == "__main__":
    # The package has imported this module under its own name already; that one does the work.
    from data_pipeline.prepare import main as run

    sys.exit(run())
