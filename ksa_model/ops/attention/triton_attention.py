"""Attention over key ranges as Triton kernels: the function of `blocked`, on tensor cores.

Legend: T query rows, N key rows, H query heads, G key/value heads, d head dimension; out and q are [T, H, d], keys and
values [N, G, d], the log-sum-exp [H, T] in natural logarithms.

One launch joins one or two parts (sets of keys) in one softmax. Row i of a part attends to keys `start[i] .. end[i]-1`.
A program computes one tile of rows of one head and loops over the keys of any of its rows; `ranges` computes on the
host which keys these are and which need no mask. The backward kernel for keys loops over the rows that attend to a tile
of keys, for all query heads that share them: there are no atomic additions, so results are reproducible bit by bit.

A row without keys has log-sum-exp +inf (see `parts.Softmax`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from ksa_model.ops.attention.parts import Part, Softmax

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _attend(acc, top, total, q, keys, values, row_start, row_end, tile, rows, inside, kv_head, scale,
            BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr):  # fmt: skip
    """Online softmax (arXiv 1805.02867) of a tile of rows over one part; `top` and `total` are in base 2.

    One loop with the mask behind a branch: separate loops for the masked ends would each have to fill a pipeline.
    """
    lo, hi, full_lo, full_hi = tl.load(tile), tl.load(tile + 1), tl.load(tile + 2), tl.load(tile + 3)
    start, end = tl.load(row_start + rows, mask=inside, other=0), tl.load(row_end + rows, mask=inside, other=0)
    for n in tl.range(lo, hi, BLOCK_N):  # need not start at a multiple: a descriptor loads from any row
        scores = tl.dot(q, keys.load([kv_head, n, 0]).reshape(BLOCK_N, BLOCK_D).T)
        if (n < full_lo) | (n + BLOCK_N > full_hi):
            column = n + tl.arange(0, BLOCK_N)
            visible = (column[None, :] >= start[:, None]) & (column[None, :] < end[:, None])
            scores = tl.where(visible, scores, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, 1) * scale)
        shift = tl.where(higher == float("-inf"), 0.0, higher)
        weights = tl.exp2(scores * scale - shift[:, None])
        shrink = tl.exp2(top - shift)
        total = total * shrink + tl.sum(weights, 1)
        value = values.load([kv_head, n, 0]).reshape(BLOCK_N, BLOCK_D)
        acc = tl.dot(weights.to(q.dtype), value, acc * shrink[:, None])
        top = higher
    return acc, top, total


@triton.jit(do_not_specialize=["num_rows", "lse_stride"])
def _forward(queries, out, lse, num_rows, lse_stride, scale,
             keys_0, values_0, row_start_0, row_end_0, tiles_0, keys_1, values_1, row_start_1, row_end_1, tiles_1,
             PARTS: tl.constexpr, HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
             BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HAS_STATE: tl.constexpr, EMPTY_IS_PADDING: tl.constexpr,
             ):  # fmt: skip
    """One tile of rows of one head. HAS_STATE: `out` and `lse` hold the softmax over other keys, which is continued.
    EMPTY_IS_PADDING: a row without keys in the last part is padding, whatever its keys in the other part."""
    index, head = tl.num_programs(0) - 1 - tl.program_id(0), tl.program_id(1)  # causal rows: the longest first
    first = index * BLOCK_M
    if HAS_STATE and not EMPTY_IS_PADDING:
        nothing = tl.load(tiles_0 + 4 * index) >= tl.load(tiles_0 + 4 * index + 1)
        if PARTS == 2:
            nothing = nothing & (tl.load(tiles_1 + 4 * index) >= tl.load(tiles_1 + 4 * index + 1))
        if nothing:
            return
    rows, columns = first + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    inside = rows < num_rows
    kept = inside[:, None] & (columns < D)[None, :]
    cells = rows.to(tl.int64)[:, None] * (HEADS * D) + head * D + columns[None, :]
    query = queries.load([head, first, 0]).reshape(BLOCK_M, BLOCK_D)
    if HAS_STATE:
        before = tl.load(lse + head * lse_stride + rows, mask=inside, other=float("inf"))
        empty = before == float("inf")
        top = tl.where(empty, float("-inf"), before * LOG2_E)
        total = tl.where(empty, 0.0, 1.0)
        acc = tl.load(out + cells, mask=kept & (empty == 0)[:, None], other=0.0).to(tl.float32)
    else:
        top = tl.full([BLOCK_M], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    acc, top, total = _attend(acc, top, total, query, keys_0, values_0, row_start_0, row_end_0, tiles_0 + 4 * index,
                              rows, inside, head // GROUP, scale * LOG2_E, BLOCK_D, BLOCK_N)  # fmt: skip
    if PARTS == 2:
        acc, top, total = _attend(acc, top, total, query, keys_1, values_1, row_start_1, row_end_1, tiles_1 + 4 * index,
                                  rows, inside, head // GROUP, scale * LOG2_E, BLOCK_D, BLOCK_N)  # fmt: skip
    is_empty = total == 0.0
    if EMPTY_IS_PADDING:
        start, end = row_start_0, row_end_0
        if PARTS == 2:
            start, end = row_start_1, row_end_1
        is_empty = tl.load(start + rows, mask=inside, other=0) >= tl.load(end + rows, mask=inside, other=0)
    share = tl.where(is_empty, 0.0, 1.0 / total)
    tl.store(out + cells, tl.where(is_empty[:, None], 0.0, acc * share[:, None]).to(out.dtype.element_ty), mask=kept)
    tl.store(lse + head * lse_stride + rows, tl.where(is_empty, float("inf"), (top + tl.log2(total)) * LN_2),
             mask=inside)  # fmt: skip


@triton.jit
def _query_gradient(grad, q, grad_out, row_lse, delta, keys, values, row_start, row_end, tile, rows, inside, kv_head,
                    scale, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr):  # fmt: skip
    lo, hi, full_lo, full_hi = tl.load(tile), tl.load(tile + 1), tl.load(tile + 2), tl.load(tile + 3)
    start, end = tl.load(row_start + rows, mask=inside, other=0), tl.load(row_end + rows, mask=inside, other=0)
    for n in tl.range(lo, hi, BLOCK_N):  # need not start at a multiple: a descriptor loads from any row
        key = keys.load([kv_head, n, 0]).reshape(BLOCK_N, BLOCK_D)
        weights = tl.exp2(tl.dot(q, key.T) * scale - row_lse[:, None])
        if (n < full_lo) | (n + BLOCK_N > full_hi):
            column = n + tl.arange(0, BLOCK_N)
            weights = tl.where((column[None, :] >= start[:, None]) & (column[None, :] < end[:, None]), weights, 0.0)
        value = values.load([kv_head, n, 0]).reshape(BLOCK_N, BLOCK_D)
        grad_weights = tl.dot(grad_out, value.T)
        grad_scores = weights * (grad_weights - delta[:, None])
        grad = tl.dot(grad_scores.to(key.dtype), key, grad)
    return grad


@triton.jit(do_not_specialize=["num_rows", "lse_stride"])
def _backward_queries(queries, grads, out, lse, delta, grad_q, num_rows, lse_stride, scale,
                      keys_0, values_0, row_start_0, row_end_0, tiles_0,
                      keys_1, values_1, row_start_1, row_end_1, tiles_1,
                      PARTS: tl.constexpr, HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr,
                      BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HAS_STATE: tl.constexpr,
                      HAS_DELTA: tl.constexpr):  # fmt: skip
    """Gradient of one tile of query rows; with HAS_STATE it is added to `grad_q`. Without HAS_DELTA, `delta`, the sum
    of grad_out * out over a row, is computed and stored for the gradients of the keys."""
    index, head = tl.num_programs(0) - 1 - tl.program_id(0), tl.program_id(1)
    first = index * BLOCK_M
    if HAS_STATE and HAS_DELTA:
        nothing = tl.load(tiles_0 + 4 * index) >= tl.load(tiles_0 + 4 * index + 1)
        if PARTS == 2:
            nothing = nothing & (tl.load(tiles_1 + 4 * index) >= tl.load(tiles_1 + 4 * index + 1))
        if nothing:
            return
    rows, columns = first + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    inside = rows < num_rows
    query = queries.load([head, first, 0]).reshape(BLOCK_M, BLOCK_D)
    grad_rows = grads.load([head, first, 0]).reshape(BLOCK_M, BLOCK_D)
    row_lse = tl.load(lse + head * lse_stride + rows, mask=inside, other=float("inf")) * LOG2_E
    cells = rows.to(tl.int64)[:, None] * (HEADS * D) + head * D + columns[None, :]
    kept = inside[:, None] & (columns < D)[None, :]
    if HAS_DELTA:
        row_delta = tl.load(delta + head * lse_stride + rows, mask=inside, other=0.0)
    else:
        row_delta = tl.sum(grad_rows.to(tl.float32) * tl.load(out + cells, mask=kept, other=0.0), 1)
        tl.store(delta + head * lse_stride + rows, row_delta, mask=inside)
    grad = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    grad = _query_gradient(grad, query, grad_rows, row_lse, row_delta, keys_0, values_0, row_start_0, row_end_0,
                           tiles_0 + 4 * index, rows, inside, head // GROUP, scale * LOG2_E, BLOCK_D,
                           BLOCK_N)  # fmt: skip
    if PARTS == 2:
        grad = _query_gradient(grad, query, grad_rows, row_lse, row_delta, keys_1, values_1, row_start_1, row_end_1,
                               tiles_1 + 4 * index, rows, inside, head // GROUP, scale * LOG2_E, BLOCK_D,
                               BLOCK_N)  # fmt: skip
    grad *= scale
    if HAS_STATE:
        grad += tl.load(grad_q + cells, mask=kept, other=0.0).to(tl.float32)
    tl.store(grad_q + cells, grad.to(grad_q.dtype.element_ty), mask=kept)


@triton.jit
def _key_gradient(index, kv_head, queries, grads, lse, delta, keys, values, row_start, row_end, tiles, grad_k, grad_v,
                  num_keys, scale, HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
                  BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):  # fmt: skip
    first = index * BLOCK_N
    tile = tiles + 4 * index
    lo, hi, full_lo, full_hi = tl.load(tile), tl.load(tile + 1), tl.load(tile + 2), tl.load(tile + 3)
    key_rows, columns = first + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    key = keys.load([kv_head, first, 0]).reshape(BLOCK_N, BLOCK_D)
    value = values.load([kv_head, first, 0]).reshape(BLOCK_N, BLOCK_D)
    sum_k, sum_v = tl.zeros([BLOCK_N, BLOCK_D], tl.float32), tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    # From the last row back: the rows of a document that attend to a far key start at different rows and all end at the
    # document's end, so programs that begin there together find each other's rows in the cache.
    lowest = lo // BLOCK_M * BLOCK_M
    steps = tl.cdiv(hi - lowest, BLOCK_M)
    for head in range(kv_head * GROUP, (kv_head + 1) * GROUP):
        for step in tl.range(0, steps):
            m = lowest + (steps - 1 - step) * BLOCK_M
            # Rows beyond the last read as zero, their log-sum-exp and gradient too, and add nothing.
            query = queries.load([head, m, 0]).reshape(BLOCK_M, BLOCK_D)
            row_lse = lse.load([head, m]).reshape(BLOCK_M) * LOG2_E
            weights = tl.exp2(tl.dot(key, query.T) * (scale * LOG2_E) - row_lse[None, :])
            if (m < full_lo) | (m + BLOCK_M > full_hi):
                rows = m + tl.arange(0, BLOCK_M)
                start = tl.load(row_start + rows, mask=rows < hi, other=0)
                end = tl.load(row_end + rows, mask=rows < hi, other=0)
                visible = (key_rows[:, None] >= start[None, :]) & (key_rows[:, None] < end[None, :])
                weights = tl.where(visible, weights, 0.0)
            grad_rows = grads.load([head, m, 0]).reshape(BLOCK_M, BLOCK_D)
            sum_v = tl.dot(weights.to(query.dtype), grad_rows, sum_v)
            row_delta = delta.load([head, m]).reshape(BLOCK_M)
            grad_scores = weights * (tl.dot(value, grad_rows.T) - row_delta[None, :])
            sum_k = tl.dot(grad_scores.to(query.dtype), query, sum_k)
    cells = key_rows.to(tl.int64)[:, None] * (HEADS // GROUP * D) + kv_head * D + columns[None, :]
    kept = (key_rows < num_keys)[:, None] & (columns < D)[None, :]
    tl.store(grad_k + cells, (sum_k * scale).to(grad_k.dtype.element_ty), mask=kept)
    tl.store(grad_v + cells, sum_v.to(grad_v.dtype.element_ty), mask=kept)


@triton.jit(do_not_specialize=["num_keys_0", "num_keys_1"])
def _backward_keys(queries, grads, lse, delta, scale,
                   keys_0, values_0, row_start_0, row_end_0, tiles_0, grad_k_0, grad_v_0, num_keys_0,
                   keys_1, values_1, row_start_1, row_end_1, tiles_1, grad_k_1, grad_v_1, num_keys_1,
                   PARTS: tl.constexpr, HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr,
                   BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):  # fmt: skip
    """Gradients of one tile of keys and values over all query heads that share them. The tiles of the first part come
    first, for all heads: many rows attend to its keys, so short work comes last."""
    index = tl.program_id(0)
    tiles_of_0, tiles_of_1 = tl.cdiv(num_keys_0, BLOCK_N), tl.cdiv(num_keys_1, BLOCK_N)
    if index < tiles_of_0 * (HEADS // GROUP):
        _key_gradient(index % tiles_of_0, index // tiles_of_0, queries, grads, lse, delta, keys_0, values_0,
                      row_start_0, row_end_0, tiles_0, grad_k_0, grad_v_0, num_keys_0, scale,
                      HEADS, GROUP, D, BLOCK_D, BLOCK_M, BLOCK_N)  # fmt: skip
    elif PARTS == 2:
        index -= tiles_of_0 * (HEADS // GROUP)
        _key_gradient(index % tiles_of_1, index // tiles_of_1, queries, grads, lse, delta, keys_1, values_1,
                      row_start_1, row_end_1, tiles_1, grad_k_1, grad_v_1, num_keys_1, scale,
                      HEADS, GROUP, D, BLOCK_D, BLOCK_M, BLOCK_N)  # fmt: skip


@triton.jit(do_not_specialize=["first_row", "lse_stride", "num_steps"])
def _merge(out, lse, other_out, other_lse, first_row, lse_stride, num_steps, out_stride, other_stride,
           STEP_ROWS: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
           BLOCK_M: tl.constexpr):  # fmt: skip
    """Log-sum-exp merge of other_out [n*STEP_ROWS, H, d], other_lse [STEP_ROWS, H, n] into rows from `first_row` on.

    Rows without keys so far are padding and stay so.
    """
    rows, head, columns = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M), tl.program_id(1), tl.arange(0, BLOCK_D)
    inside = rows < num_steps * STEP_ROWS
    at = lse + head * lse_stride + first_row + rows
    mine = tl.load(at, mask=inside, other=float("inf"))
    theirs = tl.load(other_lse + (rows % STEP_ROWS * HEADS + head) * num_steps + rows // STEP_ROWS, mask=inside,
                     other=float("-inf"))  # fmt: skip
    inside = inside & (mine != float("inf"))
    top = tl.maximum(mine, theirs)
    mine_weight, their_weight = tl.exp2((mine - top) * LOG2_E), tl.exp2((theirs - top) * LOG2_E)
    total = mine_weight + their_weight
    cells = (first_row + rows).to(tl.int64)[:, None] * out_stride + head * D + columns[None, :]
    other_cells = rows.to(tl.int64)[:, None] * other_stride + head * D + columns[None, :]
    kept = inside[:, None] & (columns < D)[None, :]
    merged = tl.load(out + cells, mask=kept, other=0.0).to(tl.float32) * (mine_weight / total)[:, None]
    merged += tl.load(other_out + other_cells, mask=kept, other=0.0).to(tl.float32) * (their_weight / total)[:, None]
    tl.store(out + cells, merged.to(out.dtype.element_ty), mask=kept)
    tl.store(at, top + tl.log2(total) * LN_2, mask=inside)


# -- launches ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tiling:
    """Query rows and keys of a tile; warps and pipeline stages of a program."""

    rows: int
    keys: int
    warps: int
    stages: int

    @property
    def options(self) -> dict[str, int]:
        """The keyword arguments of a launch."""
        return dict(BLOCK_M=self.rows, BLOCK_N=self.keys, num_warps=self.warps, num_stages=self.stages)


def tilings(head_dim: int, capability: tuple[int, int]) -> tuple[Tiling, Tiling, Tiling]:
    """The tilings of forward, query gradient and key gradient on a device of this compute capability. docs/log.md has
    the times."""
    if head_dim > 128:
        return Tiling(64, 32, 4, 2), Tiling(64, 32, 4, 2), Tiling(32, 32, 4, 1)
    if capability != (8, 0) and capability[0] not in (9, 10):  # consumer GPUs: less than 100 KiB of shared memory
        return Tiling(64, 64, 4, 2), Tiling(64, 32, 4, 2), Tiling(32, 64, 4, 2)
    return Tiling(64, 64, 4, 3), Tiling(64, 64, 4, 2), Tiling(64, 64, 4, 2)  # two programs share a multiprocessor


def row_values(q: torch.Tensor) -> torch.Tensor:
    """An uninitialised tensor [H, T] fp32 for one value per row and head. The stride between heads is a multiple of 16
    bytes, as tensor descriptors require."""
    rows, heads, _ = q.shape
    values = torch.empty(heads, -(-rows // 4) * 4, dtype=torch.float32, device=q.device)
    return values[:, :rows]


def forward(q, parts: list[Part], state: Softmax, *, has_state: bool, empty_is_padding: bool) -> None:
    """Joint softmax of q [T, H, d] over one or two parts, written to `state`, whose `lse` is made by `row_values`. With
    `has_state` the softmax in `state` is continued."""
    out, lse = state.out, state.lse
    tiling = _tilings(q)[0]
    _forward[(triton.cdiv(len(q), tiling.rows), q.shape[1])](
        _tiles_of(q, tiling.rows), out, lse, len(q), lse.stride(0), _scale(q),
        *_arguments([_row_part(part, tiling) for part in parts]),
        PARTS=len(parts), HAS_STATE=has_state, EMPTY_IS_PADDING=empty_is_padding, **_shape(q, parts), **tiling.options,
    )  # fmt: skip


def backward_queries(
    grad_out, q, parts: list[Part], softmax: Softmax, delta, grad_q, *, has_state: bool, has_delta: bool
) -> None:
    """Gradient of q under the joint `softmax`, written to `grad_q` [T, H, d], or with `has_state` added to it.

    Without `has_delta`, fills `delta` [H, T] (`row_values`), the sum of grad_out * out of each row, for
    `backward_keys`.
    """
    tiling, out, lse = _tilings(q)[1], softmax.out, softmax.lse
    _backward_queries[(triton.cdiv(len(q), tiling.rows), q.shape[1])](
        _tiles_of(q, tiling.rows), _tiles_of(grad_out, tiling.rows), out, lse, delta, grad_q, len(q), lse.stride(0),
        _scale(q), *_arguments([_row_part(part, tiling) for part in parts]),
        PARTS=len(parts), HAS_STATE=has_state, HAS_DELTA=has_delta, **_shape(q, parts), **tiling.options,
    )  # fmt: skip


def backward_keys(grad_out, q, parts: list[Part], lse, delta) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Gradients [N, G, d] of every part's keys and values, under the joint `lse` and `delta` [H, T]."""
    tiling = _tilings(q)[2]
    grads = [(torch.empty(k.shape, dtype=k.dtype, device=k.device),
              torch.empty(v.shape, dtype=v.dtype, device=v.device)) for k, v, _ in parts]  # fmt: skip
    values_of_rows = (TensorDescriptor(x, list(x.shape), [x.stride(0), 1], [1, tiling.rows]) for x in (lse, delta))

    def key_part(part: Part, grad: tuple[torch.Tensor, torch.Tensor]) -> list:
        k, v, ranges = part
        tiles = ranges.tile_tensor(ranges.key_tiles(len(k), tiling.keys), ("keys", len(k), tiling.keys), q.device)
        operands = _tiles_of(k, tiling.keys), _tiles_of(v, tiling.keys), *ranges.tensors(q.device), tiles
        return [*operands, *grad, len(k)]

    arguments = _arguments([key_part(part, grad) for part, grad in zip(parts, grads)])
    tiles = sum(triton.cdiv(len(k), tiling.keys) for k, _, _ in parts)
    _backward_keys[(tiles * parts[0][0].shape[1],)](
        _tiles_of(q, tiling.rows), _tiles_of(grad_out, tiling.rows), *values_of_rows, _scale(q), *arguments,
        PARTS=len(parts), **_shape(q, parts), **tiling.options,
    )  # fmt: skip
    return grads


