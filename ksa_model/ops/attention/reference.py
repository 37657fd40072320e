"""The attention rule, stated from its definition, with a dense fp32 attention: the ground truth of the tests.

Nothing here is fast, and nothing shares code with the kernels: masks are built pair by pair from document and chunk
numbers (arXiv 2604.24432, section 3), while the kernels work from key ranges.

Legend: T text rows, S summary rows, H query heads, G key/value heads, d head dimension.
"""

from __future__ import annotations

import torch

from ksa_model.layout.sequence import SequenceLayout


def text_to_text_mask(layout: SequenceLayout, mixer: str, window: int = 0) -> torch.Tensor:
    """bool [T, T]: whether text row i (first axis) attends to text row j, for mixer `K`, `F`, `S` or `C`.

    `window`: of `S` in tokens, of `K` and `C` in chunks, of `F` unused.
    """
    row = torch.arange(layout.num_text)
    chunk = row // layout.chunk_size
    document, real = _documents(layout)
    same = (document[:, None] == document[None, :]) & real[:, None] & real[None, :]
    causal = row[None, :] <= row[:, None]
    if mixer == "F":
        return same & causal
    if mixer == "S":
        return same & causal & (row[:, None] - row[None, :] < window)
    return same & causal & (chunk[None, :] >= chunk[:, None] - window)


def text_to_summary_mask(layout: SequenceLayout, window_chunks: int) -> torch.Tensor:
    """bool [T, S]: the summaries of exactly the chunks of its document that a row does not attend to as text."""
    chunk_of_row = torch.arange(layout.num_text) // layout.chunk_size
    chunk_of_summary = torch.arange(layout.num_summary) // layout.summary_tokens
    document, real = _documents(layout)
    document_of_summary = document[chunk_of_summary * layout.chunk_size]
    chunk_is_real = torch.from_numpy(layout.chunk_lengths)[chunk_of_summary] > 0
    same = (document[:, None] == document_of_summary[None, :]) & real[:, None] & chunk_is_real[None, :]
    return same & (chunk_of_summary[None, :] < chunk_of_row[:, None] - window_chunks)


def summary_masks(layout: SequenceLayout) -> tuple[torch.Tensor, torch.Tensor]:
    """bool [S, T] and bool [S, S]: a summary attends to the text of its own chunk and its summaries up to itself."""
    chunk_of_row = torch.arange(layout.num_text) // layout.chunk_size
    summary = torch.arange(layout.num_summary)
    chunk = summary // layout.summary_tokens
    _, real = _documents(layout)
    text = (chunk[:, None] == chunk_of_row[None, :]) & real[None, :]
    own = (chunk[:, None] == chunk[None, :]) & (summary[None, :] <= summary[:, None])
    return text, own


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Softmax attention of q [N, H, d] over k, v [M, G, d] under mask [N, M], in fp32. A row without keys gives 0."""
    group = q.shape[1] // k.shape[1]
    k, v = (x.float().repeat_interleave(group, dim=1) for x in (k, v))
    scores = torch.einsum("nhd,mhd->hnm", q.float(), k) * q.shape[-1] ** -0.5
    scores = scores.masked_fill(~mask.to(q.device), float("-inf"))
    weights = torch.nan_to_num(torch.softmax(scores, dim=-1))  # a row of -inf gives 0/0
    return torch.einsum("hnm,mhd->nhd", weights, v).to(q.dtype)


def ksa_attention(q_text, k_text, v_text, k_summary, v_summary, layout: SequenceLayout, window_chunks: int, q_far=None):
    """Twin of `joint.ksa_attention`: one softmax over near text and far summaries together."""
    near, far = text_to_text_mask(layout, "K", window_chunks), text_to_summary_mask(layout, window_chunks)
    values = torch.cat([v_text, v_summary])
    if q_far is None:
        return attend(q_text, torch.cat([k_text, k_summary]), values, torch.cat([near, far], dim=1))
    # Two kinds of queries: twice the features, of which every key has one half.
    q = torch.cat([q_text, q_far], dim=-1) * 2**0.5  # `attend` divides by the root of the features
    keys = torch.cat(
        [
            torch.nn.functional.pad(k_text, (0, k_text.shape[-1])),
            torch.nn.functional.pad(k_summary, (k_text.shape[-1], 0)),
        ]
    )
    return attend(q, keys, values, torch.cat([near, far], dim=1))


def summary_attention(q_summary, k_text, v_text, k_summary, v_summary, layout: SequenceLayout):
    """Twin of `blocked.summary_attention`."""
    mask = torch.cat(summary_masks(layout), dim=1)
    return attend(q_summary, torch.cat([k_text, k_summary]), torch.cat([v_text, v_summary]), mask)


def text_attention(q, k, v, layout: SequenceLayout, mixer: str, window: int = 0):
    """Twin of `joint.text_attention`: the mixers `F`, `S` and `C`."""
    return attend(q, k, v, text_to_text_mask(layout, mixer, window))


def _documents(layout: SequenceLayout) -> tuple[torch.Tensor, torch.Tensor]:
    """The document of each text row (the number of its first chunk), and whether the row holds a real token."""
    first = torch.from_numpy(layout.first_chunks).repeat_interleave(layout.chunk_size)
    offset = torch.arange(layout.num_text) % layout.chunk_size
    length = torch.from_numpy(layout.chunk_lengths).repeat_interleave(layout.chunk_size)
    return first, offset < length
