"""GEMMs of rows with weights: several from one input, and one that is added to the residual stream.

Legend: n rows, h input features, f features between the GEMMs of an MLP; a weight is [out, h].

GEMMs do what torch would do in separate passes over memory. The gradients of an input that several weights share are
summed into its one gradient. The gradient of a weight with a `main_grad` (fp32, the weight's shape; the name is
Megatron's) is added to it in fp32, without a 16-bit copy. The residual is added by the GEMM. On a GPU, backward
recomputes the normed rows and the MLP's activations instead of keeping them, which takes one cheap pass each.

A `Weight` with `fp8` runs its GEMMs in 8 bits, forward and for the gradient of the rows: see `ksa_model.ops.fp8`.
Weights are quantized at each use, since they are small compared to the rows. Nothing more is kept for backward.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch

from ksa_model.layout.ranges import zero_outside
from ksa_model.ops.backend import Backend


class Norm(NamedTuple):
    """An RMSNorm before a GEMM: its gain [h] and its epsilon."""

    gain: torch.Tensor
    eps: float


class Weight(NamedTuple):
    """A weight [out, h], whether its GEMMs run in fp8, and the bias [out] that `project` adds to their results."""

    matrix: torch.Tensor
    fp8: bool = False
    bias: torch.Tensor | None = None


class Target(NamedTuple):
    """The GEMM of rows `start` to `stop` with `weight`."""

    start: int
    stop: int
    weight: Weight


def project(backend: Backend, x: torch.Tensor, norm: Norm | None, targets: Sequence[Target]) -> list[torch.Tensor]:
    """For each target `normed[start:stop] @ weight.T + bias`, where `normed` is x [n, h] after the norm, or x itself.

    The row ranges of two targets are equal or disjoint. Rows without a target get a gradient of 0.
    """
    if norm is not None and (gemv := backend.gemv_for(len(x))) is not None:
        return gemv.project(x, norm.gain, norm.eps, targets)
    normed = x if norm is None else backend.rows.rms_norm(x, norm.gain, norm.eps)
    source = x.detach() if norm is not None and backend.recompute_in_backward else None
    spans, in_fp8 = [(t.start, t.stop) for t in targets], [t.weight.fp8 for t in targets]
    matrices, biases = [t.weight.matrix for t in targets], [t.weight.bias for t in targets]
    return list(_Project.apply(backend, normed, source, norm, spans, in_fp8, *matrices, *biases))


def gated(backend: Backend, x: torch.Tensor, norm: Norm | None, gate: Weight, up: Weight) -> tuple[torch.Tensor, ...]:
    """The two GEMMs before SwiGLU, (gate, up) [n, f] each, of the normed rows; or swiglu(gate, up) alone where a gemv
    kernel computes it."""
    if norm is not None and (gemv := backend.gemv_for(len(x))) is not None:
        return (gemv.gated(x, norm.gain, norm.eps, gate.matrix, up.matrix),)
    return tuple(project(backend, x, norm, [Target(0, len(x), gate), Target(0, len(x), up)]))


def add_gemm(
    backend: Backend, x: torch.Tensor | None, y: torch.Tensor, weight: Weight, reuse: bool = False
) -> torch.Tensor:
    """x + y @ weight.T: x [n, out] or None, y [n, h].

    `reuse`: no gradients are computed and nothing else needs x, so the sum may overwrite it, which saves a copy.
    """
    if x is not None and (gemv := backend.gemv_for(len(x))) is not None:
        return gemv.add_gemm(x, y, weight.matrix)
    if x is not None and reuse:
        return x.addmm_(y, weight.matrix.t())
    return _AddGemm.apply(backend, x, weight.fp8, weight.matrix, y)


def add_gated_gemm(
    backend: Backend, x: torch.Tensor | None, parts: tuple[torch.Tensor, ...], weight: Weight, reuse: bool = False
) -> torch.Tensor:
    """x + swiglu(gate, up) @ weight.T for `parts` as returned by `gated`; `reuse` as in `add_gemm`."""
    if len(parts) == 1:
        return add_gemm(backend, x, *parts, weight, reuse)
    if backend.recompute_in_backward and not reuse:
        return _AddGemm.apply(backend, x, weight.fp8, weight.matrix, *parts)
    return add_gemm(backend, x, backend.rows.swiglu(*parts), weight, reuse)


class _Project(torch.autograd.Function):
    """GEMMs of rows x with weights, each followed by its bias or None. With a `source`, this is kept instead of
    x = norm(source)."""

    @staticmethod
    def forward(ctx, backend: Backend, x, source, norm: Norm | None, spans, in_fp8: list[bool], *parameters):
        weights, biases = parameters[: len(spans)], parameters[len(spans) :]
        ctx.backend, ctx.spans, ctx.in_fp8, ctx.num_weights = backend, spans, in_fp8, len(weights)
        ctx.eps = None if norm is None else norm.eps
        kept = (x,) if source is None or norm is None else (source, norm.gain)
        ctx.save_for_backward(*weights, *kept)
        quantize = backend.fp8.quantize_rows
        rows8 = {span: quantize(x[slice(*span)]) for span in {s for s, fp8 in zip(spans, in_fp8) if fp8}}
        found = []
        for span, weight, bias, fp8 in zip(spans, weights, biases, in_fp8):
            if fp8:
                out = backend.fp8.gemm(rows8[span], quantize(weight), True)
                found.append(out if bias is None else out.add_(bias))
            else:
                rows = x[slice(*span)]
                found.append(rows @ weight.t() if bias is None else torch.addmm(bias, rows, weight.t()))
        return tuple(found)

    @staticmethod
    def backward(ctx, *grads):
        saved = ctx.saved_tensors
        weights, (x, *gain) = saved[: ctx.num_weights], saved[ctx.num_weights :]
        if gain:
            x = ctx.backend.rows.rms_norm(x, gain[0], ctx.eps)
        grad_x = _project_input_gradient(ctx, x, weights, grads) if ctx.needs_input_grad[1] else None
        of_weights = (
            _weight_gradient(weight, grad, x[slice(*span)]) if ctx.needs_input_grad[6 + i] else None
            for i, (span, weight, grad) in enumerate(zip(ctx.spans, weights, grads))
        )
        first_bias = 6 + ctx.num_weights
        of_biases = (grad.sum(0) if ctx.needs_input_grad[first_bias + i] else None for i, grad in enumerate(grads))
        return None, grad_x, None, None, None, None, *of_weights, *of_biases


def _project_input_gradient(ctx, x: torch.Tensor, weights, grads) -> torch.Tensor:
    """The gradient of the rows x of `_Project`: the sum over its GEMMs, and 0 in rows without any."""
    grad_x = torch.empty_like(x)
    written: list[tuple[int, int]] = []
    for span, weight, grad, fp8 in zip(ctx.spans, weights, grads, ctx.in_fp8):
        target = grad_x[slice(*span)]
        if fp8:
            # One GEMM of all gradients side by side would save the addition, which is a pass over rows of h features,
            # and would cost a pass over the concatenated gradients, which are wider.
            found = _input_gradient(ctx.backend, grad, weight, fp8)
            if span in written:
                target.add_(found)
            elif span == (0, len(x)):
                grad_x = found
            else:
                target.copy_(found)
        elif span in written:
            target.addmm_(grad, weight)
        else:
            torch.mm(grad, weight, out=target)
        if span not in written:
            written.append(span)
    spans = [range(*span) for span in sorted(written)]
    disjoint = all(before.stop <= after.start for before, after in itertools.pairwise(spans))
    assert disjoint, f"targets overlap in part: {written}"
    zero_outside(grad_x, spans)
    return grad_x


class _AddGemm(torch.autograd.Function):
    """x + y @ weight.T. y is given, or computed from `gate` and `up` and recomputed in backward."""

    @staticmethod
    def forward(ctx, backend: Backend, x, fp8: bool, weight, *parts):
        ctx.save_for_backward(weight, *parts)
        ctx.backend, ctx.fp8 = backend, fp8
        y = parts[0] if len(parts) == 1 else backend.rows.swiglu(*parts)
        if fp8:
            found = backend.fp8.gemm(backend.fp8.quantize_rows(y), backend.fp8.quantize_rows(weight), True)
            return found if x is None else found.add_(x)
        return y @ weight.t() if x is None else torch.addmm(x, y, weight.t())

    @staticmethod
    def backward(ctx, grad):
        weight, *parts = ctx.saved_tensors
        rows, grad = ctx.backend.rows, grad.contiguous()
        grad_y = _input_gradient(ctx.backend, grad, weight, ctx.fp8) if any(ctx.needs_input_grad[4:]) else None
        if len(parts) == 1:
            (y,), grad_parts = parts, [grad_y]
        elif grad_y is None:
            y, grad_parts = rows.swiglu(*parts), [None, None]
        else:
            gate, up = parts
            y, *grad_parts = rows.swiglu_and_gradients(gate, up, grad_y)
        grad_weight = _weight_gradient(weight, grad, y) if ctx.needs_input_grad[3] else None
        return None, grad if ctx.needs_input_grad[1] else None, None, grad_weight, *grad_parts


def _input_gradient(backend: Backend, grad: torch.Tensor, weight: torch.Tensor, fp8: bool) -> torch.Tensor:
    """grad @ weight: the gradient of the rows [n, h] of a GEMM for that of its result [n, out]."""
    if not fp8:
        return grad @ weight
    return backend.fp8.gemm(backend.fp8.quantize_rows(grad), backend.fp8.quantize_rows(weight.t()), False)


def _weight_gradient(weight: torch.Tensor, grad: torch.Tensor, x: torch.Tensor) -> torch.Tensor | None:
    """grad.T @ x, or None after adding it to the weight's `main_grad`."""
    main_grad = getattr(weight, "main_grad", None)
    if main_grad is None:
        return grad.t() @ x
    add_weight_gradient(main_grad, grad, x)
    weight.grad_added_to_main_grad = True  # type: ignore[attr-defined]
    return None


def add_weight_gradient(total: torch.Tensor, grad: torch.Tensor, x: torch.Tensor) -> None:
    """total [out, h] fp32 += grad.T @ x for grad [n, out], x [n, h] of any dtype."""
    if grad.is_cuda and grad.dtype != torch.float32:
        torch.addmm(total, grad.t(), x, out_dtype=torch.float32, out=total)
    elif grad.dtype == torch.float32:
        total.addmm_(grad.t(), x)
    else:
        total += grad.t() @ x
