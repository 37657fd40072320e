"""Attention over key ranges, in parts that share one softmax.

Legend: T text rows, S summary rows, H query heads, G key/value heads, d head dimension.

A part is one set of keys (near text, far summaries) with its key ranges. Each part can be computed on its own and
merged with the others by its log-sum-exp. The backward pass gives every part the *merged* output and log-sum-exp; then
the gradients of the parts add up exactly (the identity behind ring attention, arXiv 2310.01889): with the joint weights
P = exp(s - lse), dS = P * (dP - rowsum(dO * O)) depends on the other parts through lse and O only.

Three modules compute parts, with the same names: `blocked` in plain torch on any device, `cpu`, and `cuda`. All
accumulate in fp32 and keep nothing larger than their operands. `ksa_model.ops.backend` chooses one for each model.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch

from ksa_model.layout.ranges import KeyRanges
from ksa_model.layout.sequence import SequenceLayout
from ksa_model.memory import SavedOutput
from ksa_model.ops.attention import reference
from ksa_model.ops.attention.parts import Part, Softmax
from ksa_model.parallel.context import ContextParallel, Exchange, Gather, Halo, PendingGradients, gather_exchange


@dataclass(frozen=True)
class Source:
    """Where the keys and values of one part come from, and which of them each row attends to."""

    ranges: KeyRanges
    exchange: Exchange  # brings them from the ranks that hold them
    pair: int = 0  # index into the attention's pairs of keys and values: 0 text, 1 summaries
    query: int = 0  # index into its queries: 0 those of near text, 1 those of the far part where they differ


def ksa_attention(
    inputs: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor],
    layout: SequenceLayout,
    window_chunks: int,
    kernels: ModuleType,
    context: ContextParallel | None = None,
    kept: SavedOutput | None = None,
    q_far: torch.Tensor | None = None,
) -> torch.Tensor:
    """KSA of text rows: near text and far summaries under one softmax. Twin: `reference.ksa_attention`.

    inputs: q_text [T, H, d]; k_text, v_text [T, G, d]; k_summary, v_summary [S, G, d] -> [T, H, d] in q's dtype. The
    mixers `H` and `P` pass pooled keys and values for those of summaries, one for each chunk. Rows
    of padding give 0. `kernels`: `Backend.attention`. With `context`, the rows and `layout` are this rank's share of
    the sample. `kept` holds the result for a second run on the same inputs (the dense reference computes it again).
    `q_far` [T, H, d]: queries of the far part; None: those of near text.
    """
    if kernels is reference:
        return reference.ksa_attention(*inputs, layout, window_chunks, q_far)
    near = _text_sources(layout, layout.near_ranges(window_chunks), context, window_chunks * layout.chunk_size)
    far = Source(layout.far_ranges(window_chunks), gather_exchange(context, "summaries"), 1, int(q_far is not None))
    queries = inputs[:1] if q_far is None else (inputs[0], q_far)
    return _JointAttention.apply((far, *near), kernels, kept, len(queries), *queries, *inputs[1:])


def text_attention(
    inputs: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    layout: SequenceLayout,
    mixer: str,
    window: int,
    kernels: ModuleType,
    context: ContextParallel | None = None,
    kept: SavedOutput | None = None,
) -> torch.Tensor:
    """Attention of text over text alone, for the mixers `F`, `S` and `C`. Twin: `reference.text_attention`.

    inputs: q [T, H, d]; k, v [T, G, d] -> [T, H, d]. `window`: of `S` in tokens, of `C` in chunks, of `F` unused. The
    other arguments are those of `ksa_attention`.
    """
    if kernels is reference:
        return reference.text_attention(*inputs, layout, mixer, window)
    if mixer == "F":
        sources = _text_sources(layout, layout.full_ranges(), context, None)
    elif mixer == "S":
        sources = _text_sources(layout, layout.sliding_ranges(window), context, window - 1)
    else:
        sources = _text_sources(layout, layout.near_ranges(window), context, window * layout.chunk_size)
    return _JointAttention.apply(sources, kernels, kept, 1, *inputs)


def _text_sources(
    layout: SequenceLayout, ranges: KeyRanges, context: ContextParallel | None, rows_back: int | None
) -> tuple[Source, ...]:
    """The parts of text keys, for rows that attend to up to `rows_back` rows before them (None: the whole sample)."""
    if context is None or context.size == 1:
        return (Source(ranges, Exchange()),)
    own = Source(layout.local_keys(ranges), Exchange())
    if rows_back is None:
        return own, Source(layout.remote_prefix(ranges), Gather(context, "text"))
    if rows_back == 0:
        return (own,)
    return own, Source(layout.halo_keys(ranges, rows_back), Halo(context, rows_back))


class _JointAttention(torch.autograd.Function):
    """One softmax over several parts of one or two pairs of keys and values.

    Keys from other ranks are requested first and awaited last; local parts are computed in the meantime. Backward goes
    in the opposite order, so that gradients for other ranks are sent while the rest is computed. Local parts are
    computed in one call and remote parts in another, because the CUDA kernels join the parts of a call in one pass.

    When a block is recomputed, `kept` holds the result and nothing is computed, but keys are exchanged again: backward
    needs them.
    """

    @staticmethod
    def forward(ctx, sources: tuple[Source, ...], kernels: ModuleType, kept: SavedOutput | None, num_queries, *tensors):
        queries, keys_and_values = tensors[:num_queries], tensors[num_queries:]
        own = list(zip(keys_and_values[::2], keys_and_values[1::2]))
        pending = [source.exchange.start(*own[source.pair]) for source in sources]
        pairs: list[tuple[torch.Tensor, torch.Tensor]] = [own[source.pair] for source in sources]
        found = None if kept is None else kept.take()
        softmax: Any = None if found is None else Softmax(*found)
        for query, group in _groups(sources):
            for i in group:
                pairs[i] = pending[i].wait()
            if found is None:
                softmax = kernels.attend(queries[query], [Part(*pairs[i], sources[i].ranges) for i in group], softmax)
        if kept is not None and found is None:
            kept.put(softmax.out, softmax.lse)
        ctx.sources, ctx.kernels, ctx.num_queries, ctx.num_pairs = sources, kernels, num_queries, len(own)
        ctx.save_for_backward(softmax.out, softmax.lse, *queries, *(x for pair in pairs for x in pair))
        return softmax.out

    @staticmethod
    def backward(ctx, grad_out):
        out, lse, *tensors = ctx.saved_tensors
        queries, keys_and_values = tensors[: ctx.num_queries], tensors[ctx.num_queries :]
        sources, pairs = ctx.sources, list(zip(keys_and_values[::2], keys_and_values[1::2]))
        gradients = [ctx.kernels.Gradient(grad_out, q, Softmax(out, lse)) for q in queries]
        totals: list[Any] = [None] * ctx.num_pairs
        pending: list[tuple[int, PendingGradients]] = []
        for query, group in reversed(_groups(sources)):
            found = gradients[query].add([Part(*pairs[i], sources[i].ranges) for i in group])
            pending += [(sources[i].pair, sources[i].exchange.start_backward(*grads)) for i, grads in zip(group, found)]
            del found  # with a million remote rows these are gigabytes, beside those of the next group
        for pair, returning in reversed(pending):  # the large local gradient first, then a halo's few rows
            totals[pair] = returning.add_to(totals[pair])
        grads = (gradient.grad_q for gradient in gradients)
        return None, None, None, None, *grads, *(grad for both in totals for grad in both)


def _groups(sources: tuple[Source, ...]) -> list[tuple[int, list[int]]]:
    """Indices of the parts to compute together, each with its query: local parts, then remote ones.

    The first group ends with near text of this rank, because `cuda.attend` takes rows without keys in the last part of
    the first call for padding.
    """
    groups = (
        (
            query,
            [i for i, source in enumerate(sources) if (source.exchange.communicates, source.query) == (remote, query)],
        )
        for remote in (False, True)
        for query in (0, 1)
    )
    return [(query, group) for query, group in groups if group]
