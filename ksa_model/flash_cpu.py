"""Attention over key ranges on the CPU, through torch's fused kernel: scores stay in the core's cache.

Legend: T query rows, N key rows, H query heads, G key/value heads, d head dimension. Computes in fp32.

Two kinds of problem cover every range. Long causal stretches (a document of a full layer; the far part of KSA in a long
document, where the rows of a chunk are a batch: see `fused`) need no mask. What they leave over is cut into blocks of
query rows, each with a window of keys as wide as its widest row needs; blocks of like width are one batch under one
additive mask.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from ksa_model.blocked import Part, Softmax, merge
from ksa_model.ranges import KeyRanges

ROWS_PER_BLOCK = 64  # query rows under one mask; see docs/log.md for the sizes tried
MIN_WIDTH = 256  # keys; windows up to this width, up to 4, 16, ... times of it are a batch each
MIN_STEPS = 64  # steps from which a causal stretch is a problem of its own
LONG = 512  # steps from which a stretch with many rows a step is left as it is, for its masks would grow too large
STEPS_PER_BLOCK = 32  # of a shorter one
MAX_MASK = 2**22  # elements of one batch's mask: 16 MiB

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def attend(q: torch.Tensor, parts: list[Part], before: Softmax | None = None) -> Softmax:
    """The joint softmax of q [T, H, d] over `parts`, going on from `before`. Twin: `blocked.attend`."""
    results = [_attend_part(q.float(), k, v, ranges) for k, v, ranges in parts]
    if before is not None:
        results.insert(0, (before.out.float(), before.lse))
    out, lse = merge(results)
    return Softmax(out.to(q.dtype), lse)


class Gradient:
    """Gradients of parts under their joint softmax: `add` each group of parts, then take `grad_q` [T, H, d]."""

    def __init__(self, grad_out: torch.Tensor, q: torch.Tensor, softmax: Softmax):
        self._dtype = q.dtype
        self._grad_out, self._q, self._out = (x.float() for x in (grad_out, q, softmax.out))
        # With +inf, rows that see nothing weigh every key with exp(-inf) = 0.
        self._lse = softmax.lse.masked_fill(softmax.lse == float("-inf"), float("inf"))
        self._grad_q = torch.zeros_like(self._q)

    def add(self, parts: list[Part]) -> list[list[torch.Tensor]]:
        """Gradients [N, G, d] of every part's keys and values."""
        return [self._add_part(k, v, ranges) for k, v, ranges in parts]

    def _add_part(self, k: torch.Tensor, v: torch.Tensor, ranges: KeyRanges) -> list[torch.Tensor]:
        heads = self._q.shape[1]
        keys, values = (_for_heads(x, heads) for x in (k, v))
        grad_keys, grad_values = torch.zeros_like(keys), torch.zeros_like(values)
        for problem in _problems(ranges, len(keys)):
            grad_out, queries, out, lse = map(
                problem.rows_of, (self._grad_out, self._q, self._out, self._lse[..., None])
            )
            call_q, call_k, call_v = _backward(
                grad_out, queries, problem.keys_of(keys), problem.keys_of(values), out, lse[..., 0], 0.0,
                problem.causal, attn_mask=problem.mask,
            )  # fmt: skip
            problem.add_rows(self._grad_q, call_q)
            problem.add_keys(grad_keys, call_k)
            problem.add_keys(grad_values, call_v)
        return [_of_groups(grad, like) for grad, like in ((grad_keys, k), (grad_values, v))]

    @property
    def grad_q(self) -> torch.Tensor:
        return self._grad_q.to(self._dtype)


def _attend_part(q, k, v, ranges: KeyRanges) -> tuple[torch.Tensor, torch.Tensor]:
    """One part alone: out [T, H, d] and lse [T, H]; a row whose range is empty gives 0 and -inf."""
    out = torch.zeros_like(q)
    lse = q.new_full((*q.shape[:2], 1), float("-inf"))
    keys, values = (_for_heads(x, q.shape[1]) for x in (k, v))
    for problem in _problems(ranges, len(keys)):
        call_out, call_lse = _forward(
            problem.rows_of(q), problem.keys_of(keys), problem.keys_of(values), 0.0, problem.causal,
            attn_mask=problem.mask,
        )  # fmt: skip
        problem.put_rows(out, call_out)
        problem.put_rows(lse, call_lse[..., None])
    empty = ranges.cached("empty rows", lambda: torch.from_numpy(np.flatnonzero(ranges.end <= ranges.start)))
    if len(empty):  # rows that lie in a problem but see nothing: padding
        out[empty], lse[empty] = 0.0, float("-inf")
    return out, lse[..., 0]


def _for_heads(x: torch.Tensor, heads: int) -> torch.Tensor:
    """[N, G, d] -> [N, H, d] in fp32: every query head meets its key head."""
    x = x.float()
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], dim=1)


