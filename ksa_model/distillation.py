"""Distillation of a model with summaries from the same weights without them (arXiv 2604.24432).

The teacher is the model itself: its text rows alone, full attention in every layer, no gradient. So a run needs no
second model in memory, and as the weights change the teacher changes with them; where only summary parameters train,
it stays what it was.

Legend: T text rows, h hidden size, V vocabulary rows of this tensor rank.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from ksa_model import kernels
from ksa_model.attention import Attention, Heads
from ksa_model.layout import SequenceLayout, TextLayout
from ksa_model.linear import add_product_fp32
from ksa_model.loss import IGNORE_INDEX, LOSS_ROWS
from ksa_model.megatron import reduce_from_tensor_model_parallel_region
from ksa_model.model import Block, Decoder
from ksa_model.tensor_parallel import TensorParallel

PARTS = ("lm", "kl", "attention")
_NEVER = -1e30  # a score that gets no probability; finite, so that 0 * log p stays 0
_EPS = 1e-12  # attention outputs of a fresh model are small; their mean square is about 1e-6


@dataclass
class Distillation:
    """An `Objective` of `Decoder.forward`: weighted losses, each summed over the rows that carry one.

    `lm`: cross entropy with the labels. `kl`: KL(teacher || student) of the next-token distributions. `attention`: mean
    over layers and features of the squared difference between the two models' attention outputs (behind the output
    projection), each row divided by its root mean square.
    """

    lm_weight: float = 1.0
    kl_weight: float = 5.0
    attention_weight: float = 5.0
    _sums: torch.Tensor | None = field(default=None, repr=False)

    def __call__(
        self, model: Decoder, tokens: torch.Tensor, labels: torch.Tensor, layout: SequenceLayout
    ) -> torch.Tensor:
        tp = model.tp
        outputs: list[torch.Tensor] = []
        with torch.no_grad(), _watching(model, outputs.append):
            taught = tp.gather(model.norm(model.hidden(tokens, TextLayout(layout), attend_fully)))
        counted = labels != IGNORE_INDEX
        local = tp.local_rows(len(labels))
        mine = counted[tp.rank * local :][:local] if tp.shards_rows else counted
        learnt: list[torch.Tensor] = []
        # Compared afterwards: work done while a block runs would be missing when recomputation runs it again.
        with _watching(model, learnt.append):
            hidden = tp.gather(model.norm(model.hidden(tokens, layout)))
        weights = (self.lm_weight, self.kl_weight)
        loss, parts = _ChunkedDivergence.apply(
            hidden, model.head_weight, taught, labels, model.valid_columns, tp, weights
        )
        gap = loss.new_zeros(())
        if self.attention_weight:
            gap = torch.stack([attention_gap(s[:local], t, mine) for s, t in zip(learnt, outputs)]).mean()
        if tp.shards_rows:  # each rank has compared its own rows; the gradient needs no exchange
            gap = reduce_from_tensor_model_parallel_region(gap, group=tp.group)
        self._count(torch.cat([parts, gap.detach()[None]]))
        return loss + self.attention_weight * gap

    def _count(self, parts: torch.Tensor) -> None:
        self._sums = parts.double() if self._sums is None else self._sums + parts

    def take(self) -> torch.Tensor | None:
        """This rank's sums of `PARTS` since the last call, fp64 [3] on the device; None where there was no call."""
        sums, self._sums = self._sums, None
        return sums


