"""Kernels of decoding: attention of one row a request over its cache, and storing a row there.

Decoding reads every weight and every cached key once a token; what else it does must be few launches. All kernels have
fixed shapes and read lengths from the device, so that a CUDA graph can hold them.

Legend: B requests, H query heads, G key/value heads, d head dimension, N rows of a cache.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

PROGRAMS = 512  # of the attention over a cache, some for each multiprocessor; each walks over its share of the rows
MOST_SPLITS = 64
BLOCK_ROWS = 64


@triton.jit
def _store_rows(k, v, keys, values, slots, rows, heads, D: tl.constexpr, BLOCK: tl.constexpr):
    request, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    column = tl.arange(0, BLOCK)
    inside = column < D
    source = (request * heads + head) * D + column
    target = ((request * heads + head) * rows + tl.load(slots + request)) * D + column
    tl.store(keys + target, tl.load(k + source, mask=inside), mask=inside)
    tl.store(values + target, tl.load(v + source, mask=inside), mask=inside)


@triton.jit
def _attend_share(q, keys, values, visible, stops, parts, weights, rows, width, heads, scale, GROUP: tl.constexpr,
                  ROWS_Q: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr,
                  PRECISION: tl.constexpr):  # fmt: skip
    """The query heads of one key/value head of one request over one share of its rows: output and log-sum-exp."""
    request, head = (tl.program_id(0) // heads).to(tl.int64), tl.program_id(0) % heads
    share, shares = tl.program_id(1), tl.num_programs(1)
    stop = tl.load(stops + request)
    each = tl.cdiv(tl.cdiv(stop, shares), BLOCK) * BLOCK
    first = share * each
    last = tl.minimum(first + each, stop)
    column, query_row = tl.arange(0, BLOCK_D), tl.arange(0, ROWS_Q)
    in_column = column < D
    pair = request * heads + head
    query = tl.load(
        q + (pair * GROUP + query_row[:, None]) * D + column[None, :],
        mask=(query_row < GROUP)[:, None] & in_column[None, :],
        other=0.0,
    )
    top = tl.full([ROWS_Q], float("-inf"), tl.float32)
    total = tl.zeros([ROWS_Q], tl.float32)
    acc = tl.zeros([ROWS_Q, BLOCK_D], tl.float32)
    for begin in range(first, last, BLOCK):
        row = begin + tl.arange(0, BLOCK)
        inside = row < last
        cells = (pair * rows + row)[:, None] * D + column[None, :]
        held = inside[:, None] & in_column[None, :]
        key = tl.load(keys + cells, mask=held, other=0.0)
        value = tl.load(values + cells, mask=held, other=0.0)
        seen = tl.load(visible + request * width + row, mask=inside, other=0) != 0
        scores = tl.dot(query, tl.trans(key), input_precision=PRECISION) * scale
        scores = tl.where(seen[None, :], scores, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, 1))
        shift = tl.where(higher == float("-inf"), 0.0, higher)
        weight = tl.exp(scores - shift[:, None])
        shrink = tl.exp(top - shift)
        total = total * shrink + tl.sum(weight, 1)
        acc = acc * shrink[:, None] + tl.dot(weight.to(value.dtype), value, input_precision=PRECISION)
        top = higher
    at = (pair * shares + share) * GROUP + query_row
    kept = query_row < GROUP
    some = total > 0
    tl.store(weights + at, tl.where(some, top + tl.log(tl.where(some, total, 1.0)), float("-inf")), mask=kept)
    normed = acc / tl.where(some, total, 1.0)[:, None]
    tl.store(parts + at[:, None] * D + column[None, :], normed, mask=kept[:, None] & in_column[None, :])


@triton.jit
def _merge_shares(parts, weights, out, GROUP: tl.constexpr, SHARES: tl.constexpr, D: tl.constexpr,
                  BLOCK_D: tl.constexpr):  # fmt: skip
    pair, member = tl.program_id(0).to(tl.int64), tl.program_id(1)
    share, column = tl.arange(0, SHARES), tl.arange(0, BLOCK_D)
    in_column = column < D
    at = (pair * SHARES + share) * GROUP + member
    weight = tl.load(weights + at)
    top = tl.max(weight, 0)
    weight = tl.exp(weight - tl.where(top == float("-inf"), 0.0, top))
    total = tl.sum(weight, 0)
    part = tl.load(parts + at[:, None] * D + column[None, :], mask=in_column[None, :], other=0.0)
    merged = tl.sum(part * weight[:, None], 0) / tl.where(total > 0, total, 1.0)
    tl.store(out + (pair * GROUP + member) * D + column, merged.to(out.dtype.element_ty), mask=in_column)


def store_rows(buffer: torch.Tensor, slots: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    """One row a request: k, v [B, G, d] into slots [B] (int64) of buffer [2, B, G, N, d]."""
    batch, heads, d = k.shape
    _store_rows[(batch, heads)](
        k.contiguous(), v.contiguous(), buffer[0], buffer[1], slots, buffer.shape[3], heads,
        D=d, BLOCK=triton.next_power_of_2(d), num_warps=1,
    )  # fmt: skip


def attend(q: torch.Tensor, buffer: torch.Tensor, visible: torch.Tensor, stops: torch.Tensor) -> torch.Tensor:
    """q [B, H, d] over the rows of buffer [2, B, G, N, d] that `visible` [B, at most N] (bool) names -> [B, H, d].

    Rows from `stops` [B] (integers, on the device) on are not read, whatever `visible` says.
    """
    batch, heads, d = q.shape
    kv_heads, group = buffer.shape[2], heads // buffer.shape[2]
    pairs = batch * kv_heads
    shares = triton.next_power_of_2(max(1, min(MOST_SPLITS, PROGRAMS // pairs)))
    parts = torch.empty(pairs, shares, group, d, dtype=torch.float32, device=q.device)
    weights = torch.empty(pairs, shares, group, dtype=torch.float32, device=q.device)
    out, block_d, rows_q = torch.empty_like(q), triton.next_power_of_2(d), max(16, triton.next_power_of_2(group))
    _attend_share[(pairs, shares)](
        q.contiguous(), buffer[0], buffer[1], visible.contiguous().view(torch.uint8), stops, parts, weights,
        buffer.shape[3], visible.shape[1], kv_heads, d**-0.5, GROUP=group, ROWS_Q=rows_q,
        D=d, BLOCK_D=max(16, block_d), BLOCK=BLOCK_ROWS, PRECISION="ieee" if q.dtype == torch.float32 else "tf32",
    )  # fmt: skip
    _merge_shares[(pairs, group)](parts, weights, out, GROUP=group, SHARES=shares, D=d, BLOCK_D=block_d, num_warps=8)
    return out