def _of_groups(grad: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Transpose of `_for_heads`."""
    if grad.shape[1] != like.shape[1]:
        grad = grad.unflatten(1, (like.shape[1], -1)).sum(2)
    return grad.to(like.dtype)


# -- problems ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Stretch:
    """Plain causal attention: step s is rows `first_row + s*step_rows ...`, all of which see s + 1 keys.

    The rows of a step are a batch of `step_rows` problems over the same keys. Views, not copies.
    """

    first_row: int
    first_key: int
    num_steps: int
    step_rows: int
    causal = True
    mask = None

    def _rows(self, x: torch.Tensor) -> torch.Tensor:
        return x[self.first_row : self.first_row + self.num_steps * self.step_rows]

    def _keys(self, x: torch.Tensor) -> torch.Tensor:
        return x[self.first_key : self.first_key + self.num_steps]

    def rows_of(self, x: torch.Tensor) -> torch.Tensor:
        """[T, H, d] -> [step_rows, H, steps, d]."""
        return self._rows(x).unflatten(0, (self.num_steps, self.step_rows)).permute(1, 2, 0, 3)

    def keys_of(self, x: torch.Tensor) -> torch.Tensor:
        """[N, H, d] -> [step_rows, H, steps, d]."""
        return self._keys(x).transpose(0, 1)[None].expand(self.step_rows, -1, -1, -1)

    def put_rows(self, total: torch.Tensor, found: torch.Tensor) -> None:
        self.rows_of(total).copy_(found)

    def add_rows(self, total: torch.Tensor, found: torch.Tensor) -> None:
        self.rows_of(total).add_(found)

    def add_keys(self, total: torch.Tensor, found: torch.Tensor) -> None:
        self._keys(total).add_(found.sum(0).transpose(0, 1))


@dataclass(frozen=True)
class _Windows:
    """Blocks of `length` rows of a tensor [n, H, d], which begin at `firsts`, `spacing` apart; 0 where uneven."""

    firsts: np.ndarray
    length: int
    spacing: int

    @staticmethod
    def at(firsts: np.ndarray, length: int) -> _Windows:
        spacing = int(firsts[1] - firsts[0]) if len(firsts) > 1 else length
        is_even = spacing > 0 and bool((np.diff(firsts) == spacing).all())
        return _Windows(firsts, length, spacing if is_even else 0)

    def _view(self, x: torch.Tensor, begin: int, length: int) -> torch.Tensor:
        """`length` rows of every block, from its row `begin` on: [blocks, H, length, d]."""
        rows = x[self.firsts[0] + begin : self.firsts[-1] + begin + length]
        return rows.unfold(0, length, self.spacing).transpose(2, 3)

    def cut(self, x: torch.Tensor) -> torch.Tensor:
        """[n, H, d] -> [blocks, H, length, d], a view where blocks are evenly spaced; they may overlap."""
        if self.spacing:
            return self._view(x, 0, self.length)
        return torch.stack([x[i : i + self.length] for i in self.firsts]).transpose(1, 2)

    def onto(self, total: torch.Tensor, found: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Pairs of a view of total [n, H, d], which does not overlap itself, and what of found [blocks, H, length, d]
        goes there."""
        if not self.spacing:
            yield from ((total[i : i + self.length], one) for i, one in zip(self.firsts, found.transpose(1, 2)))
            return
        for begin in range(0, self.length, self.spacing):
            part = found[:, :, begin : begin + self.spacing]
            yield self._view(total, begin, part.shape[2]), part


@dataclass(frozen=True)
class _Batch:
    """Blocks of query rows, each with its window of keys, under a mask [blocks, 1, rows, window]: 0, or -inf."""

    rows: _Windows
    keys: _Windows
    mask: torch.Tensor
    causal = False

    def rows_of(self, x: torch.Tensor) -> torch.Tensor:
        return self.rows.cut(x)

    def keys_of(self, x: torch.Tensor) -> torch.Tensor:
        return self.keys.cut(x)

    def put_rows(self, total: torch.Tensor, found: torch.Tensor) -> None:
        for target, source in self.rows.onto(total, found):
            target.copy_(source)

    def add_rows(self, total: torch.Tensor, found: torch.Tensor) -> None:
        for target, source in self.rows.onto(total, found):
            target.add_(source)

    def add_keys(self, total: torch.Tensor, found: torch.Tensor) -> None:
        for target, source in self.keys.onto(total, found):
            target.add_(source)


def _problems(ranges: KeyRanges, num_keys: int) -> list[_Stretch | _Batch]:
    """Every row that sees something lies in exactly one problem; rows that see nothing may lie in one too."""
    return ranges.cached(("flash_cpu", num_keys), lambda: _find_problems(ranges, num_keys))


def _find_problems(ranges: KeyRanges, num_keys: int) -> list[_Stretch | _Batch]:
    problems: list[_Stretch | _Batch] = []
    left, blocks = 0, []
    for stretch in _stretches(ranges):
        problems += _in_blocks(ranges, stretch)
        blocks += _blocks(ranges, left, stretch.first_row)
        left = stretch.first_row + stretch.num_steps * stretch.step_rows
    blocks += _blocks(ranges, left, len(ranges.start))
    # Windows of like width make a batch; a window narrower than the batch's is widened, and masked.
    by_kind: dict[tuple[int, int], list[tuple[int, int, int, int]]] = {}
    for block in blocks:
        _, rows, low, high = block
        width = MIN_WIDTH
        while width < high - low:
            width *= 4
        by_kind.setdefault((rows, width), []).append(block)
    for alike in by_kind.values():
        rows, width = alike[0][1], min(max(high - low for _, _, low, high in alike), num_keys)
        firsts = [(first, min(max(0, high - width), num_keys - width)) for first, _, _, high in alike]
        at_once = max(1, MAX_MASK // (rows * width))
        for some in _evenly_spaced(firsts, rows):
            for i in range(0, len(some), at_once):
                problems.append(_batch(ranges, some[i : i + at_once], rows, width))
    return problems


def _in_blocks(ranges: KeyRanges, stretch: _Stretch) -> list[_Stretch | _Batch]:
    """A short stretch of many rows a step as masked blocks over all their rows: larger products of matrices."""
    if stretch.step_rows == 1 or stretch.num_steps >= LONG:
        return [stretch]
    found: list[_Stretch | _Batch] = []
    for first in range(0, stretch.num_steps, STEPS_PER_BLOCK):
        last = min(first + STEPS_PER_BLOCK, stretch.num_steps)
        firsts = [(stretch.first_row + first * stretch.step_rows, stretch.first_key)]
        found.append(_batch(ranges, firsts, (last - first) * stretch.step_rows, last))
    return found


def _evenly_spaced(firsts: list[tuple[int, int]], rows: int) -> list[list[tuple[int, int]]]:
    """(first row, first key) of blocks: runs of at least 4 in which both advance by `rows`, and the rest together."""
    runs: list[list[tuple[int, int]]] = []
    for first in firsts:
        if runs and first == (runs[-1][-1][0] + rows, runs[-1][-1][1] + rows):
            runs[-1].append(first)
        else:
            runs.append([first])
    rest = [first for run in runs if len(run) < 4 for first in run]
    return [run for run in runs if len(run) >= 4] + ([rest] if rest else [])


def _stretches(ranges: KeyRanges) -> list[_Stretch]:
    """Documents whose steps see 1, 2, 3, ... keys, from the step on that sees the first."""
    if ranges.growth is None or ranges.growth[1] != 1:
        return []
    step_rows = ranges.growth[0]
    start, end = ranges.start[::step_rows], ranges.end[::step_rows]
    edges = [0, *(np.flatnonzero(np.diff(start)) + 1).tolist(), len(start)]
    found = []
    for first, last in itertools.pairwise(edges):
        if last - first < MIN_STEPS:
            continue
        seen = end[first:last] - start[first]
        begin = first + int(np.searchsorted(seen, 1))
        steps = last - begin
        if steps >= MIN_STEPS and (seen[begin - first :] == np.arange(1, steps + 1)).all():
            found.append(_Stretch(begin * step_rows, int(start[first]), steps, step_rows))
    return found


def _blocks(ranges: KeyRanges, begin: int, end: int) -> list[tuple[int, int, int, int]]:
    """Rows [begin, end) in blocks of (first row, rows, first key, key behind the last), without those without keys."""
    found = []
    for first in range(begin, end, ROWS_PER_BLOCK):
        last = min(first + ROWS_PER_BLOCK, end)
        low, high = ranges.start[first:last], ranges.end[first:last]
        seeing = np.flatnonzero(high > low)
        if len(seeing):
            found.append((first, last - first, int(low[seeing[0]]), int(high[seeing[-1]])))
    return found


def _batch(ranges: KeyRanges, firsts: list[tuple[int, int]], num_rows: int, width: int) -> _Batch:
    first_rows, first_keys = np.array(firsts).T
    rows = first_rows[:, None] + np.arange(num_rows)
    keys = (first_keys[:, None] + np.arange(width))[:, None]
    seen = (keys >= ranges.start[rows][..., None]) & (keys < ranges.end[rows][..., None])
    mask = torch.from_numpy(np.where(seen, np.float32(0), np.float32("-inf")))[:, None]
    return _Batch(_Windows.at(first_rows, num_rows), _Windows.at(first_keys, width), mask)
