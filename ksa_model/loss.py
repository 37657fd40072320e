"""The language-model loss without a [T, vocabulary] tensor, over a vocabulary split among tensor ranks.

Legend: T text rows, h hidden size, V vocabulary rows of this tensor rank.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from ksa_model.config import CPU_LOSS_ROWS, FUSED_LOSS_ROWS, LOSS_ROWS
from ksa_model.linear import add_product_fp32
from ksa_model.megatron import vocab_parallel_cross_entropy
from ksa_model.rows import triton_module
from ksa_model.tensor_parallel import TensorParallel

IGNORE_INDEX = -100


def cross_entropy(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, valid_columns: int, tp: TensorParallel
) -> torch.Tensor:
    """Sum over rows of the cross entropy of `hidden @ weight.T`: hidden [T, h], weight [V, h], labels int64 [T].

    Rows labelled `IGNORE_INDEX` count nothing; columns from `valid_columns` on are padding of the vocabulary and get no
    probability. Returns an fp32 scalar, alike on all tensor ranks.
    """
    return _ChunkedCrossEntropy.apply(hidden, weight, labels, valid_columns, tp)


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Sum of cross-entropies of `hidden @ weight.T` without a [T, vocabulary] tensor.

    Each slice of rows runs forward and backward at once and leaves only its share of the gradients behind; backward
    scales them by the incoming gradient, so any outer loss scale is honoured. The vocabulary is split over tensor
    ranks; each rank's hidden gradient is partial and summed by the `gather` that made `hidden`.
    """

    @staticmethod
    def forward(ctx, hidden, weight, labels, valid_columns: int, tp: TensorParallel):
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        needs_grad = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        step, loss_of = _method(hidden, tp)
        if needs_grad:
            grad_hidden = torch.empty_like(hidden)
            grad_weight = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)
        for start in range(0, len(hidden), step):
            rows = slice(start, start + step)
            logits = hidden[rows] @ weight.t()
            loss, grad_logits = loss_of(logits, labels[rows], valid_columns, tp, needs_grad)
            total += loss
            if grad_logits is not None:
                torch.matmul(grad_logits, weight, out=grad_hidden[rows])
                add_product_fp32(grad_weight, grad_logits, hidden[rows])
        if needs_grad:
            ctx.save_for_backward(grad_hidden, grad_weight)
            ctx.weight_dtype = weight.dtype
        return total

    @staticmethod
    def backward(ctx, grad_total):
        grad_hidden, grad_weight = ctx.saved_tensors
        scaled = torch.empty_like(grad_weight, dtype=ctx.weight_dtype)
        torch.mul(grad_weight, grad_total, out=scaled)  # in one pass, whatever the dtype
        return grad_hidden * grad_total, scaled, None, None, None


def _method(hidden: torch.Tensor, tp: TensorParallel):
    """Rows at a time, and the function of their loss."""
    if hidden.is_cuda and hidden.dtype in (torch.bfloat16, torch.float16) and triton_module("triton_loss") is not None:
        return FUSED_LOSS_ROWS, _fused_loss
    return LOSS_ROWS if hidden.is_cuda else CPU_LOSS_ROWS, _whole_loss if tp.size == 1 else _parallel_loss


def _fused_loss(logits, labels, valid_columns: int, tp: TensorParallel, needs_grad: bool):
    """Sum of the rows' losses and, if asked, its gradient, which takes the place of `logits` [n, V] (16 bits)."""
    from ksa_model import triton_loss

    first_column = tp.rank * logits.shape[1]
    top, total, picked = triton_loss.statistics(logits, labels, valid_columns, first_column)
    if tp.size > 1:
        highest = top.clone()
        dist.all_reduce(highest, op=dist.ReduceOp.MAX, group=tp.group)
        both = torch.stack([total * (top - highest).exp(), picked])
        dist.all_reduce(both, group=tp.group)
        top, (total, picked) = highest, both
    log_total = top + total.log()
    loss = ((log_total - picked) * (labels != IGNORE_INDEX)).sum()
    if not needs_grad:
        return loss, None
    triton_loss.gradient_(logits, labels, log_total, valid_columns, first_column, IGNORE_INDEX)
    return loss, logits


def _whole_loss(logits, labels, valid_columns: int, tp: TensorParallel, needs_grad: bool):
    """The same in plain torch where this rank holds the whole vocabulary. Twin of `_fused_loss`."""
    dtype, logits = logits.dtype, _without_padding(logits, valid_columns)
    valid, picked = labels != IGNORE_INDEX, labels.clamp(min=0)[:, None]
    top = logits.amax(-1, keepdim=True)
    logits.sub_(top)  # in place throughout, for the CPU's caches
    own = logits.gather(1, picked)
    total = logits.exp_().sum(-1, keepdim=True)
    loss = ((total.log() - own)[:, 0] * valid).sum()
    if not needs_grad:
        return loss, None
    grad = logits.mul_(total.reciprocal_())
    grad.scatter_add_(1, picked, grad.new_full((), -1).expand_as(picked))
    return loss, grad.mul_(valid[:, None]).to(dtype)


def _parallel_loss(logits, labels, valid_columns: int, tp: TensorParallel, needs_grad: bool):
    """The same where each tensor rank holds a share of the vocabulary, through the library's cross entropy, which
    overwrites the logits with the softmax and then the gradient."""
    dtype, logits = logits.dtype, _without_padding(logits, valid_columns)
    with torch.enable_grad():
        picked = labels.clamp(min=0)[:, None]
        losses = vocab_parallel_cross_entropy(logits.requires_grad_(needs_grad)[:, None], picked)[:, 0]
        loss = (losses * (labels != IGNORE_INDEX)).sum()
    return loss.detach(), torch.autograd.grad(loss, logits)[0].to(dtype) if needs_grad else None


def _without_padding(logits: torch.Tensor, valid_columns: int) -> torch.Tensor:
    logits = logits.float()
    logits[:, valid_columns:] = float("-inf")
    return logits
