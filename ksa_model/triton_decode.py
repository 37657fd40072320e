"""Kernels for forward passes without gradients: one launch each where torch needs many, and attention of one row.

Decoding reads every weight and every cached key once a token; what else it does must be few launches. All kernels have
fixed shapes and read lengths from the device, so that a CUDA graph can hold them.

Legend: B requests, H query heads, G key/value heads, d head dimension, N rows of a cache.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

PROGRAMS = 1024  # of the attention over a cache, some for each multiprocessor; each walks over its share of the rows
MOST_SPLITS = 128
BLOCK_ROWS = 64
ELEMENTS = 1024


@triton.jit
def _rms_norm(x, weight, out, size, eps, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < size
    values = tl.load(x + row * size + column, mask=inside, other=0.0).to(tl.float32)
    scale = 1 / tl.sqrt(tl.sum(values * values, 0) / size + eps)
    gain = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * size + column, (values * scale * gain).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _norm_rotate(x, weight, cos, sin, out, heads, eps, HALF: tl.constexpr, BLOCK: tl.constexpr, NORM: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < HALF
    at = (row * heads + tl.program_id(1)) * (2 * HALF) + column
    left = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    right = tl.load(x + at + HALF, mask=inside, other=0.0).to(tl.float32)
    if NORM:
        scale = 1 / tl.sqrt((tl.sum(left * left, 0) + tl.sum(right * right, 0)) / (2 * HALF) + eps)
        left *= scale * tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
        right *= scale * tl.load(weight + HALF + column, mask=inside, other=0.0).to(tl.float32)
        left = left.to(x.dtype.element_ty).to(tl.float32)  # as the norm by itself hands it on
        right = right.to(x.dtype.element_ty).to(tl.float32)
    c = tl.load(cos + row * HALF + column, mask=inside, other=0.0)
    s = tl.load(sin + row * HALF + column, mask=inside, other=0.0)
    tl.store(out + at, (left * c - right * s).to(out.dtype.element_ty), mask=inside)
    tl.store(out + at + HALF, (right * c + left * s).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _swiglu(gate, up, out, count, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    g = tl.load(gate + at, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + at, (g / (1 + tl.exp(-g)) * u).to(out.dtype.element_ty), mask=inside)


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


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """`torch.nn.functional.rms_norm` over the last dimension, in fp32, in x's dtype."""
    x, size = x.contiguous(), x.shape[-1]
    out = torch.empty_like(x)
    if x.numel():
        block = triton.next_power_of_2(size)
        _rms_norm[(x.numel() // size,)](x, weight, out, size, eps, block, num_warps=8 if block > 1024 else 1)
    return out


def norm_rotate(x, weight: torch.Tensor | None, eps: float, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """x [rows, heads, d] -> normed over d where there is a weight [d], then rotated; cos, sin [rows, 1, d/2] fp32."""
    x = x.contiguous()
    rows, heads, d = x.shape
    out = torch.empty_like(x)
    if x.numel():
        gain = x if weight is None else weight
        block = triton.next_power_of_2(d // 2)
        _norm_rotate[(rows, heads)](
            x, gain, cos, sin, out, heads, eps, HALF=d // 2, BLOCK=block, NORM=weight is not None, num_warps=1
        )
    return out


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up."""
    gate, up = gate.contiguous(), up.contiguous()
    out = torch.empty_like(gate)
    if gate.numel():
        _swiglu[(triton.cdiv(gate.numel(), ELEMENTS),)](gate, up, out, gate.numel(), ELEMENTS)
    return out


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
    _merge_shares[(pairs, group)](parts, weights, out, GROUP=group, SHARES=shares, D=d, BLOCK_D=block_d)
    return out
