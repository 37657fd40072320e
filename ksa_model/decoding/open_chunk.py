"""The open chunk of each request, in layers that pool chunks (mixers `H` and `P`).

Legend: B requests, k tokens a chunk, G key/value heads, d head dimension.

A pooled key is a weighted mean of keys before their norm and rotation, and a decoding cache keeps keys after them. So
each request keeps the sums over its open chunk: of the weights, and of the weighted keys and values. Weights are
relative to the largest score so far, as in an online softmax. The sums do not depend on the length of the text.
"""

from __future__ import annotations

import numpy as np
import torch

from ksa_model.ops.pooling import ChunkRows


class OpenChunk:
    """`sums` fp32 [B, G, 2, d]: weighted keys and values. `weights` fp32 [B, G, 2]: the largest score, and the sum of
    the weights. Both are updated in place, as recorded CUDA graphs require."""

    def __init__(self, num_requests: int, kv_heads: int, head_dim: int, device: torch.device):
        self.sums = torch.zeros(num_requests, kv_heads, 2, head_dim, device=device)
        self.weights = torch.zeros(num_requests, kv_heads, 2, device=device)

    @property
    def allocated_bytes(self) -> int:
        """Bytes of both tensors."""
        return sum(x.numel() * x.element_size() for x in (self.sums, self.weights))

    def prefill(self, rows: ChunkRows, ends: np.ndarray, lengths: np.ndarray, chunk_size: int) -> None:
        """Take the last, incomplete chunk of each prompt, int64 [B]: `ends` are the rows after its last token in
        `rows`, `lengths` its tokens."""
        held, inside = lengths % chunk_size, np.arange(chunk_size)
        index = np.minimum((ends - held)[:, None] + inside, len(rows.k) - 1)
        device = self.sums.device
        at, real = torch.from_numpy(index).to(device), torch.from_numpy(inside < held[:, None]).to(device)
        scores = self.sums.new_zeros(*index.shape, self.sums.shape[1])
        if rows.scores is not None and rows.bias is not None:
            scores = rows.scores[at].float() + rows.bias.float().view(-1, chunk_size).t()
        scores = scores.masked_fill(~real[..., None], float("-inf"))
        top = scores.amax(1)
        top = torch.where(real[:, :1], top, 0.0)  # a chunk without tokens
        weights = (scores - top[:, None]).exp()
        both = torch.stack([rows.k[at], rows.v[at]], 3).float()  # [B, k, G, 2, d]
        self.sums.copy_(torch.einsum("bkg,bkgxd->bgxd", weights, both))
        self.weights.copy_(torch.stack([top, weights.sum(1)], -1))

    def add(self, rows: ChunkRows, position: torch.Tensor, chunk_size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Add a token of each request, `rows` [B, ...], at `position` int64 [B]. Returns the pooled key and value
        [B, G, d] of its chunk up to it; they are final when the chunk is complete."""
        inside = position % chunk_size
        begun = (inside > 0)[:, None]
        score = torch.zeros_like(self.weights[..., 0])
        if rows.scores is not None and rows.bias is not None:
            score = rows.scores.float() + rows.bias.float().view(-1, chunk_size).t()[inside]
        top, total = self.weights.unbind(-1)
        highest = torch.where(begun, torch.maximum(top, score), score)
        decay, weight = torch.where(begun, (top - highest).exp(), 0.0), (score - highest).exp()
        total = total * decay + weight
        both = torch.stack([rows.k, rows.v], 2).float()
        self.sums.mul_(decay[..., None, None]).add_(weight[..., None, None] * both)
        self.weights.copy_(torch.stack([highest, total], -1))
        pooled = (self.sums / total[..., None, None]).to(rows.k.dtype)
        return pooled[:, :, 0], pooled[:, :, 1]
