"""Packing: which documents go into which sample. Computed once, stored and memory-mapped.

Shapes: S samples, G segments (a document, or a piece of one, in a sample), T = seq_len, k = alignment.

Rules:
- A document that fits in a sample is never cut. A longer one is cut every T tokens; its pieces after the first are
  continuations.
- Every segment starts at a multiple of k in its sample. Gaps between segments are padding.
- A segment of one token without a next token to predict is left out: a one-token document, or the last token of a
  document of n*T + 1 tokens (which is the label of the token before it, so it is still predicted).
- Samples are filled best fit decreasing: the longest segments first, each into the fullest sample with enough room.

Worked example, T=8, k=2, lengths [3, 20, 8, 4]: in units of k the pieces are 2, 4+4+2, 4 and 2 units, T is 4 units.
Document 1 fills two samples and leaves a tail of 4 tokens; document 2 fills one; 0, 1's tail and 3 take 2 units each:
    sample 0: doc 1 [0:8]      sample 1: doc 1 [8:16], continues     sample 2: doc 2 [0:8]
    sample 3: doc 0 [0:3] at 0, doc 1 [16:20] at 4, continues        sample 4: doc 3 [0:4] at 0
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.errors import DataError
from data_pipeline.packing.order import derive_key, mix64, permute
from data_pipeline.packing.samples import IGNORE_INDEX, PackedSample, Samples, index_in_plan
from data_pipeline.store.files import build_once, fingerprint_of, read_json, write_array, write_json
from data_pipeline.store.manifest import shard_hashes
from data_pipeline.store.mapped import MappedArray
from data_pipeline.store.shards import ShardSet

CONTINUATION = 1
"""Segment flag: an earlier sample holds the tokens before this piece."""
GOES_ON = 2
"""Segment flag: the document has a token after this piece, which is the label of the piece's last token."""

SEGMENT = np.dtype([("doc", "<u8"), ("offset", "<u8"), ("start", "<u4"), ("length", "<u4"), ("flags", "u1")])
"""A segment: tokens `offset : offset + length` of document `doc`, stored from `start` on in the sample."""

_ALGORITHM = 1  # increase it when the same input gives another plan
_DOCUMENT_ORDER, _HASH_RANGE = 1, 3  # the purposes of random keys
_PLAN = "plan.json"


@dataclass(frozen=True)
class Selection:
    """The documents of a corpus that are packed.

    Attributes:
        min_tokens, max_tokens: bounds of the length, including the end token; None: no upper bound.
        hash_range: [low, high) inside [0, 1); a document is packed if the hash of its number is in this range.
    """

    min_tokens: int = 0
    max_tokens: int | None = None
    hash_range: tuple[float, float] = (0.0, 1.0)

    def apply(self, lengths: np.ndarray) -> np.ndarray:
        """`lengths` int64 [num_documents] with 0 for the documents that are not selected."""
        chosen = lengths >= self.min_tokens
        if self.max_tokens is not None:
            chosen &= lengths <= self.max_tokens
        if self.hash_range != (0.0, 1.0):
            key = np.uint64(derive_key(_HASH_RANGE))
            hashes = mix64(np.arange(lengths.size, dtype=np.uint64) ^ key) / 2.0**64
            chosen &= (hashes >= self.hash_range[0]) & (hashes < self.hash_range[1])
        return np.where(chosen, lengths, 0)


@dataclass(frozen=True, eq=False)
class PackedSamples:
    """The result of `pack`: sample s has the segments `segments[row_ptr[s] : row_ptr[s + 1]]`, ascending by start.

    Attributes:
        row_ptr: uint64 [S + 1].
        segments: SEGMENT [G].
    """

    row_ptr: np.ndarray
    segments: np.ndarray


