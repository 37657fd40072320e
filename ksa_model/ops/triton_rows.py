"""Triton kernels for RMSNorm, norm with rotation and SwiGLU with their gradients, and for quantization to fp8.

Legend: n rows, h features of a row, H heads, d head dimension. Every operation is one launch, where torch needs many. A
kernel computes in fp32 and reads and writes its operands once. Backward keeps only the inputs, or the output where that
is kept anyway. The twins are the functions of the same names in `ksa_model.ops.rows`, and `fp8.plain_quantize_rows`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ksa_model.ops.fp8 import E4M3_MAX, MIN_AMAX, Quantized

PROGRAMS = 1024  # programs that share the rows of a norm's backward; each writes a partial sum of the gain's gradient
PAIRS = 16  # (row, head) pairs of a tile
ELEMENTS = 1024  # SwiGLU elements of one program


@triton.jit
def _rms_norm(x, weight, out, size, eps, BLOCK: tl.constexpr):
    row, column = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    inside = column < size
    values = tl.load(x + row * size + column, mask=inside, other=0.0).to(tl.float32)
    scale = 1 / tl.sqrt(tl.sum(values * values, 0) / size + eps)
    gain = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * size + column, (values * scale * gain).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _rms_norm_backward(x, weight, grad, grad_x, grad_weight, rows, size, eps, BLOCK: tl.constexpr):
    first, step, column = tl.program_id(0), tl.num_programs(0), tl.arange(0, BLOCK)
    inside = column < size
    gain = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    sum_weight = tl.zeros([BLOCK], tl.float32)
    for index in range(first, rows, step):
        row = tl.cast(index, tl.int64) * size
        values = tl.load(x + row + column, mask=inside, other=0.0).to(tl.float32)
        given = tl.load(grad + row + column, mask=inside, other=0.0).to(tl.float32)
        scale = 1 / tl.sqrt(tl.sum(values * values, 0) / size + eps)
        normed = values * scale
        sum_weight += given * normed
        given *= gain
        found = scale * (given - normed * (tl.sum(given * normed, 0) / size))
        tl.store(grad_x + row + column, found.to(grad_x.dtype.element_ty), mask=inside)
    tl.store(grad_weight + first.to(tl.int64) * size + column, sum_weight, mask=inside)


@triton.jit
def _norm_rotate(x, weight, cos, sin, out, scales, pairs, heads, eps, HALF: tl.constexpr, BLOCK: tl.constexpr,
                 PAIRS: tl.constexpr, NORM: tl.constexpr):  # fmt: skip
    pair = tl.program_id(0).to(tl.int64) * PAIRS + tl.arange(0, PAIRS)
    column = tl.arange(0, BLOCK)
    inside = (pair < pairs)[:, None] & (column < HALF)[None, :]
    at = pair[:, None] * (2 * HALF) + column[None, :]
    left = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    right = tl.load(x + at + HALF, mask=inside, other=0.0).to(tl.float32)
    if NORM:
        scale = 1 / tl.sqrt((tl.sum(left * left, 1) + tl.sum(right * right, 1)) / (2 * HALF) + eps)
        tl.store(scales + pair, scale, mask=pair < pairs)
        left *= scale[:, None] * tl.load(weight + column, mask=column < HALF, other=0.0).to(tl.float32)[None, :]
        right *= scale[:, None] * tl.load(weight + HALF + column, mask=column < HALF, other=0.0).to(tl.float32)[None, :]
        left = left.to(x.dtype.element_ty).to(tl.float32)  # rounded as the output of the norm alone
        right = right.to(x.dtype.element_ty).to(tl.float32)
    angle = (pair // heads)[:, None] * HALF + column[None, :]
    c, s = tl.load(cos + angle, mask=inside, other=0.0), tl.load(sin + angle, mask=inside, other=0.0)
    tl.store(out + at, (left * c - right * s).to(out.dtype.element_ty), mask=inside)
    tl.store(out + at + HALF, (right * c + left * s).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _norm_rotate_backward(kept, scales, weight, cos, sin, grad, grad_x, grad_weight, pairs, heads, HALF: tl.constexpr,
                          BLOCK: tl.constexpr, PAIRS: tl.constexpr, NORM: tl.constexpr,
                          KEPT_INPUT: tl.constexpr):  # fmt: skip
    """`kept` is the output of forward, or with KEPT_INPUT its x."""
    first, step, column = tl.program_id(0), tl.num_programs(0), tl.arange(0, BLOCK)
    in_half = column < HALF
    if NORM:
        gain_left = tl.load(weight + column, mask=in_half, other=1.0).to(tl.float32)[None, :]
        gain_right = tl.load(weight + HALF + column, mask=in_half, other=1.0).to(tl.float32)[None, :]
        ungain_left = tl.where(gain_left == 0.0, 0.0, 1 / gain_left)
        ungain_right = tl.where(gain_right == 0.0, 0.0, 1 / gain_right)
    sum_left, sum_right = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    for tile in range(first, tl.cdiv(pairs, PAIRS), step):
        pair = tl.cast(tile, tl.int64) * PAIRS + tl.arange(0, PAIRS)
        inside = (pair < pairs)[:, None] & in_half[None, :]
        at = pair[:, None] * (2 * HALF) + column[None, :]
        angle = (pair // heads)[:, None] * HALF + column[None, :]
        c, s = tl.load(cos + angle, mask=inside, other=1.0), tl.load(sin + angle, mask=inside, other=0.0)
        given_left = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32)
        given_right = tl.load(grad + at + HALF, mask=inside, other=0.0).to(tl.float32)
        left, right = given_left * c + given_right * s, given_right * c - given_left * s
        if NORM:
            kept_left = tl.load(kept + at, mask=inside, other=0.0).to(tl.float32)
            kept_right = tl.load(kept + at + HALF, mask=inside, other=0.0).to(tl.float32)
            scale = tl.load(scales + pair, mask=pair < pairs, other=0.0)
            if KEPT_INPUT:
                normed_left, normed_right = kept_left * scale[:, None], kept_right * scale[:, None]
            else:
                unrotate = 1 / (c * c + s * s)  # 1, except for YaRN's factor
                normed_left = (kept_left * c + kept_right * s) * unrotate * ungain_left
                normed_right = (kept_right * c - kept_left * s) * unrotate * ungain_right
            sum_left += tl.sum(left * normed_left, 0)
            sum_right += tl.sum(right * normed_right, 0)
            left *= gain_left
            right *= gain_right
            mean = (tl.sum(left * normed_left, 1) + tl.sum(right * normed_right, 1)) / (2 * HALF)
            left = scale[:, None] * (left - normed_left * mean[:, None])
            right = scale[:, None] * (right - normed_right * mean[:, None])
        tl.store(grad_x + at, left.to(grad_x.dtype.element_ty), mask=inside)
        tl.store(grad_x + at + HALF, right.to(grad_x.dtype.element_ty), mask=inside)
    if NORM:
        tl.store(grad_weight + first * 2 * HALF + column, sum_left, mask=in_half)
        tl.store(grad_weight + first * 2 * HALF + HALF + column, sum_right, mask=in_half)


@triton.jit
def _swiglu(gate, up, out, count, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    g = tl.load(gate + at, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + at, (g / (1 + tl.exp(-g)) * u).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _swiglu_backward(gate, up, grad, grad_gate, grad_up, out, count, BLOCK: tl.constexpr, OUT: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    g = tl.load(gate + at, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + at, mask=inside, other=0.0).to(tl.float32)
    given = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32)
    share = 1 / (1 + tl.exp(-g))
    tl.store(grad_up + at, (given * g * share).to(grad_up.dtype.element_ty), mask=inside)
    if OUT:
        tl.store(out + at, (g * share * u).to(out.dtype.element_ty), mask=inside)
    slope = share * (1 + g * (1 - share))
    tl.store(grad_gate + at, (given * u * slope).to(grad_gate.dtype.element_ty), mask=inside)


@triton.jit
def _quantize_rows(x, out, scales, size, largest, least, BLOCK: tl.constexpr):
    row, column = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    inside = column < size
    values = tl.load(x + row * size + column, mask=inside, other=0.0).to(tl.float32)
    scale = tl.maximum(tl.max(tl.abs(values), 0), least) / largest
    has_nan = tl.max((values != values).to(tl.int32), 0) > 0  # a maximum ignores NaN
    scale = tl.where(has_nan, float("nan"), scale)
    tl.store(scales + row, scale)
    tl.store(out + row * size + column, (values / scale).to(out.dtype.element_ty), mask=inside)


class RMSNorm(torch.autograd.Function):
    """x [..., h], weight [h] -> x's shape and dtype."""

    @staticmethod
    def forward(ctx, x, weight, eps: float):
        x, size = x.contiguous(), x.shape[-1]
        out, block = torch.empty_like(x), triton.next_power_of_2(size)
        if x.numel():
            _rms_norm[(x.numel() // size,)](x, weight, out, size, eps, block, num_warps=_norm_warps(block))
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        return out

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        grad, size = grad.contiguous(), x.shape[-1]
        rows, block = x.numel() // size, triton.next_power_of_2(size)
        programs = max(1, min(PROGRAMS, rows))
        grad_x = torch.empty_like(x)
        partial = torch.empty(programs, size, dtype=torch.float32, device=x.device)
        _rms_norm_backward[(programs,)](
            x, weight, grad, grad_x, partial, rows, size, ctx.eps, block, num_warps=_norm_warps(block)
        )
        return grad_x, partial.sum(0).to(weight.dtype), None


class NormRotate(torch.autograd.Function):
    """x [n, H, d] -> normed over d where there is a weight [d], then rotated; cos, sin [n, 1, d/2] fp32.

    Attention keeps the result, so backward does not keep x as well: it rotates the result back and divides by the gain,
    which gives the normed row. Rotation mixes the rounding errors of two features, and dividing by a gain much smaller
    than its partner's would amplify them: for such gains (`rows.is_uneven`) set `keep_input`, which keeps x. Besides,
    one fp32 value per row and head is kept, the scale of the norm.
    """

    @staticmethod
    def forward(ctx, x, weight, eps: float, cos, sin, keep_input: bool = False):
        x = x.contiguous()
        rows, heads, d = x.shape
        out = torch.empty_like(x)
        scales = torch.empty(0 if weight is None else rows * heads, dtype=torch.float32, device=x.device)
        if x.numel():
            _norm_rotate[(triton.cdiv(rows * heads, PAIRS),)](
                x, x if weight is None else weight, cos, sin, out, scales, rows * heads, heads, eps, HALF=d // 2,
                BLOCK=triton.next_power_of_2(d // 2), PAIRS=PAIRS, NORM=weight is not None, num_warps=4,
            )  # fmt: skip
        ctx.save_for_backward(out[:0] if weight is None else x if keep_input else out, scales, weight, cos, sin)
        ctx.kept_input = keep_input
        return out

    @staticmethod
    def backward(ctx, grad):
        kept, scales, weight, cos, sin = ctx.saved_tensors
        grad = grad.contiguous()
        rows, heads, d = grad.shape
        programs = max(1, min(PROGRAMS, triton.cdiv(rows * heads, PAIRS)))
        grad_x = torch.empty_like(grad)
        partial = None
        if weight is not None:
            partial = torch.empty(programs, d, dtype=torch.float32, device=grad.device)
        _norm_rotate_backward[(programs,)](
            kept if weight is not None else grad, scales, weight if weight is not None else grad, cos, sin, grad,
            grad_x, partial if partial is not None else grad, rows * heads, heads, HALF=d // 2,
            BLOCK=triton.next_power_of_2(d // 2), PAIRS=PAIRS, NORM=weight is not None, KEPT_INPUT=ctx.kept_input,
            num_warps=4,
        )  # fmt: skip
        return grad_x, None if partial is None else partial.sum(0).to(weight.dtype), None, None, None, None


class SwiGLU(torch.autograd.Function):
    """silu(gate) * up."""

    @staticmethod
    def forward(ctx, gate, up):
        gate, up = gate.contiguous(), up.contiguous()
        out = torch.empty_like(gate)
        if gate.numel():
            _swiglu[(triton.cdiv(gate.numel(), ELEMENTS),)](gate, up, out, gate.numel(), ELEMENTS)
        ctx.save_for_backward(gate, up)
        return out

    @staticmethod
    def backward(ctx, grad):
        gate, up = ctx.saved_tensors
        return _swiglu_gradients(gate, up, grad, with_output=False)[1:]


def rms_norm(x: torch.Tensor, gain: torch.Tensor, eps: float) -> torch.Tensor:
    """See `rows.rms_norm`."""
    return RMSNorm.apply(x, gain, eps)


def norm_rotate(
    x, gain: torch.Tensor | None, eps: float, cos: torch.Tensor, sin: torch.Tensor, keep_input: bool = False
) -> torch.Tensor:
    """See `rows.norm_rotate`."""
    return NormRotate.apply(x, gain, eps, cos, sin, keep_input)


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """See `rows.swiglu`."""
    return SwiGLU.apply(gate, up)


def swiglu_and_gradients(gate, up, grad) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor]:
    """See `rows.swiglu_and_gradients`; one pass."""
    return _swiglu_gradients(gate, up, grad, with_output=True)


def _swiglu_gradients(gate, up, grad, with_output: bool) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor]:
    """(silu(gate) * up or None, gradient of gate, gradient of up), in one pass."""
    gate, up, grad = gate.contiguous(), up.contiguous(), grad.contiguous()
    grad_gate, grad_up = torch.empty_like(gate), torch.empty_like(up)
    out = torch.empty_like(gate) if with_output else None
    if gate.numel():
        _swiglu_backward[(triton.cdiv(gate.numel(), ELEMENTS),)](
            gate, up, grad, grad_gate, grad_up, grad_gate if out is None else out, gate.numel(), ELEMENTS,
            OUT=with_output,
        )  # fmt: skip
    return out, grad_gate, grad_up


def quantize_rows(x: torch.Tensor) -> Quantized:
    """x [n, h] in fp8 with a scale for each row. Twin: `fp8.plain_quantize_rows`."""
    x, (rows, size) = x.contiguous(), x.shape
    out = torch.empty(rows, size, dtype=torch.float8_e4m3fn, device=x.device)
    scales = torch.empty(rows, 1, dtype=torch.float32, device=x.device)
    if rows:
        block = triton.next_power_of_2(size)
        _quantize_rows[(rows,)](x, out, scales, size, E4M3_MAX, MIN_AMAX, block, num_warps=_norm_warps(block))
    return Quantized(out, scales)


def _norm_warps(block: int) -> int:
    return 8 if block > 1024 else 1
