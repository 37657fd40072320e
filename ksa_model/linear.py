"""Products of rows with weights: several from one input, and one that is added to the residual stream.

Legend: n rows, h features of a row; a weight is [out, h].

What torch would do in many passes over memory is done in the products themselves: the gradients of an input that
several weights share add up in its one gradient; a weight's gradient adds up in fp32 where the weight has a `main_grad`
(fp32, of its shape, as Megatron calls it), with no copy in 16 bits on the way; a residual is added by the product. On a
GPU the normed rows and the MLP's activations are made again in backward instead of kept: one cheap pass each.

With `fp8` products of rows with weights run in 8 bits, in both directions: see `ksa_model.fp8`. Weights are quantized
where they are used: they are small beside the rows. Nothing more is kept for backward.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from types import ModuleType
from typing import NamedTuple

import torch

from ksa_model import rows
from ksa_model.fp8 import product, quantize_rows
from ksa_model.ranges import zero_outside
from ksa_model.rows import triton_module

# Up to so many rows products without gradients go to the kernels of decoding. cuBLAS is as good beyond, and for fp32,
# which the matrix units do not multiply exactly, from three rows on.
FEW_ROWS, FEW_ROWS_FP32 = 16, 2


class Norm(NamedTuple):
    """An RMSNorm that stands before a product."""

    gain: torch.Tensor
    eps: float


class Target(NamedTuple):
    """Rows from `start` to `stop` times `weight`."""

    start: int
    stop: int
    weight: torch.Tensor
    fp8: bool = False


def project(x: torch.Tensor, norm: Norm | None, targets: Sequence[Target]) -> list[torch.Tensor]:
    """For each target `normed[start:stop] @ weight.T`, where `normed` is x [n, h] behind the norm, or x itself."""
    if norm is not None and (fast := decoding(x)) is not None:
        return fast.project(x, norm.gain, norm.eps, targets)
    normed = x if norm is None else rows.rms_norm(x, norm.gain, norm.eps)
    source = x.detach() if norm is not None and _remakes(x) else None
    spans, in_fp8 = [(target.start, target.stop) for target in targets], [target.fp8 for target in targets]
    return list(_Project.apply(normed, source, norm, spans, in_fp8, *(target.weight for target in targets)))


def gated(
    x: torch.Tensor, norm: Norm | None, gate: torch.Tensor, up: torch.Tensor, fp8: bool = False
) -> tuple[torch.Tensor, ...]:
    """What SwiGLU multiplies: (gate, up) [n, f] of the normed rows, or its product alone, where nothing keeps them."""
    if norm is not None and (fast := decoding(x)) is not None:
        return (fast.gated(x, norm.gain, norm.eps, gate, up),)
    return tuple(project(x, norm, [Target(0, len(x), gate, fp8), Target(0, len(x), up, fp8)]))


def add_product(
    x: torch.Tensor | None, y: torch.Tensor, weight: torch.Tensor, fp8: bool = False, reuse: bool = False
) -> torch.Tensor:
    """x + y @ weight.T: x [n, out] or None, y [n, h]. `reuse`: no gradients, and nobody else needs x: it may become the
    sum, which saves a copy of it."""
    if x is not None and (fast := decoding(x)) is not None:
        return fast.add_product(x, y, weight)
    if x is not None and reuse:
        return x.addmm_(y, weight.t())
    return _AddProduct.apply(x, weight, fp8, y)


def add_gated(
    x: torch.Tensor | None,
    parts: tuple[torch.Tensor, ...],
    weight: torch.Tensor,
    fp8: bool = False,
    reuse: bool = False,
) -> torch.Tensor:
    """x + swiglu(gate, up) @ weight.T for `parts` as `gated` gives them."""
    if len(parts) == 1:
        return add_product(x, *parts, weight, fp8, reuse)
    if _remakes(parts[0]) and not reuse:
        return _AddProduct.apply(x, weight, fp8, *parts)
    return add_product(x, rows.swiglu(*parts), weight, fp8, reuse)


class _Project(torch.autograd.Function):
    """Products of rows x with weights; where there is a `source`, it is kept instead of x = norm(source)."""

    @staticmethod
    def forward(ctx, x, source, norm: Norm | None, spans: list[tuple[int, int]], in_fp8: list[bool], *weights):
        ctx.spans, ctx.in_fp8, ctx.eps = spans, in_fp8, None if norm is None else norm.eps
        ctx.weights = len(weights)
        kept = (x,) if source is None or norm is None else (source, norm.gain)
        ctx.save_for_backward(*weights, *kept)
        rows8 = {span: quantize_rows(x[slice(*span)]) for span in {s for s, fp8 in zip(spans, in_fp8) if fp8}}
        return tuple(
            product(rows8[span], quantize_rows(weight), fast_sums=True) if fp8 else x[slice(*span)] @ weight.t()
            for span, weight, fp8 in zip(spans, weights, in_fp8)
        )

    @staticmethod
    def backward(ctx, *grads):
        saved = ctx.saved_tensors
        weights, (x, *gain) = saved[: ctx.weights], saved[ctx.weights :]
        if gain:
            x = rows.rms_norm(x, gain[0], ctx.eps)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = torch.empty_like(x)
            written: list[tuple[int, int]] = []
            for span, weight, grad, fp8 in zip(ctx.spans, weights, grads, ctx.in_fp8):
                mine = grad_x[slice(*span)]
                if fp8:
                    # One product of all gradients side by side would save the addition, a pass over rows of h features,
                    # and cost one over the joined gradients, which are wider.
                    found = _times(grad, weight, fp8)
                    if span in written:
                        mine.add_(found)
                    elif span == (0, len(x)):
                        grad_x = found
                    else:
                        mine.copy_(found)
                elif span in written:
                    mine.addmm_(grad, weight)
                else:
                    torch.mm(grad, weight, out=mine)
                if span not in written:
                    written.append(span)
            _zero_rest(grad_x, written)
        of_weights = (
            _weight_gradient(weight, grad, x[slice(*span)]) if ctx.needs_input_grad[5 + i] else None
            for i, (span, weight, grad) in enumerate(zip(ctx.spans, weights, grads))
        )
        return grad_x, None, None, None, None, *of_weights


def _zero_rest(x: torch.Tensor, written: list[tuple[int, int]]) -> None:
    """Rows of x outside the spans `written`, which do not overlap, become zero."""
    spans = [range(*span) for span in sorted(written)]
    apart = all(before.stop <= after.start for before, after in itertools.pairwise(spans))
    assert apart, f"targets overlap in part: {written}"
    zero_outside(x, spans)


class _AddProduct(torch.autograd.Function):
    """x + y @ weight.T, where y is given, or made of `gate` and `up` and made again."""

    @staticmethod
    def forward(ctx, x, weight, fp8: bool, *parts):
        ctx.save_for_backward(weight, *parts)
        ctx.fp8 = fp8
        y = parts[0] if len(parts) == 1 else rows.swiglu(*parts)
        if fp8:
            found = product(quantize_rows(y), quantize_rows(weight), fast_sums=True)
            return found if x is None else found.add_(x)
        return y @ weight.t() if x is None else torch.addmm(x, y, weight.t())

    @staticmethod
    def backward(ctx, grad):
        weight, *parts = ctx.saved_tensors
        grad = grad.contiguous()
        of_y = _times(grad, weight, ctx.fp8) if any(ctx.needs_input_grad[3:]) else None
        if len(parts) == 1:
            (y,), of_parts = parts, [of_y]
        elif of_y is None:
            y, of_parts = rows.swiglu(*parts), [None, None]
        else:
            gate, up = parts
            y, *of_parts = rows.swiglu_and_gradients(gate, up, of_y)
        of_weight = _weight_gradient(weight, grad, y) if ctx.needs_input_grad[1] else None
        return grad if ctx.needs_input_grad[0] else None, of_weight, None, *of_parts


def _times(grad: torch.Tensor, weight: torch.Tensor, fp8: bool) -> torch.Tensor:
    """grad @ weight: what a product's gradient [n, out] means for its rows, [n, h]."""
    return product(quantize_rows(grad), quantize_rows(weight.t())) if fp8 else grad @ weight


