"""Attention over key ranges, in parts that share one softmax.

Legend: T text rows, S summary rows, C chunks, H query heads, G key/value heads, d head dimension.

A part is one set of keys (near text, far summaries) with its key ranges. Parts share one softmax: each can be computed
on its own and merged by its log-sum-exp, and backward hands every part the *merged* output and log-sum-exp, with which
the parts' gradients add up exactly (the identity behind ring attention, arXiv 2310.01889): for joint weights
P = exp(s - lse), dS = P * (dP - rowsum(dO * O)) needs nothing of the other parts but lse and O.

Three modules compute parts, with the same names inside: `blocked` in plain torch on any device, `fused` on CUDA,
`flash_cpu` on the CPU. All accumulate in fp32 and keep nothing larger than their operands.
"""

from __future__ import annotations

import functools
import warnings
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch

from ksa_model import blocked, flash_cpu, reference
from ksa_model.collectives import Arrived, ContextParallel, Exchange, Pending, gather, halo
from ksa_model.config import ModelConfigError
from ksa_model.layout import SequenceLayout
from ksa_model.memory import Kept
from ksa_model.ranges import KeyRanges, to_device


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
    kept: Kept | None = None,
) -> torch.Tensor:
    """KSA of text rows: near text and far summaries under one softmax.

    q_text [T, H, d]; k_text, v_text [T, G, d]; k_summary, v_summary [S, G, d] -> [T, H, d] in q's dtype.
    Rows of padding give 0. With `context`, the rows and `layout` are this rank's share of the sample. `kept` holds the
    result for a second run on the same operands (the dense reference computes it again).
    Twin: `reference.ksa_attention`.
    """
    if backend == "reference":
        return reference.ksa_attention(q_text, k_text, v_text, k_summary, v_summary, layout, window_chunks)
    near = Part(layout.near_ranges(window_chunks), halo(context, window_chunks * layout.chunk_size))
    far = Part(layout.far_ranges(window_chunks), gather(context, "summaries"))
    if near.exchange.travels or far.exchange.travels:  # near text has the shorter way
        operands = q_text, k_text, v_text, k_summary, v_summary
        return _JointAttention.apply((near, far), choose(q_text, backend), kept, *operands)
    operands = q_text, k_summary, v_summary, k_text, v_text
    return _JointAttention.apply((far, near), choose(q_text, backend), kept, *operands)


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
    kept: Kept | None = None,
) -> torch.Tensor:
    """Attention of text over text alone: mixers `F`, `S`, `C`. Shapes and `kept` as in `ksa_attention`."""
    if backend == "reference":
        return reference.text_attention(q, k, v, layout, mixer, window_chunks, window_tokens)
    if mixer == "F":
        exchange = gather(context, "text")
        if exchange.travels:  # a rank's own slices are computed while the others' keys are under way
            parts = Part(layout.own_ranges(), Exchange()), Part(layout.earlier_ranges(), exchange)
            return _JointAttention.apply(parts, choose(q, backend), kept, q, k, v, k, v)
        part = Part(layout.full_ranges(), exchange)
    elif mixer == "S":
        part = Part(layout.sliding_ranges(window_tokens), halo(context, window_tokens - 1))
    else:
        part = Part(layout.near_ranges(window_chunks), halo(context, window_chunks * layout.chunk_size))
    return _JointAttention.apply((part,), choose(q, backend), kept, q, k, v)


def choose(q: torch.Tensor, backend: str) -> ModuleType:
    """The module that computes parts for `backend` `auto`, `blocked` or `fused`. Raises `ModelConfigError`."""
    if backend == "auto" and q.device.type == "cpu":
        return flash_cpu
    if backend == "blocked" or (backend == "auto" and not q.is_cuda):
        return blocked
    try:
        from ksa_model import fused  # needs Triton, which CPU builds of torch come without
    except ImportError as error:
        if backend == "auto":
            return _slower_path(f"Triton is missing ({error})")
        raise ModelConfigError(f"model.attention_backend=fused needs Triton: {error}") from None
    if fused.supports(q):
        return fused
    needs = "a CUDA device of compute capability 8.0 or newer, bf16 or fp16, and head_dim at most 256 in steps of 8"
    has = f"{q.device.type}, {str(q.dtype).removeprefix('torch.')}, head_dim={q.shape[-1]}"
    if q.is_cuda:
        has += ", compute capability {}.{}".format(*torch.cuda.get_device_capability(q.device))
    if backend == "fused":
        raise ModelConfigError(f"model.attention_backend=fused needs {needs}; here it is {has}")
    return _slower_path(f"the fused kernels need {needs}; here it is {has}")


