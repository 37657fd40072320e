"""Attention over key ranges, in parts that share one softmax.

Legend: T text rows, S summary rows, C chunks, H query heads, G key/value heads, d head dimension.

A part is one set of keys (near text, far summaries) with its key ranges. Each part's forward returns its own normalised
output and log-sum-exp; `merge` combines them into the joint softmax. The backward hands every part the *merged* output
and log-sum-exp, with which the parts' gradients add up exactly (the identity behind ring attention, arXiv 2310.01889):
for joint weights P = exp(s - lse), dS = P * (dP - rowsum(dO * O)) needs nothing of the other parts but lse and O.

The blocked path below is plain torch: it walks over blocks of query rows, touches only the keys their ranges name and
keeps no tensor larger than a block. It runs on any device and in any dtype, accumulating in fp32.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ksa_model import reference
from ksa_model.collectives import ContextParallel, Exchange, gather, halo
from ksa_model.layout import KeyRanges, SequenceLayout

ROWS_PER_BLOCK = 128  # query rows per block; see docs/log.md for the sizes tried


def ksa_attention(
    q_text,
    k_text,
    v_text,
    k_summary,
    v_summary,
    layout: SequenceLayout,
    window_chunks: int,
    backend: str = "auto",
    context: ContextParallel | None = None,
) -> torch.Tensor:
    """KSA of text rows: near text and far summaries under one softmax.

    q_text [T, H, d]; k_text, v_text [T, G, d]; k_summary, v_summary [S, G, d] -> [T, H, d] in q's dtype.
    Rows of padding give 0. With `context`, the rows and `layout` are this rank's share of the sample.
    Twin: `reference.ksa_attention`.
    """
    if backend == "reference":
        return reference.ksa_attention(q_text, k_text, v_text, k_summary, v_summary, layout, window_chunks)
    near = Part(layout.near_ranges(window_chunks), halo(context, window_chunks * layout.chunk_size))
    far = Part(layout.far_ranges(window_chunks), gather(context, "summaries"))
    return _JointAttention.apply((near, far), q_text, k_text, v_text, k_summary, v_summary)


def text_attention(
    q,
    k,
    v,
    layout: SequenceLayout,
    mixer: str,
    window_chunks: int = 0,
    window_tokens: int = 0,
    backend: str = "auto",
    context: ContextParallel | None = None,
) -> torch.Tensor:
    """Attention of text over text alone: mixers `F`, `S`, `C`. Shapes as in `ksa_attention`."""
    if backend == "reference":
        return reference.text_attention(q, k, v, layout, mixer, window_chunks, window_tokens)
    if mixer == "F":
        part = Part(layout.full_ranges(), gather(context, "text"))
    elif mixer == "S":
        part = Part(layout.sliding_ranges(window_tokens), halo(context, window_tokens - 1))
    else:
        part = Part(layout.near_ranges(window_chunks), halo(context, window_chunks * layout.chunk_size))
    return _JointAttention.apply((part,), q, k, v)


def summary_attention(
    q_summary, k_text, v_text, k_summary, v_summary, layout: SequenceLayout, backend: str = "auto"
) -> torch.Tensor:
    """Attention of summary rows over their own chunk's text and its summaries up to themselves.

    At most k + m keys a row, so one small batched product over chunks: q_summary [S, H, d] -> [S, H, d].
    """
    if backend == "reference":
        return reference.summary_attention(q_summary, k_text, v_text, k_summary, v_summary, layout)
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
    length = layout.cached(("chunk_lengths", device), lambda: torch.from_numpy(layout.chunk_lengths).to(device))
    text = torch.arange(layout.chunk_size, device=device)[None, :] < length[:, None]
    text = text[:, None, :].expand(-1, m, -1)
    own = torch.ones(m, m, dtype=torch.bool, device=device).tril().expand(layout.num_chunks, -1, -1)
    return torch.cat([text, own], dim=2).repeat_interleave(group, dim=1)[:, None]


@dataclass(frozen=True)
class Part:
    """One set of keys of a softmax: which of them a row sees, and how they come here from the ranks that hold them."""

    ranges: KeyRanges
    exchange: Exchange


class _JointAttention(torch.autograd.Function):
    """One softmax over several parts; the i-th pair of keys and values belongs to `parts[i]`.

    Every exchange starts before the first part is computed and is waited for when its part's turn comes, so the part
    with the largest exchange stands last; backward runs the other way round.
    """

    @staticmethod
    def forward(ctx, parts: tuple[Part, ...], q, *keys_and_values):
        own = zip(keys_and_values[::2], keys_and_values[1::2])
        pending = [part.exchange.start(k, v) for part, (k, v) in zip(parts, own)]
        seen, results = [], []
        for part, arriving in zip(parts, pending):
            k, v = arriving.wait()
            seen += [k, v]
            results.append(attend_ranges(q, k, v, part.ranges))
        out, lse = merge(results)
        out = out.to(q.dtype)
        ctx.parts = parts
        ctx.save_for_backward(q, out, lse, *seen)
        return out

    @staticmethod
    def backward(ctx, grad_out):
        q, out, lse, *seen = ctx.saved_tensors
        delta = (grad_out.float() * out.float()).sum(-1)  # [T, H]
        grad_q = torch.zeros(q.shape, dtype=torch.float32, device=q.device)
        pending = []
        for part, k, v in reversed(list(zip(ctx.parts, seen[::2], seen[1::2]))):
            grads = attend_ranges_backward(grad_out, q, k, v, part.ranges, lse, delta, grad_q)
            pending.append(part.exchange.start_backward(*grads))
        grads = [grad for arriving in reversed(pending) for grad in arriving.wait()]
        return None, grad_q.to(q.dtype), *grads


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
    weighted = [part_out * (part_lse - shift).exp()[..., None] for part_out, part_lse in parts]
    return torch.stack(weighted).sum(0), lse


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
