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
from ksa_model.blocked import attend_ranges, attend_ranges_backward, merge
from ksa_model.collectives import ContextParallel, Exchange, gather, halo
from ksa_model.layout import KeyRanges, SequenceLayout


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
