"""What a Loader reads: packed samples in a global order, each a function of its index."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from data_pipeline.order import derive_key, permute

IGNORE_INDEX = -100
"""The label of a token that has nothing to predict."""
_SAMPLE_ORDER = 2


@dataclass(frozen=True, eq=False)
class PackedSample:
    """One packed sequence of T tokens.

    Attributes:
        tokens: int64 [T]; padding holds 0.
        labels: int64 [T]; the next token of the same document, IGNORE_INDEX where there is none (the document's last
            token, padding). The last token of a piece that goes on elsewhere has the true next token as its label.
        doc_starts: int64 [num_docs], ascending multiples of the alignment; the first is 0.
        doc_lengths: int64 [num_docs], real tokens, at least 1.
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
    """One pack that holds several samples one after another, each with its own documents; it has the first's index."""
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
        fingerprint: sha256 (hex) of all that decides what sample i is.
        identity: the parts of it by name, JSON-able; they tell what has changed when the fingerprint has.
        seq_len: T.
        num_samples: samples of one epoch (after which documents repeat), or of a validation set.
        accept_changes: a Loader takes the state of a run on other data as well.
    """

    fingerprint: str
    identity: dict[str, Any]
    seq_len: int
    num_samples: int
    accept_changes: bool = False

    def at(self, index: int) -> PackedSample:
        """Sample `index` of the global order."""
        raise NotImplementedError

    def will_need(self, index: int) -> None:
        """Called some samples before `at(index)`, so that what is far away can be fetched meanwhile."""

    def bookmark(self, index: int) -> dict[str, Any]:
        """What a new process needs, beside `index`, to go on near it without starting over: JSON-able."""
        return {}

    def restore(self, bookmark: Mapping[str, Any]) -> None:
        """Take a `bookmark` of an earlier process."""


def row_at(index: int, num_samples: int, seed: int) -> int:
    """The row of a plan that stands at `index` of its order: every epoch is a permutation of its own."""
    epoch, position = divmod(index, num_samples)
    return int(permute(np.array([position]), num_samples, derive_key(seed, _SAMPLE_ORDER, epoch))[0])
