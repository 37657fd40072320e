"""The language-model loss without a [T, vocabulary] tensor, over a vocabulary split among tensor ranks.

Legend: T text rows, h hidden size, V vocabulary rows of this tensor rank.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import ModuleType

import torch
import torch.distributed as dist

from ksa_model.layers.tensor_parallel import TensorParallel
from ksa_model.ops.backend import Backend
from ksa_model.ops.linear import add_weight_gradient
from ksa_model.parallel.megatron import vocab_parallel_cross_entropy

IGNORE_INDEX = -100


def cross_entropy(
    backend: Backend,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    valid_columns: int,
    tp: TensorParallel,
) -> torch.Tensor:
    """Sum over rows of the cross entropy of `hidden @ weight.T`: hidden [T, h], weight [V, h], labels int64 [T].

    Rows labelled `IGNORE_INDEX` add nothing. Columns from `valid_columns` on are vocabulary padding and get no
    probability. Returns an fp32 scalar, the same on all tensor ranks.
    """
    return _ChunkedCrossEntropy.apply(backend, hidden, weight, labels, valid_columns, tp)


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Sum of cross entropies of `hidden @ weight.T` without a [T, vocabulary] tensor.

    Forward also computes the gradients, one slice of rows after the other, and keeps only these. Backward multiplies
    them by the incoming gradient, which applies any outer loss scale. The vocabulary is split over tensor ranks; each
    rank's hidden gradient is partial and summed by the `gather` that made `hidden`.
    """

    @staticmethod
    def forward(ctx, backend: Backend, hidden, weight, labels, valid_columns: int, tp: TensorParallel):
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        needs_grad = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
        loss_of = _loss_function(backend, tp)
        if needs_grad:
            grad_hidden = torch.empty_like(hidden)
            grad_weight = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)
        for start in range(0, len(hidden), backend.loss_rows):
            rows = slice(start, start + backend.loss_rows)
            logits = hidden[rows] @ weight.t()
            loss, grad_logits = loss_of(logits, labels[rows], valid_columns, tp, needs_grad)
            total += loss
            if grad_logits is not None:
                torch.matmul(grad_logits, weight, out=grad_hidden[rows])
                add_weight_gradient(grad_weight, grad_logits, hidden[rows])
        if needs_grad:
            ctx.save_for_backward(grad_hidden, grad_weight)
            ctx.weight_dtype = weight.dtype
        return total

    @staticmethod
    def backward(ctx, grad_total):
        grad_hidden, grad_weight = ctx.saved_tensors
        scaled = torch.empty_like(grad_weight, dtype=ctx.weight_dtype)
        torch.mul(grad_weight, grad_total, out=scaled)  # one pass, for any dtype
        return None, grad_hidden * grad_total, scaled, None, None, None


def _loss_function(backend: Backend, tp: TensorParallel) -> Callable:
    """(logits [n, V], labels, valid columns, tp, whether a gradient is needed) -> summed loss, gradient or None."""
    if backend.loss is not None:
        return partial(_fused_loss, backend.loss)
    return _whole_loss if tp.size == 1 else _parallel_loss


def _fused_loss(kernels: ModuleType, logits, labels, valid_columns: int, tp: TensorParallel, needs_grad: bool):
    """The sum of the rows' losses and, if needed, its gradient, which overwrites `logits` [n, V] (16 bits)."""
    first_column = tp.rank * logits.shape[1]
    top, total, picked = kernels.statistics(logits, labels, valid_columns, first_column)
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
    kernels.gradient_(logits, labels, log_total, valid_columns, first_column, IGNORE_INDEX)
    return loss, logits


def _whole_loss(logits, labels, valid_columns: int, tp: TensorParallel, needs_grad: bool):
    """The same in plain torch, for a rank with the whole vocabulary. Twin of `_fused_loss`."""
    dtype, logits = logits.dtype, _without_padding(logits, valid_columns)
    valid, picked = labels != IGNORE_INDEX, labels.clamp(min=0)[:, None]
    top = logits.amax(-1, keepdim=True)
    logits.sub_(top)  # in place throughout, to stay in the CPU's caches
    own = logits.gather(1, picked)
    total = logits.exp_().sum(-1, keepdim=True)
    loss = ((total.log() - own)[:, 0] * valid).sum()
    if not needs_grad:
        return loss, None
    grad = logits.mul_(total.reciprocal_())
    grad.scatter_add_(1, picked, grad.new_full((), -1).expand_as(picked))
    return loss, grad.mul_(valid[:, None]).to(dtype)


def _parallel_loss(logits, labels, valid_columns: int, tp: TensorParallel, needs_grad: bool):
    """The same for tensor ranks with a share of the vocabulary each, by Megatron's cross entropy, which overwrites the
    logits with the softmax and then the gradient."""
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
