"""Pooled keys and values, one for each chunk of text: the far keys of the mixers `H` and `P`, in plain torch.

Legend: T text rows, k tokens a chunk, C = T/k chunks, G key/value heads, d head dimension.

`P` takes the mean of a chunk's keys and that of its values. `H` learns the weights (as the heavily compressed attention
of DeepSeek-V4's report, with one weight for each head instead of each feature): in each head, a softmax over the
chunk's tokens of a score, which is a projection of the layer's input plus a bias for each position in the chunk. With
scores and biases of zero `H` is `P`.

Keys are pooled before their norm and rotation. The pooled key is then normed and rotated as a summary's key is in KSA:
with the same gain, at the position of the chunk's last token. So far keys have the length of near keys.

A chunk that its document does not fill is pooled with its padding, because no row attends to it: text attends to pooled
chunks only from a later chunk of the same document. `triton_pooling` is the twin on a GPU.
"""

from __future__ import annotations

from typing import NamedTuple

import torch


class ChunkRows(NamedTuple):
    """Text rows before the pooling: k, v [T, G, d], not normed, not rotated; of `H`, scores [T, G] and bias [G*k]."""

    k: torch.Tensor
    v: torch.Tensor
    scores: torch.Tensor | None = None
    bias: torch.Tensor | None = None


def pool(rows: ChunkRows, chunk_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Pooled keys and values [C, G, d] in the dtype of k; sums and weights are fp32. Without scores, means."""
    if rows.scores is None or rows.bias is None:
        return _PoolMeans.apply(rows.k, rows.v, chunk_size)
    return _PoolSums.apply(rows.k, rows.v, pool_weights(rows.scores, rows.bias, chunk_size))


def pool_weights(scores: torch.Tensor, bias: torch.Tensor, chunk_size: int) -> torch.Tensor:
    """scores [T, G], bias [G*k] -> fp32 [C, k, G], the weights of the tokens of each chunk, which sum to 1."""
    by_chunk = scores.float().unflatten(0, (-1, chunk_size))
    return torch.softmax(by_chunk + bias.float().view(-1, chunk_size).t(), dim=1)


class _PoolMeans(torch.autograd.Function):
    """The means of each chunk. Saves nothing."""

    @staticmethod
    def forward(ctx, k, v, chunk_size: int):
        ctx.chunk_size = chunk_size
        return tuple(x.unflatten(0, (-1, chunk_size)).float().mean(1).to(x.dtype) for x in (k, v))

    @staticmethod
    def backward(ctx, *grads):
        size = ctx.chunk_size
        return *((grad / size).unsqueeze(1).expand(-1, size, -1, -1).flatten(0, 1) for grad in grads), None


class _PoolSums(torch.autograd.Function):
    """Sums of each chunk with fp32 weights [C, k, G]. Saves its inputs; autograd would save them in fp32."""

    @staticmethod
    def forward(ctx, k, v, weights):
        ctx.save_for_backward(k, v, weights)
        return tuple(torch.einsum("ckg,ckgd->cgd", weights, _by_chunk(x, weights)).to(x.dtype) for x in (k, v))

    @staticmethod
    def backward(ctx, *grads):
        k, v, weights = ctx.saved_tensors
        grad_weights = torch.zeros_like(weights)
        grad_rows = []
        for x, grad in zip((k, v), grads):
            grad_weights += torch.einsum("cgd,ckgd->ckg", grad.float(), _by_chunk(x, weights))
            grad_rows.append((weights[..., None] * grad.float()[:, None]).flatten(0, 1).to(x.dtype))
        return *grad_rows, grad_weights


def _by_chunk(x: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Rows [T, G, d] -> fp32 [C, k, G, d]."""
    return x.unflatten(0, (-1, weights.shape[1])).float()
