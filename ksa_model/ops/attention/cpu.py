"""Attention over key ranges on the CPU, with torch's fused attention kernel, which keeps scores in the core's cache.

Legend: T query rows, N key rows, H query heads, G key/value heads, d head dimension. Computes in fp32.

Two kinds of problems cover all ranges. Long causal stretches need no mask: a document of a full-attention layer, or the
far part of KSA in a long document, where the rows of a chunk form a batch (see `cuda`). All other rows are cut into
blocks of query rows. Each block has a window of keys that covers the ranges of all its rows, and blocks of similar
width form one batch under one additive mask.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from ksa_model.layout.ranges import KeyRanges
from ksa_model.ops.attention.blocked import join, summary_attention
from ksa_model.ops.attention.parts import Part, Softmax

__all__ = ["Gradient", "attend", "summary_attention"]

ROWS_PER_BLOCK = 64  # query rows under one mask; see docs/log.md for the sizes tried
MIN_WIDTH = 256  # keys; windows of up to 1, 4, 16, ... times this width form one batch each
MIN_STEPS = 64  # shortest causal stretch, in steps, that is a problem of its own
LONG = 512  # stretches with many rows a step stay whole from this many steps on: their masks would be too large
STEPS_PER_BLOCK = 32  # of a shorter stretch
MAX_MASK = 2**22  # elements of one batch's mask: 16 MiB

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def attend(q: torch.Tensor, parts: list[Part], before: Softmax | None = None) -> Softmax:
    """The joint softmax of q [T, H, d] over `parts`, continued from `before`. Twin: `blocked.attend`."""
    return join(q, [_attend_part(q.float(), k, v, ranges) for k, v, ranges in parts], before)


class Gradient:
    """Gradients of parts under their joint softmax: `add` each group of parts, then read `grad_q` [T, H, d]."""

    def __init__(self, grad_out: torch.Tensor, q: torch.Tensor, softmax: Softmax):
        self._dtype = q.dtype
        self._grad_out, self._q, self._out = (x.float() for x in (grad_out, q, softmax.out))
        self._lse = softmax.lse.t()
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
        """The gradient of q over all parts added so far."""
        return self._grad_q.to(self._dtype)


def _attend_part(q, k, v, ranges: KeyRanges) -> tuple[torch.Tensor, torch.Tensor]:
    """One part alone: out [T, H, d] and lse [T, H]; a row with an empty range gives 0 and -inf."""
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
    if len(empty):  # rows of a problem without keys: padding
        out[empty], lse[empty] = 0.0, float("-inf")
    return out, lse[..., 0]


def _for_heads(x: torch.Tensor, heads: int) -> torch.Tensor:
    """[N, G, d] -> [N, H, d] in fp32: a key head for each query head."""
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
    """Plain causal attention: the rows of step s, from `first_row + s*step_rows` on, attend to s + 1 keys.

    The rows of a step are a batch of `step_rows` problems over the same keys. Tensors are views, not copies.
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
    """Blocks of `length` rows of a tensor [n, H, d] that begin at `firsts`, `spacing` rows apart (0: unevenly)."""

    firsts: np.ndarray
    length: int
    spacing: int

    @staticmethod
    def at(firsts: np.ndarray, length: int) -> _Windows:
        spacing = int(firsts[1] - firsts[0]) if len(firsts) > 1 else length
        is_even = spacing > 0 and bool((np.diff(firsts) == spacing).all())
        return _Windows(firsts, length, spacing if is_even else 0)

    def _view(self, x: torch.Tensor, begin: int, length: int) -> torch.Tensor:
        """`length` rows of every block from its row `begin` on: [blocks, H, length, d]."""
        rows = x[self.firsts[0] + begin : self.firsts[-1] + begin + length]
        return rows.unfold(0, length, self.spacing).transpose(2, 3)

    def cut(self, x: torch.Tensor) -> torch.Tensor:
        """[n, H, d] -> [blocks, H, length, d]. A view where blocks are evenly spaced. Blocks may overlap."""
        if self.spacing:
            return self._view(x, 0, self.length)
        return torch.stack([x[i : i + self.length] for i in self.firsts]).transpose(1, 2)

    def onto(self, total: torch.Tensor, found: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Pairs (view of total [n, H, d] that does not overlap itself, the rows of found [blocks, H, length, d] for
        it)."""
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
    """Every row with keys is in exactly one problem; rows without keys may be in one too."""
    return ranges.cached(("cpu problems", num_keys), lambda: _find_problems(ranges, num_keys))


def _find_problems(ranges: KeyRanges, num_keys: int) -> list[_Stretch | _Batch]:
    problems: list[_Stretch | _Batch] = []
    left, blocks = 0, []
    for stretch in _stretches(ranges):
        problems += _in_blocks(ranges, stretch)
        blocks += _blocks(ranges, left, stretch.first_row)
        left = stretch.first_row + stretch.num_steps * stretch.step_rows
    blocks += _blocks(ranges, left, len(ranges.start))
    # Windows of similar width form a batch; narrower ones are widened to the batch's width and masked.
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
    """A short stretch of many rows a step as masked blocks over all rows of some steps, which makes GEMMs larger."""
    if stretch.step_rows == 1 or stretch.num_steps >= LONG:
        return [stretch]
    found: list[_Stretch | _Batch] = []
    for first in range(0, stretch.num_steps, STEPS_PER_BLOCK):
        last = min(first + STEPS_PER_BLOCK, stretch.num_steps)
        firsts = [(stretch.first_row + first * stretch.step_rows, stretch.first_key)]
        found.append(_batch(ranges, firsts, (last - first) * stretch.step_rows, last))
    return found


def _evenly_spaced(firsts: list[tuple[int, int]], rows: int) -> list[list[tuple[int, int]]]:
    """Groups of blocks (first row, first key): runs of at least 4 whose rows and keys both advance by `rows`, and one
    group of all others."""
    runs: list[list[tuple[int, int]]] = []
    for first in firsts:
        if runs and first == (runs[-1][-1][0] + rows, runs[-1][-1][1] + rows):
            runs[-1].append(first)
        else:
            runs.append([first])
    rest = [first for run in runs if len(run) < 4 for first in run]
    return [run for run in runs if len(run) >= 4] + ([rest] if rest else [])


def _stretches(ranges: KeyRanges) -> list[_Stretch]:
    """Documents whose steps attend to 1, 2, 3, ... keys, each from the first step with a key on."""
    if ranges.growth is None or ranges.growth[1] != 1:
        return []
    step_rows = ranges.growth[0]
    start, end = ranges.start[::step_rows], ranges.end[::step_rows]
    edges = [0, *(np.flatnonzero(np.diff(start)) + 1).tolist(), len(start)]
    found = []
    for first, last in itertools.pairwise(edges):
        if last - first < MIN_STEPS:
            continue
        num_keys = end[first:last] - start[first]
        begin = first + int(np.searchsorted(num_keys, 1))
        steps = last - begin
        if steps >= MIN_STEPS and (num_keys[begin - first :] == np.arange(1, steps + 1)).all():
            found.append(_Stretch(begin * step_rows, int(start[first]), steps, step_rows))
    return found


def _blocks(ranges: KeyRanges, begin: int, end: int) -> list[tuple[int, int, int, int]]:
    """Rows [begin, end) as blocks (first row, rows, first key, end of keys); blocks without keys are left out."""
    found = []
    for first in range(begin, end, ROWS_PER_BLOCK):
        last = min(first + ROWS_PER_BLOCK, end)
        low, high = ranges.start[first:last], ranges.end[first:last]
        with_keys = np.flatnonzero(high > low)
        if len(with_keys):
            found.append((first, last - first, int(low[with_keys[0]]), int(high[with_keys[-1]])))
    return found


def _batch(ranges: KeyRanges, firsts: list[tuple[int, int]], num_rows: int, width: int) -> _Batch:
    first_rows, first_keys = np.array(firsts).T
    rows = first_rows[:, None] + np.arange(num_rows)
    keys = (first_keys[:, None] + np.arange(width))[:, None]
    visible = (keys >= ranges.start[rows][..., None]) & (keys < ranges.end[rows][..., None])
    mask = torch.from_numpy(np.where(visible, np.float32(0), np.float32("-inf")))[:, None]
    return _Batch(_Windows.at(first_rows, num_rows), _Windows.at(first_keys, width), mask)
