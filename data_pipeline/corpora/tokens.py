"""One corpus of token shards: prepared from text, prepared earlier, or existing Megatron files; local or remote."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.config import RAW, SPLITS, TRAIN, VALIDATION, DataConfig
from data_pipeline.errors import DataError
from data_pipeline.packing.plan import Plan, Selection, build_plan, tokens_beyond
from data_pipeline.packing.samples import Samples, TrainingData
from data_pipeline.store import ids, verify
from data_pipeline.store.cache import BlockCache
from data_pipeline.store.files import build_once, fingerprint_of, read_json, sha256_of_file
from data_pipeline.store.manifest import MANIFEST, TOKENIZER, check_format
from data_pipeline.store.remote import RemoteObject, find_remote, info_or_none, is_remote, with_retries
from data_pipeline.store.shards import RemoteShardReader, ShardReader, ShardSet
from data_pipeline.text.end_token import copy_tokenizer
from data_pipeline.text.prepare import PreparedData, inexact_lines, open_prepared, prepare
from data_pipeline.text.sources import list_local_files
from data_pipeline.text.tokenizer import Tokenizer

_HASHED_RANGES, _RANGE_BYTES = 32, 1 << 16


class TokenCorpus(TrainingData):
    """The shards of one corpus, local or remote.

    Args:
        config: seed, cache and the settings to report.
        tokenizer_path: local file.
        prefixes: paths or URLs of the shards of each split.
        hashes: sha256 of `[tokenizer, .bin, .idx]` of each shard of each split.
        hash_ranges: split -> its `Selection.hash_range`, where both splits have the same shards.
        opener: opens one shard.
        manifest: of prepared shards; None: Megatron files.
    """

    def __init__(
        self,
        config: DataConfig,
        tokenizer_path: Path,
        prefixes: dict[str, Sequence[str | Path]],
        hashes: dict[str, list[list[str]]],
        *,
        hash_ranges: dict[str, tuple[float, float]] | None = None,
        opener: Callable[[Any], Any] = ShardReader,
        manifest: dict[str, Any] | None = None,
    ) -> None:
        self.config, self.tokenizer_path, self.manifest = config, tokenizer_path, manifest
        self.prefixes, self._hashes, self._opener = prefixes, hashes, opener
        self._hash_ranges = hash_ranges or {}
        self._open: dict[str, ShardSet] = {}
        self.tokenizer = Tokenizer(tokenizer_path, config.end_token)
        self._check_end()
        self.vocab_size = self.tokenizer.vocab_size
        self.fingerprint = fingerprint_of([self.tokenizer.fingerprint, [hashes[split] for split in SPLITS]])

    def _check_end(self) -> None:
        """Raise DataError if the shards end their documents with another token than the tokenizer says."""
        written, tokenizer = (self.manifest or {}).get("tokenizer", {}).get("eos_id"), self.tokenizer
        if written not in (None, tokenizer.eos_id):
            raise DataError(
                f"data.path={self.config.path}: its documents end with token {written} "
                f"({tokenizer.token(written)!r}), the tokenizer names {tokenizer.eos_id} "
                f"({tokenizer.token(tokenizer.eos_id)!r}); set data.end_token={tokenizer.token(written)!r}, or prepare "
                f"the corpus again"
            )

    def shards(self, split: str) -> ShardSet:
        """The shards of a split. Where both splits have the same shards, `lengths` and `plan` select its documents."""
        if split not in self._open:
            self._open[split] = ShardSet(self.prefixes[split], self._opener, self.vocab_size)
        return self._open[split]

    def lengths(self, split: str, selection: Selection | None = None) -> np.ndarray:
        """int64 [num_documents]: tokens per document, 0 for documents of the other split or not selected."""
        return self._select(split, selection).apply(self.shards(split).lengths)

    def plan(self, split: str, seq_len: int, alignment: int, selection: Selection | None = None) -> Plan:
        """The packing of a split's documents."""
        config = self.config
        return build_plan(
            self.prefixes[split],
            seq_len,
            alignment,
            config.seed,
            config.cache_dir,
            selection=self._select(split, selection),
            hashes=self._hashes[split],
            shards=self.shards(split),
        )

    def _samples(self, split: str, seq_len: int, alignment: int) -> Samples | None:
        if split == VALIDATION and not (self.prefixes[split] and (self.lengths(split) > 1).any()):
            return None
        return self.plan(split, seq_len, alignment)

    def report(self) -> list[str]:
        """See `TrainingData`."""
        lines = []
        for split in SPLITS:
            lengths = self.lengths(split) if self.prefixes[split] else np.zeros(0, dtype=np.int64)
            lengths = lengths[lengths > 0]
            text = 0 if self.manifest is None else self.manifest["splits"][split]["text_bytes"]
            per_token = f", {text / max(lengths.sum(), 1):.2f} bytes per token" if text else ""
            lines.append(f"{split}: {lengths.size:,} documents, {int(lengths.sum()):,} tokens{per_token}")
            if lengths.size:
                quantiles = np.quantile(lengths, [0.5, 0.9, 0.99, 1.0], method="nearest").tolist()
                names = zip(("median", "90 %", "99 %", "longest"), quantiles)
                lines.append("  tokens per document: " + ", ".join(f"{name} {value:,}" for name, value in names))
                shares = tokens_beyond(lengths).items()
                lines.append(
                    "  tokens in documents longer than " + ", ".join(f"{n}: {share:.1%}" for n, share in shares)
                )
        for reason, count in sorted((self.manifest or {}).get("source", {}).get("skipped", {}).items()):
            lines.append(f"left out: {count:,} documents, {reason}")
        lines += inexact_lines(self.manifest or {})
        return lines

    def _select(self, split: str, selection: Selection | None) -> Selection:
        return replace(selection or Selection(), hash_range=self._hash_ranges.get(split, (0.0, 1.0)))


