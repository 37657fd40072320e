"""Attention over key ranges as Triton kernels: what `blocked` computes, at the speed of the tensor cores.

Legend: T query rows, N key rows, H query heads, G key/value heads, d head dimension; out and q are [T, H, d], keys and
values [N, G, d], the log-sum-exp [H, T] in natural logarithms.

Row i sees keys `start[i] .. end[i]-1` and both ends never move backwards (`layout.KeyRanges`). So the keys of a tile of
rows are one slice of which only the two ends need a mask, and the rows that see a key are one slice too: backward for
keys walks over rows by the transposed ranges and needs no atomics, the same bits come out every time.

A row that sees nothing has log-sum-exp +inf here: exp(s - inf) = 0 keeps it out of every gradient without a mask.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _slice_bounds(lo, hi, full_lo, full_hi, BLOCK: tl.constexpr):
    """Where a tile's walk over [lo, hi) begins, and where its unmasked middle begins and ends."""
    begin = lo // BLOCK * BLOCK
    middle = tl.maximum(begin, tl.minimum(tl.cdiv(full_lo, BLOCK), tl.cdiv(hi, BLOCK)) * BLOCK)
    end = tl.maximum(middle, full_hi // BLOCK * BLOCK)
    return begin, middle, end


@triton.jit
def _attend_slice(acc, top, total, q, keys, values, lo, hi, start, end, scale, MASKED: tl.constexpr,
                  BLOCK_N: tl.constexpr):  # fmt: skip
    """Online softmax (arXiv 1805.02867) of a tile of rows over keys [lo, hi); `top` and `total` in base 2."""
    for n in tl.range(lo, hi, BLOCK_N):
        scores = tl.dot(q, keys.load([n, 0]).T)
        if MASKED:
            column = n + tl.arange(0, BLOCK_N)
            seen = (column[None, :] >= start[:, None]) & (column[None, :] < end[:, None])
            scores = tl.where(seen, scores, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, 1) * scale)
        shift = higher
        if MASKED:
            shift = tl.where(higher == float("-inf"), 0.0, higher)
        weights = tl.exp2(scores * scale - shift[:, None])
        shrink = tl.exp2(top - shift)
        total = total * shrink + tl.sum(weights, 1)
        acc = tl.dot(weights.to(q.dtype), values.load([n, 0]), acc * shrink[:, None])
        top = higher
    return acc, top, total


