"""What a layer does to single rows: norm, norm with rotation, SwiGLU. Plain torch, or one kernel each on a GPU.

Legend: h features of a row, H heads, d head dimension. All compute in fp32 and return the input's dtype.
"""

from __future__ import annotations

import functools
import importlib
from types import ModuleType

import torch
from torch import nn

from ksa_model.rows_cpu import RMSNormCPU, RotateCPU

# Ratio of two gains from which the smaller's gradient, found from the output, has three times the rounding of bf16.
UNEVEN = 8.0


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Root-mean-square norm (arXiv 1910.07467) of x [..., h] over its last dimension, with a gain [h]."""
    if (fast := _kernels(x)) is not None:
        return fast.RMSNorm.apply(x, weight, eps)
    if x.device.type == "cpu":
        return RMSNormCPU.apply(x.float(), weight.float(), eps).to(x.dtype)
    return plain_rms_norm(x, weight, eps)


def norm_rotate(
    x, weight: torch.Tensor | None, eps: float, cos: torch.Tensor, sin: torch.Tensor, keep_input: bool = False
) -> torch.Tensor:
    """x [rows, H, d], normed over d where there is a gain [d], then turned by RoPE; cos, sin [rows, 1, d/2] fp32.

    `keep_input`: for gains that are `is_uneven`, so that gradients on a GPU stay as good as 16 bits are.
    """
    if (fast := _kernels(x)) is not None:
        return fast.NormRotate.apply(x, weight, eps, cos, sin, keep_input)
    normed = x if weight is None else rms_norm(x, weight, eps)
    if x.device.type == "cpu":
        return RotateCPU.apply(normed.float(), cos, sin).to(x.dtype)
    return rotate(normed, (cos, sin))


def is_uneven(gain: torch.Tensor) -> bool:
    """Whether the gains [d] of two features that RoPE turns together are far apart, or zero. Waits for the device."""
    sizes = gain.detach().float().abs().unflatten(0, (2, -1))
    return bool((sizes.amax(0) >= UNEVEN * sizes.amin(0)).any())


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up (arXiv 2002.05202)."""
    fast = _kernels(gate)
    return fast.SwiGLU.apply(gate, up) if fast else plain_swiglu(gate, up)


def swiglu_and_gradients(
    gate: torch.Tensor, up: torch.Tensor, grad: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """swiglu(gate, up), and the gradients of gate and up under `grad`, its gradient."""
    if (fast := _kernels(gate)) is not None:
        return fast.swiglu_backward(gate, up, grad, and_product=True)
    with torch.enable_grad():
        gate, up = gate.detach().requires_grad_(), up.detach().requires_grad_()
        product = plain_swiglu(gate, up)
    grad_gate, grad_up = torch.autograd.grad(product, (gate, up), grad)
    return product.detach(), grad_gate, grad_up


def plain_rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Twin of `rms_norm`."""
    return nn.functional.rms_norm(x.float(), weight.shape, weight.float(), eps).to(x.dtype)


def plain_norm_rotate(x, weight: torch.Tensor | None, eps: float, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Twin of `norm_rotate`."""
    return rotate(x if weight is None else plain_rms_norm(x, weight, eps), (cos, sin))


def plain_swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """Twin of `swiglu`."""
    return nn.functional.silu(gate) * up


def rotate(x: torch.Tensor, table: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """RoPE (arXiv 2104.09864) on x [rows, heads, d], pairing feature i with i + d/2 as Llama and Qwen do."""
    cos, sin = table
    left, right = x.float().chunk(2, dim=-1)
    return torch.cat([left * cos - right * sin, right * cos + left * sin], dim=-1).to(x.dtype)


def _kernels(x: torch.Tensor) -> ModuleType | None:
    return triton_module("triton_rows") if x.is_cuda else None


@functools.cache
def triton_module(name: str) -> ModuleType | None:
    """`ksa_model.<name>`, or None with a torch that came without Triton."""
    try:
        return importlib.import_module(f"ksa_model.{name}")
    except ImportError:
        return None