def _weight_gradient(weight: torch.Tensor, grad: torch.Tensor, x: torch.Tensor) -> torch.Tensor | None:
    """grad.T @ x, or None after adding it to the weight's `main_grad`."""
    main_grad = getattr(weight, "main_grad", None)
    if main_grad is None:
        return grad.t() @ x
    add_product_fp32(main_grad, grad, x)
    weight.grad_added_to_main_grad = True  # type: ignore[attr-defined]
    return None


def add_product_fp32(total: torch.Tensor, grad: torch.Tensor, x: torch.Tensor) -> None:
    """total [out, h] fp32 += grad.T @ x for grad [n, out], x [n, h] of any dtype."""
    if grad.is_cuda and grad.dtype != torch.float32:
        torch.addmm(total, grad.t(), x, out_dtype=torch.float32, out=total)
    elif grad.dtype == torch.float32:
        total.addmm_(grad.t(), x)
    else:
        total += grad.t() @ x


def _remakes(x: torch.Tensor) -> bool:
    """Whether cheap rows are made again in backward. On the CPU a pass over memory costs more than keeping them."""
    return x.is_cuda


def decoding(x: torch.Tensor, most: int | None = None) -> ModuleType | None:
    """The kernels for few rows x, where no gradients are asked for: up to `most` rows, or as many as their products are
    the fastest for."""
    if most is None:
        most = FEW_ROWS if x.element_size() == 2 else FEW_ROWS_FP32
    if x.is_cuda and len(x) <= most and not torch.is_grad_enabled():
        return triton_module("triton_few_rows")
    return None
