"""Pooled keys and values as Triton kernels: twins of `ksa_model.ops.pooling`, in one launch each way.

Legend: T text rows, k tokens a chunk, C = T/k chunks, G key/value heads, d head dimension.

A program handles some chunks of one head. The backward kernel recomputes the weights of learned pooling, so only the
inputs are kept, and it is the only writer of each gradient.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ksa_model.ops import pooling
from ksa_model.ops.pooling import ChunkRows

MAX_TILE = 16384  # values of a chunk and head that fit a program; larger ones are pooled in plain torch
TILE = 4096  # values that a program should have


@triton.jit
def _weights(scores, bias, first, chunks, head, HEADS: tl.constexpr, K: tl.constexpr, LEARNED: tl.constexpr,
             BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr):  # fmt: skip
    """fp32 [BLOCK_C, BLOCK_K]: the weights of each chunk's tokens, 0 beyond the chunk."""
    chunk, token = first + tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_K)
    inside = token[None, :] < K
    if not LEARNED:
        return tl.where(inside, 1.0 / K, 0.0) + tl.zeros([BLOCK_C, BLOCK_K], tl.float32)
    at = (chunk.to(tl.int64)[:, None] * K + token[None, :]) * HEADS + head
    score = tl.load(scores + at, mask=inside & (chunk < chunks)[:, None], other=0.0).to(tl.float32)
    score += tl.load(bias + head * K + token, mask=token < K, other=0.0).to(tl.float32)[None, :]
    score = tl.where(inside, score, float("-inf"))
    weight = tl.exp(score - tl.max(score, 1)[:, None])
    return weight / tl.sum(weight, 1)[:, None]


@triton.jit
def _cells(first, chunks, head, row_stride, K: tl.constexpr, D: tl.constexpr, BLOCK_C: tl.constexpr,
           BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr):  # fmt: skip
    """Offsets [BLOCK_C, BLOCK_K, BLOCK_D] of the values of some chunks of one head, and which of them exist."""
    chunk, token = first + tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_K)
    feature = tl.arange(0, BLOCK_D)
    row = chunk.to(tl.int64)[:, None] * K + token[None, :]
    exists = (chunk < chunks)[:, None] & (token < K)[None, :]
    at = row[:, :, None] * row_stride + head * D + feature[None, None, :]
    return at, exists[:, :, None] & (feature < D)[None, None, :]


@triton.jit
def _pooled_cells(first, chunks, head, HEADS: tl.constexpr, D: tl.constexpr, BLOCK_C: tl.constexpr,
                  BLOCK_D: tl.constexpr):  # fmt: skip
    """Offsets [BLOCK_C, BLOCK_D] of the pooled values of some chunks of one head, and which of them exist."""
    chunk, feature = first + tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_D)
    at = (chunk.to(tl.int64)[:, None] * HEADS + head) * D + feature[None, :]
    return at, (chunk < chunks)[:, None] & (feature < D)[None, :]


@triton.jit
def _pool_forward(k, v, scores, bias, out_k, out_v, chunks, k_stride, v_stride, HEADS: tl.constexpr, K: tl.constexpr,
                  D: tl.constexpr, LEARNED: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
                  BLOCK_D: tl.constexpr):  # fmt: skip
    first, head = tl.program_id(0) * BLOCK_C, tl.program_id(1)
    weight = _weights(scores, bias, first, chunks, head, HEADS, K, LEARNED, BLOCK_C, BLOCK_K)[:, :, None]
    to, written = _pooled_cells(first, chunks, head, HEADS, D, BLOCK_C, BLOCK_D)
    at, exists = _cells(first, chunks, head, k_stride, K, D, BLOCK_C, BLOCK_K, BLOCK_D)
    pooled = tl.sum(tl.load(k + at, mask=exists, other=0.0).to(tl.float32) * weight, 1)
    tl.store(out_k + to, pooled.to(out_k.dtype.element_ty), mask=written)
    at, exists = _cells(first, chunks, head, v_stride, K, D, BLOCK_C, BLOCK_K, BLOCK_D)
    pooled = tl.sum(tl.load(v + at, mask=exists, other=0.0).to(tl.float32) * weight, 1)
    tl.store(out_v + to, pooled.to(out_v.dtype.element_ty), mask=written)