@functools.cache
def _slower_path(why: str) -> ModuleType:
    warnings.warn(f"attention runs on the slower blocked path: {why}", stacklevel=3)
    return blocked


def summary_attention(
    q_summary, k_text, v_text, k_summary, v_summary, layout: SequenceLayout, backend: str = "auto"
) -> torch.Tensor:
    """Attention of summary rows over their own chunk's text and its summaries up to themselves.

    At most k + m keys a row, so one small batched product over chunks: q_summary [S, H, d] -> [S, H, d].
    """
    if backend == "reference":
        return reference.summary_attention(q_summary, k_text, v_text, k_summary, v_summary, layout)
    kernels = choose(q_summary, backend)
    if kernels.__name__ == "ksa_model.fused" and layout.num_chunks:
        found = kernels.summary_attention(q_summary, k_text, v_text, k_summary, v_summary, layout)
        if found is not None:
            return found
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
class Part:
    """One set of keys of a softmax: which of them a row sees, and how they come here from the ranks that hold them."""

    ranges: KeyRanges
    exchange: Exchange


class _JointAttention(torch.autograd.Function):
    """One softmax over several parts; the i-th pair of keys and values belongs to `parts[i]`.

    Every exchange starts before the first part is computed and is waited for when its part's turn comes, so the part
    with the largest exchange stands last; backward runs the other way round. Parts that are here already are handed
    over together, since the fused kernels then join them in one pass.

    A re-run of the block finds the result in `kept` and computes nothing, but exchanges again: backward needs the keys.
    """

    @staticmethod
    def forward(ctx, parts: tuple[Part, ...], kernels, kept: Kept | None, q, *keys_and_values):
        own = zip(keys_and_values[::2], keys_and_values[1::2])
        pending = [part.exchange.start(k, v) for part, (k, v) in zip(parts, own)]
        seen: list[torch.Tensor] = []
        found = None if kept is None else kept.take()
        softmax: Any = None if found is None else kernels.Softmax(*found)
        for group in _groups(parts):
            arrived = [(*pending[i].wait(), parts[i].ranges) for i in group]
            seen += [x for k, v, _ in arrived for x in (k, v)]
            if found is None:
                softmax = kernels.attend(q, arrived, softmax)
        if kept is not None and found is None:
            kept.put(softmax.out, softmax.lse)
        ctx.parts, ctx.kernels = parts, kernels
        ctx.save_for_backward(q, softmax.out, softmax.lse, *seen)
        return softmax.out

    @staticmethod
    def backward(ctx, grad_out):
        q, out, lse, *seen = ctx.saved_tensors
        parts, kernels = ctx.parts, ctx.kernels
        gradient = kernels.Gradient(grad_out, q, kernels.Softmax(out, lse))
        pending: dict[int, Pending | Arrived] = {}
        for group in reversed(_groups(parts)):
            found = gradient.add([(seen[2 * i], seen[2 * i + 1], parts[i].ranges) for i in group])
            pending |= {i: parts[i].exchange.start_backward(*grads) for i, grads in zip(group, found)}
            del found  # of a million rows that travel, gigabytes beside the next part's
        grads = [grad for i in range(len(parts)) for grad in pending[i].wait()]
        return None, None, None, gradient.grad_q, *grads


def _groups(parts: tuple[Part, ...]) -> list[list[int]]:
    """Parts to compute together: all of them, or one by one where some have to travel."""
    if any(part.exchange.travels for part in parts):
        return [[i] for i in range(len(parts))]
    return [list(range(len(parts)))]
