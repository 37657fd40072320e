"""Cross entropy over 16-bit logits in place: logits are read twice and overwritten once, with the gradient.

Legend: n rows, V columns of this tensor rank. The vocabulary may be split over ranks; then the caller combines the
statistics of the ranks between the two steps.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

BLOCK = 4096


@triton.jit
def _loss_statistics(logits, labels, top_out, total_out, picked_out, columns, valid_columns, first_column,
                BLOCK: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    at, column = logits + row * columns, tl.arange(0, BLOCK)
    top = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for first in range(0, valid_columns, BLOCK):
        value = tl.load(at + first + column, mask=first + column < valid_columns, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(top, value)
        shift = tl.where(higher == float("-inf"), 0.0, higher)
        total = total * tl.exp(top - shift) + tl.exp(value - shift)
        top = higher
    highest = tl.max(top, 0)
    shift = tl.where(highest == float("-inf"), 0.0, highest)
    tl.store(top_out + row, highest)
    tl.store(total_out + row, tl.sum(total * tl.exp(top - shift), 0))
    label = tl.load(labels + row) - first_column
    in_columns = (label >= 0) & (label < valid_columns)
    tl.store(picked_out + row, tl.load(at + label, mask=in_columns, other=0.0).to(tl.float32))


@triton.jit
def _loss_gradient(logits, labels, log_total, columns, valid_columns, first_column, ignored, BLOCK: tl.constexpr):
    row, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    at, inside = logits + row * columns + column, column < columns
    label = tl.load(labels + row)
    value = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    weight = tl.where(column < valid_columns, tl.exp(value - tl.load(log_total + row)), 0.0)
    weight -= tl.where(column == label - first_column, 1.0, 0.0)
    tl.store(at, tl.where(label == ignored, 0.0, weight).to(logits.dtype.element_ty), mask=inside)


def statistics(logits: torch.Tensor, labels: torch.Tensor, valid_columns: int, first_column: int):
    """logits [n, V], labels int64 [n] -> for each row its largest logit, the sum of exp(logit - largest), and the logit
    of its label, or 0 where the label is not in this rank's columns, which start at `first_column`; all fp32 [n]."""
    found = torch.empty(3, len(logits), dtype=torch.float32, device=logits.device)
    _loss_statistics[(len(logits),)](
        logits, labels, *found, logits.shape[1], valid_columns, first_column, BLOCK, num_warps=8
    )  # fmt: skip
    return found.unbind()


def gradient_(logits: torch.Tensor, labels, log_total, valid_columns: int, first_column: int, ignored: int) -> None:
    """Overwrite logits [n, V] with the gradient of the summed loss: softmax minus one-hot, 0 in rows labelled
    `ignored`.

    log_total fp32 [n]: log-sum-exp of a row over the whole vocabulary.
    """
    grid = (len(logits), triton.cdiv(logits.shape[1], BLOCK))
    _loss_gradient[grid](
        logits, labels, log_total, logits.shape[1], valid_columns, first_column, ignored, BLOCK, num_warps=8
    )