@triton.jit
def _pool_backward(k, v, scores, bias, grad_out_k, grad_out_v, grad_k, grad_v, grad_scores, chunks, k_stride, v_stride,
                   HEADS: tl.constexpr, K: tl.constexpr, D: tl.constexpr, LEARNED: tl.constexpr,
                   BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr):  # fmt: skip
    first, head = tl.program_id(0) * BLOCK_C, tl.program_id(1)
    weight = _weights(scores, bias, first, chunks, head, HEADS, K, LEARNED, BLOCK_C, BLOCK_K)
    source, given = _pooled_cells(first, chunks, head, HEADS, D, BLOCK_C, BLOCK_D)
    of_k = tl.load(grad_out_k + source, mask=given, other=0.0).to(tl.float32)[:, None, :]
    of_v = tl.load(grad_out_v + source, mask=given, other=0.0).to(tl.float32)[:, None, :]
    to, written = _cells(first, chunks, head, HEADS * D, K, D, BLOCK_C, BLOCK_K, BLOCK_D)
    tl.store(grad_k + to, (weight[:, :, None] * of_k).to(grad_k.dtype.element_ty), mask=written)
    tl.store(grad_v + to, (weight[:, :, None] * of_v).to(grad_v.dtype.element_ty), mask=written)
    if LEARNED:
        at, exists = _cells(first, chunks, head, k_stride, K, D, BLOCK_C, BLOCK_K, BLOCK_D)
        of_weight = tl.sum(tl.load(k + at, mask=exists, other=0.0).to(tl.float32) * of_k, 2)
        at, exists = _cells(first, chunks, head, v_stride, K, D, BLOCK_C, BLOCK_K, BLOCK_D)
        of_weight += tl.sum(tl.load(v + at, mask=exists, other=0.0).to(tl.float32) * of_v, 2)
        of_score = weight * (of_weight - tl.sum(weight * of_weight, 1)[:, None])
        chunk, token = first + tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_K)
        cells = (chunk.to(tl.int64)[:, None] * K + token[None, :]) * HEADS + head
        tl.store(grad_scores + cells, of_score, mask=(chunk < chunks)[:, None] & (token < K)[None, :])


def pool(rows: ChunkRows, chunk_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """See `pooling.pool`."""
    if triton.next_power_of_2(chunk_size) * triton.next_power_of_2(rows.k.shape[2]) > MAX_TILE:
        return pooling.pool(rows, chunk_size)
    return _PoolChunks.apply(*rows, chunk_size)


class _PoolChunks(torch.autograd.Function):
    @staticmethod
    def forward(ctx, k, v, scores, bias, chunk_size: int):
        ctx.chunk_size, ctx.shape, ctx.learned = chunk_size, k.shape, scores is not None
        k, v = _whole_heads(k), _whole_heads(v)
        out_k, out_v = (k.new_empty(len(k) // chunk_size, *k.shape[1:]) for _ in range(2))
        inputs = (k, v, scores.contiguous(), bias) if ctx.learned else (k, v, k, k)  # unused pointers
        grid, sizes, numbers = _plan(k, v, chunk_size, ctx.learned)
        _pool_forward[grid](*inputs, out_k, out_v, *numbers, **sizes)
        if ctx.learned:
            ctx.save_for_backward(*inputs)
        return out_k, out_v

    @staticmethod
    def backward(ctx, *grads):
        given = [grad.contiguous() for grad in grads]
        grad_k, grad_v = (given[0].new_empty(ctx.shape) for _ in range(2))
        if not ctx.learned:
            grid, sizes, numbers = _plan(grad_k, grad_v, ctx.chunk_size, False)
            _pool_backward[grid](*[grad_k] * 4, *given, grad_k, grad_v, grad_k, *numbers, **sizes)
            return grad_k, grad_v, None, None, None
        k, v, scores, bias = ctx.saved_tensors
        grad_scores = torch.empty(scores.shape, dtype=torch.float32, device=k.device)
        grid, sizes, numbers = _plan(k, v, ctx.chunk_size, True)
        _pool_backward[grid](k, v, scores, bias, *given, grad_k, grad_v, grad_scores, *numbers, **sizes)
        grad_bias = grad_scores.unflatten(0, (-1, ctx.chunk_size)).sum(0).t().flatten()
        return grad_k, grad_v, grad_scores.to(scores.dtype), grad_bias.to(bias.dtype), None


def _plan(k: torch.Tensor, v: torch.Tensor, chunk_size: int, learned: bool):
    """The grid, the compile-time sizes and the numbers of a launch."""
    chunks, heads, d = len(k) // chunk_size, *k.shape[1:]
    block_k, block_d = triton.next_power_of_2(chunk_size), triton.next_power_of_2(d)
    at_once = max(1, TILE // (block_k * block_d))
    sizes = dict(HEADS=heads, K=chunk_size, D=d, LEARNED=learned, BLOCK_C=at_once, BLOCK_K=block_k, BLOCK_D=block_d,
                 num_warps=4 if block_k * block_d <= TILE else 8)  # fmt: skip
    return (triton.cdiv(chunks, at_once), heads), sizes, (chunks, k.stride(0), v.stride(0))


def _whole_heads(x: torch.Tensor) -> torch.Tensor:
    """x [rows, G, d] with the heads of a row side by side; rows may be further apart."""
    return x if x.stride(2) == 1 and x.stride(1) == x.shape[2] else x.contiguous()
