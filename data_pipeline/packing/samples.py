"""Packed samples in a global order, each a function of its index; and `TrainingData`, which provides them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, overload

import numpy as np

from data_pipeline.config import DataConfig
from data_pipeline.packing.order import derive_key, permute

IGNORE_INDEX = -100
"""The label of a token without a next token to predict."""
_SAMPLE_ORDER = 2


@dataclass(frozen=True, eq=False)
class PackedSample:
    """One packed sequence of T tokens.

    Attributes:
        tokens: int64 [T]; padding holds 0.
        labels: int64 [T]; the next token of the same document, IGNORE_INDEX where there is none (the document's last
            token, padding). The last token of a piece that another sample continues has that next token as its label.
        doc_starts: int64 [num_docs], ascending multiples of the alignment; the first is 0.
        doc_lengths: int64 [num_docs], tokens without padding, at least 1.
        continuation: bool [num_docs]; the piece continues a document from an earlier sample of the plan.
        index: number of the sample: in the plan, or in the global order when it comes from a Loader.
    """

    tokens: np.ndarray
    labels: np.ndarray
    doc_starts: np.ndarray
    doc_lengths: np.ndarray
    continuation: np.ndarray
    index: int


def join(samples: Sequence[PackedSample]) -> PackedSample:
    """Concatenate samples to one with the documents of all of them and the index of the first."""
    if len(samples) == 1:
        return samples[0]
    offsets = np.cumsum([0] + [len(sample.tokens) for sample in samples[:-1]])
    return PackedSample(
        tokens=np.concatenate([sample.tokens for sample in samples]),
        labels=np.concatenate([sample.labels for sample in samples]),
        doc_starts=np.concatenate([sample.doc_starts + offset for sample, offset in zip(samples, offsets)]),
        doc_lengths=np.concatenate([sample.doc_lengths for sample in samples]),
        continuation=np.concatenate([sample.continuation for sample in samples]),
        index=samples[0].index,
    )


class Samples:
    """A global order of samples. Subclasses set the attributes and define `at`.

    Attributes:
        fingerprint: sha256 (hex) of everything that determines sample i.
        identity: the parts of the fingerprint by name, as JSON; they show what has changed when it has.
        seq_len: T.
        num_samples: samples of one epoch (after which documents repeat), or of a validation set.
        accept_changes: a Loader accepts the state of a run on other data.
    """

    fingerprint: str
    identity: dict[str, Any]
    seq_len: int
    num_samples: int
    accept_changes: bool = False

    def at(self, index: int) -> PackedSample:
        """Sample `index` of the global order."""
        raise NotImplementedError

    def prefetch(self, index: int) -> None:
        """Start to fetch what `at(index)` will read. A Loader calls it some samples ahead."""

    def bookmark(self, index: int) -> dict[str, Any]:
        """What a new process needs, besides `index`, to continue there without reading from the start; as JSON."""
        return {}

    def restore(self, bookmark: Mapping[str, Any]) -> None:
        """Use a `bookmark` of an earlier process."""


def index_in_plan(index: int, num_samples: int, seed: int) -> int:
    """The sample of a plan that is number `index` of the global order; every epoch has its own permutation."""
    epoch, position = divmod(index, num_samples)
    return int(permute(np.array([position]), num_samples, derive_key(seed, _SAMPLE_ORDER, epoch))[0])


class TrainingData:
    """A tokenizer and the samples of both splits. Subclasses set the attributes and define `_samples` and `report`.

    Attributes:
        tokenizer_path: local file of the tokenizer.
        vocab_size: number of token ids.
        fingerprint: sha256 (hex) of tokenizer and content.
        config: the configuration it was opened with.
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
        """The samples of `train` or `validation`; None when no documents are held out.

        Args:
            split: `train` or `validation`.
            seq_len: T, tokens of a sample; a multiple of `alignment`.
            alignment: documents start at multiples of it.

        Raises:
            DataError: `seq_len` and `alignment` do not fit each other or the data.
        """
        samples = self._samples(split, seq_len, alignment)
        if samples is not None:
            samples.accept_changes = self.config.accept_changes
        return samples

    def report(self) -> list[str]:
        """Lines of text that describe the data: documents, tokens, lengths."""
        raise NotImplementedError

    def _samples(self, split: str, seq_len: int, alignment: int) -> Samples | None:
        raise NotImplementedError
