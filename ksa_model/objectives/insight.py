"""The attention weight that text rows give to summaries, by layer and distance, without a [T, T] tensor.

Legend: n text rows of a block, H query heads, G key/value heads, d head dimension, N keys of a block.
"""

from __future__ import annotations

import torch

from ksa_model.layers.attention import Attention, Heads
from ksa_model.layout.ranges import Block, KeyRanges
from ksa_model.layout.sequence import SequenceLayout
from ksa_model.model import Decoder

_ROWS = 128  # query rows at a time; the largest tensor has this many rows, with a column for each summary of the sample


@torch.no_grad()
def summary_weights(model: Decoder, tokens: torch.Tensor, layout: SequenceLayout) -> dict[int, torch.Tensor]:
    """Layer -> fp64 [2, bins]. Row 0: the softmax weight that text rows give to the summaries of a bin, averaged over
    heads and summed over rows. Row 1: the number of text rows that attend to a summary of the bin.

    Bin b has the summaries of chunks that are 2^b to 2^(b+1) - 1 chunks back. Results of several samples can be added;
    row 0 / row 1 is the mean weight per row. The remaining weight of a row goes to text. tokens: int64 [T]. Reports `K`
    layers, and `H` and `P` layers with pooled keys for summaries. Needs a model without tensor and context parallelism.
    """
    bins = max(1, layout.num_chunks.bit_length())
    found: dict[int, torch.Tensor] = {}

    def core(attention: Attention, heads: Heads, layout: SequenceLayout):
        if attention.layer.has_far:
            found[attention.layer.index] = _weights(heads, layout, attention.layer.window_chunks, bins)
        return attention.core(attention, heads, layout)

    model.hidden(tokens, layout, core)
    return found


def _weights(heads: Heads, layout: SequenceLayout, window_chunks: int, bins: int) -> torch.Tensor:
    k_far = heads.far_keys
    q_far = heads.q if heads.q_far is None else heads.q_far
    assert k_far is not None
    device = heads.q.device
    near, far = layout.near_ranges(window_chunks), layout.far_ranges(window_chunks)
    near_blocks = {block.rows.start: block for block in near.blocks(_ROWS)}
    sums = torch.zeros(2, bins, dtype=torch.float64, device=device)
    for block in far.blocks(_ROWS):
        rows = torch.arange(block.rows.start, block.rows.stop, device=device)
        summaries = torch.arange(block.keys.start, block.keys.stop, device=device)
        scores = _scores(q_far, k_far, far, block)  # [H, n, N]
        text = _scores(heads.q, heads.k, near, near_blocks[block.rows.start])
        total = torch.logaddexp(scores.logsumexp(-1), text.logsumexp(-1))
        weights = torch.nan_to_num((scores - total[..., None]).exp()).mean(0)
        back = rows[:, None] // layout.chunk_size - summaries[None, :] // layout.summary_tokens
        visible = torch.isfinite(scores[0])
        bin_of = torch.where(visible, back.clamp(min=1).log2().floor().long(), bins)  # one more bin for the rest
        by_row = torch.zeros(len(rows), bins + 1, dtype=torch.float32, device=device)
        by_row.scatter_add_(1, bin_of, weights)
        has = torch.zeros_like(by_row).scatter_(1, bin_of, 1.0)
        sums += torch.stack([by_row[:, :bins].sum(0), has[:, :bins].sum(0)])
    return sums


def _scores(q: torch.Tensor, k: torch.Tensor, ranges: KeyRanges, block: Block) -> torch.Tensor:
    """fp32 [H, n, N], -inf where a row does not attend to a key."""
    keys = k[block.keys].repeat_interleave(q.shape[1] // k.shape[1], dim=1).float()
    scores = torch.einsum("nhd,mhd->hnm", q[block.rows].float(), keys) * q.shape[-1] ** -0.5
    start, end = (x[block.rows, None] for x in ranges.tensors(q.device))
    column = torch.arange(block.keys.start, block.keys.stop, device=q.device)
    return scores.masked_fill_((column < start) | (column >= end), float("-inf"))