def open_corpus(config: DataConfig, *, progress: bool = False) -> TokenCorpus:
    """Open one corpus; text is prepared first. Raises DataError; see `open_data` for the arguments."""
    if config.source in RAW:
        prepared = prepare(config, progress=progress)
        return _from_prepared(config, prepared)
    assert config.path is not None  # DataConfig refuses a missing path
    if config.source == "megatron":
        return _open_megatron(config)
    if is_remote(config.path):
        return _open_remote_shards(config)
    given_tokenizer = None if config.tokenizer is None else Tokenizer(config.tokenizer, config.end_token).fingerprint
    if not os.path.isfile(Path(config.path) / MANIFEST):  # unlike Path's, False for a name that is too long
        raise DataError(f"data.path={config.path}: holds no {MANIFEST}; data.source=shards needs a prepared directory")
    prepared = open_prepared(config.path, given_tokenizer)
    shards = [shard for split in SPLITS for shard in prepared.manifest["splits"][split]["shards"]]
    verify.check(prepared.directory, shards, config.cache_dir, everything=config.verify)
    return _from_prepared(config, prepared)


def _from_prepared(config: DataConfig, prepared: PreparedData) -> TokenCorpus:
    prefixes: dict[str, Sequence[str | Path]] = {TRAIN: prepared.train, VALIDATION: prepared.validation}
    hashes = _hashes(prepared.manifest)
    return TokenCorpus(config, prepared.tokenizer_path, prefixes, hashes, manifest=prepared.manifest)


def _hashes(manifest: dict[str, Any]) -> dict[str, list[list[str]]]:
    tokenizer, splits = manifest["tokenizer"]["fingerprint"], manifest["splits"]
    return {split: [[tokenizer, s["sha256_bin"], s["sha256_idx"]] for s in splits[split]["shards"]] for split in SPLITS}


def _block_cache(config: DataConfig) -> BlockCache:
    return BlockCache(Path(config.cache_dir) / "remote", int(config.cache_gb * 1e9))


def _open_remote_shards(config: DataConfig) -> TokenCorpus:
    assert config.path is not None
    root, cache = config.path.rstrip("/"), _block_cache(config)

    def fetch(name: str, sha256: str | None = None) -> Path:
        return cache.whole_file(find_remote(f"{root}/{name}", config.retries), sha256)

    manifest = read_json(fetch(MANIFEST))
    check_format(manifest, f"{root}/{MANIFEST}")
    recorded = manifest["tokenizer"]["fingerprint"]
    tokenizer_path = fetch(TOKENIZER, recorded)
    if description := manifest["tokenizer"].get("description"):
        described = Path(config.cache_dir) / f"remote-tokenizer-{fingerprint_of([recorded, description])[:16]}"
        build_once(described, TOKENIZER, lambda target: copy_tokenizer(tokenizer_path, target / TOKENIZER, description))
        tokenizer_path = described / TOKENIZER
    if (
        config.tokenizer is not None
        and (given := Tokenizer(config.tokenizer, config.end_token).fingerprint) != recorded
    ):
        raise DataError(
            f"data.tokenizer={config.tokenizer}: does not fit the shards in {root}: they were made with tokenizer "
            f"sha256 {recorded}, the configured tokenizer has {given}; use that tokenizer, or prepare the corpus again"
        )
    entries = {f"{root}/{s['name']}": s for split in SPLITS for s in manifest["splits"][split]["shards"]}

    def open_shard(prefix: str) -> RemoteShardReader:
        reader = RemoteShardReader(prefix, cache, config.retries, entries[prefix]["sha256_idx"])
        if config.verify:
            _verify_remote(reader.bin_file, entries[prefix]["sha256_bin"])
        return reader

    prefixes: dict[str, Sequence[str | Path]] = {
        split: [f"{root}/{shard['name']}" for shard in manifest["splits"][split]["shards"]] for split in SPLITS
    }
    return TokenCorpus(config, tokenizer_path, prefixes, _hashes(manifest), opener=open_shard, manifest=manifest)