def attend_fully(
    attention: Attention, heads: Heads, layout: SequenceLayout
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """A `Mix` that lets every layer see all earlier text of the document, for a layout without summaries. A gated delta
    net has seen it all anyway."""
    if attention.layer.mixer == "G":
        return attention.mix(attention, heads, layout)
    backend, context = attention.config.attention_backend, attention.context
    out = kernels.text_attention(heads.q, heads.k, heads.v, layout, "F", backend=backend, context=context)
    return out, heads.q_summary  # no rows


def attention_gap(student: torch.Tensor, teacher: torch.Tensor, counted: torch.Tensor) -> torch.Tensor:
    """student, teacher [T, h]; counted bool [T] -> sum over counted rows of the mean squared difference, fp32."""
    a, b = (torch.nn.functional.rms_norm(x.float(), x.shape[-1:], eps=_EPS) for x in (student, teacher))
    return ((a - b).square().mean(-1) * counted).sum()


@contextlib.contextmanager
def _watching(model: Decoder, see: Callable[[torch.Tensor], None]) -> Iterator[None]:
    """Show `see` what each attention sub-layer adds to the residual stream, bottom to top."""

    def watch(block: Block):
        def hook(module: torch.nn.Module, inputs: object, mixed: torch.Tensor) -> None:
            # Nothing that is kept here may be counted to a block that is run again: nobody watches then.
            with torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x):
                see(block.attended(mixed))

        return block.attention.register_forward_hook(hook)

    handles = [watch(block) for block in model.modules() if isinstance(block, Block)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _ChunkedDivergence(torch.autograd.Function):
    """Cross entropy and KL divergence from a teacher, without a [T, vocabulary] tensor.

    As the loss of `Decoder`: each slice of rows leaves only its share of the gradients behind, the vocabulary is split
    over tensor ranks, each rank's hidden gradient is partial.
    """

    @staticmethod
    def forward(ctx, hidden, weight, taught, labels, valid_columns: int, tp: TensorParallel, weights):
        """hidden, taught [T, h]; weight [V, h]; labels int64 [T] -> weighted sum, fp32 scalar, and its two parts."""
        parts = torch.zeros(2, dtype=torch.float32, device=hidden.device)
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        grad_hidden = torch.empty_like(hidden) if wants_hidden else None
        grad_weight = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device) if wants_weight else None
        for start in range(0, len(hidden), LOSS_ROWS):
            rows = slice(start, start + LOSS_ROWS)
            log_p = _log_probabilities(hidden[rows], weight, valid_columns, tp)
            log_t = _log_probabilities(taught[rows], weight, valid_columns, tp)
            column = labels[rows] - tp.rank * len(weight)
            mine = (column >= 0) & (column < len(weight))
            column = column.clamp(0, len(weight) - 1)[:, None]
            counted = labels[rows] != IGNORE_INDEX
            probability = log_t.exp()
            losses = torch.stack([-log_p.gather(1, column)[:, 0] * mine, (probability * (log_t - log_p)).sum(-1)])
            dist.all_reduce(losses, group=tp.group)
            parts += (losses * counted).sum(-1)
            if not (wants_hidden or wants_weight):
                continue
            grad = log_p.exp_().mul_(sum(weights)).sub_(probability.mul_(weights[1]))
            grad.scatter_add_(1, column, (-weights[0] * mine.float())[:, None])
            grad = grad.mul_(counted[:, None]).to(hidden.dtype)
            if grad_hidden is not None:
                torch.matmul(grad, weight, out=grad_hidden[rows])
            if grad_weight is not None:
                add_product_fp32(grad_weight, grad, hidden[rows])
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.weight_dtype = weight.dtype
        ctx.mark_non_differentiable(parts)
        return parts @ parts.new_tensor(weights), parts

    @staticmethod
    def backward(ctx, grad_total, _):
        grad_hidden, grad_weight = ctx.saved_tensors
        return (
            None if grad_hidden is None else grad_hidden * grad_total,
            None if grad_weight is None else (grad_weight * grad_total).to(ctx.weight_dtype),
            *[None] * 5,
        )


def _log_probabilities(hidden, weight, valid_columns: int, tp: TensorParallel) -> torch.Tensor:
    """fp32 [n, V]: this rank's columns of the log-softmax over the whole vocabulary."""
    logits = (hidden.detach() @ weight.detach().t()).float()
    logits[:, valid_columns:] = _NEVER
    most = logits.max(-1, keepdim=True).values
    dist.all_reduce(most, op=dist.ReduceOp.MAX, group=tp.group)
    total = (logits - most).exp_().sum(-1, keepdim=True)
    dist.all_reduce(total, group=tp.group)
    return logits.sub_(most).sub_(total.log())
