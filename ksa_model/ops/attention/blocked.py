"""Attention over key ranges in plain torch, a block of query rows at a time. Runs on any device; memory is linear.

Legend: T query rows, N key rows, H query heads, G key/value heads, d head dimension, C chunks of k text rows and m
summaries. Accumulates in fp32.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ksa_model.layout.ranges import KeyRanges, to_device
from ksa_model.layout.sequence import SequenceLayout
from ksa_model.ops.attention.parts import Part, Softmax

ROWS_PER_BLOCK = 128  # query rows per block; see docs/log.md for the sizes tried


def attend(q: torch.Tensor, parts: list[Part], before: Softmax | None = None) -> Softmax:
    """The joint softmax of q [T, H, d] over `parts`, continued from `before`. Twin: `cuda.attend`."""
    return join(q, [attend_ranges(q, k, v, ranges) for k, v, ranges in parts], before)


def join(q: torch.Tensor, results: list[tuple[torch.Tensor, torch.Tensor]], before: Softmax | None) -> Softmax:
    """The joint softmax of `before` and parts computed alone, each out [T, H, d] and lse [T, H] as `attend_ranges`
    returns them."""
    if before is not None:
        results = [(before.out.float(), _flip_empty(before.lse.t())), *results]
    out, lse = merge(results)
    return Softmax(out.to(q.dtype), _flip_empty(lse.t()))


def _flip_empty(lse: torch.Tensor) -> torch.Tensor:
    """Log-sum-exps with the sign of every infinity flipped: -inf marks a row without keys in `merge`, +inf in
    `Softmax`."""
    return torch.where(lse.isinf(), -lse, lse)


class Gradient:
    """Gradients of parts under their joint softmax: `add` each group of parts, then read `grad_q` [T, H, d]."""

    def __init__(self, grad_out: torch.Tensor, q: torch.Tensor, softmax: Softmax):
        self._grad_out, self._q, self._lse = grad_out, q, softmax.lse.t()
        self._delta = (grad_out.float() * softmax.out.float()).sum(-1)  # [T, H]
        self._grad_q = torch.zeros(q.shape, dtype=torch.float32, device=q.device)

    def add(self, parts: list[Part]) -> list[list[torch.Tensor]]:
        """Gradients [N, G, d] of every part's keys and values."""
        operands = self._lse, self._delta, self._grad_q
        return [attend_ranges_backward(self._grad_out, self._q, k, v, ranges, *operands) for k, v, ranges in parts]

    @property
    def grad_q(self) -> torch.Tensor:
        """The gradient of q over all parts added so far."""
        return self._grad_q.to(self._q.dtype)


def summary_attention(q_summary, k_text, v_text, k_summary, v_summary, layout: SequenceLayout) -> torch.Tensor:
    """Attention of summary rows over the text of their own chunk and its summaries up to themselves.

    A row has at most k + m keys, so this is one small attention batched over chunks. q_summary [C*m, H, d]; k_text,
    v_text [C*k, G, d]; k_summary, v_summary [C*m, G, d] -> [C*m, H, d]. Twins: `reference.summary_attention`,
    `cuda.summary_attention`.
    """
    chunks, m = layout.num_chunks, layout.summary_tokens
    heads, head_dim = q_summary.shape[1:]
    kv_heads = k_text.shape[1]
    group = heads // kv_heads

    def per_chunk(text: torch.Tensor, summary: torch.Tensor) -> torch.Tensor:
        """[C, G, k+m, d]: a chunk's text rows, then its summary rows."""
        both = torch.cat(
            [text.view(chunks, -1, kv_heads, head_dim), summary.view(chunks, m, kv_heads, head_dim)], dim=1
        )
        return both.transpose(1, 2)

    keys, values = per_chunk(k_text, k_summary), per_chunk(v_text, v_summary)
    queries = (
        q_summary.view(chunks, m, kv_heads, group, head_dim)
        .permute(0, 2, 1, 3, 4)
        .reshape(chunks, kv_heads, m * group, head_dim)
    )
    out = torch.nn.functional.scaled_dot_product_attention(
        queries, keys, values, attn_mask=_summary_mask(layout, q_summary.device, group)
    )
    return out.view(chunks, kv_heads, m, group, head_dim).permute(0, 2, 1, 3, 4).reshape(chunks * m, heads, head_dim)


def _summary_mask(layout: SequenceLayout, device: torch.device, group: int) -> torch.Tensor:
    """bool [C, 1, m*group, k+m]."""
    m = layout.summary_tokens
    length = layout.cached(("chunk_lengths", device), lambda: to_device(layout.chunk_lengths, device))
    text = torch.arange(layout.chunk_size, device=device)[None, :] < length[:, None]
    text = text[:, None, :].expand(-1, m, -1)
    own = torch.ones(m, m, dtype=torch.bool, device=device).tril().expand(layout.num_chunks, -1, -1)
    return torch.cat([text, own], dim=2).repeat_interleave(group, dim=1)[:, None]


@dataclass(frozen=True)
class _Tile:
    """The scores of one block of query rows in one part, rows grouped so that key/value heads are the batch.

    scores [G, n*group, keys] in fp32, already scaled, -inf where the row may not attend to the key.
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
    """Gradients of one part under the joint `lse` (+inf: no keys) and `delta` [T, H]; adds to `grad_q` (fp32), returns
    those of k and v."""
    grad_k = torch.zeros(k.shape, dtype=torch.float32, device=k.device)
    grad_v = torch.zeros_like(grad_k)
    kv_heads, scale = k.shape[1], q.shape[-1] ** -0.5
    for block in ranges.blocks(ROWS_PER_BLOCK):
        tile = _tile(q, k, ranges, block)
        weights = tile.scores.sub_(_group(lse[block.rows, :, None], kv_heads)).exp_()
        tile_grad = _group(grad_out[block.rows], kv_heads).float()
        grad_v[block.keys] += (weights.transpose(1, 2) @ tile_grad).transpose(0, 1)
        grad_scores = tile_grad @ v[block.keys].permute(1, 2, 0).float()
        grad_scores.sub_(_group(delta[block.rows, :, None], kv_heads)).mul_(weights).mul_(scale)
        grad_k[block.keys] += (grad_scores.transpose(1, 2) @ tile.queries).transpose(0, 1)
        grad_q[block.rows] += _ungroup(grad_scores @ tile.keys, q.shape[1])
    return [grad_k.to(k.dtype), grad_v.to(v.dtype)]


def merge(parts: list[tuple[torch.Tensor, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-sum-exp merge of parts (out [T, H, d], lse [T, H]). A row without keys in all parts stays 0 with lse -inf."""
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
    """[n, H, e] -> [G, n*group, e]: the query heads that share a key/value head become rows of one GEMM."""
    n, heads, e = x.shape
    return x.reshape(n, kv_heads, heads // kv_heads, e).transpose(0, 1).reshape(kv_heads, -1, e)


def _ungroup(x: torch.Tensor, heads: int) -> torch.Tensor:
    """Inverse of `_group`."""
    kv_heads, rows, e = x.shape
    group = heads // kv_heads
    return x.reshape(kv_heads, rows // group, group, e).transpose(0, 1).reshape(-1, heads, e)
