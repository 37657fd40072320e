"""The configuration of the data: plain values only, so that it can be built from YAML or a command line."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import Any

from data_pipeline.errors import DataError
from data_pipeline.values import convert, expand_home

TRAIN, VALIDATION = "train", "validation"
SPLITS = (TRAIN, VALIDATION)

RAW = ("stdlib", "text", "jsonl", "parquet", "hf")
"""Sources of text, which `prepare` tokenizes."""
TOKENIZED = ("shards", "megatron")
"""Sources of tokens, which are used as they are."""
SOURCES = (*RAW, *TOKENIZED, "mixture", "synthetic")
STREAMABLE = ("text", "jsonl", "parquet")
TOKENIZER_TYPES = ("bpe", "unigram")
TASKS = ("needle", "multikey", "multiquery", "multivalue", "variables", "common", "frequent", "joint", "chain", "count")
DEFAULT_TASKS = ("needle", "multikey", "variables")
_MAX_SIZE = 1e15
_OF_TEXT = "remove it, or set data.source to text or jsonl"
_UNUSED = {
    "stdlib": (("path", "validation_path"), _OF_TEXT),
    "synthetic": (("path", "validation_path"), _OF_TEXT),
    "hf": (("validation_path",), "hold out documents with data.validation_fraction"),
    "shards": (
        ("validation_path", "validation_fraction", "max_document_tokens"),
        "remove it, or prepare the shards again with it",
    ),
    "megatron": (("max_document_tokens",), "remove it; a mixture's data.stages choose documents by max_tokens"),
    "mixture": (
        ("path", "validation_path", "text_key", "subset", "split", "tasks", "probe_tokens"),
        "remove it, or set it on the corpora of data.corpora",
    ),
}
"""Settings that a source does not use, and what to do instead."""


@dataclass(frozen=True)
class CorpusConfig:
    """One corpus of a mixture. The fields mean what they mean in `DataConfig`."""

    name: str
    source: str
    path: str | None = None
    weight: float | None = None
    """Share of the samples drawn from here, relative to the others; None on all corpora: by size (`temperature`)."""
    text_key: str = "text"
    subset: str | None = None
    split: str = "train"
    validation_path: str | None = None
    validation_fraction: float = 0.01
    tasks: tuple[str, ...] = DEFAULT_TASKS
    probe_tokens: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if not (isinstance(self.name, str) and self.name):
            raise DataError(f"data.corpora: name={self.name!r} must be a non-empty text")
        if isinstance(self.tasks, list):
            object.__setattr__(self, "tasks", tuple(self.tasks))
        for name in ("path", "validation_path"):
            object.__setattr__(self, name, expand_home(getattr(self, name)))
        key = f"data.corpora[{self.name}]"
        known = (*RAW, *TOKENIZED, "synthetic")
        if self.source not in known:
            raise DataError(f"{key}.source={self.source!r} must be one of {', '.join(known)}")
        if self.source == "synthetic" and self.weight is None:
            raise DataError(f"{key}: probes have no size: give a weight")
        if self.weight is not None and not _is_above_zero(self.weight):
            raise DataError(f"{key}.weight={self.weight!r} must be above 0; leave the corpus out instead")
        if self.weight is not None and self.weight > _MAX_SIZE:
            raise DataError(f"{key}.weight={self.weight!r} must be at most {_MAX_SIZE:g}; weights are relative")


_CORPUS_FIELDS = tuple(field.name for field in fields(CorpusConfig) if field.name not in ("name", "weight"))


@dataclass(frozen=True)
class DrawConfig:
    """A draw of a stage: the documents of one corpus with `min_tokens` to `max_tokens` tokens, and their weight."""

    corpus: str
    weight: float | None = None
    """None: the weight of the corpus in the mixture."""
    min_tokens: int = 0
    max_tokens: int | None = None

    def __post_init__(self) -> None:
        _check_range(f"data.stages.draws[{self.corpus}]", self.min_tokens, self.max_tokens)
        if not isinstance(self.corpus, str):
            raise DataError(f"data.stages.draws: corpus={self.corpus!r} must be the name of a corpus")
        if self.weight is not None and not _is_above_zero(self.weight):
            raise DataError(f"data.stages.draws[{self.corpus}].weight={self.weight!r} must be above 0")
        if self.weight is not None and self.weight > _MAX_SIZE:
            raise DataError(f"data.stages.draws[{self.corpus}].weight={self.weight!r} must be at most {_MAX_SIZE:g}")


@dataclass(frozen=True)
class StageConfig:
    """A stage of a mixture: a number of samples of one length, such as 2,000 samples of 1,048,576 tokens."""

    seq_len: int
    samples: int
    min_tokens: int = 0
    """Documents shorter than this are left out."""
    max_tokens: int | None = None
    """Documents longer than this are left out."""
    draws: tuple[DrawConfig, ...] = ()
    """Corpora (or length ranges of them) with weights of this stage; empty: all corpora with theirs."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "draws", convert(tuple[DrawConfig, ...], self.draws, "data.stages.draws", DataError))
        for name in ("seq_len", "samples"):
            value = getattr(self, name)
            if not (_is_whole(value) and value >= 1):
                raise DataError(f"data.stages: {name}={value!r} must be at least 1 and a whole number")
            if value >= 2**48:
                raise DataError(f"data.stages: {name}={value!r} must be below 2**48")
        _check_range(f"data.stages[seq_len={self.seq_len}]", self.min_tokens, self.max_tokens)