def pack(lengths: np.ndarray, seq_len: int, alignment: int, order: np.ndarray | None = None) -> PackedSamples:
    """Pack documents into samples by the rules in this module's docstring.

    Args:
        lengths: integers [num_documents], tokens per document.
        seq_len: T, a multiple of `alignment`.
        alignment: k.
        order: int64 [num_documents], a permutation; equally long documents are placed in this order. None: by number.

    Raises:
        DataError: `seq_len` is not a multiple of `alignment`, or one of them is out of range.
    """
    if alignment < 1 or seq_len < 2 or seq_len >= 2**32 or seq_len % alignment:
        raise DataError(
            f"seq_len={seq_len} must be a multiple of alignment={alignment}, at least 2 and below 2**32; the nearest "
            f"multiple is {max(round(seq_len / max(alignment, 1)), 1) * max(alignment, 1)}"
        )
    lengths = np.asarray(lengths, dtype=np.int64)
    docs = np.arange(lengths.size, dtype=np.int64) if order is None else np.asarray(order, dtype=np.int64)
    docs = docs[lengths[docs] > 1]
    length = lengths[docs]

    num_full, tail = length // seq_len, length % seq_len
    full_doc = np.repeat(docs, num_full)
    first_of_doc = np.repeat(np.cumsum(num_full) - num_full, num_full)
    full_piece = np.arange(full_doc.size, dtype=np.int64) - first_of_doc
    has_tail = tail > np.where(num_full > 0, 1, 0)
    tail_doc, tail_length, tail_offset = docs[has_tail], tail[has_tail], (num_full * seq_len)[has_tail]
    tail_row, tail_start = _best_fit_decreasing(-(-tail_length // alignment), seq_len // alignment)

    segments = np.zeros(full_doc.size + tail_doc.size, dtype=SEGMENT)
    segments["doc"] = np.concatenate([full_doc, tail_doc])
    segments["offset"] = np.concatenate([full_piece * seq_len, tail_offset])
    segments["start"] = np.concatenate([np.zeros_like(full_doc), tail_start * alignment])
    segments["length"] = np.concatenate([np.full_like(full_doc, seq_len), tail_length])
    goes_on = (full_piece + 1) * seq_len < lengths[full_doc]
    full_flags = CONTINUATION * (full_piece > 0) | GOES_ON * goes_on
    segments["flags"] = np.concatenate([full_flags, CONTINUATION * (tail_offset > 0)])
    row = np.concatenate([np.arange(full_doc.size, dtype=np.int64), full_doc.size + tail_row])
    num_rows = int(row.max()) + 1 if row.size else 0
    row_ptr = np.zeros(num_rows + 1, dtype=np.uint64)
    row_ptr[1:] = np.cumsum(np.bincount(row, minlength=num_rows))
    return PackedSamples(row_ptr, segments[np.lexsort((segments["start"], row))])


def _best_fit_decreasing(sizes: np.ndarray, capacity: int) -> tuple[np.ndarray, np.ndarray]:
    """Exact best fit decreasing: the bin of each item and its start in the bin, both int64 [num_items].

    Equal sizes are placed together. Best fit puts an item into the fullest bin with room, and the next item of that
    size into the same bin while it fits, because that bin is now even fuller. So each of the m bins with the least
    sufficient room c takes c // size items, and one step places up to m * (c // size) items.
    """
    by_size = np.argsort(-sizes, kind="stable")
    bin_of, start_of = np.empty(sizes.size, dtype=np.int64), np.empty(sizes.size, dtype=np.int64)
    ordered = sizes[by_size]
    edges = np.concatenate([[0], np.flatnonzero(np.diff(ordered)) + 1, [ordered.size]]).tolist()
    bins_with: dict[int, list[np.ndarray]] = {}  # room left -> bins
    rooms: list[int] = []  # the keys of bins_with, ascending
    num_bins = 0

    def take(room: int, wanted: int) -> np.ndarray:
        # Up to `wanted` bins with this room, in time proportional to their number.
        waiting, parts = bins_with[room], []
        while waiting and wanted:
            bins = waiting.pop()
            parts.append(bins[:wanted])
            if bins.size > wanted:
                waiting.append(bins[wanted:])
            wanted -= parts[-1].size
        if not waiting:
            del bins_with[room], rooms[bisect.bisect_left(rooms, room)]
        return np.concatenate(parts)

    def put_back(bins: np.ndarray, room: int) -> None:
        if bins.size and room:
            if room not in bins_with:
                bisect.insort(rooms, room)
                bins_with[room] = []
            bins_with[room].append(bins)

    for begin, end in pairwise(edges):
        size = int(ordered[begin]) if end > begin else 0
        while begin < end:
            at = bisect.bisect_left(rooms, size)
            room = rooms[at] if at < len(rooms) else capacity
            per_bin = room // size
            wanted = -(-(end - begin) // per_bin)
            if at < len(rooms):
                bins = take(room, wanted)
            else:
                bins = np.arange(num_bins, num_bins + wanted, dtype=np.int64)
                num_bins += wanted
            count = min(end - begin, per_bin * bins.size)
            slot = np.arange(count, dtype=np.int64)
            items = by_size[begin : begin + count]
            bin_of[items] = bins[slot // per_bin]
            start_of[items] = capacity - room + slot % per_bin * size
            whole, rest = divmod(count, per_bin)
            put_back(bins[:whole], room - per_bin * size)
            put_back(bins[whole:], room - rest * size)
            begin += count
    return bin_of, start_of


class Plan(Samples):
    """The stored packing of a list of shards. `sample(i)` reads one sample from the memory-mapped shards.

    As `Samples`, it gives every sample once per epoch, in a new order each epoch.

    Attributes:
        alignment: k.
        seed: shuffled the documents before packing; shuffles the samples.
        statistics: counts of documents and tokens, `fill` (the share of T that is not padding), and `tokens_beyond`
            (the share of tokens in documents longer than a number of tokens).
    """

    def __init__(self, directory: Path, shards: ShardSet) -> None:
        content = read_json(directory / _PLAN)
        self.fingerprint: str = content["fingerprint"]
        self.seq_len: int = content["seq_len"]
        self.alignment: int = content["alignment"]
        self.seed: int = content["seed"]
        self.statistics: dict[str, Any] = content["statistics"]
        self.identity = {
            "corpus": fingerprint_of([[bin_hash, idx_hash] for _, bin_hash, idx_hash in content["shards"]]),
            "tokenizer": fingerprint_of(sorted({tokenizer for tokenizer, _, _ in content["shards"]})),
            **{key: content.get(key) for key in ("seq_len", "alignment", "seed", "selection", "algorithm")},
        }
        self._shards = shards
        try:
            self._row_ptr = MappedArray.open(directory / "row_ptr.npy")
            self._segments = MappedArray.open(directory / "segments.npy")
        except (OSError, ValueError, EOFError) as error:  # EOFError: an empty file
            raise DataError(f"{directory}: the plan cannot be read ({error}); delete it to build it again") from error
        if self._segments.dtype != SEGMENT or int(self._row_ptr.values[-1]) != self._segments.size:
            raise DataError(
                f"{directory}: row_ptr.npy and segments.npy do not belong together; delete it to build it again"
            )
        self.num_samples = self._row_ptr.size - 1

    def at(self, index: int) -> PackedSample:
        """Sample `index` of the global order, which is endless: epoch after epoch."""
        return replace(self.sample(index_in_plan(index, self.num_samples, self.seed)), index=index)

    def prefetch(self, index: int) -> None:
        """Start to fetch what `at(index)` will read, if it is remote."""
        for doc, offset, _, length, flags in self.segments(index_in_plan(index, self.num_samples, self.seed)).tolist():
            self._shards.prefetch(doc, offset, length + (flags & GOES_ON > 0))

    def segments(self, index: int) -> np.ndarray:
        """The segments of sample `index` of the plan, SEGMENT [num_docs]."""
        if not 0 <= index < self.num_samples:
            raise IndexError(f"sample {index} of a plan with {self.num_samples} samples")
        first, end = self._row_ptr.values[index : index + 2].tolist()
        return np.array(self._segments.values[first:end])

    def sample(self, index: int) -> PackedSample:
        """Sample `index` of the plan, in `range(num_samples)`."""
        segments = self.segments(index)
        tokens = np.zeros(self.seq_len, dtype=np.int64)
        labels = np.full(self.seq_len, IGNORE_INDEX, dtype=np.int64)
        for doc, offset, start, length, flags in segments.tolist():
            has_next = 1 if flags & GOES_ON else 0
            text = self._shards.read(doc, offset, length + has_next)
            tokens[start : start + length] = text[:length]
            labels[start : start + length - 1 + has_next] = text[1:]
        return PackedSample(
            tokens=tokens,
            labels=labels,
            doc_starts=segments["start"].astype(np.int64),
            doc_lengths=segments["length"].astype(np.int64),
            continuation=(segments["flags"] & CONTINUATION).astype(bool),
            index=index,
        )


def build_plan(
    prepared_shards: Sequence[str | Path],
    seq_len: int,
    alignment: int,
    seed: int,
    cache_dir: str | Path,
    *,
    selection: Selection | None = None,
    hashes: Sequence[Sequence[str]] | None = None,
    shards: ShardSet | None = None,
) -> Plan:
    """Pack prepared shards into samples, or find the plan in the cache. Several processes may call this at once.

    Args:
        prepared_shards: shard prefixes of `PreparedData.train` or `.validation`.
        seq_len: T, tokens per sample, a multiple of `alignment`.
        alignment: k; every document starts at a multiple of it in its sample.
        seed: shuffles the documents before packing, and the samples.
        cache_dir: the plan is stored in a directory below it.
        selection: the documents to pack; None: all.
        hashes: sha256 of `[tokenizer, .bin, .idx]` of each shard; None: read from the manifests of the shards.
        shards: the opened shards; None: they are opened here.

    Raises:
        DataError: sizes that do not fit, shards that are missing or damaged, or no document of at least two tokens.
    """
    selection = selection or Selection()
    request = {
        "algorithm": _ALGORITHM,
        "shards": shard_hashes(prepared_shards) if hashes is None else [list(row) for row in hashes],
        "seq_len": seq_len,
        "alignment": alignment,
        "seed": seed,
    }
    if selection != Selection():
        request["selection"] = [selection.min_tokens, selection.max_tokens, list(selection.hash_range)]
    fingerprint = fingerprint_of(request)
    documents = ShardSet(prepared_shards) if shards is None else shards

    def build(directory: Path) -> None:
        lengths = selection.apply(documents.lengths)
        order = np.arange(lengths.size, dtype=np.int64)
        if lengths.size:
            order = permute(order, lengths.size, derive_key(seed, _DOCUMENT_ORDER))
        packed = pack(lengths, seq_len, alignment, order)
        num_samples = packed.row_ptr.size - 1
        if not num_samples:
            limits = f" of {selection.min_tokens} to {selection.max_tokens or 'any'} tokens"
            raise DataError(
                f"no document of at least 2 tokens{'' if selection == Selection() else limits} in "
                f"{len(prepared_shards)} shard(s): nothing to pack; widen min_tokens and max_tokens, or add documents"
            )
        write_array(directory / "row_ptr.npy", packed.row_ptr)
        write_array(directory / "segments.npy", packed.segments)
        num_tokens = int(packed.segments["length"].sum())
        statistics = {
            "documents": int((lengths > 1).sum()),
            "documents_split": int((lengths > seq_len + 1).sum()),
            "documents_left_out": int((lengths <= 1).sum()),
            "tokens": num_tokens,
            "samples": num_samples,
            "fill": num_tokens / (num_samples * seq_len),
            "tokens_beyond": tokens_beyond(lengths),
        }
        write_json(directory / _PLAN, {"fingerprint": fingerprint, **request, "statistics": statistics})

    directory = Path(cache_dir) / f"plan-{fingerprint[:16]}"
    build_once(directory, _PLAN, build)
    return Plan(directory, documents)


def tokens_beyond(lengths: np.ndarray) -> dict[str, float]:
    """The share of all tokens that are in documents longer than 8k, 32k, 128k and 1M tokens, by that limit."""
    total = max(int(lengths.sum()), 1)
    return {str(limit): int(lengths[lengths > limit].sum()) / total for limit in (8192, 32768, 131072, 1048576)}
