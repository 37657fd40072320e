"""Operations on single rows in plain torch: RMSNorm, norm with rotation, SwiGLU.

Legend: n rows, h features of a row, H heads, d head dimension. All compute in fp32 and return the input's dtype.

`rows_cpu` and `triton_rows` have functions of the same names, with these as their twins; `ksa_model.ops.backend`
chooses.
"""

from __future__ import annotations

import torch
from torch import nn

# From this ratio of two gains on, the gradient of the smaller one, computed from the output, has three times the
# rounding error of bf16.
UNEVEN = 8.0


def rms_norm(x: torch.Tensor, gain: torch.Tensor, eps: float) -> torch.Tensor:
    """Root-mean-square norm (arXiv 1910.07467) of x [..., h] over its last dimension, with a gain [h]."""
    return nn.functional.rms_norm(x.float(), gain.shape, gain.float(), eps).to(x.dtype)


def norm_rotate(
    x, gain: torch.Tensor | None, eps: float, cos: torch.Tensor, sin: torch.Tensor, keep_input: bool = False
) -> torch.Tensor:
    """x [n, H, d], normed over d where there is a gain [d], then rotated by RoPE; cos, sin [n, 1, d/2] fp32.

    `keep_input`: for gains that are `is_uneven`, so that the gradients of the Triton kernels stay as accurate as 16
    bits allow; without effect here.
    """
    return rotate(x if gain is None else rms_norm(x, gain, eps), (cos, sin))


def is_uneven(gain: torch.Tensor) -> bool:
    """Whether the gains [d] of two features that RoPE rotates together differ much, or are zero. Waits for the
    device."""
    sizes = gain.detach().float().abs().unflatten(0, (2, -1))
    return bool((sizes.amax(0) >= UNEVEN * sizes.amin(0)).any())


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up (arXiv 2002.05202)."""
    return nn.functional.silu(gate) * up


def swiglu_and_gradients(
    gate: torch.Tensor, up: torch.Tensor, grad: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """swiglu(gate, up), and the gradients of gate and up for the gradient `grad` of the result."""
    with torch.enable_grad():
        gate, up = gate.detach().requires_grad_(), up.detach().requires_grad_()
        out = swiglu(gate, up)
    grad_gate, grad_up = torch.autograd.grad(out, (gate, up), grad)
    return out.detach(), grad_gate, grad_up


def rotate(x: torch.Tensor, table: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """RoPE (arXiv 2104.09864) on x [n, H, d]. Feature i is paired with i + d/2, as in Llama and Qwen."""
    cos, sin = table
    left, right = x.float().chunk(2, dim=-1)
    return torch.cat([left * cos - right * sin, right * cos + left * sin], dim=-1).to(x.dtype)
