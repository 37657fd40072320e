"""Contiguous ranges of visible keys, and how kernels cut them into tiles: pure integers, no device.

Legend: T query rows, N key rows. A kernel works on tiles: consecutive rows, or consecutive keys.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch


@dataclass(frozen=True, eq=False)  # compared and hashed by identity: ranges are keys of caches
class KeyRanges:
    """Query row `i` attends to key rows `start[i] .. end[i]-1`; where `start == end` it attends to none.

    `start` and `end` are int64 arrays [T]. Both are non-decreasing, so the keys of a block of rows are one slice too.
    The exception is the remainder of `causal_split`, which may step back where rows were taken out; it is cut into
    tiles all the same.

    `growth` is (rows, keys) if every `rows` rows of a document attend to `keys` keys more and to all keys before them,
    as in causal attention. It is (1, 0) if consecutive rows attend to the same keys, and None for windows.
    """

    start: np.ndarray
    end: np.ndarray
    growth: tuple[int, int] | None = None
    _cache: dict = field(default_factory=dict, repr=False)

    @property
    def visible_keys(self) -> int:
        """Number of query-key pairs, for FLOP counts."""
        return self.cached("visible", lambda: int((self.end - self.start).sum()))

    def blocks(self, rows_per_block: int) -> list[Block]:
        """The rows cut into blocks, each with the slice of keys it needs; blocks without keys are left out."""

        def compute() -> list[Block]:
            blocks = (self._block(first, rows_per_block) for first in range(0, len(self.start), rows_per_block))
            return [block for block in blocks if block is not None]

        return self.cached(rows_per_block, compute)

    def _block(self, first: int, rows_per_block: int) -> Block | None:
        start, end = self.start[first : first + rows_per_block], self.end[first : first + rows_per_block]
        rows_with_keys = np.flatnonzero(end > start)
        if not len(rows_with_keys):
            return None
        key_start, key_end = int(start[rows_with_keys[0]]), int(end[rows_with_keys[-1]])
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
        """int64 [tiles, 4]: keys [lo, hi) that any row of a tile attends to, and [full_lo, full_hi) that all rows do.

        A tile without keys has lo = hi = 0. If the rows of a tile have no key in common, full_lo >= full_hi.
        """

        def compute() -> np.ndarray:
            empty = self.end <= self.start
            infinity = np.iinfo(np.int64).max
            lo = _by_tile(np.minimum, np.where(empty, infinity, self.start), rows_per_tile)
            hi = _by_tile(np.maximum, np.where(empty, 0, self.end), rows_per_tile)
            full_lo = _by_tile(np.maximum, np.where(empty, infinity, self.start), rows_per_tile)
            full_hi = _by_tile(np.minimum, np.where(empty, 0, self.end), rows_per_tile)
            return np.stack([np.minimum(lo, hi), hi, np.minimum(full_lo, hi), full_hi], axis=1)

        return self.cached(("row tiles", rows_per_tile), compute)

    def key_tiles(self, num_keys: int, keys_per_tile: int) -> np.ndarray:
        """int64 [tiles, 4]: rows [lo, hi) that bound all rows attending to a key of a tile, and rows
        [full_lo, full_hi) that attend to all of its keys."""

        def compute() -> np.ndarray:
            first, last, whole = self._rows_by_key(num_keys)
            unused = last <= first
            infinity = np.iinfo(np.int64).max
            lo = _by_tile(np.minimum, np.where(unused, infinity, first), keys_per_tile)
            hi = _by_tile(np.maximum, np.where(unused, 0, last), keys_per_tile)
            full_lo = _by_tile(np.maximum, np.where(unused | ~whole, infinity, first), keys_per_tile)
            full_hi = _by_tile(np.minimum, np.where(unused | ~whole, 0, last), keys_per_tile)
            return np.stack([np.minimum(lo, hi), hi, np.minimum(full_lo, hi), full_hi], axis=1)

        return self.cached(("key tiles", num_keys, keys_per_tile), compute)

    def _rows_by_key(self, num_keys: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """For every key: the first row that attends to it, one past the last such row, and whether all rows between
        attend to it too."""
        key = np.arange(num_keys)
        first, last = np.full(num_keys, len(self.start)), np.zeros(num_keys, np.int64)
        count = np.zeros(num_keys, np.int64)
        rows_with_keys = np.flatnonzero(self.end > self.start)
        start, end = self.start[rows_with_keys], self.end[rows_with_keys]
        # Binary search needs ranges that never step back: where they do, a new segment of rows begins.
        breaks = np.flatnonzero((np.diff(start) < 0) | (np.diff(end) < 0)) + 1
        for rows, lows, highs in zip(*(np.split(x, breaks) for x in (rows_with_keys, start, end))):
            if not len(rows):
                continue
            begin = np.searchsorted(highs, key, side="right")
            stop = np.maximum(begin, np.searchsorted(lows, key, side="right"))
            used = np.flatnonzero(stop > begin)
            first[used] = np.minimum(first[used], rows[begin[used]])
            last[used] = np.maximum(last[used], rows[stop[used] - 1] + 1)
            count[used] += (stop - begin)[used]
        return first, last, last - first == count

    def tile_tensor(self, tiles: np.ndarray, key: tuple, device: torch.device) -> torch.Tensor:
        """`row_tiles` or `key_tiles` as an int32 tensor on `device`, copied once for every `key`."""
        return self.cached(("tiles", device, *key), lambda: to_device(tiles, device))

    # -- long causal runs of rows -----------------------------------------------------------------------------------

    def causal_split(self, min_steps: int) -> tuple[list[CausalRun], KeyRanges]:
        """Split into runs of at least `min_steps` steps and the remaining ranges. The rows of a run are plain causal
        attention, or all attend to the same keys.

        A library kernel compiles itself anew for every shape. To limit the number of shapes, the length of a run is
        rounded down to one of 16 values an octave, unless the run fills the sample or one of its two context-parallel
        slices, whose length is the same in every step. What rounding cuts off stays in the remaining ranges.
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
            rows_of_run = slice(run.first_row, run.first_row + run.num_rows)
            has_keys = self.end[rows_of_run] > self.start[rows_of_run]  # padding stays without keys
            rest_start[rows_of_run] = run.document_key
            rest_end[rows_of_run] = np.where(has_keys, run.rectangle_key, run.document_key)
        return runs, KeyRanges(rest_start, rest_end)

    def _run(self, first: int, last: int, min_steps: int) -> CausalRun | None:
        """The run in steps [first, last), whose ranges all start at the same key; None if it is too short."""
        assert self.growth is not None
        rows, keys = self.growth
        start, end = self.start[::rows], self.end[::rows]
        halves = (0, len(start) // 2, len(start))
        fills = first in halves and last in halves
        base = int(end[first])
        begin = first + int(np.searchsorted(end[first:last], base, side="right"))  # the first step with more keys
        if keys == 0:
            begin = first
        elif begin == first + 1 and base - keys >= start[first]:
            begin, base = first, base - keys  # the first step already has keys that the step before did not have
        steps = last - begin
        if steps < min_steps or end[last - 1] != base + keys * steps:
            return None
        document = int(start[first])
        before = base - document
        if not fills:
            steps = round_down(steps)
        rectangle = before if fills and document == 0 else round_down(before)
        if rectangle < min_steps * max(keys, 1):
            if keys == 0:  # a run without growth is its rectangle alone
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

    def cached(self, key: Hashable, compute: Callable[[], Any]) -> Any:
        """Return `compute()`, computed once and stored under `key`."""
        if key not in self._cache:
            self._cache[key] = compute()
        return self._cache[key]


@dataclass(frozen=True)
class Block:
    """Consecutive query rows and the slice of keys that any of them attends to; `full`: each attends to all of it."""

    rows: slice
    keys: slice
    full: bool


@dataclass(frozen=True)
class CausalRun:
    """Consecutive rows whose keys are a rectangle and a triangle; if `step_keys` is 0, a rectangle alone.

    Step s of `num_steps` is the `step_rows` rows from `first_row + s*step_rows` on. They all attend to the keys
    [rectangle_key, triangle_key) and to the first `(s+1) * step_keys` keys from `triangle_key` on. They also attend to
    the keys [document_key, rectangle_key), which are not part of the run.
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
        """All keys that any row of the run attends to within the run."""
        return range(self.rectangle_key, self.triangle_key + self.num_steps * self.step_keys)


def outside(span: range, others: Iterable[range]) -> list[range]:
    """The parts of `span` that are in none of `others`, no two of which may overlap."""
    left, start = [], span.start
    for other in sorted(others, key=lambda other: (other.start, other.stop)):
        left.append(range(start, min(other.start, span.stop)))
        start = max(start, other.stop)
    return [part for part in (*left, range(start, span.stop)) if part]


def zero_outside(x: torch.Tensor, spans: Iterable[range]) -> None:
    """Set the rows of x that are in none of `spans` to zero; no two spans may overlap."""
    for rows in outside(range(len(x)), spans):
        x[rows.start : rows.stop].zero_()


def round_down(n: int) -> int:
    """The largest number not above `n` whose binary digits after the first five are zero."""
    unit = 1 << max(0, n.bit_length() - 5)
    return n // unit * unit


def to_device(values: np.ndarray, device: torch.device) -> torch.Tensor:
    """int32 copy of `values` on `device`, copied without blocking the host."""
    tensor = torch.from_numpy(values.astype(np.int32))
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def _by_tile(function: np.ufunc, values: np.ndarray, per_tile: int) -> np.ndarray:
    """`function.reduce` over consecutive groups of `per_tile` values; the last group may be shorter."""
    return function.reduceat(values, np.arange(0, len(values), per_tile)) if len(values) else values
