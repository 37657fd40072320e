"""What corpus to prepare and how to read it. Plain values only, so that it can be built from YAML or a command line."""

from __future__ import annotations

from dataclasses import dataclass

from data_pipeline.errors import DataError

SOURCES = ("stdlib", "text", "jsonl")
TOKENIZER_TYPES = ("bpe", "unigram")


@dataclass(frozen=True)
class DataConfig:
    """One corpus: where it is, how it is split and tokenized, and how its samples are ordered.

    Raises:
        DataError: a value is of the wrong type or out of range, or the fields do not fit together.
    """

    source: str = "stdlib"
    """`stdlib` (the running Python's own standard library), `text` (a document per file) or `jsonl` (one per line)."""
    path: str | None = None
    """File, directory or glob of the corpus; for `text` and `jsonl` only."""
    text_key: str = "text"
    """The key of a JSONL object that holds the document."""
    validation_path: str | None = None
    """File, directory or glob of the held-out documents; None holds out `validation_fraction` of `path` instead."""
    validation_fraction: float = 0.01
    """Share of documents held out, chosen by a hash of the document's text: equal texts share a side."""
    tokenizer: str | None = None
    """Path of a SentencePiece model; None trains one on the training split."""
    vocab_size: int = 4096
    """Pieces of a tokenizer trained here; a given `tokenizer` brings its own."""
    tokenizer_type: str = "bpe"
    """Kind of a tokenizer trained here: `bpe` or `unigram`."""
    cache_dir: str = ".cache/data"
    """Everything that is built lies below this directory."""
    seed: int = 0
    """Chooses which documents share a sample and the order of the samples."""
    prefetch_samples: int = 4
    """Samples per data-parallel rank that the loader keeps ready."""

    def __post_init__(self) -> None:
        for name in ("source", "text_key", "tokenizer_type", "cache_dir"):
            _require(isinstance(getattr(self, name), str) and getattr(self, name) != "", name, self, "a non-empty text")
        for name in ("path", "validation_path", "tokenizer"):
            value = getattr(self, name)
            _require(value is None or (isinstance(value, str) and value != ""), name, self, "a path or null")
        for name in ("vocab_size", "seed", "prefetch_samples"):
            value = getattr(self, name)
            _require(isinstance(value, int) and not isinstance(value, bool), name, self, "a whole number")
        _require(self.source in SOURCES, "source", self, f"one of {', '.join(SOURCES)}")
        _require(self.tokenizer_type in TOKENIZER_TYPES, "tokenizer_type", self, f"one of {', '.join(TOKENIZER_TYPES)}")
        _require(self.vocab_size > 0, "vocab_size", self, "at least 1")
        _require(0 <= self.seed < 2**63, "seed", self, "between 0 and 2**63 - 1")
        _require(self.prefetch_samples >= 1, "prefetch_samples", self, "at least 1")
        fraction = self.validation_fraction
        _require(
            isinstance(fraction, (int, float)) and not isinstance(fraction, bool) and 0 <= fraction < 1,
            "validation_fraction",
            self,
            "a number from 0 up to but not including 1",
        )
        if self.source == "stdlib":
            for name in ("path", "validation_path"):
                if getattr(self, name) is not None:
                    raise DataError(
                        f"data.{name}={getattr(self, name)!r} has no meaning for data.source=stdlib: remove it, or set "
                        f"data.source to text or jsonl"
                    )
        elif self.path is None:
            raise DataError(f"data.source={self.source} needs data.path: a file, a directory or a glob")


def _require(condition: bool, name: str, config: DataConfig, wanted: str) -> None:
    if not condition:
        raise DataError(f"data.{name}={getattr(config, name)!r} must be {wanted}")
