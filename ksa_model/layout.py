"""Where everything stands in a packed sequence: pure integers, no model, no device.

Legend: T text rows, k tokens a chunk, C = T/k chunks, m summaries a chunk, S = C*m summary rows, W window chunks.

Every attention pattern of this project has one shape: a query row sees one *contiguous* range of key rows, and both
ends of the range never move backwards from row to row. `ranges.KeyRanges` is that shape; kernels, block lists, FLOP
counts and the context-parallel exchange all derive from it. The dense statement of the same rule, from the definitions,
is in `ksa_model.reference`, and the tests hold the two against each other.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from ksa_model.config import ModelConfigError
from ksa_model.ranges import KeyRanges


@dataclass(frozen=True)
class SequenceLayout:
    """A packed sequence: documents that start on chunk boundaries, and a summary slot after every chunk.

    Chunks are counted over the whole pack; chunk `c` holds text rows `c*k .. c*k+k-1` and summary rows
    `c*m .. c*m+m-1`. `chunk_lengths[c]` is its number of real tokens (0 for a chunk of padding), `first_chunks[c]` the
    first chunk of the document it belongs to (itself for padding). Positions are counted from the document's start.

    Worked example, k=2, m=1, documents of 3 and 1 tokens in 8 rows, `x` padding:
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
    _ranges: dict = field(default_factory=dict, repr=False, compare=False)

    @property
    def num_chunks(self) -> int:
        return self.num_text // self.chunk_size

    @property
    def num_summary(self) -> int:
        return self.num_chunks * self.summary_tokens

    # -- the attention rule as key ranges ---------------------------------------------------------------------------

    def near_ranges(self, window_chunks: int) -> KeyRanges:
        """Text rows seen as text: from the start of `W` chunks back (same document) up to the row itself."""

        def compute() -> KeyRanges:
            chunk = np.arange(self.num_chunks)
            first = np.maximum(self.first_chunks, chunk - window_chunks) * self.chunk_size
            return self._causal_from(np.repeat(first, self.chunk_size))

        return self.cached(("near", window_chunks), compute)

    def far_ranges(self, window_chunks: int) -> KeyRanges:
        """Summary rows seen by a text row: every older chunk of the document, up to where the text window begins."""

        def compute() -> KeyRanges:
            chunk = np.arange(self.num_chunks)
            last = np.maximum(self.first_chunks, chunk - window_chunks) * self.summary_tokens
            start = np.repeat(self.first_chunks * self.summary_tokens, self.chunk_size)
            end = np.repeat(last, self.chunk_size)
            # Padding sees nothing. Its range is kept in step with its neighbours so that ranges stay ordered.
            growth = (self.chunk_size, self.summary_tokens)
            return KeyRanges(start=np.where(self.text_is_real, start, end), end=end, growth=growth)

        return self.cached(("far", window_chunks), compute)

    def full_ranges(self) -> KeyRanges:
        """All earlier text of the document and the row itself."""
        return self.cached("full", lambda: self._causal_from(self.document_starts, growth=(1, 1)))

    def sliding_ranges(self, window_tokens: int) -> KeyRanges:
        """The last `window_tokens` text rows of the document, the row itself included."""

        def compute() -> KeyRanges:
            row = np.arange(self.num_text)
            return self._causal_from(np.maximum(self.document_starts, row - window_tokens + 1))

        return self.cached(("sliding", window_tokens), compute)

    # Where a sample is spread over context ranks, text ranges fall into keys that are here and keys that have to come.

    def own(self, ranges: KeyRanges) -> KeyRanges:
        """Of ranges over text, what each row sees of its own context-parallel slice, in this rank's rows: here, all."""
        return ranges

    def before_own(self, ranges: KeyRanges) -> KeyRanges:
        """What each row sees before its own slice, in rows of the whole sample: here, nothing."""
        return self.cached(("before", id(ranges)), lambda: KeyRanges(ranges.start, ranges.start, growth=(1, 0)))

    def in_halo(self, ranges: KeyRanges, halo_rows: int) -> KeyRanges:
        """`before_own` in rows of the halo, [the last `halo_rows` rows before the first slice | before the second].

        Raises `ModelConfigError` where they are more than a slice has.
        """
        return self.before_own(ranges)

    def _causal_from(self, start: np.ndarray, growth: tuple[int, int] | None = None) -> KeyRanges:
        row = np.arange(self.num_text)
        real = self.text_is_real
        return KeyRanges(start=np.where(real, start, row), end=np.where(real, row + 1, row), growth=growth)

    def cached(self, key, compute):
        """What `compute()` gives, kept with the layout under `key`."""
        if key not in self._ranges:
            self._ranges[key] = compute()
        return self._ranges[key]

    # -- masks and counts -------------------------------------------------------------------------------------------

    @property
    def text_is_real(self) -> np.ndarray:
        """bool [T]: the row holds a token, not padding."""
        return self.cached(
            "real", lambda: (np.arange(self.chunk_size)[None, :] < self.chunk_lengths[:, None]).reshape(-1)
        )

    @property
    def document_starts(self) -> np.ndarray:
        """int64 [T]: first row of the document a row belongs to."""
        return self.cached("starts", lambda: np.repeat(self.first_chunks * self.chunk_size, self.chunk_size))

    @property
    def num_tokens(self) -> int:
        """Real tokens in the pack."""
        return int(self.chunk_lengths.sum())

    def visible_keys(self, mixer: str, window_chunks: int, window_tokens: int) -> int:
        """Query-key pairs of one text layer: what the real documents ask for, not what a kernel happens to touch. A
        gated delta net (`G`) looks at no keys."""
        if mixer == "G":
            return 0
        if mixer == "F":
            return self.full_ranges().visible_keys
        if mixer == "S":
            return self.sliding_ranges(window_tokens).visible_keys
        near = self.near_ranges(window_chunks).visible_keys
        return near + (self.far_ranges(window_chunks).visible_keys if mixer == "K" else 0)

    def summary_visible_keys(self) -> int:
        """Query-key pairs of the summary stream: each summary sees its chunk's text and the summaries up to itself."""
        m = self.summary_tokens
        return int(m * self.chunk_lengths.sum() + self.num_chunks * m * (m + 1) // 2)


class TextLayout(SequenceLayout):
    """A layout, whole or sharded, without its summary rows: what the same weights see as a full-attention model."""

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

    def own(self, ranges: KeyRanges) -> KeyRanges:
        return self._layout.own(ranges)

    def before_own(self, ranges: KeyRanges) -> KeyRanges:
        return self._layout.before_own(ranges)

    def in_halo(self, ranges: KeyRanges, halo_rows: int) -> KeyRanges:
        return self._layout.in_halo(ranges, halo_rows)


class ShardedLayout(SequenceLayout):
    """One context rank's share of a layout: slices `rank` and `2*size - 1 - rank` of `2*size` equal slices.

    It reads like a layout of the rank's own rows; only its key ranges point into the whole sample. `own`, `before_own`
    and `in_halo` say where text keys are found: here, in the sample gathered, or in what the neighbours sent.

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
            chunk_lengths=self._own(whole.chunk_lengths, self._slice_rows // k),
            first_chunks=self._own(whole.first_chunks, self._slice_rows // k),  # numbers of the whole sample
            text_positions=self._own(whole.text_positions, self._slice_rows),
            summary_positions=self._own(whole.summary_positions, self._slice_rows // k * m),
        )

    def _own(self, values: np.ndarray, per_slice: int) -> np.ndarray:
        """This rank's two slices of an array over the whole sample."""
        return np.concatenate([values[i * per_slice : (i + 1) * per_slice] for i in self._slices])

    def rows(self, values: np.ndarray) -> np.ndarray:
        """This rank's rows of an array over the sample's text rows."""
        return self._own(values, self._slice_rows)

    def near_ranges(self, window_chunks: int) -> KeyRanges:
        return self._in_whole(self._whole.near_ranges(window_chunks))

    def sliding_ranges(self, window_tokens: int) -> KeyRanges:
        return self._in_whole(self._whole.sliding_ranges(window_tokens))

    def far_ranges(self, window_chunks: int) -> KeyRanges:
        return self._in_whole(self._whole.far_ranges(window_chunks))

    def full_ranges(self) -> KeyRanges:
        return self._in_whole(self._whole.full_ranges())

    def _in_whole(self, ranges: KeyRanges) -> KeyRanges:
        return self.cached(
            id(ranges), lambda: KeyRanges(self.rows(ranges.start), self.rows(ranges.end), growth=ranges.growth)
        )

    def own(self, ranges: KeyRanges) -> KeyRanges:
        def compute() -> KeyRanges:
            start = np.maximum(ranges.start, self._slice_starts)
            shift = self._slice_starts - np.repeat([0, self._slice_rows], self._slice_rows)
            return KeyRanges(start - shift, np.maximum(ranges.end, start) - shift, growth=ranges.growth)

        return self.cached(("own", id(ranges)), compute)

    def before_own(self, ranges: KeyRanges) -> KeyRanges:
        def compute() -> KeyRanges:
            start, end = (np.minimum(x, self._slice_starts) for x in (ranges.start, ranges.end))
            return KeyRanges(start, end, growth=ranges.growth and (1, 0))

        return self.cached(("before", id(ranges)), compute)

    def in_halo(self, ranges: KeyRanges, halo_rows: int) -> KeyRanges:
        if halo_rows > self._slice_rows:
            raise ModelConfigError(
                f"a window of {halo_rows} rows is longer than a context-parallel slice of {self._slice_rows}"
            )

        def compute() -> KeyRanges:
            before = self.before_own(ranges)
            shift = self._slice_starts - np.repeat([halo_rows, 2 * halo_rows], self._slice_rows)
            return KeyRanges(before.start - shift, before.end - shift)

        return self.cached(("halo", id(ranges), halo_rows), compute)

    @property
    def _slice_starts(self) -> np.ndarray:
        """int64 [rows of this rank]: the row of the sample that a row's slice begins at."""
        starts = np.array(self._slices) * self._slice_rows
        return self.cached("slice starts", lambda: np.repeat(starts, self._slice_rows))


def check_context_parallel(num_text: int, chunk_size: int, halo_rows: int, size: int) -> None:
    """Raise `ModelConfigError` unless a sample of `num_text` rows divides into slices for `size` context ranks.

    `halo_rows` is the furthest that any near or sliding part looks back.
    """
    unit = 2 * size * chunk_size
    below = num_text // unit * unit
    if size > 1 and num_text % unit:
        raise ModelConfigError(
            f"seq_len={num_text} does not divide into 2 x parallel.context={size} slices of whole chunks of "
            f"{chunk_size}; the nearest that do are {max(unit, below)} and {below + unit}"
        )
    if size > 1 and num_text // (2 * size) < halo_rows:
        most = max(1, num_text // (2 * max(1, halo_rows)))
        raise ModelConfigError(
            f"parallel.context={size} cuts seq_len={num_text} into slices of {num_text // (2 * size)} rows, shorter "
            f"than the {halo_rows} rows a window looks back; use parallel.context={most} or less, or a longer seq_len"
        )


def build(
    doc_starts: np.ndarray, doc_lengths: np.ndarray, num_text: int, chunk_size: int, summary_tokens: int = 1
) -> SequenceLayout:
    """Lay out documents of `doc_lengths` tokens that start at rows `doc_starts` of a pack of `num_text` rows.

    Vectorised over documents: a pack of a million tokens takes milliseconds. Raises `ModelConfigError` when a document
    does not start on a chunk boundary, is empty, overlaps its successor or leaves the pack.
    """
    k, m = chunk_size, summary_tokens
    starts, lengths = np.asarray(doc_starts, np.int64), np.asarray(doc_lengths, np.int64)
    if num_text % k:
        raise ModelConfigError(f"a pack of {num_text} rows is not a multiple of chunk_size={k}")
    _check_documents(starts, lengths, num_text, k)
    num_chunks = num_text // k
    chunk = np.arange(num_chunks)
    if len(starts):
        # The document whose start is the last at or before each chunk; padding behind a document is told by length 0.
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
    # Summary a of a chunk at position p with l tokens stands at p + ((a+1)*l)//m - 1, never below p.
    chunk_position = ((chunk - first_chunks) * k)[:, None]
    offset = (np.arange(1, m + 1)[None, :] * chunk_lengths[:, None]) // m - 1
    summary_positions = (chunk_position + np.maximum(offset, 0)).reshape(-1)
    return SequenceLayout(num_text, k, m, chunk_lengths, first_chunks, text_positions, summary_positions)


def _check_documents(starts: np.ndarray, lengths: np.ndarray, num_text: int, chunk_size: int) -> None:
    if starts.shape != lengths.shape or starts.ndim != 1:
        raise ModelConfigError(f"doc_starts {starts.shape} and doc_lengths {lengths.shape} must be two equal rows")
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
