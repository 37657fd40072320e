"""`open_data(config)`: whatever the configuration names, ready to be sampled.

Raw text is prepared first, finished shards and Megatron files are used where they are, local or remote; mixtures,
streams and synthetic probes have modules of their own. All of them are `TrainingData`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, overload

import numpy as np

from data_pipeline import verify
from data_pipeline.cache import BlockCache
from data_pipeline.config import RAW, DataConfig
from data_pipeline.errors import DataError
from data_pipeline.packing import Plan, Selection, build_plan, tokens_beyond
from data_pipeline.prepare import MANIFEST, TOKENIZER, PreparedData, check_format, open_prepared, prepare
from data_pipeline.remote import RemoteObject, find_remote, info_or_none, is_remote, with_retries
from data_pipeline.samples import Samples
from data_pipeline.shards import RemoteShardReader, ShardReader, ShardSet
from data_pipeline.sources import SPLITS, TRAIN, VALIDATION, find_local
from data_pipeline.storage import fingerprint_of, read_json, sha256_of_file
from data_pipeline.tokenizer import Tokenizer

_PROBES, _PROBE_BYTES = 32, 1 << 16


class TrainingData:
    """A tokenizer and samples.

    Attributes:
        tokenizer_path: local file of the tokenizer.
        vocab_size: number of token ids.
        fingerprint: sha256 (hex) of tokenizer and content.
        config: where it came from.
    """

    tokenizer_path: Path
    vocab_size: int
    fingerprint: str
    config: DataConfig

    @overload
    def samples(self, split: Literal["train"], seq_len: int, alignment: int) -> Samples: ...

    @overload
    def samples(self, split: str, seq_len: int, alignment: int) -> Samples | None: ...

    def samples(self, split: str, seq_len: int, alignment: int) -> Samples | None:
        """The samples of `train` or `validation`; None when nothing is held out.

        Raises:
            DataError: `seq_len` and `alignment` do not fit each other or the data.
        """
        samples = self._samples(split, seq_len, alignment)
        if samples is not None:
            samples.accept_changes = self.config.accept_changes
        return samples

    def report(self) -> list[str]:
        """Lines that say what is in it."""
        raise NotImplementedError

    def _samples(self, split: str, seq_len: int, alignment: int) -> Samples | None:
        raise NotImplementedError


def open_data(config: DataConfig, *, progress: bool = False) -> TrainingData:
    """Prepare or find the data of a configuration. Safe to call from several processes at once.

    Args:
        config: what to train on.
        progress: show progress bars on stderr.

    Raises:
        DataError: the data are not what they should be.
    """
    if config.source == "mixture":
        from data_pipeline.mixture import Mixture

        return Mixture(config, progress=progress)
    if config.source == "synthetic":
        from data_pipeline.synthetic import Synthetic

        return Synthetic(config)
    if config.stream:
        from data_pipeline.stream import Stream

        return Stream(config, progress=progress)
    return open_corpus(config, progress=progress)


class TokenCorpus(TrainingData):
    """Shards of one corpus, local or remote.

    Args:
        config: where it came from, seed and cache.
        tokenizer_path: local file.
        prefixes: paths or URLs of the shards of each split.
        hashes: `[tokenizer, .bin, .idx]` of each of them.
        parts: for a split, the share of the documents that belong to it, where both splits have the same shards.
        opener: opens one shard.
        manifest: of prepared shards.
    """

    def __init__(
        self,
        config: DataConfig,
        tokenizer_path: Path,
        prefixes: dict[str, Sequence[str | Path]],
        hashes: dict[str, list[list[str]]],
        *,
        parts: dict[str, tuple[float, float]] | None = None,
        opener: Callable[[Any], Any] = ShardReader,
        manifest: dict[str, Any] | None = None,
    ) -> None:
        self.config, self.tokenizer_path, self.manifest = config, tokenizer_path, manifest
        self.prefixes, self._hashes, self._opener = prefixes, hashes, opener
        self._parts = parts or {}
        self._open: dict[str, ShardSet] = {}
        self.tokenizer = Tokenizer(tokenizer_path)
        self.vocab_size = self.tokenizer.vocab_size
        self.fingerprint = fingerprint_of([self.tokenizer.fingerprint, [hashes[split] for split in SPLITS]])

    def shards(self, split: str) -> ShardSet:
        """The documents of a split (before `parts` chooses among them)."""
        if split not in self._open:
            self._open[split] = ShardSet(self.prefixes[split], self._opener)
        return self._open[split]

    def lengths(self, split: str, selection: Selection | None = None) -> np.ndarray:
        """int64: tokens per document, 0 for those that are not of this split or not selected."""
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
        """See TrainingData."""
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
                lines.append("  tokens in documents longer than " + ", ".join(f"{x}: {s:.1%}" for x, s in shares))
        for reason, count in sorted((self.manifest or {}).get("source", {}).get("skipped", {}).items()):
            lines.append(f"left out: {count:,} documents, {reason}")
        return lines

    def _select(self, split: str, selection: Selection | None) -> Selection:
        chosen = selection or Selection()
        return Selection(chosen.min_tokens, chosen.max_tokens, self._parts.get(split, (0.0, 1.0)))


def open_corpus(config: DataConfig, *, progress: bool = False) -> TokenCorpus:
    """`open_data` of one corpus that is, or becomes, shards."""
    if config.source in RAW:
        prepared = prepare(config, progress=progress)
        return _of_prepared(config, prepared)
    assert config.path is not None  # DataConfig refuses a missing path
    if config.source == "megatron":
        return _open_megatron(config)
    if is_remote(config.path):
        return _open_remote_shards(config)
    wanted = None if config.tokenizer is None else Tokenizer(config.tokenizer).fingerprint
    if not (Path(config.path) / MANIFEST).is_file():
        raise DataError(f"data.path={config.path}: holds no {MANIFEST}; data.source=shards wants a prepared directory")
    prepared = open_prepared(config.path, wanted)
    shards = [shard for split in SPLITS for shard in prepared.manifest["splits"][split]["shards"]]
    verify.check(prepared.directory, shards, config.cache_dir, everything=config.verify)
    return _of_prepared(config, prepared)


def _of_prepared(config: DataConfig, prepared: PreparedData) -> TokenCorpus:
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
    if config.tokenizer is not None and (asked := Tokenizer(config.tokenizer).fingerprint) != recorded:
        raise DataError(
            f"data.tokenizer={config.tokenizer}: does not fit the shards in {root}, made with tokenizer sha256 "
            f"{recorded}, the tokenizer asked for has {asked}; use that tokenizer, or prepare the corpus again"
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


def _verify_remote(file: RemoteObject, wanted: str) -> None:
    digest = hashlib.sha256()
    for start in range(0, file.size, 8 << 20):
        digest.update(file.read(start, start + (8 << 20)))
    if digest.hexdigest() != wanted:
        raise DataError(
            f"{file.url}: its content has changed: the manifest has sha256 {wanted}, the file {digest.hexdigest()}; "
            f"upload it again"
        )


def _open_megatron(config: DataConfig) -> TokenCorpus:
    """Existing .bin/.idx. Nothing records their hashes, so their identity is the index and probes of the tokens."""
    assert config.path is not None and config.tokenizer is not None
    tokenizer = Tokenizer(config.tokenizer)
    remote = is_remote(config.path)
    cache = _block_cache(config) if remote else None

    def open_shard(prefix: str) -> ShardReader | RemoteShardReader:
        return ShardReader(prefix) if cache is None else RemoteShardReader(prefix, cache, config.retries)

    def identify(prefix: str) -> list[str]:
        reader = open_shard(prefix)
        if cache is None:
            index = Path(prefix + ".idx")
        else:
            index = cache.whole_file(find_remote(prefix + ".idx", config.retries))
        return [tokenizer.fingerprint, _probe(prefix, reader, tokenizer.vocab_size), sha256_of_file(index)]

    train = _megatron_prefixes(config.path, "path", config.retries)
    validation = train
    parts: dict[str, tuple[float, float]] = {}
    if config.validation_path is not None:
        validation = _megatron_prefixes(config.validation_path, "validation_path", config.retries)
        train = [prefix for prefix in train if prefix not in validation]
        if not train:
            raise DataError(f"data.path={config.path}: all its files are also in data.validation_path")
    else:
        fraction = float(config.validation_fraction)
        parts = {TRAIN: (fraction, 1.0), VALIDATION: (0.0, fraction)}
    hashes = {TRAIN: [identify(prefix) for prefix in train]}
    hashes[VALIDATION] = hashes[TRAIN] if parts else [identify(prefix) for prefix in validation]
    prefixes: dict[str, Sequence[str | Path]] = {TRAIN: train, VALIDATION: validation}
    return TokenCorpus(config, Path(config.tokenizer), prefixes, hashes, parts=parts, opener=open_shard)


def _probe(prefix: str, reader: ShardReader | RemoteShardReader, vocab_size: int) -> str:
    """A hash of the length and some evenly spread stretches of the tokens, which are checked on the way."""
    digest = hashlib.sha256(str(len(reader)).encode())
    total, size = int(reader.lengths.sum()), _PROBE_BYTES // reader.dtype.itemsize
    for start in np.unique(np.linspace(0, max(total - size, 0), _PROBES).astype(np.int64)).tolist():
        tokens = reader.stretch(start, min(start + size, total))
        digest.update(np.ascontiguousarray(tokens).tobytes())
        if tokens.size and not 0 <= int(tokens.min()) <= int(tokens.max()) < vocab_size:
            raise DataError(
                f"{prefix}.bin: holds token {int(tokens.max())}, but data.tokenizer has {vocab_size} tokens; name the "
                f"tokenizer that the shards were made with"
            )
    return "probes:" + digest.hexdigest()


def _megatron_prefixes(path: str, field: str, retries: int) -> list[str]:
    """The shards that a prefix, a .bin or .idx file, a directory or a glob names, sorted."""
    stem = path[:-4] if path.endswith((".bin", ".idx")) else path

    def look() -> list[str]:
        import fsspec

        system, root = fsspec.core.url_to_fs(stem)
        system.invalidate_cache()
        if info_or_none(system, root + ".idx") is not None:
            found = [root + ".idx"]
        elif (info := info_or_none(system, root)) is not None and info["type"] == "directory":
            below = system.find(root) if is_remote(path) else find_local(root)
            found = [item for item in below if item.endswith(".idx")]
        else:
            found = system.glob(root if root.endswith(".idx") else root + ".idx")
        return sorted((system.unstrip_protocol(item) if is_remote(path) else item)[:-4] for item in found)

    prefixes = with_retries(look, f"data.{field}={path}:", retries)
    if not prefixes:
        raise DataError(f"data.{field}={path}: no such shard, and no .idx file there; name a prefix, directory or glob")
    return prefixes