@dataclass(frozen=True)
class DataConfig:
    """Where the data are, how they are split and tokenized, and how their samples are ordered.

    Raises:
        DataError: a value is of the wrong type or out of range, or the fields do not fit together.
    """

    source: str = "stdlib"
    """`stdlib` (the running Python's own standard library), `text` (a document per file), `jsonl` (one per line),
    `parquet` (one per row), `hf` (a Hugging Face dataset), `shards` (prepared earlier, local or remote), `megatron`
    (existing .bin/.idx), `mixture` (several of these) or `synthetic` (generated probes)."""
    path: str | None = None
    """File, directory or glob of the corpus, local or a URL (s3://, gs://, https://, hf://); for `hf` the dataset."""
    text_key: str = "text"
    """The key of a JSONL object, or the column of a table, that holds the document."""
    subset: str | None = None
    """`hf` only: the configuration of the dataset, where it has several."""
    split: str = "train"
    """`hf` only: the split of the dataset."""
    validation_path: str | None = None
    """File, directory or glob of the held-out documents; None holds out `validation_fraction` of `path` instead."""
    validation_fraction: float = 0.01
    """Share of documents held out, chosen by a hash of the document's text: equal texts go to the same split."""
    tokenizer: str | None = None
    """Path of a SentencePiece model or a Hugging Face tokenizer.json; None trains one on the training split."""
    end_token: str | None = None
    """The token of `tokenizer` that ends a document; None: see `data_pipeline.text.end_token`."""
    vocab_size: int = 4096
    """Pieces of a tokenizer trained here; a given `tokenizer` brings its own."""
    tokenizer_type: str = "bpe"
    """Kind of a tokenizer trained here: `bpe` or `unigram`."""
    max_document_tokens: int | None = None
    """Longer documents are left out and counted; None keeps all."""
    shard_mb: float = 512.0
    """Size of a token shard; after an interruption, preparing continues after the last finished shard."""
    cache_dir: str = ".cache/data"
    """Everything that is built is written below this directory."""
    cache_gb: float = 20.0
    """Bound of the local cache of remote shards; the least recently used blocks go first."""
    retries: int = 5
    """How often a failed remote request is repeated before it is an error."""
    verify: bool = False
    """Hash all shards when they are opened. Shards with a changed time stamp are always hashed."""
    stream: bool = False
    """`text`, `jsonl`, `parquet`: train straight from the raw text, tokenized when it is needed."""
    slab_mb: float = 64.0
    """`stream` only: text that is tokenized and packed together. A slab should give at least 200 samples."""
    seed: int = 0
    """Chooses which documents share a sample and the order of the samples."""
    prefetch_samples: int = 4
    """Samples per data-parallel rank that the loader keeps ready."""
    accept_changes: bool = False
    """Continue a run on other data (corpus, tokenizer, seq_len, seed, weights) at the same sample number."""
    corpora: tuple[CorpusConfig, ...] = ()
    """`mixture` only: the corpora."""
    temperature: float = 1.0
    """`mixture` without weights: a corpus of n tokens weighs n ** (1 / temperature)."""
    stages: tuple[StageConfig, ...] = ()
    """`mixture` only: lengths of samples in the order of training; empty: one endless stage of the run's length."""
    tasks: tuple[str, ...] = DEFAULT_TASKS
    """`synthetic` only: the kinds of probes, in turn."""
    probe_tokens: tuple[int, int] | None = None
    """`synthetic` only: the least and most tokens of a probe; samples are packs of probes. None: one probe a sample."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "corpora", convert(tuple[CorpusConfig, ...], self.corpora, "data.corpora", DataError))
        object.__setattr__(self, "stages", convert(tuple[StageConfig, ...], self.stages, "data.stages", DataError))
        for name in ("source", "text_key", "split", "tokenizer_type", "cache_dir"):
            _require(isinstance(getattr(self, name), str) and getattr(self, name) != "", name, self, "a non-empty text")
        for name in ("path", "subset", "validation_path", "tokenizer", "cache_dir"):
            value = getattr(self, name)
            _require(value is None or (isinstance(value, str) and value != ""), name, self, "a path or null")
            _require("\0" not in (value or ""), name, self, "without a NUL character, which no path has")
            object.__setattr__(self, name, expand_home(value))
        end = self.end_token
        _require(end is None or (isinstance(end, str) and end != ""), "end_token", self, "a token or null")
        for name in ("vocab_size", "seed", "prefetch_samples", "retries"):
            _require(_is_whole(getattr(self, name)), name, self, "a whole number")
        for name in ("verify", "stream", "accept_changes"):
            _require(isinstance(getattr(self, name), bool), name, self, "true or false")
        for name in ("shard_mb", "cache_gb", "slab_mb", "temperature"):
            value = getattr(self, name)
            _require(_is_above_zero(value), name, self, "a number above 0")
            _require(name == "temperature" or value <= _MAX_SIZE, name, self, f"at most {_MAX_SIZE:g}")
        _require(self.source in SOURCES, "source", self, f"one of {', '.join(SOURCES)}")
        _require(self.tokenizer_type in TOKENIZER_TYPES, "tokenizer_type", self, f"one of {', '.join(TOKENIZER_TYPES)}")
        _require(self.vocab_size > 0, "vocab_size", self, "at least 1")
        _require(self.vocab_size < 2**31, "vocab_size", self, "at most 2**31 - 1")
        _require(0 <= self.seed < 2**63, "seed", self, "between 0 and 2**63 - 1")
        _require(self.prefetch_samples >= 1, "prefetch_samples", self, "at least 1")
        _require(self.retries >= 0, "retries", self, "at least 0")
        limit = self.max_document_tokens
        _require(limit is None or (_is_whole(limit) and limit > 0), "max_document_tokens", self, "at least 1, or null")
        fraction = self.validation_fraction
        _require(
            isinstance(fraction, (int, float)) and not isinstance(fraction, bool) and 0 <= fraction < 1,
            "validation_fraction",
            self,
            "a number from 0 up to but not including 1",
        )
        self._check_probes()
        self._check_source()

    def _check_probes(self) -> None:
        tasks, lengths = self.tasks, self.probe_tokens
        known = isinstance(tasks, (list, tuple)) and len(tasks) > 0 and all(task in TASKS for task in tasks)
        _require(known, "tasks", self, f"a list of {', '.join(TASKS)}")
        object.__setattr__(self, "tasks", tuple(tasks))
        if lengths is not None:
            whole = isinstance(lengths, (list, tuple)) and len(lengths) == 2 and all(map(_is_whole, lengths))
            _require(
                whole and 0 < lengths[0] <= lengths[1], "probe_tokens", self, "two lengths, least and most, or null"
            )
            object.__setattr__(self, "probe_tokens", tuple(lengths))

    def _check_source(self) -> None:
        names, advice = _UNUSED.get(self.source, ((), ""))
        for name in names:
            if getattr(self, name) != _default_of(name):
                raise DataError(
                    f"data.{name}={getattr(self, name)!r} has no meaning for data.source={self.source}: {advice}"
                )
        if "path" not in names and self.path is None:
            raise DataError(f"data.source={self.source} needs data.path: a file, a directory or a glob")
        if self.source != "mixture" and (self.corpora or self.stages):
            raise DataError(f"data.corpora and data.stages belong to data.source=mixture, not {self.source}")
        if self.source == "mixture":
            _check_mixture(self.corpora, self.stages)
        if self.source == "megatron" and self.tokenizer is None:
            raise DataError("data.source=megatron needs data.tokenizer: the one that the shards were made with")
        if self.stream and self.source not in STREAMABLE:
            raise DataError(f"data.stream=true reads {', '.join(STREAMABLE)}, not data.source={self.source}")
        if self.stream and self.tokenizer is None:
            raise DataError(
                "data.stream=true needs data.tokenizer: training one would read the corpus first; make one with "
                "`python -m data_pipeline.tokenizer train ...`"
            )
        for corpus in self.corpora:
            corpus_config(self, corpus, self.tokenizer)


def corpus_config(config: DataConfig, corpus: CorpusConfig, tokenizer: str | None) -> DataConfig:
    """The configuration of one corpus of a mixture as data of its own. Raises DataError that names the corpus."""
    own = {name: getattr(corpus, name) for name in _CORPUS_FIELDS}
    if corpus.source not in RAW:
        own["max_document_tokens"] = None  # one value for all corpora of text; tokens are taken as they are
    with errors_name_corpus(corpus.name):
        return replace(config, corpora=(), stages=(), tokenizer=tokenizer, **own)


@contextmanager
def errors_name_corpus(name: str, prefix: str = "") -> Iterator[None]:
    """A DataError raised inside gets the name of a corpus of a mixture in front, and `prefix` before that."""
    try:
        yield
    except DataError as error:
        raise DataError(f"{prefix}data.corpora[{name}]: {error}") from error


def _default_of(name: str) -> Any:
    return next(field.default for field in fields(DataConfig) if field.name == name)


def _check_mixture(corpora: tuple[CorpusConfig, ...], stages: tuple[StageConfig, ...]) -> None:
    names = [corpus.name for corpus in corpora]
    if not names:
        raise DataError("data.source=mixture needs data.corpora: a list of corpora with name, source and path")
    for name in names:
        if names.count(name) > 1:
            raise DataError(f"data.corpora: the name {name!r} is given twice")
    without = [corpus.name for corpus in corpora if corpus.weight is None]
    if without and len(without) < len(names):
        raise DataError(f"data.corpora: {', '.join(without)} lack a weight; give one to all corpora or to none")
    for stage in stages:
        for draw in stage.draws:
            if draw.corpus not in names:
                near = difflib.get_close_matches(draw.corpus, names, n=1, cutoff=0)[0]
                raise DataError(f"data.stages draw from {draw.corpus!r}, which is no corpus; the nearest is {near!r}")


def _require(condition: bool, name: str, config: DataConfig, wanted: str) -> None:
    if not condition:
        raise DataError(f"data.{name}={getattr(config, name)!r} must be {wanted}")


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_above_zero(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < float("inf")


def _check_range(key: str, min_tokens: int, max_tokens: int | None) -> None:
    for name, value in (("min_tokens", min_tokens), ("max_tokens", max_tokens)):
        if not _is_whole(value) and (name, value) != ("max_tokens", None):
            raise DataError(f"{key}: {name}={value!r} must be a whole number")
    if min_tokens < 0 or (max_tokens is not None and max_tokens < max(min_tokens, 1)):
        raise DataError(
            f"{key}: min_tokens={min_tokens} and max_tokens={max_tokens} leave no length; lower min_tokens or raise "
            f"max_tokens"
        )