def merge(out, lse, other_out, other_lse, first_row: int, step_rows: int) -> None:
    """Merge other_out [n*step_rows, H', d], other_lse [step_rows, H', n] into rows `first_row` and on of out [T, H', d]
    (some heads of a larger tensor) and lse [H', T]."""
    rows, heads, head_dim = other_out.shape
    _merge[(triton.cdiv(rows, 64), heads)](
        out, lse, other_out, other_lse, first_row, lse.stride(0), rows // step_rows, out.stride(0), other_out.stride(0),
        STEP_ROWS=step_rows, HEADS=heads, D=head_dim, BLOCK_D=_block_d(head_dim), BLOCK_M=64,
    )  # fmt: skip


def _tiles_of(x: torch.Tensor, rows: int) -> TensorDescriptor:
    """A descriptor of x [N, heads, d] that loads tiles of one head; features beyond d and rows beyond N read as
    zero."""
    count, heads, head_dim = x.shape
    block = [1, rows, _block_d(head_dim)]
    return TensorDescriptor(x, [heads, count, head_dim], [x.stride(1), x.stride(0), 1], block)


def _arguments(parts: list[list]) -> list:
    """The arguments of both parts. A kernel with one part gets it twice and reads it once."""
    return [*parts[0], *parts[-1]]


def _row_part(part: Part, tiling: Tiling) -> list:
    k, v, ranges = part
    tiles = ranges.tile_tensor(ranges.row_tiles(tiling.rows), ("rows", tiling.rows), k.device)
    return [_tiles_of(k, tiling.keys), _tiles_of(v, tiling.keys), *ranges.tensors(k.device), tiles]


def _shape(q, parts: list[Part]) -> dict[str, int]:
    heads, head_dim = q.shape[1:]
    return dict(HEADS=heads, GROUP=heads // parts[0][0].shape[1], D=head_dim, BLOCK_D=_block_d(head_dim))


def _tilings(q: torch.Tensor) -> tuple[Tiling, Tiling, Tiling]:
    if not q.is_cuda:  # Triton's interpreter
        return Tiling(32, 16, 1, 1), Tiling(16, 32, 1, 1), Tiling(32, 16, 1, 1)
    return tilings(q.shape[-1], torch.cuda.get_device_capability(q.device))


def _block_d(head_dim: int) -> int:
    return max(16, triton.next_power_of_2(head_dim))  # a matrix instruction needs at least 16 features


def _scale(q: torch.Tensor) -> float:
    return q.shape[-1] ** -0.5