def _verify_remote(file: RemoteObject, expected: str) -> None:
    """Raise DataError unless a file has the sha256 `expected`."""
    digest = hashlib.sha256()
    for start in range(0, file.size, 8 << 20):
        digest.update(file.read(start, start + (8 << 20)))
    if digest.hexdigest() != expected:
        raise DataError(
            f"{file.url}: its content has changed: the manifest has sha256 {expected}, the file {digest.hexdigest()}; "
            f"upload it again"
        )


def _open_megatron(config: DataConfig) -> TokenCorpus:
    """Existing .bin/.idx files. No manifest has their hashes: the index and ranges of the tokens identify them."""
    assert config.path is not None and config.tokenizer is not None
    tokenizer = Tokenizer(config.tokenizer, config.end_token)
    remote = is_remote(config.path)
    cache = _block_cache(config) if remote else None

    def open_shard(prefix: str) -> ShardReader | RemoteShardReader:
        return ShardReader(prefix) if cache is None else RemoteShardReader(prefix, cache, config.retries)

    def shard_hashes(prefix: str) -> list[str]:
        reader = open_shard(prefix)
        if cache is None:
            index = Path(prefix + ".idx")
        else:
            index = cache.whole_file(find_remote(prefix + ".idx", config.retries))
        return [tokenizer.fingerprint, _hash_ranges(reader, tokenizer.vocab_size), sha256_of_file(index)]

    train = _megatron_prefixes(config.path, "path", config.retries)
    validation = train
    hash_ranges: dict[str, tuple[float, float]] = {}
    if config.validation_path is not None:
        validation = _megatron_prefixes(config.validation_path, "validation_path", config.retries)
        train = [prefix for prefix in train if prefix not in validation]
        if not train:
            raise DataError(f"data.path={config.path}: all its files are also in data.validation_path")
    else:
        fraction = float(config.validation_fraction)
        hash_ranges = {TRAIN: (fraction, 1.0), VALIDATION: (0.0, fraction)}
    hashes = {TRAIN: [shard_hashes(prefix) for prefix in train]}
    hashes[VALIDATION] = hashes[TRAIN] if hash_ranges else [shard_hashes(prefix) for prefix in validation]
    if not remote:
        found = dict(zip([*train, *validation], [*hashes[TRAIN], *hashes[VALIDATION]]))
        ids.check(found, tokenizer.vocab_size, config.cache_dir)
    prefixes: dict[str, Sequence[str | Path]] = {TRAIN: train, VALIDATION: validation}
    return TokenCorpus(config, Path(config.tokenizer), prefixes, hashes, hash_ranges=hash_ranges, opener=open_shard)


def _hash_ranges(reader: ShardReader | RemoteShardReader, vocab_size: int) -> str:
    """A hash of evenly spread ranges of a shard's tokens, which are checked against the vocabulary."""
    digest = hashlib.sha256(str(len(reader)).encode())
    total, size = int(reader.lengths.sum()), _RANGE_BYTES // reader.dtype.itemsize
    for start in np.unique(np.linspace(0, max(total - size, 0), _HASHED_RANGES).astype(np.int64)).tolist():
        tokens = reader.read_range(start, min(start + size, total))
        digest.update(np.ascontiguousarray(tokens).tobytes())
        reader.check_ids(tokens, start, vocab_size)
    return "probes:" + digest.hexdigest()


def _megatron_prefixes(path: str, field: str, retries: int) -> list[str]:
    """The shards of a prefix, a .bin or .idx file, a directory or a glob, sorted. `field` is the field of `path`."""
    stem = path[:-4] if path.endswith((".bin", ".idx")) else path

    def find() -> list[str]:
        import fsspec

        system, root = fsspec.core.url_to_fs(stem)
        system.invalidate_cache()
        if info_or_none(system, root + ".idx") is not None:
            found = [root + ".idx"]
        elif (info := info_or_none(system, root)) is not None and info["type"] == "directory":
            below = system.find(root) if is_remote(path) else list_local_files(root)
            found = [item for item in below if item.endswith(".idx")]
        else:
            found = system.glob(root if root.endswith(".idx") else root + ".idx")
        return sorted((system.unstrip_protocol(item) if is_remote(path) else item)[:-4] for item in found)

    prefixes = with_retries(find, f"data.{field}={path}:", retries)
    if not prefixes:
        raise DataError(f"data.{field}={path}: no such shard, and no .idx file there; name a prefix, directory or glob")
    return prefixes
