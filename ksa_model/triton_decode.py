"""Kernels of decoding: attention of one row a request over its cache, storing a row there, summarising a chunk that
stands there, and products of few rows with weights, with the norm before them and what follows them in one launch.

Decoding reads every weight and every cached key once a token; what else it does must be few launches. All kernels have
fixed shapes and read lengths from the device, so that a CUDA graph can hold them.

Legend: B requests, H query heads, G key/value heads, d head dimension, N rows of a cache, n rows, h features of a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

if TYPE_CHECKING:
    from ksa_model.linear import Target

PROGRAMS = 512  # of the attention over a cache, some for each multiprocessor; each walks over its share of the rows
MOST_SPLITS = 64
BLOCK_ROWS = 64
# Of products with few rows: output features of a program, and features of the input that it takes at a time. What is
# under way must hide the memory's latency: some 2 MB on the whole device.
FEATURES = 16
DEPTH = 256
MOST_KEYS = 256  # of a chunk and its summaries, in one tile


@triton.jit
def _store_rows(k, v, keys, values, slots, rows, heads, EACH: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr):
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    column = tl.arange(0, BLOCK)
    inside = column < D
    source = (row * heads + head) * D + column
    target = ((row // EACH * heads + head) * rows + tl.load(slots + row)) * D + column
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


@triton.jit
def _summarise(q, keys, values, k_own, v_own, chunks, out, rows, ring, heads, scale, GROUP: tl.constexpr,
               CHUNK: tl.constexpr, OWN: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, D: tl.constexpr,
               BLOCK_D: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """The OWN summaries of one chunk, for the query heads of one key/value head of one request."""
    request, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    column, query, key = tl.arange(0, BLOCK_D), tl.arange(0, QUERIES), tl.arange(0, KEYS)
    in_column, member, own = column < D, query % GROUP, query // GROUP
    real = own < OWN
    at_query = ((request * OWN + own) * heads * GROUP + head * GROUP + member)[:, None] * D + column[None, :]
    queries = tl.load(q + at_query, mask=real[:, None] & in_column[None, :], other=0.0)
    is_text, summary = key < CHUNK, key - CHUNK
    slot = (tl.load(chunks + request) * CHUNK + key) % ring
    slot = tl.minimum(tl.maximum(slot, 0), rows - 1)  # provisional summaries may look at any row
    at_text = ((request * heads + head) * rows + slot)[:, None] * D + column[None, :]
    at_own = ((request * OWN + summary) * heads + head)[:, None] * D + column[None, :]
    text = is_text[:, None] & in_column[None, :]
    mine = ((summary >= 0) & (summary < OWN))[:, None] & in_column[None, :]
    k = tl.load(keys + at_text, mask=text, other=0.0) + tl.load(k_own + at_own, mask=mine, other=0.0)
    v = tl.load(values + at_text, mask=text, other=0.0) + tl.load(v_own + at_own, mask=mine, other=0.0)
    scores = tl.dot(queries, tl.trans(k), input_precision=PRECISION) * scale
    scores = tl.where(is_text[None, :] | (summary[None, :] <= own[:, None]), scores, float("-inf"))
    weight = tl.exp(scores - tl.max(scores, 1)[:, None])
    found = tl.dot(weight.to(v.dtype), v, input_precision=PRECISION) / tl.sum(weight, 1)[:, None]
    tl.store(out + at_query, found.to(out.dtype.element_ty), mask=real[:, None] & in_column[None, :])


@triton.jit
def _few_rows(x, gain, residual, weight_0, weight_1, weight_2, out_0, out_1, out_2, features_0, features_1, features_2,
              rows, size, eps, NORM: tl.constexpr, GATED: tl.constexpr, ADD: tl.constexpr, ROWS: tl.constexpr,
              FEATURES: tl.constexpr, DEPTH: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Some output features of one of three weights (or of two together, GATED) for all rows.

    A norm's scale is one number a row, so it multiplies the result: rows are read once.
    """
    block, weight, out, features = tl.program_id(0), weight_0, out_0, features_0
    if not GATED:
        before = tl.cdiv(features_0, FEATURES)
        if block >= before:
            block, weight, out, features = block - before, weight_1, out_1, features_1
            before = tl.cdiv(features_1, FEATURES)
            if block >= before:
                block, weight, out, features = block - before, weight_2, out_2, features_2
    row, feature = tl.arange(0, ROWS), block * FEATURES + tl.arange(0, FEATURES)
    in_rows, in_features = row < rows, feature < features
    line = feature.to(tl.int64)[:, None] * size
    acc = tl.zeros([FEATURES, ROWS], tl.float32)
    acc_up = tl.zeros([FEATURES, ROWS], tl.float32)
    squares = tl.zeros([ROWS], tl.float32)
    for begin in range(0, size, DEPTH):
        column = begin + tl.arange(0, DEPTH)
        inside = column < size
        held = in_features[:, None] & inside[None, :]
        w = tl.load(weight + line + column[None, :], mask=held, other=0.0)
        values = tl.load(x + row[None, :] * size + column[:, None], mask=inside[:, None] & in_rows[None, :], other=0.0)
        if NORM:
            exact = values.to(tl.float32)
            squares += tl.sum(exact * exact, 0)
            values = exact * tl.load(gain + column, mask=inside, other=0.0).to(tl.float32)[:, None]
            values = values.to(x.dtype.element_ty)
        acc = tl.dot(w, values, acc, input_precision=PRECISION)
        if GATED:
            up = tl.load(weight_1 + line + column[None, :], mask=held, other=0.0)
            acc_up = tl.dot(up, values, acc_up, input_precision=PRECISION)
    if NORM:
        scale = 1 / tl.sqrt(squares / size + eps)
        acc *= scale[None, :]
        acc_up *= scale[None, :]
    if GATED:
        acc = acc / (1 + tl.exp(-acc)) * acc_up
    at = row[None, :] * features + feature[:, None]
    real = in_features[:, None] & in_rows[None, :]
    if ADD:
        acc += tl.load(residual + at, mask=real, other=0.0).to(tl.float32)
    tl.store(out + at, acc.to(out.dtype.element_ty), mask=real)