@triton.jit
def _forward(q, k, v, out, lse, row_start, row_end, num_rows, num_keys, q_stride, k_stride, v_stride, scale,
             HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
             BLOCK_N: tl.constexpr, HAS_STATE: tl.constexpr, EMPTY_IS_PADDING: tl.constexpr):  # fmt: skip
    """One tile of rows of one head. With HAS_STATE, `out` and `lse` hold the softmax over other keys, which goes on."""
    block, head = tl.num_programs(0) - 1 - tl.program_id(0), tl.program_id(1)
    first = block * BLOCK_M
    last = tl.minimum(first + BLOCK_M, num_rows) - 1
    lo, hi = tl.load(row_start + first), tl.load(row_end + last)
    if HAS_STATE and not EMPTY_IS_PADDING:
        if lo >= hi:
            return
    rows, columns = first + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    inside = rows < num_rows
    start, end = tl.load(row_start + rows, mask=inside, other=0), tl.load(row_end + rows, mask=inside, other=0)
    begin, middle, middle_end = _slice_bounds(lo, hi, tl.load(row_start + last), tl.load(row_end + first), BLOCK_N)
    queries = tl.make_tensor_descriptor(q + head * D, [num_rows, D], [q_stride, 1], [BLOCK_M, BLOCK_D])
    keys = tl.make_tensor_descriptor(k + head // GROUP * D, [num_keys, D], [k_stride, 1], [BLOCK_N, BLOCK_D])
    values = tl.make_tensor_descriptor(v + head // GROUP * D, [num_keys, D], [v_stride, 1], [BLOCK_N, BLOCK_D])
    query = queries.load([first, 0])
    cells = rows.to(tl.int64)[:, None] * (HEADS * D) + head * D + columns[None, :]
    kept = inside[:, None] & (columns < D)[None, :]
    if HAS_STATE:
        before = tl.load(lse + head * num_rows + rows, mask=inside, other=float("inf"))
        empty = before == float("inf")
        if EMPTY_IS_PADDING:
            empty = empty | (start >= end)
        top = tl.where(empty, float("-inf"), before * LOG2_E)
        total = tl.where(empty, 0.0, 1.0)
        acc = tl.load(out + cells, mask=kept & (empty == 0)[:, None], other=0.0).to(tl.float32)
    else:
        top = tl.full([BLOCK_M], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    acc, top, total = _attend_slice(acc, top, total, query, keys, values, begin, tl.minimum(middle, hi), start, end,
                                    scale, True, BLOCK_N)  # fmt: skip
    acc, top, total = _attend_slice(acc, top, total, query, keys, values, middle, middle_end, start, end, scale,
                                    False, BLOCK_N)  # fmt: skip
    acc, top, total = _attend_slice(acc, top, total, query, keys, values, middle_end, hi, start, end, scale, True,
                                    BLOCK_N)  # fmt: skip
    saw_nothing = total == 0.0
    total = tl.where(saw_nothing, 1.0, total)
    tl.store(out + cells, (acc / total[:, None]).to(out.dtype.element_ty), mask=kept)
    tl.store(lse + head * num_rows + rows, tl.where(saw_nothing, float("inf"), (top + tl.log2(total)) * LN_2),
             mask=inside)  # fmt: skip


@triton.jit
def _delta(grad_out, out, delta, num_rows, HEADS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
           BLOCK_M: tl.constexpr):  # fmt: skip
    """delta [H, T] = rowsum(grad_out * out)."""
    rows, head, columns = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M), tl.program_id(1), tl.arange(0, BLOCK_D)
    inside = rows < num_rows
    cells = rows.to(tl.int64)[:, None] * (HEADS * D) + head * D + columns[None, :]
    kept = inside[:, None] & (columns < D)[None, :]
    product = tl.load(grad_out + cells, mask=kept, other=0.0).to(tl.float32) * tl.load(out + cells, mask=kept, other=0.0)
    tl.store(delta + head * num_rows + rows, tl.sum(product, 1), mask=inside)


@triton.jit
def _query_slice(grad, q, grad_out, lse, delta, keys, values, lo, hi, start, end, scale, MASKED: tl.constexpr,
                 BLOCK_N: tl.constexpr):  # fmt: skip
    for n in tl.range(lo, hi, BLOCK_N):
        key = keys.load([n, 0])
        weights = tl.exp2(tl.dot(q, key.T) * scale - lse[:, None])
        if MASKED:
            column = n + tl.arange(0, BLOCK_N)
            weights = tl.where((column[None, :] >= start[:, None]) & (column[None, :] < end[:, None]), weights, 0.0)
        grad_weights = tl.dot(grad_out, values.load([n, 0]).T)
        grad_scores = weights * (grad_weights - delta[:, None])
        grad = tl.dot(grad_scores.to(key.dtype), key, grad)
    return grad


@triton.jit
def _backward_queries(q, k, v, grad_out, lse, delta, grad_q, row_start, row_end, num_rows, num_keys, q_stride, k_stride,
                      v_stride, scale, HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
                      BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HAS_STATE: tl.constexpr):  # fmt: skip
    """Gradient of one tile of query rows; with HAS_STATE it is added to what `grad_q` holds."""
    block, head = tl.num_programs(0) - 1 - tl.program_id(0), tl.program_id(1)
    first = block * BLOCK_M
    last = tl.minimum(first + BLOCK_M, num_rows) - 1
    lo, hi = tl.load(row_start + first), tl.load(row_end + last)
    if HAS_STATE:
        if lo >= hi:
            return
    rows, columns = first + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    inside = rows < num_rows
    start, end = tl.load(row_start + rows, mask=inside, other=0), tl.load(row_end + rows, mask=inside, other=0)
    begin, middle, middle_end = _slice_bounds(lo, hi, tl.load(row_start + last), tl.load(row_end + first), BLOCK_N)
    queries = tl.make_tensor_descriptor(q + head * D, [num_rows, D], [q_stride, 1], [BLOCK_M, BLOCK_D])
    grads = tl.make_tensor_descriptor(grad_out + head * D, [num_rows, D], [HEADS * D, 1], [BLOCK_M, BLOCK_D])
    keys = tl.make_tensor_descriptor(k + head // GROUP * D, [num_keys, D], [k_stride, 1], [BLOCK_N, BLOCK_D])
    values = tl.make_tensor_descriptor(v + head // GROUP * D, [num_keys, D], [v_stride, 1], [BLOCK_N, BLOCK_D])
    query, grad_rows = queries.load([first, 0]), grads.load([first, 0])
    row_lse = tl.load(lse + head * num_rows + rows, mask=inside, other=float("inf")) * LOG2_E
    row_delta = tl.load(delta + head * num_rows + rows, mask=inside, other=0.0)
    grad = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    base_2 = scale * LOG2_E
    grad = _query_slice(grad, query, grad_rows, row_lse, row_delta, keys, values, begin, tl.minimum(middle, hi), start,
                        end, base_2, True, BLOCK_N)  # fmt: skip
    grad = _query_slice(grad, query, grad_rows, row_lse, row_delta, keys, values, middle, middle_end, start, end,
                        base_2, False, BLOCK_N)  # fmt: skip
    grad = _query_slice(grad, query, grad_rows, row_lse, row_delta, keys, values, middle_end, hi, start, end, base_2,
                        True, BLOCK_N)  # fmt: skip
    grad *= scale
    cells = rows.to(tl.int64)[:, None] * (HEADS * D) + head * D + columns[None, :]
    kept = inside[:, None] & (columns < D)[None, :]
    if HAS_STATE:
        grad += tl.load(grad_q + cells, mask=kept, other=0.0).to(tl.float32)
    tl.store(grad_q + cells, grad.to(grad_q.dtype.element_ty), mask=kept)


@triton.jit
def _key_slice(grad_k, grad_v, k, v, queries, grads, lse, delta, column, lo, hi, start, end, num_rows, scale,
               MASKED: tl.constexpr, BLOCK_M: tl.constexpr):  # fmt: skip
    for m in tl.range(lo, hi, BLOCK_M):
        rows = m + tl.arange(0, BLOCK_M)
        inside = rows < num_rows
        query = queries.load([m, column])
        row_lse = tl.load(lse + rows, mask=inside, other=float("inf")) * LOG2_E
        weights = tl.exp2(tl.dot(k, query.T) * scale - row_lse[None, :])
        if MASKED:
            weights = tl.where((rows[None, :] >= start[:, None]) & (rows[None, :] < end[:, None]), weights, 0.0)
        grad_rows = grads.load([m, column])
        grad_v = tl.dot(weights.to(query.dtype), grad_rows, grad_v)
        row_delta = tl.load(delta + rows, mask=inside, other=0.0)
        grad_scores = weights * (tl.dot(v, grad_rows.T) - row_delta[None, :])
        grad_k = tl.dot(grad_scores.to(query.dtype), query, grad_k)
    return grad_k, grad_v


@triton.jit
def _backward_keys(q, k, v, grad_out, lse, delta, grad_k, grad_v, key_start, key_end, num_rows, num_keys, q_stride,
                   k_stride, v_stride, scale, HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr,
                   BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):  # fmt: skip
    """Gradients of one tile of keys and values, over all query heads that share them."""
    block, kv_head = tl.program_id(0), tl.program_id(1)
    first = block * BLOCK_N
    last = tl.minimum(first + BLOCK_N, num_keys) - 1
    places, columns = first + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    inside = places < num_keys
    lo, hi = tl.load(key_start + first), tl.load(key_end + last)
    start, end = tl.load(key_start + places, mask=inside, other=0), tl.load(key_end + places, mask=inside, other=0)
    begin, middle, middle_end = _slice_bounds(lo, hi, tl.load(key_start + last), tl.load(key_end + first), BLOCK_M)
    keys = tl.make_tensor_descriptor(k + kv_head * D, [num_keys, D], [k_stride, 1], [BLOCK_N, BLOCK_D])
    values = tl.make_tensor_descriptor(v + kv_head * D, [num_keys, D], [v_stride, 1], [BLOCK_N, BLOCK_D])
    # Over all heads, addressed by column: where d is no power of two a tile also holds columns of the next head, which
    # meet the zeros that `keys` and `values` are padded with, or columns of the gradients that are not stored.
    queries = tl.make_tensor_descriptor(q, [num_rows, HEADS * D], [q_stride, 1], [BLOCK_M, BLOCK_D])
    grads = tl.make_tensor_descriptor(grad_out, [num_rows, HEADS * D], [HEADS * D, 1], [BLOCK_M, BLOCK_D])
    key, value = keys.load([first, 0]), values.load([first, 0])
    sum_k, sum_v = tl.zeros([BLOCK_N, BLOCK_D], tl.float32), tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    base_2 = scale * LOG2_E
    for head in range(kv_head * GROUP, (kv_head + 1) * GROUP):
        row_lse, row_delta, column = lse + head * num_rows, delta + head * num_rows, head * D
        sum_k, sum_v = _key_slice(sum_k, sum_v, key, value, queries, grads, row_lse, row_delta, column, begin,
                                  tl.minimum(middle, hi), start, end, num_rows, base_2, True, BLOCK_M)  # fmt: skip
        sum_k, sum_v = _key_slice(sum_k, sum_v, key, value, queries, grads, row_lse, row_delta, column, middle,
                                  middle_end, start, end, num_rows, base_2, False, BLOCK_M)  # fmt: skip
        sum_k, sum_v = _key_slice(sum_k, sum_v, key, value, queries, grads, row_lse, row_delta, column, middle_end, hi,
                                  start, end, num_rows, base_2, True, BLOCK_M)  # fmt: skip
    cells = places.to(tl.int64)[:, None] * (HEADS // GROUP * D) + kv_head * D + columns[None, :]
    kept = inside[:, None] & (columns < D)[None, :]
    tl.store(grad_k + cells, (sum_k * scale).to(grad_k.dtype.element_ty), mask=kept)
    tl.store(grad_v + cells, sum_v.to(grad_v.dtype.element_ty), mask=kept)


@triton.jit
def _merge(out, lse, other_out, other_lse, first_row, num_rows, num_steps, STEP_ROWS: tl.constexpr, HEADS: tl.constexpr,
           D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr):  # fmt: skip
    """Log-sum-exp merge of other_out [n*STEP_ROWS, H, d], other_lse [STEP_ROWS, H, n] into rows from `first_row` on.

    Rows that have seen nothing so far are padding and stay so.
    """
    places, head, columns = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M), tl.program_id(1), tl.arange(0, BLOCK_D)
    inside = places < num_steps * STEP_ROWS
    at = lse + head * num_rows + first_row + places
    mine = tl.load(at, mask=inside, other=float("inf"))
    theirs = tl.load(other_lse + (places % STEP_ROWS * HEADS + head) * num_steps + places // STEP_ROWS, mask=inside,
                     other=float("-inf"))  # fmt: skip
    inside = inside & (mine != float("inf"))
    top = tl.maximum(mine, theirs)
    mine_weight, their_weight = tl.exp2((mine - top) * LOG2_E), tl.exp2((theirs - top) * LOG2_E)
    total = mine_weight + their_weight
    cells = (first_row + places).to(tl.int64)[:, None] * (HEADS * D) + head * D + columns[None, :]
    other_cells = places.to(tl.int64)[:, None] * (HEADS * D) + head * D + columns[None, :]
    kept = inside[:, None] & (columns < D)[None, :]
    merged = tl.load(out + cells, mask=kept, other=0.0).to(tl.float32) * (mine_weight / total)[:, None]
    merged += tl.load(other_out + other_cells, mask=kept, other=0.0).to(tl.float32) * (their_weight / total)[:, None]
    tl.store(out + cells, merged.to(out.dtype.element_ty), mask=kept)
    tl.store(at, top + tl.log2(total) * LN_2, mask=inside)
