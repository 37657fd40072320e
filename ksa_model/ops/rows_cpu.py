"""The operations of `ksa_model.ops.rows` on the CPU. Norm and rotation have gradients of their own, since in plain
torch each is a chain of small operations in both directions."""

from __future__ import annotations

import torch

from ksa_model.ops.rows import swiglu, swiglu_and_gradients

__all__ = ["RMSNormCPU", "RotateCPU", "norm_rotate", "rms_norm", "swiglu", "swiglu_and_gradients"]


def rms_norm(x: torch.Tensor, gain: torch.Tensor, eps: float) -> torch.Tensor:
    """See `rows.rms_norm`."""
    return RMSNormCPU.apply(x.float(), gain.float(), eps).to(x.dtype)


def norm_rotate(
    x, gain: torch.Tensor | None, eps: float, cos: torch.Tensor, sin: torch.Tensor, keep_input: bool = False
) -> torch.Tensor:
    """See `rows.norm_rotate`."""
    normed = x if gain is None else rms_norm(x, gain, eps)
    return RotateCPU.apply(normed.float(), cos, sin).to(x.dtype)


class RMSNormCPU(torch.autograd.Function):
    """x [..., n] and gain [n], both fp32 -> x / rms(x) * gain. Twin: `torch.nn.functional.rms_norm`.

    With r = 1 / rms(x) and y = x * r, the gradient of x is r * (g - y * mean(g * y)) for g = gain * grad_out. Keeps x
    and r [..., 1] only.
    """

    @staticmethod
    def forward(ctx, x: torch.Tensor, gain: torch.Tensor, eps: float) -> torch.Tensor:
        size = x.shape[-1]
        scale = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(size).add_(eps).rsqrt_()
        ctx.save_for_backward(x, scale, gain)
        return (x * scale).mul_(gain)

    @staticmethod
    def backward(ctx, grad_out):
        x, scale, gain = ctx.saved_tensors
        normed = x * scale
        grad_normed = grad_out * normed
        grad_gain = grad_normed.flatten(0, -2).sum(0)
        mean = (grad_normed @ gain[:, None]).div_(-len(gain))
        return (grad_out * gain).addcmul_(normed, mean).mul_(scale), grad_gain, None


class RotateCPU(torch.autograd.Function):
    """RoPE on x [rows, heads, d] fp32 with cos, sin [rows, 1, d/2]. Twin: `rows.rotate`. Keeps only the table."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(cos, sin)
        return _turn(x, cos, sin, 1)

    @staticmethod
    def backward(ctx, grad_out):
        cos, sin = ctx.saved_tensors
        return _turn(grad_out, cos, sin, -1), None, None


def _turn(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, direction: int) -> torch.Tensor:
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    (left, right), (new_left, new_right) = x.chunk(2, dim=-1), out.chunk(2, dim=-1)
    torch.mul(left, cos, out=new_left).addcmul_(right, sin, value=-direction)
    torch.mul(right, cos, out=new_right).addcmul_(left, sin, value=direction)
    return out