def store_rows(buffer: torch.Tensor, slots: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    """Rows of each request in turn, the same number for all: k, v [n, G, d] into slots [n] (int64) of buffer
    [2, B, G, N, d]."""
    count, heads, d = k.shape
    _store_rows[(count, heads)](
        k.contiguous(), v.contiguous(), buffer[0], buffer[1], slots, buffer.shape[3], heads,
        EACH=count // buffer.shape[1], D=d, BLOCK=triton.next_power_of_2(d), num_warps=1,
    )  # fmt: skip


def summarise(
    q: torch.Tensor,
    buffer: torch.Tensor,
    ring_rows: int | None,
    chunk: torch.Tensor,
    chunk_size: int,
    k_own: torch.Tensor,
    v_own: torch.Tensor,
) -> torch.Tensor | None:
    """The m summaries of one whole chunk a request, each over the chunk's text and the summaries up to itself.

    q [B*m, H, d]; k_own, v_own [B*m, G, d]; text stands in buffer [2, B, G, N, d] at its position modulo `ring_rows`;
    chunk int64 [B] -> [B*m, H, d]. None where a chunk is too long for one tile.
    """
    (batch, kv_heads), (total, heads, d) = buffer.shape[1:3], q.shape
    group, m = heads // kv_heads, total // batch
    if chunk_size + m > MOST_KEYS:
        return None
    out = torch.empty_like(q)
    _summarise[(batch, kv_heads)](
        q.contiguous(), buffer[0], buffer[1], k_own.contiguous(), v_own.contiguous(), chunk, out, buffer.shape[3],
        ring_rows or 2**62, kv_heads, d**-0.5, GROUP=group, CHUNK=chunk_size, OWN=m,
        QUERIES=max(16, triton.next_power_of_2(group * m)), KEYS=max(16, triton.next_power_of_2(chunk_size + m)), D=d,
        BLOCK_D=max(16, triton.next_power_of_2(d)), PRECISION=_precision(q),
    )  # fmt: skip
    return out


def project(x: torch.Tensor, gain: torch.Tensor, eps: float, targets: Sequence[Target]) -> list[torch.Tensor]:
    """`linear.project` behind a norm, for few rows."""
    found: list[torch.Tensor] = []
    for (start, stop), alike in groupby(targets, key=lambda target: (target.start, target.stop)):
        weights = [target.weight for target in alike]
        for first in range(0, len(weights), 3):
            found += _launch(x[start:stop], weights[first : first + 3], gain=gain, eps=eps)
    return found


def gated(x: torch.Tensor, gain: torch.Tensor, eps: float, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """swiglu of both products of the normed rows: [n, f]."""
    return _launch(x, [gate, up], gain=gain, eps=eps, is_gated=True)[0]


def add_product(x: torch.Tensor, y: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x + y @ weight.T"""
    return _launch(y, [weight], residual=x)[0]


def _launch(x, weights, gain=None, eps=0.0, residual=None, is_gated=False) -> list[torch.Tensor]:
    x, (rows, size) = x.contiguous(), x.shape
    outs = [x.new_empty(rows, len(weight)) for weight in weights[: 1 if is_gated else 3]]
    programs = sum(triton.cdiv(out.shape[1], FEATURES) for out in outs)
    weights, outs_3 = weights + weights[:1] * (3 - len(weights)), outs + outs[:1] * (3 - len(outs))
    features = [out.shape[1] for out in outs] + [0] * (3 - len(outs))
    if rows:
        _few_rows[(programs,)](
            x, x if gain is None else gain, x if residual is None else residual.contiguous(), *weights, *outs_3,
            *features, rows, size, eps, NORM=gain is not None, GATED=is_gated, ADD=residual is not None,
            ROWS=max(16, triton.next_power_of_2(rows)), FEATURES=FEATURES, DEPTH=DEPTH, PRECISION=_precision(x),
            num_stages=4,
        )  # fmt: skip
    return outs


def _precision(x: torch.Tensor) -> str:
    return "ieee" if x.dtype == torch.float32 else "tf32"


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
        D=d, BLOCK_D=max(16, block_d), BLOCK=BLOCK_ROWS, PRECISION=_precision(q),
    )  # fmt: skip
    _merge_shares[(pairs, group)](parts, weights, out, GROUP=group, SHARES=shares, D=d, BLOCK_D=block_d, num_warps=8)
    return out
