"""Attention over key ranges in plain torch, a block of query rows at a time: exact on any device, linear in memory.

Legend: T query rows, N key rows, H query heads, G key/value heads, d head dimension. Accumulates in fp32.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ksa_model.ranges import KeyRanges

ROWS_PER_BLOCK = 128  # query rows per block; see docs/log.md for the sizes tried


# keys and values [N, G, d] and the rows' ranges over them
Part = tuple[torch.Tensor, torch.Tensor, KeyRanges]


@dataclass
class Softmax:
    """What rows have seen so far: out [T, H, d] in the query's dtype, lse [T, H] fp32 (-inf where nothing)."""

    out: torch.Tensor
    lse: torch.Tensor


def attend(q: torch.Tensor, parts: list[Part], before: Softmax | None = None) -> Softmax:
    """The joint softmax of q [T, H, d] over `parts`, going on from `before`. Twin: `fused.attend`."""
    results = [attend_ranges(q, k, v, ranges) for k, v, ranges in parts]
    if before is not None:
        results.insert(0, (before.out.float(), before.lse))
    out, lse = merge(results)
    return Softmax(out.to(q.dtype), lse)


class Gradient:
    """Gradients of parts under their joint softmax: `add` each group of parts, then take `grad_q` [T, H, d]."""

    def __init__(self, grad_out: torch.Tensor, q: torch.Tensor, softmax: Softmax):
        self._grad_out, self._q, self._lse = grad_out, q, softmax.lse
        self._delta = (grad_out.float() * softmax.out.float()).sum(-1)  # [T, H]
        self._grad_q = torch.zeros(q.shape, dtype=torch.float32, device=q.device)

    def add(self, parts: list[Part]) -> list[list[torch.Tensor]]:
        """Gradients [N, G, d] of every part's keys and values."""
        operands = self._lse, self._delta, self._grad_q
        return [attend_ranges_backward(self._grad_out, self._q, k, v, ranges, *operands) for k, v, ranges in parts]

    @property
    def grad_q(self) -> torch.Tensor:
        return self._grad_q.to(self._q.dtype)


@dataclass(frozen=True)
class _Tile:
    """The scores of one block of query rows in one part, rows grouped so that key/value heads are the batch.

    scores [G, n*group, keys] in fp32, already scaled, -inf where the row does not see the key.
    """

    scores: torch.Tensor
    queries: torch.Tensor  # [G, n*group, d]
    keys: torch.Tensor  # [G, keys, d]


def attend_ranges(q, k, v, ranges: KeyRanges) -> tuple[torch.Tensor, torch.Tensor]:
    """One part alone: q [T, H, d] over k, v [N, G, d] -> out [T, H, d] and lse [T, H], both fp32.

    A row whose range is empty gives out 0 and lse -inf.
    """
    out = torch.zeros(q.shape, dtype=torch.float32, device=q.device)
    lse = torch.full(q.shape[:2], float("-inf"), dtype=torch.float32, device=q.device)
    for block in ranges.blocks(ROWS_PER_BLOCK):
        tile = _tile(q, k, ranges, block)
        tile_lse = torch.logsumexp(tile.scores, dim=-1)
        finite = tile_lse if block.full else tile_lse.masked_fill(tile_lse == float("-inf"), 0.0)
        weights = tile.scores.sub_(finite[..., None]).exp_()
        tile_out = weights @ v[block.keys].transpose(0, 1).float()
        out[block.rows] = _ungroup(tile_out, q.shape[1])
        lse[block.rows] = _ungroup(tile_lse[..., None], q.shape[1])[..., 0]
    return out, lse


def attend_ranges_backward(grad_out, q, k, v, ranges: KeyRanges, lse, delta, grad_q) -> list[torch.Tensor]:
    """Gradients of one part under the merged `lse` and `delta` [T, H]; adds into `grad_q` (fp32), returns dk and dv."""
    grad_k = torch.zeros(k.shape, dtype=torch.float32, device=k.device)
    grad_v = torch.zeros_like(grad_k)
    kv_heads, scale = k.shape[1], q.shape[-1] ** -0.5
    for block in ranges.blocks(ROWS_PER_BLOCK):
        tile = _tile(q, k, ranges, block)
        merged_lse = _group(lse[block.rows, :, None], kv_heads)
        if not block.full:
            merged_lse = merged_lse.masked_fill(merged_lse == float("-inf"), 0.0)
        weights = tile.scores.sub_(merged_lse).exp_()
        tile_grad = _group(grad_out[block.rows], kv_heads).float()
        grad_v[block.keys] += (weights.transpose(1, 2) @ tile_grad).transpose(0, 1)
        grad_scores = tile_grad @ v[block.keys].permute(1, 2, 0).float()
        grad_scores.sub_(_group(delta[block.rows, :, None], kv_heads)).mul_(weights).mul_(scale)
        grad_k[block.keys] += (grad_scores.transpose(1, 2) @ tile.queries).transpose(0, 1)
        grad_q[block.rows] += _ungroup(grad_scores @ tile.keys, q.shape[1])
    return [grad_k.to(k.dtype), grad_v.to(v.dtype)]


def merge(parts: list[tuple[torch.Tensor, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-sum-exp merge of parts (out [T, H, d], lse [T, H]); rows that no part sees stay 0 with lse -inf."""
    if len(parts) == 1:
        return parts[0]
    lse = torch.logsumexp(torch.stack([part_lse for _, part_lse in parts]), dim=0)
    shift = lse.masked_fill(lse == float("-inf"), 0.0)
    weights = [(part_lse - shift).exp()[..., None] for _, part_lse in parts]
    out = parts[0][0] * weights[0]
    for (part_out, _), weight in zip(parts[1:], weights[1:]):
        out.addcmul_(part_out, weight)
    return out, lse


def _tile(q, k, ranges: KeyRanges, block) -> _Tile:
    queries = _group(q[block.rows], k.shape[1]).float()
    keys = k[block.keys].transpose(0, 1).float()
    scores = torch.baddbmm(queries.new_zeros(()), queries, keys.transpose(1, 2), beta=0, alpha=q.shape[-1] ** -0.5)
    if not block.full:
        start, end = (x[block.rows, None] for x in ranges.tensors(q.device))
        column = torch.arange(block.keys.start, block.keys.stop, device=q.device)
        hidden = (column < start) | (column >= end)  # [n, keys]
        group = q.shape[1] // k.shape[1]
        scores.view(k.shape[1], -1, group, len(column)).masked_fill_(hidden[None, :, None, :], float("-inf"))
    return _Tile(scores, queries, keys)


def _group(x: torch.Tensor, kv_heads: int) -> torch.Tensor:
    """[n, H, e] -> [G, n*group, e]: the query heads that share a key/value head become rows of one product."""
    n, heads, e = x.shape
    return x.reshape(n, kv_heads, heads // kv_heads, e).transpose(0, 1).reshape(kv_heads, -1, e)


def _ungroup(x: torch.Tensor, heads: int) -> torch.Tensor:
    """Inverse of `_group`."""
    kv_heads, rows, e = x.shape
    group = heads // kv_heads
    return x.reshape(kv_heads, rows // group, group, e).transpose(0, 1).reshape(-1, heads, e)
