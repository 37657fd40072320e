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
from ksa_model.collectives import ContextParallel, Exchange, Gather, Halo, Returning, gather
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
    near = _text_parts(layout, layout.near_ranges(window_chunks), context, window_chunks * layout.chunk_size)
    far = Part(layout.far_ranges(window_chunks), gather(context, "summaries"), pair=1)
    operands = q_text, k_text, v_text, k_summary, v_summary
    return _JointAttention.apply((far, *near), choose(q_text, backend), kept, *operands)


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
        parts = _text_parts(layout, layout.full_ranges(), context, None)
    elif mixer == "S":
        parts = _text_parts(layout, layout.sliding_ranges(window_tokens), context, window_tokens - 1)
    else:
        parts = _text_parts(layout, layout.near_ranges(window_chunks), context, window_chunks * layout.chunk_size)
    return _JointAttention.apply(parts, choose(q, backend), kept, q, k, v)


def _text_parts(
    layout: SequenceLayout, ranges: KeyRanges, context: ContextParallel | None, rows_back: int | None
) -> tuple[Part, ...]:
    """The parts of text keys, for rows that look `rows_back` rows back, or to the start of the sample (None)."""
    if context is None or context.size == 1:
        return (Part(ranges, Exchange()),)
    own = Part(layout.own(ranges), Exchange())
    if rows_back is None:
        return own, Part(layout.before_own(ranges), Gather(context, "text"))
    if rows_back == 0:
        return (own,)
    return own, Part(layout.in_halo(ranges, rows_back), Halo(context, rows_back))


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
    pair: int = 0  # of the attention's keys and values: text, summaries


class _JointAttention(torch.autograd.Function):
    """One softmax over several parts of one or two pairs of keys and values.

    What has to come from other ranks is asked for first and waited for last: the parts that are here are computed while
    it is under way. Backward goes the other way round, so that what belongs to other ranks leaves while the rest is
    computed. Parts of either kind are handed over together, since the fused kernels join them in one pass.

    A re-run of the block finds the result in `kept` and computes nothing, but exchanges again: backward needs the keys.
    """

    @staticmethod
    def forward(ctx, parts: tuple[Part, ...], kernels, kept: Kept | None, q, *keys_and_values):
        own = list(zip(keys_and_values[::2], keys_and_values[1::2]))
        pending = [part.exchange.start(*own[part.pair]) for part in parts]
        seen: list[tuple[torch.Tensor, torch.Tensor]] = [own[part.pair] for part in parts]
        found = None if kept is None else kept.take()
        softmax: Any = None if found is None else kernels.Softmax(*found)
        for group in _groups(parts):
            for i in group:
                seen[i] = pending[i].wait()
            if found is None:
                softmax = kernels.attend(q, [(*seen[i], parts[i].ranges) for i in group], softmax)
        if kept is not None and found is None:
            kept.put(softmax.out, softmax.lse)
        ctx.parts, ctx.kernels, ctx.pairs = parts, kernels, len(own)
        ctx.save_for_backward(q, softmax.out, softmax.lse, *(x for both in seen for x in both))
        return softmax.out

    @staticmethod
    def backward(ctx, grad_out):
        q, out, lse, *seen = ctx.saved_tensors
        parts, kernels = ctx.parts, ctx.kernels
        gradient = kernels.Gradient(grad_out, q, kernels.Softmax(out, lse))
        totals: list[Any] = [None] * ctx.pairs
        pending: list[tuple[int, Returning]] = []
        for group in reversed(_groups(parts)):
            found = gradient.add([(seen[2 * i], seen[2 * i + 1], parts[i].ranges) for i in group])
            pending += [(parts[i].pair, parts[i].exchange.start_backward(*grads)) for i, grads in zip(group, found)]
            del found  # of a million rows that travel, gigabytes beside the next part's
        for pair, returning in reversed(pending):  # what a halo returns is a few rows of what was computed here
            totals[pair] = returning.add_to(totals[pair])
        return None, None, None, gradient.grad_q, *(grad for both in totals for grad in both)


def _groups(parts: tuple[Part, ...]) -> list[list[int]]:
    """Parts to compute together: those that are here, then those that have to come."""
    groups = ([i for i, part in enumerate(parts) if part.exchange.travels == travels] for travels in (False, True))
    return [group for group in groups if group]
