"""Which keys a row sees, as contiguous ranges, and how kernels cut them up: pure integers, no device.

Legend: T query rows, N key rows. A kernel works on tiles: consecutive rows, or consecutive keys.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import torch


@dataclass(frozen=True)
class KeyRanges:
    """Query row `i` sees key rows `start[i] .. end[i]-1`; an empty range (`start == end`) sees nothing.

    `start` and `end` are int64 arrays, non-decreasing, so that the keys of a block of rows are one slice too (what
    `causal_split` leaves over may step back where rows were taken out, and is cut into tiles all the same).
    `growth`: (rows, keys) where every so many rows of a document see so many keys more and none less, as in causal
    attention; (1, 0) where rows see the same; None for windows.
    """

    start: np.ndarray
    end: np.ndarray
    growth: tuple[int, int] | None = None
    _cache: dict = field(default_factory=dict, repr=False, compare=False)

    @property
    def visible_keys(self) -> int:
        """Query-key pairs that exist, for FLOP counts."""
        return self.cached("visible", lambda: int((self.end - self.start).sum()))

    def blocks(self, rows_per_block: int) -> list[Block]:
        """The rows cut into blocks, each with the slice of keys it needs; blocks without keys are left out."""

        def compute() -> list[Block]:
            blocks = (self._block(first, rows_per_block) for first in range(0, len(self.start), rows_per_block))
            return [block for block in blocks if block is not None]

        return self.cached(rows_per_block, compute)

    def _block(self, first: int, rows_per_block: int) -> Block | None:
        start, end = self.start[first : first + rows_per_block], self.end[first : first + rows_per_block]
        seeing = np.flatnonzero(end > start)
        if not len(seeing):
            return None
        key_start, key_end = int(start[seeing[0]]), int(end[seeing[-1]])
        return Block(
            rows=slice(first, first + len(start)),
            keys=slice(key_start, key_end),
            full=bool((start <= key_start).all() and (end >= key_end).all()),
        )

    def tensors(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """`start` and `end` as int32 tensors on `device`, copied once."""
        return self.cached(("tensors", device), lambda: (to_device(self.start, device), to_device(self.end, device)))

    # -- tiles ------------------------------------------------------------------------------------------------------

    def row_tiles(self, rows_per_tile: int) -> np.ndarray:
        """int64 [tiles, 4]: keys [lo, hi) that some row of a tile sees, and keys [full_lo, full_hi) that all rows see.

        A tile without keys has lo = hi = 0; one where no key is seen by all has full_lo >= full_hi.
        """

        def compute() -> np.ndarray:
            empty = self.end <= self.start
            far = np.iinfo(np.int64).max
            lo = _by_tile(np.minimum, np.where(empty, far, self.start), rows_per_tile)
            hi = _by_tile(np.maximum, np.where(empty, 0, self.end), rows_per_tile)
            full_lo = _by_tile(np.maximum, np.where(empty, far, self.start), rows_per_tile)
            full_hi = _by_tile(np.minimum, np.where(empty, 0, self.end), rows_per_tile)
            return np.stack([np.minimum(lo, hi), hi, np.minimum(full_lo, hi), full_hi], axis=1)

        return self.cached(("row tiles", rows_per_tile), compute)

    def key_tiles(self, num_keys: int, keys_per_tile: int) -> np.ndarray:
        """int64 [tiles, 4]: rows [lo, hi) between which lie all rows that see some key of a tile, and rows
        [full_lo, full_hi) that see all of its keys."""

        def compute() -> np.ndarray:
            first, last, whole = self._rows_by_key(num_keys)
            unseen = last <= first
            far = np.iinfo(np.int64).max
            lo = _by_tile(np.minimum, np.where(unseen, far, first), keys_per_tile)
            hi = _by_tile(np.maximum, np.where(unseen, 0, last), keys_per_tile)
            full_lo = _by_tile(np.maximum, np.where(unseen | ~whole, far, first), keys_per_tile)
            full_hi = _by_tile(np.minimum, np.where(unseen | ~whole, 0, last), keys_per_tile)
            return np.stack([np.minimum(lo, hi), hi, np.minimum(full_lo, hi), full_hi], axis=1)

        return self.cached(("key tiles", num_keys, keys_per_tile), compute)

    def _rows_by_key(self, num_keys: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """For every key: first row that sees it, one behind the last, and whether all rows in between see it too."""
        key = np.arange(num_keys)
        first, last = np.full(num_keys, len(self.start)), np.zeros(num_keys, np.int64)
        count = np.zeros(num_keys, np.int64)
        seeing = np.flatnonzero(self.end > self.start)
        start, end = self.start[seeing], self.end[seeing]
        # Ranges that never step back can be searched; where they do, another stretch of rows begins.
        breaks = np.flatnonzero((np.diff(start) < 0) | (np.diff(end) < 0)) + 1
        for rows, lows, highs in zip(*(np.split(x, breaks) for x in (seeing, start, end))):
            if not len(rows):
                continue
            begin = np.searchsorted(highs, key, side="right")
            stop = np.maximum(begin, np.searchsorted(lows, key, side="right"))
            seen = np.flatnonzero(stop > begin)
            first[seen] = np.minimum(first[seen], rows[begin[seen]])
            last[seen] = np.maximum(last[seen], rows[stop[seen] - 1] + 1)
            count[seen] += (stop - begin)[seen]
        return first, last, last - first == count

    def tile_tensor(self, tiles: np.ndarray, key: tuple, device: torch.device) -> torch.Tensor:
        """`row_tiles` or `key_tiles` as an int32 tensor on `device`, copied once for every `key`."""
        return self.cached(("tiles", device, *key), lambda: to_device(tiles, device))

    # -- long causal stretches --------------------------------------------------------------------------------------

    def causal_split(self, min_steps: int) -> tuple[list[CausalRun], KeyRanges]:
        """Stretches of at least `min_steps` steps that are plain causal attention (or see the same), and the ranges
        without them.

        A library kernel compiles itself anew for every shape it meets, so the length of a run is rounded down to one of
        16 values an octave, unless the run fills the sample or one of its two context-parallel slices, whose length is
        the same in every step. What rounding leaves over stays in the remaining ranges.
        """
        return self.cached(("runs", min_steps), lambda: self._causal_split(min_steps))

    def _causal_split(self, min_steps: int) -> tuple[list[CausalRun], KeyRanges]:
        if self.growth is None:
            return [], self
        rows, keys = self.growth
        start, end = self.start[::rows], self.end[::rows]
        if len(start) < min_steps:
            return [], self
        breaks = np.flatnonzero((np.diff(start) != 0) | (np.diff(end) > keys)) + 1
        edges = np.concatenate([[0], breaks, [len(start)]])
        long = np.flatnonzero(np.diff(edges) >= min_steps)
        runs = [run for i in long if (run := self._run(int(edges[i]), int(edges[i + 1]), min_steps)) is not None]
        if not runs:
            return [], self
        rest_start, rest_end = self.start.copy(), self.end.copy()
        for run in runs:
            stretch = slice(run.first_row, run.first_row + run.num_rows)
            kept = self.end[stretch] > self.start[stretch]  # padding keeps seeing nothing
            rest_start[stretch] = run.document_key
            rest_end[stretch] = np.where(kept, run.rectangle_key, run.document_key)
        return runs, KeyRanges(rest_start, rest_end)

    def _run(self, first: int, last: int, min_steps: int) -> CausalRun | None:
        """The run in steps [first, last), which see keys from one start on."""
        assert self.growth is not None
        rows, keys = self.growth
        start, end = self.start[::rows], self.end[::rows]
        halves = (0, len(start) // 2, len(start))
        fills = first in halves and last in halves
        base = int(end[first])
        begin = first + int(np.searchsorted(end[first:last], base, side="right"))  # the first step that sees more
        if keys == 0:
            begin = first
        elif begin == first + 1 and base - keys >= start[first]:
            begin, base = first, base - keys  # already the first step sees what the one before did not
        steps = last - begin
        if steps < min_steps or end[last - 1] != base + keys * steps:
            return None
        document = int(start[first])
        before = base - document
        if not fills:
            steps = rounded_down(steps)
        rectangle = before if fills and document == 0 else rounded_down(before)
        if rectangle < min_steps * max(keys, 1):
            if keys == 0:  # nothing else is there
                return None
            rectangle = 0
        return CausalRun(
            first_row=begin * rows,
            num_steps=steps,
            step_rows=rows,
            step_keys=keys,
            document_key=document,
            rectangle_key=base - rectangle,
            triangle_key=base,
        )

    def cached(self, key, compute):
        """What `compute()` gives, kept with the ranges under `key`."""
        if key not in self._cache:
            self._cache[key] = compute()
        return self._cache[key]


@dataclass(frozen=True)
class Block:
    """Consecutive query rows and the slice of keys that any of them sees; `full`: all of them see all of it."""

    rows: slice
    keys: slice
    full: bool


@dataclass(frozen=True)
class CausalRun:
    """Rows whose keys are a rectangle and a triangle, both without holes; without `step_keys` a rectangle alone.

    Step s of `num_steps` is rows `first_row + s*step_rows ...` (`step_rows` of them); they all see the keys
    [rectangle_key, triangle_key) and of the keys from `triangle_key` on the first `(s+1) * step_keys`. Keys from
    `document_key` to `rectangle_key` are theirs too, but no part of the run.
    """

    first_row: int
    num_steps: int
    step_rows: int
    step_keys: int
    document_key: int
    rectangle_key: int
    triangle_key: int

    @property
    def num_rows(self) -> int:
        return self.num_steps * self.step_rows

    @property
    def rows(self) -> range:
        return range(self.first_row, self.first_row + self.num_rows)

    @property
    def keys(self) -> range:
        """All that some row of the run sees."""
        return range(self.rectangle_key, self.triangle_key + self.num_steps * self.step_keys)


def outside(span: range, others: Iterable[range]) -> list[range]:
    """What of `span` is in none of `others`, no two of which may overlap."""
    left, start = [], span.start
    for other in sorted(others, key=lambda other: (other.start, other.stop)):
        left.append(range(start, min(other.start, span.stop)))
        start = max(start, other.stop)
    return [some for some in (*left, range(start, span.stop)) if some]


def zero_outside(x: torch.Tensor, spans: Iterable[range]) -> None:
    """Rows of x that are in none of `spans`, no two of which may overlap, become zero."""
    for rows in outside(range(len(x)), spans):
        x[rows.start : rows.stop].zero_()


def rounded_down(n: int) -> int:
    """The largest number not above `n` whose binary digits behind the first five are zero."""
    unit = 1 << max(0, n.bit_length() - 5)
    return n // unit * unit


def to_device(values: np.ndarray, device: torch.device) -> torch.Tensor:
    """int32 copy on `device`, which the host does not wait for."""
    tensor = torch.from_numpy(values.astype(np.int32))
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def _by_tile(function, values: np.ndarray, per_tile: int) -> np.ndarray:
    """`function.reduce` over consecutive groups of `per_tile` values; the last may be shorter."""
    return function.reduceat(values, np.arange(0, len(values), per_tile)) if len(values) else values
