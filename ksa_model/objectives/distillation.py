"""Self-distillation of a KSA model from its own weights run with full attention (arXiv 2604.24432).

The teacher is the same model without summaries: text rows only, full attention in every layer, no gradient. No second
model is in memory. The teacher changes as the weights change; if only summary parameters are trained, it stays fixed.

Legend: T text rows, h hidden size, V vocabulary rows of this tensor rank.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from ksa_model.config import LOSS_ROWS
from ksa_model.layers.attention import Attention, Heads
from ksa_model.layers.tensor_parallel import TensorParallel
from ksa_model.layout.sequence import SequenceLayout, TextLayout
from ksa_model.loss import IGNORE_INDEX
from ksa_model.model import Block, Decoder
from ksa_model.ops.attention import joint
from ksa_model.ops.linear import add_weight_gradient
from ksa_model.parallel.megatron import reduce_from_tensor_model_parallel_region

PARTS = ("lm", "kl", "attention")
_NEVER = -1e30  # the score of vocabulary padding: probability 0, but finite, so that 0 * log p is 0
_EPS = 1e-12  # well below the mean square of a new model's attention outputs, about 1e-6


@dataclass
class Distillation:
    """An `Objective` of `Decoder.forward`: a weighted sum of three losses, each summed over the rows with a label.

    - `lm`: cross entropy with the labels.
    - `kl`: KL(teacher || student) of the next-token distributions.
    - `attention`: the squared difference between student and teacher of the attention outputs after the output
      projection, each row divided by its root mean square; the mean over features and layers.
    """

    lm_weight: float = 1.0
    kl_weight: float = 5.0
    attention_weight: float = 5.0
    _sums: torch.Tensor | None = field(default=None, repr=False)

    def __call__(
        self, model: Decoder, tokens: torch.Tensor, labels: torch.Tensor, layout: SequenceLayout
    ) -> torch.Tensor:
        tp = model.tp
        teacher_outputs: list[torch.Tensor] = []
        with torch.no_grad(), _recording(model, teacher_outputs.append):
            teacher = tp.gather(model.norm(model.hidden(tokens, TextLayout(layout), attend_fully)))
        counted = labels != IGNORE_INDEX
        local = tp.local_rows(len(labels))
        counted_here = counted[tp.rank * local :][:local] if tp.shards_rows else counted
        student_outputs: list[torch.Tensor] = []
        # The comparison comes after the forward: recomputation would not repeat work that a hook does inside a block.
        with _recording(model, student_outputs.append):
            hidden = tp.gather(model.norm(model.hidden(tokens, layout)))
        weights = (self.lm_weight, self.kl_weight)
        loss, parts = _ChunkedDivergence.apply(
            hidden, model.head_weight, teacher, labels, model.valid_columns, tp, weights
        )
        gap = loss.new_zeros(())
        if self.attention_weight:
            pairs = zip(student_outputs, teacher_outputs)
            gap = torch.stack([attention_gap(s[:local], t, counted_here) for s, t in pairs]).mean()
        if tp.shards_rows:  # each rank has compared its own rows; their gradient needs no communication
            gap = reduce_from_tensor_model_parallel_region(gap, group=tp.group)
        self._count(torch.cat([parts, gap.detach()[None]]))
        return loss + self.attention_weight * gap

    def _count(self, parts: torch.Tensor) -> None:
        self._sums = parts.double() if self._sums is None else self._sums + parts

    def take(self) -> torch.Tensor | None:
        """This rank's sums of `PARTS` since the last `take`, fp64 [3] on the device; None if nothing was summed."""
        sums, self._sums = self._sums, None
        return sums


def attend_fully(
    attention: Attention, heads: Heads, layout: SequenceLayout
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """A `MixerCore` that makes every layer a full-attention layer, for a layout without summaries. Gated delta nets do
    not change: they already read all earlier text."""
    if attention.layer.mixer == "G":
        return attention.core(attention, heads, layout)
    inputs, kernels = (heads.q, heads.k, heads.v), attention.backend.attention
    out = joint.text_attention(inputs, layout, "F", 0, kernels, attention.context)
    return out, heads.q_summary  # which has no rows


def attention_gap(student: torch.Tensor, teacher: torch.Tensor, counted: torch.Tensor) -> torch.Tensor:
    """student, teacher [T, h]; counted bool [T] -> fp32 sum, over counted rows, of the mean squared difference."""
    a, b = (torch.nn.functional.rms_norm(x.float(), x.shape[-1:], eps=_EPS) for x in (student, teacher))
    return ((a - b).square().mean(-1) * counted).sum()


@contextlib.contextmanager
def _recording(model: Decoder, record: Callable[[torch.Tensor], None]) -> Iterator[None]:
    """Pass what each attention sub-layer adds to the residual stream to `record`, bottom to top."""

    def attach(block: Block):
        def hook(module: torch.nn.Module, inputs: object, mixer_output: torch.Tensor) -> None:
            # Recomputation of the block does not run this hook, so its checkpoint must not manage tensors saved here.
            with torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x):
                record(block.attended(mixer_output))

        return block.attention.register_forward_hook(hook)

    handles = [attach(block) for block in model.modules() if isinstance(block, Block)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _ChunkedDivergence(torch.autograd.Function):
    """Cross entropy and KL divergence from a teacher, without a [T, vocabulary] tensor.

    Works like `ksa_model.loss`: forward computes the gradients slice by slice, the vocabulary is split over tensor
    ranks, and the gradient of `hidden` on each rank is partial.
    """

    @staticmethod
    def forward(ctx, hidden, weight, teacher, labels, valid_columns: int, tp: TensorParallel, weights):
        """hidden, teacher [T, h]; weight [V, h]; labels int64 [T] -> weighted sum, fp32 scalar; its parts, fp32 [2]."""
        parts = torch.zeros(2, dtype=torch.float32, device=hidden.device)
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        grad_hidden = torch.empty_like(hidden) if wants_hidden else None
        grad_weight = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device) if wants_weight else None
        for start in range(0, len(hidden), LOSS_ROWS):
            rows = slice(start, start + LOSS_ROWS)
            log_p = _log_probabilities(hidden[rows], weight, valid_columns, tp)
            log_t = _log_probabilities(teacher[rows], weight, valid_columns, tp)
            column = labels[rows] - tp.rank * len(weight)
            is_local = (column >= 0) & (column < len(weight))
            column = column.clamp(0, len(weight) - 1)[:, None]
            counted = labels[rows] != IGNORE_INDEX
            probability = log_t.exp()
            losses = torch.stack([-log_p.gather(1, column)[:, 0] * is_local, (probability * (log_t - log_p)).sum(-1)])
            dist.all_reduce(losses, group=tp.group)
            parts += (losses * counted).sum(-1)
            if not (wants_hidden or wants_weight):
                continue
            grad = log_p.exp_().mul_(sum(weights)).sub_(probability.mul_(weights[1]))
            grad.scatter_add_(1, column, (-weights[0] * is_local.float())[:, None])
            grad = grad.mul_(counted[:, None]).to(hidden.dtype)
            if grad_hidden is not None:
                torch.matmul(grad, weight, out=grad_hidden[rows])
            if grad_weight is not None:
                add_weight_gradient(grad_weight, grad, hidden[rows])
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
    highest = logits.max(-1, keepdim=True).values
    dist.all_reduce(highest, op=dist.ReduceOp.MAX, group=tp.group)
    total = (logits - highest).exp_().sum(-1, keepdim=True)
    dist.all_reduce(total, group=tp.group)
    return logits.sub_(highest).sub_(total.log())
