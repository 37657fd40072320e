"""Attention of summary rows over their own chunk as a Triton kernel. Reads memory once; copies and pads nothing.

Legend: C chunks, k text rows and m summaries a chunk, H query heads, G key/value heads, d head dimension.

A program handles some consecutive chunks of one key/value head: their text keys form one tile, their summaries another,
and scores between different chunks are masked. The backward kernel recomputes the softmax and is the only writer of
each gradient, since only a chunk's own summaries attend to its keys here.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

MAX_CHUNK = 128  # the most text rows of a chunk that fit a tile
TILE = 64  # rows that a tile should have


@triton.jit
def _rows_of(base, first, count, limit, row_stride, column, BLOCK: tl.constexpr, D: tl.constexpr,
             BLOCK_D: tl.constexpr):  # fmt: skip
    """Addresses [BLOCK, BLOCK_D] of `count` rows from `first` on, and which of them exist."""
    row, feature = tl.arange(0, BLOCK), tl.arange(0, BLOCK_D)
    cells = base + (first + row).to(tl.int64)[:, None] * row_stride + column + feature[None, :]
    return cells, ((row < count) & (first + row < limit))[:, None] & (feature < D)[None, :]


@triton.jit
def _queries_of(first_chunk, chunks, head, M: tl.constexpr, GROUP: tl.constexpr, CHUNKS: tl.constexpr,
                BLOCK: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):  # fmt: skip
    """Offsets of the query rows (chunk, summary, head of the group), whether they exist, their chunk and summary."""
    index, feature = tl.arange(0, BLOCK), tl.arange(0, BLOCK_D)
    chunk, slot, member = index // (M * GROUP), index // GROUP % M, index % GROUP
    exists = (index < CHUNKS * M * GROUP) & (first_chunk + chunk < chunks)
    row = ((first_chunk + chunk) * M + slot).to(tl.int64)
    offsets = (row[:, None] * HEADS + (head * GROUP + member)[:, None]) * D + feature[None, :]
    return offsets, exists[:, None] & (feature < D)[None, :], chunk, slot


@triton.jit
def _weights(query, text, summary, lengths, first_chunk, chunks, chunk, slot, scale, K: tl.constexpr, M: tl.constexpr,
             CHUNKS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr):  # fmt: skip
    """The joint softmax over both tiles of keys, as one tensor for each tile."""
    t, s = tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_S)
    length = tl.load(lengths + first_chunk + t // K, mask=(t < CHUNKS * K) & (first_chunk + t // K < chunks), other=0)
    attends_text = (chunk[:, None] == (t // K)[None, :]) & (t % K < length)[None, :]
    attends_summary = (chunk[:, None] == (s // M)[None, :]) & (s % M <= slot[:, None]) & (s < CHUNKS * M)[None, :]
    text_scores = tl.where(attends_text, tl.dot(query, text.T) * scale, float("-inf"))
    summary_scores = tl.where(attends_summary, tl.dot(query, summary.T) * scale, float("-inf"))
    top = tl.maximum(tl.max(text_scores, 1), tl.max(summary_scores, 1))
    top = tl.where(top == float("-inf"), 0.0, top)
    text_weights, summary_weights = tl.exp(text_scores - top[:, None]), tl.exp(summary_scores - top[:, None])
    total = tl.sum(text_weights, 1) + tl.sum(summary_weights, 1)
    share = 1 / tl.where(total == 0.0, 1.0, total)
    return text_weights * share[:, None], summary_weights * share[:, None]


@triton.jit
def _summary_forward(q, k_text, v_text, k_summary, v_summary, lengths, out, chunks, text_k_stride, text_v_stride,
             summary_k_stride, summary_v_stride, scale, K: tl.constexpr, M: tl.constexpr, CHUNKS: tl.constexpr,
             HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr,
             BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr):  # fmt: skip
    first, head = tl.program_id(0) * CHUNKS, tl.program_id(1)
    at, exists, chunk, slot = _queries_of(first, chunks, head, M, GROUP, CHUNKS, BLOCK_Q, HEADS, D, BLOCK_D)
    query = tl.load(q + at, mask=exists, other=0.0)
    kt, has_t = _rows_of(k_text, first * K, CHUNKS * K, chunks * K, text_k_stride, head * D, BLOCK_T, D, BLOCK_D)
    vt, _ = _rows_of(v_text, first * K, CHUNKS * K, chunks * K, text_v_stride, head * D, BLOCK_T, D, BLOCK_D)
    ks, has_s = _rows_of(k_summary, first * M, CHUNKS * M, chunks * M, summary_k_stride, head * D, BLOCK_S, D, BLOCK_D)
    vs, _ = _rows_of(v_summary, first * M, CHUNKS * M, chunks * M, summary_v_stride, head * D, BLOCK_S, D, BLOCK_D)
    text_weights, summary_weights = _weights(
        query, tl.load(kt, mask=has_t, other=0.0), tl.load(ks, mask=has_s, other=0.0), lengths, first, chunks, chunk,
        slot, scale, K, M, CHUNKS, BLOCK_T, BLOCK_S
    )  # fmt: skip
    result = tl.dot(text_weights.to(query.dtype), tl.load(vt, mask=has_t, other=0.0))
    result = tl.dot(summary_weights.to(query.dtype), tl.load(vs, mask=has_s, other=0.0), result)
    tl.store(out + at, result.to(out.dtype.element_ty), mask=exists)


@triton.jit
def _summary_backward(q, k_text, v_text, k_summary, v_summary, lengths, grad_out, grad_q, grad_k_text, grad_v_text,
              grad_k_summary, grad_v_summary, chunks, text_k_stride, text_v_stride, summary_k_stride, summary_v_stride,
              scale, K: tl.constexpr, M: tl.constexpr, CHUNKS: tl.constexpr, HEADS: tl.constexpr, GROUP: tl.constexpr,
              D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_T: tl.constexpr,
              BLOCK_S: tl.constexpr):  # fmt: skip
    first, head = tl.program_id(0) * CHUNKS, tl.program_id(1)
    at, exists, chunk, slot = _queries_of(first, chunks, head, M, GROUP, CHUNKS, BLOCK_Q, HEADS, D, BLOCK_D)
    query, given = tl.load(q + at, mask=exists, other=0.0), tl.load(grad_out + at, mask=exists, other=0.0)
    kt, has_t = _rows_of(k_text, first * K, CHUNKS * K, chunks * K, text_k_stride, head * D, BLOCK_T, D, BLOCK_D)
    vt, _ = _rows_of(v_text, first * K, CHUNKS * K, chunks * K, text_v_stride, head * D, BLOCK_T, D, BLOCK_D)
    ks, has_s = _rows_of(k_summary, first * M, CHUNKS * M, chunks * M, summary_k_stride, head * D, BLOCK_S, D, BLOCK_D)
    vs, _ = _rows_of(v_summary, first * M, CHUNKS * M, chunks * M, summary_v_stride, head * D, BLOCK_S, D, BLOCK_D)
    text, summary = tl.load(kt, mask=has_t, other=0.0), tl.load(ks, mask=has_s, other=0.0)
    text_weights, summary_weights = _weights(
        query, text, summary, lengths, first, chunks, chunk, slot, scale, K, M, CHUNKS, BLOCK_T, BLOCK_S
    )
    grad_text = tl.dot(given, tl.load(vt, mask=has_t, other=0.0).T)
    grad_summary = tl.dot(given, tl.load(vs, mask=has_s, other=0.0).T)
    delta = tl.sum(text_weights * grad_text, 1) + tl.sum(summary_weights * grad_summary, 1)
    text_scores = (text_weights * (grad_text - delta[:, None]) * scale).to(query.dtype)
    summary_scores = (summary_weights * (grad_summary - delta[:, None]) * scale).to(query.dtype)
    result = tl.dot(summary_scores, summary, tl.dot(text_scores, text))
    tl.store(grad_q + at, result.to(grad_q.dtype.element_ty), mask=exists)
    stride: tl.constexpr = HEADS // GROUP * D
    to, _ = _rows_of(grad_k_text, first * K, CHUNKS * K, chunks * K, stride, head * D, BLOCK_T, D, BLOCK_D)
    tl.store(to, tl.dot(text_scores.T, query).to(grad_q.dtype.element_ty), mask=has_t)
    to, _ = _rows_of(grad_v_text, first * K, CHUNKS * K, chunks * K, stride, head * D, BLOCK_T, D, BLOCK_D)
    tl.store(to, tl.dot(text_weights.to(query.dtype).T, given).to(grad_q.dtype.element_ty), mask=has_t)
    to, _ = _rows_of(grad_k_summary, first * M, CHUNKS * M, chunks * M, stride, head * D, BLOCK_S, D, BLOCK_D)
    tl.store(to, tl.dot(summary_scores.T, query).to(grad_q.dtype.element_ty), mask=has_s)
    to, _ = _rows_of(grad_v_summary, first * M, CHUNKS * M, chunks * M, stride, head * D, BLOCK_S, D, BLOCK_D)
    tl.store(to, tl.dot(summary_weights.to(query.dtype).T, given).to(grad_q.dtype.element_ty), mask=has_s)


def fits(q_summary: torch.Tensor, kv_heads: int, chunk_size: int, summary_tokens: int) -> bool:
    """Whether one chunk's keys and queries fit a program's tiles."""
    return chunk_size <= MAX_CHUNK and summary_tokens * (q_summary.shape[1] // kv_heads) <= TILE


class SummaryAttention(torch.autograd.Function):
    """q [C*m, H, d] over k_text, v_text [C*k, G, d] and k_summary, v_summary [C*m, G, d], the heads of a
    row side by side.

    `lengths`: int32 [C], real text rows of each chunk.
    """

    @staticmethod
    def forward(ctx, q, k_text, v_text, k_summary, v_summary, lengths, chunk_size: int):
        inputs = q.contiguous(), k_text, v_text, k_summary, v_summary, lengths
        out = torch.empty_like(inputs[0])
        grid, sizes, numbers = _plan(inputs, chunk_size)
        _summary_forward[grid](*inputs, out, *numbers, **sizes)
        ctx.save_for_backward(*inputs)
        ctx.chunk_size = chunk_size
        return out

    @staticmethod
    def backward(ctx, grad_out):
        inputs: tuple[torch.Tensor, ...] = ctx.saved_tensors
        grid, sizes, numbers = _plan(inputs, ctx.chunk_size)
        grads = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in inputs[:5]]
        _summary_backward[grid](*inputs, grad_out.contiguous(), *grads, *numbers, **sizes)
        return *grads, None, None


def _plan(inputs: tuple[torch.Tensor, ...], chunk_size: int):
    """The grid, the compile-time sizes and the numbers of a launch."""
    q, k_text, v_text, k_summary, v_summary, lengths = inputs
    chunks, (heads, d), kv_heads = len(lengths), q.shape[1:], k_text.shape[1]
    m, group = len(q) // chunks, heads // kv_heads
    per_program = max(1, min(TILE // chunk_size, TILE // (m * group)))
    sizes = dict(
        K=chunk_size, M=m, CHUNKS=per_program, HEADS=heads, GROUP=group, D=d, BLOCK_D=_block(d),
        BLOCK_Q=_block(per_program * m * group), BLOCK_T=_block(per_program * chunk_size),
        BLOCK_S=_block(per_program * m),
    )  # fmt: skip
    strides = [x.stride(0) for x in (k_text, v_text, k_summary, v_summary)]
    return (triton.cdiv(chunks, per_program), kv_heads), sizes, (chunks, *strides, d**-0.5)


def _block(rows: int) -> int:
    return max(16, triton.next_power_of_2(rows))
