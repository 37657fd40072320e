"""The sequence layout: where documents, chunks and summaries stand in a packed sequence. Pure integers, no device.

Legend: T text rows, k tokens per chunk, C = T/k chunks, m summaries per chunk, S = C*m summary rows, W window chunks.

Every attention pattern of this project has the same shape: a query row attends to one *contiguous* range of key rows,
and neither end of the range moves backwards from row to row. `KeyRanges` is that shape. Kernels, block lists, FLOP
counts and the context-parallel exchange all derive from it. `ksa_model.ops.attention.reference` states the same rule as
dense masks, independently, and the tests compare the two.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ksa_model.config import ModelConfigError, check_context_parallel
from ksa_model.layout.ranges import KeyRanges


@dataclass(frozen=True)
class SequenceLayout:
    """A packed sequence: documents that start on chunk boundaries, and `m` summaries for every chunk.

    Chunks are numbered over the whole pack: chunk `c` holds text rows `c*k .. c*k+k-1` and summary rows
    `c*m .. c*m+m-1`. `chunk_lengths[c]` is its number of real tokens (0 for a chunk of padding). `first_chunks[c]` is
    the first chunk of its document (`c` itself for padding). Positions are counted from the start of the document.
    All arrays are int64.

    Worked example, k=2, m=1, documents of 3 and 1 tokens in 8 rows, `x` is padding:
        rows            a0 a1 | a2 x | b0 x | x  x
        chunk_lengths       2 |    1 |    1 |    0
        first_chunks        0 |    0 |    2 |    3
        text_positions   0  1 |  2 3 |  0 1 | 0  1
        summary_positions   1 |    2 |    0 |    0
    """

    num_text: int
    chunk_size: int
    summary_tokens: int
    chunk_lengths: np.ndarray
    first_chunks: np.ndarray
    text_positions: np.ndarray
    summary_positions: np.ndarray
    _cache: dict = field(default_factory=dict, repr=False, compare=False)

    @property
    def num_chunks(self) -> int:
        return self.num_text // self.chunk_size

    @property
    def num_summary(self) -> int:
        return self.num_chunks * self.summary_tokens

    # -- the attention rule as key ranges ---------------------------------------------------------------------------

    def near_ranges(self, window_chunks: int) -> KeyRanges:
        """The near part: text keys from the start of the chunk `W` chunks back (same document) up to the row itself."""

        def compute() -> KeyRanges:
            chunk = np.arange(self.num_chunks)
            first = np.maximum(self.first_chunks, chunk - window_chunks) * self.chunk_size
            return self._causal_from(np.repeat(first, self.chunk_size))

        return self.cached(("near", window_chunks), compute)

    def far_ranges(self, window_chunks: int) -> KeyRanges:
        """The far part: the summary keys, or with one for each chunk the pooled keys, of every chunk of the document
        that is older than the near part."""

        def compute() -> KeyRanges:
            chunk = np.arange(self.num_chunks)
            last = np.maximum(self.first_chunks, chunk - window_chunks) * self.summary_tokens
            start = np.repeat(self.first_chunks * self.summary_tokens, self.chunk_size)
            end = np.repeat(last, self.chunk_size)
            # Padding attends to nothing. Its empty range stands at the end of its neighbours' ranges, which keeps them
            # ordered.
            growth = (self.chunk_size, self.summary_tokens)
            return KeyRanges(start=np.where(self.text_is_real, start, end), end=end, growth=growth)

        return self.cached(("far", window_chunks), compute)

    def full_ranges(self) -> KeyRanges:
        """Full attention: all earlier text keys of the document and the row itself."""
        return self.cached("full", lambda: self._causal_from(self.document_starts, growth=(1, 1)))

    def sliding_ranges(self, window_tokens: int) -> KeyRanges:
        """Sliding window: the last `window_tokens` text keys of the document, including the row itself."""

        def compute() -> KeyRanges:
            row = np.arange(self.num_text)
            return self._causal_from(np.maximum(self.document_starts, row - window_tokens + 1))

        return self.cached(("sliding", window_tokens), compute)

    # Context parallelism splits text keys into those that this rank holds and those that other ranks send.

    def local_keys(self, ranges: KeyRanges) -> KeyRanges:
        """The part of text `ranges` in the row's own slice, numbered in this rank's rows; here all of it."""
        return ranges

    def remote_prefix(self, ranges: KeyRanges) -> KeyRanges:
        """The part of text `ranges` before the row's own slice, numbered in rows of the whole sample; here nothing."""
        return self.cached(("prefix", ranges), lambda: KeyRanges(ranges.start, ranges.start, growth=(1, 0)))

    def halo_keys(self, ranges: KeyRanges, halo_rows: int) -> KeyRanges:
        """`remote_prefix` numbered in rows of the halo: `halo_rows` rows before the first slice, then as many before
        the second. Raises `ModelConfigError` if a slice is shorter than the halo."""
        return self.remote_prefix(ranges)

    def _causal_from(self, start: np.ndarray, growth: tuple[int, int] | None = None) -> KeyRanges:
        row = np.arange(self.num_text)
        real = self.text_is_real
        return KeyRanges(start=np.where(real, start, row), end=np.where(real, row + 1, row), growth=growth)

    def cached(self, key: Hashable, compute: Callable[[], Any]) -> Any:
        """Return `compute()`, computed once and stored under `key`."""
        if key not in self._cache:
            self._cache[key] = compute()
        return self._cache[key]

    # -- masks and counts -------------------------------------------------------------------------------------------

    @property
    def text_is_real(self) -> np.ndarray:
        """bool [T]: the row holds a token, not padding."""
        return self.cached(
            "real", lambda: (np.arange(self.chunk_size)[None, :] < self.chunk_lengths[:, None]).reshape(-1)
        )

    @property
    def document_starts(self) -> np.ndarray:
        """int64 [T]: first row of the document that the row belongs to."""
        return self.cached("starts", lambda: np.repeat(self.first_chunks * self.chunk_size, self.chunk_size))

    @property
    def num_tokens(self) -> int:
        """Real tokens in the pack."""
        return int(self.chunk_lengths.sum())

    def visible_keys(self, mixer: str, window_chunks: int, window_tokens: int) -> int:
        """Query-key pairs of the text rows of one layer. Counts the pairs that the documents define, not the pairs
        that a kernel computes. A gated delta net (`G`) has none."""
        if mixer == "G":
            return 0
        if mixer == "F":
            return self.full_ranges().visible_keys
        if mixer == "S":
            return self.sliding_ranges(window_tokens).visible_keys
        near = self.near_ranges(window_chunks).visible_keys
        return near + (self.far_ranges(window_chunks).visible_keys if mixer in "KHP" else 0)

    def summary_visible_keys(self) -> int:
        """Query-key pairs of the summary rows: each attends to the text of its chunk and to the chunk's summaries up
        to itself."""
        m = self.summary_tokens
        return int(m * self.chunk_lengths.sum() + self.num_chunks * m * (m + 1) // 2)


class TextLayout(SequenceLayout):
    """A whole or sharded layout without its summary rows, for running the same weights as a full-attention model."""

    def __init__(self, layout: SequenceLayout):
        self._layout = layout
        super().__init__(
            num_text=layout.num_text,
            chunk_size=layout.chunk_size,
            summary_tokens=layout.summary_tokens,
            chunk_lengths=layout.chunk_lengths,
            first_chunks=layout.first_chunks,
            text_positions=layout.text_positions,
            summary_positions=layout.summary_positions[:0],
        )

    @property
    def num_summary(self) -> int:
        return 0

    def full_ranges(self) -> KeyRanges:
        return self._layout.full_ranges()

    def local_keys(self, ranges: KeyRanges) -> KeyRanges:
        return self._layout.local_keys(ranges)

    def remote_prefix(self, ranges: KeyRanges) -> KeyRanges:
        return self._layout.remote_prefix(ranges)

    def halo_keys(self, ranges: KeyRanges, halo_rows: int) -> KeyRanges:
        return self._layout.halo_keys(ranges, halo_rows)


class ShardedLayout(SequenceLayout):
    """The shard of one context rank: slices `rank` and `2*size - 1 - rank` of the sample's `2*size` equal slices.

    Its rows are the rank's own rows, but its key ranges are numbered in rows of the whole sample. `local_keys`,
    `remote_prefix` and `halo_keys` translate them to where the keys are: on this rank, in the gathered sample, or in
    the halo that the neighbours sent.

    Worked example, T = 16, k = 2, size = 2: slices of 4 rows; rank 0 holds rows 0-3 and 12-15, rank 1 rows 4-11.
    """

    def __init__(self, whole: SequenceLayout, rank: int, size: int):
        check_context_parallel(whole.num_text, whole.chunk_size, 0, size)
        self._whole = whole
        self._slices = (rank, 2 * size - 1 - rank)
        self._slice_rows = whole.num_text // (2 * size)
        k, m = whole.chunk_size, whole.summary_tokens
        super().__init__(
            num_text=2 * self._slice_rows,
            chunk_size=k,
            summary_tokens=m,
            chunk_lengths=self._slices_of(whole.chunk_lengths, self._slice_rows // k),
            first_chunks=self._slices_of(whole.first_chunks, self._slice_rows // k),  # numbered over the whole sample
            text_positions=self._slices_of(whole.text_positions, self._slice_rows),
            summary_positions=self._slices_of(whole.summary_positions, self._slice_rows // k * m),
        )

    def _slices_of(self, values: np.ndarray, per_slice: int) -> np.ndarray:
        """This rank's two slices of an array over the whole sample."""
        return np.concatenate([values[i * per_slice : (i + 1) * per_slice] for i in self._slices])

    def rows(self, values: np.ndarray) -> np.ndarray:
        """This rank's rows of an array [T] over the text rows of the sample."""
        return self._slices_of(values, self._slice_rows)

    def near_ranges(self, window_chunks: int) -> KeyRanges:
        return self._for_own_rows(self._whole.near_ranges(window_chunks))

    def sliding_ranges(self, window_tokens: int) -> KeyRanges:
        return self._for_own_rows(self._whole.sliding_ranges(window_tokens))

    def far_ranges(self, window_chunks: int) -> KeyRanges:
        return self._for_own_rows(self._whole.far_ranges(window_chunks))

    def full_ranges(self) -> KeyRanges:
        return self._for_own_rows(self._whole.full_ranges())

    def _for_own_rows(self, ranges: KeyRanges) -> KeyRanges:
        """Ranges of all rows -> ranges of this rank's rows."""
        return self.cached(
            ranges, lambda: KeyRanges(self.rows(ranges.start), self.rows(ranges.end), growth=ranges.growth)
        )

    def local_keys(self, ranges: KeyRanges) -> KeyRanges:
        def compute() -> KeyRanges:
            start = np.maximum(ranges.start, self._slice_starts)
            shift = self._slice_starts - np.repeat([0, self._slice_rows], self._slice_rows)
            return KeyRanges(start - shift, np.maximum(ranges.end, start) - shift, growth=ranges.growth)

        return self.cached(("local", ranges), compute)

    def remote_prefix(self, ranges: KeyRanges) -> KeyRanges:
        def compute() -> KeyRanges:
            start, end = (np.minimum(x, self._slice_starts) for x in (ranges.start, ranges.end))
            return KeyRanges(start, end, growth=ranges.growth and (1, 0))

        return self.cached(("prefix", ranges), compute)

    def halo_keys(self, ranges: KeyRanges, halo_rows: int) -> KeyRanges:
        if halo_rows > self._slice_rows:
            raise ModelConfigError(
                f"a window of {halo_rows} rows is longer than a context-parallel slice of {self._slice_rows}"
            )

        def compute() -> KeyRanges:
            prefix = self.remote_prefix(ranges)
            shift = self._slice_starts - np.repeat([halo_rows, 2 * halo_rows], self._slice_rows)
            return KeyRanges(prefix.start - shift, prefix.end - shift)

        return self.cached(("halo", ranges, halo_rows), compute)

    @property
    def _slice_starts(self) -> np.ndarray:
        """int64 [this rank's rows]: the row of the sample where the slice of each row begins."""
        starts = np.array(self._slices) * self._slice_rows
        return self.cached("slice starts", lambda: np.repeat(starts, self._slice_rows))


def build_layout(
    doc_starts: np.ndarray, doc_lengths: np.ndarray, num_text: int, chunk_size: int, summary_tokens: int = 1
) -> SequenceLayout:
    """The layout of documents of `doc_lengths` tokens that start at rows `doc_starts` of a pack of `num_text` rows.

    Vectorised over documents: a pack of a million tokens takes milliseconds. Raises `ModelConfigError` if a document
    does not start on a chunk boundary, is empty, overlaps the next one or ends beyond the pack.
    """
    k, m = chunk_size, summary_tokens
    starts, lengths = np.asarray(doc_starts, np.int64), np.asarray(doc_lengths, np.int64)
    if num_text % k:
        raise ModelConfigError(f"a pack of {num_text} rows is not a multiple of chunk_size={k}")
    _check_documents(starts, lengths, num_text, k)
    num_chunks = num_text // k
    chunk = np.arange(num_chunks)
    if len(starts):
        # Each chunk's document is the last that starts at or before it. Padding after a document has length 0.
        doc = np.searchsorted(starts // k, chunk, side="right") - 1
        inside = doc >= 0
        doc = np.maximum(doc, 0)
        left = starts[doc] + lengths[doc] - chunk * k
        chunk_lengths = np.where(inside, np.clip(left, 0, k), 0)
    else:
        doc = np.zeros(num_chunks, np.int64)
        chunk_lengths = np.zeros(num_chunks, np.int64)
    first_chunks = np.where(chunk_lengths > 0, starts[doc] // k if len(starts) else chunk, chunk)
    text_positions = np.arange(num_text) - np.repeat(first_chunks * k, k)
    # Summary a of a chunk of l tokens at position p has position max(p, p + ((a+1)*l)//m - 1).
    chunk_position = ((chunk - first_chunks) * k)[:, None]
    offset = (np.arange(1, m + 1)[None, :] * chunk_lengths[:, None]) // m - 1
    summary_positions = (chunk_position + np.maximum(offset, 0)).reshape(-1)
    return SequenceLayout(num_text, k, m, chunk_lengths, first_chunks, text_positions, summary_positions)


def _check_documents(starts: np.ndarray, lengths: np.ndarray, num_text: int, chunk_size: int) -> None:
    if starts.shape != lengths.shape or starts.ndim != 1:
        raise ModelConfigError(
            f"doc_starts {starts.shape} and doc_lengths {lengths.shape} must be one-dimensional and of equal length"
        )
    for what, bad in (
        (f"does not start on a multiple of chunk_size={chunk_size}", starts % chunk_size != 0),
        ("is empty", lengths < 1),
        (f"begins before the pack of {num_text} rows", starts < 0),
        (f"ends beyond the pack of {num_text} rows", starts + lengths > num_text),
        (
            "begins before its predecessor's last chunk ends",
            np.append(False, starts[1:] < -(-(starts + lengths)[:-1] // chunk_size) * chunk_size),
        ),
    ):
        if bad.any():
            i = int(np.flatnonzero(bad)[0])
            raise ModelConfigError(f"document {i} (start {starts[i]}, length {lengths[i]}) {what}")
