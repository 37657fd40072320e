"""Matrix products in 8-bit floats (e4m3, arXiv 2209.05433) of rows that have a scale each.

Legend: n rows, h features of a row; a weight is [out, h].

The recipe is what torchao calls "rowwise with grad-weight in high precision": forward, x W^T has a scale for each row
of x and of W; backward, dy W has one for each row of dy and each column of W; scales are those of the very tensors that
are multiplied. A weight's gradient, dy^T x, stays a product in 16 bits.

On a GPU torch's `scaled_mm` multiplies and Triton quantizes (`ksa_model.triton_rows`). `plain_quantize_rows` and
`plain_product` are their twins, and what runs elsewhere.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch.nn import functional as F

from ksa_model.config import ModelConfig, ModelConfigError
from ksa_model.rows import triton_module

LARGEST = 448.0  # that e4m3 holds
LEAST_AMAX = 1e-30  # rows of less, of zeros say, are scaled as if this were in them: far below, fp32 has no scales
FEATURES = 16  # that both sides of a weight must be multiples of
CAPABILITY = (8, 9)  # of the first CUDA devices with such products


class Quantized(NamedTuple):
    """values [n, h] float8_e4m3fn, each row to be multiplied with its one of scales [n, 1] fp32."""

    values: torch.Tensor
    scales: torch.Tensor


def quantize_rows(x: torch.Tensor) -> Quantized:
    """x [n, h] with each row divided by its largest magnitude / 448; rows that are not finite stay so."""
    x = x.contiguous()
    fast = triton_module("triton_rows") if x.is_cuda else None
    return Quantized(*fast.quantize_rows(x, LARGEST, LEAST_AMAX)) if fast else plain_quantize_rows(x)


def product(x: Quantized, weight: Quantized, fast_sums: bool = False) -> torch.Tensor:
    """x [n, h] times the rows of weight [out, h]: bf16 [n, out].

    `fast_sums` lets Hopper's tensor cores add up with fewer bits than fp32 has, which torchao's recipe does in forward
    and not in backward.
    """
    return scaled_product(x, weight, fast_sums) if x.values.is_cuda else plain_product(x, weight)


def scaled_product(x: Quantized, weight: Quantized, fast_sums: bool = False) -> torch.Tensor:
    """`product` by torch's own operator, which needs torch 2.10."""
    by_row = F.ScalingType.RowWise
    return F.scaled_mm(
        x.values,
        weight.values.t(),
        x.scales,
        by_row,
        weight.scales.view(1, -1),
        by_row,
        output_dtype=torch.bfloat16,
        use_fast_accum=fast_sums,
    )


def plain_quantize_rows(x: torch.Tensor) -> Quantized:
    """Twin of `quantize_rows`."""
    x = x.float()
    scales = x.abs().amax(1, keepdim=True).clamp_(min=LEAST_AMAX).div_(LARGEST)
    return Quantized((x / scales).to(torch.float8_e4m3fn), scales)


def plain_product(x: Quantized, weight: Quantized) -> torch.Tensor:
    """Twin of `product`."""
    x32, weight32 = (side.values.float() * side.scales for side in (x, weight))
    return (x32 @ weight32.t()).bfloat16()


def check_features(config: ModelConfig, tensor_ranks: int) -> None:
    """Raise `ModelConfigError` where a tensor rank's share of a weight has a side that `scaled_mm` does not take."""
    for names, divided in (
        (("hidden_size",), 1),
        (("num_heads", "head_dim"), tensor_ranks),
        (("num_kv_heads", "head_dim"), tensor_ranks),
        (("ffn_size",), tensor_ranks),
    ):
        size = math.prod(getattr(config, name) for name in names)
        if size // divided % FEATURES:
            said = " x ".join(f"model.{name}={getattr(config, name)}" for name in names)
            share = f" over parallel.tensor={divided}" if divided > 1 else ""
            raise ModelConfigError(
                f"perf.precision=fp8 multiplies multiples of {FEATURES} features, and {said}{share} gives "
                f"{size // divided}; choose another size, or perf.precision=bf16"
            )


def check_device(device: torch.device) -> None:
    """Raise `ModelConfigError` for a CUDA device, or a torch on one, without products in 8 bits."""
    if device.type != "cuda":
        return
    capability = torch.cuda.get_device_capability(device)
    if capability < CAPABILITY:
        raise ModelConfigError(
            f"perf.precision=fp8 needs a CUDA device of capability {CAPABILITY[0]}.{CAPABILITY[1]} or above, and "
            f"{torch.cuda.get_device_name(device)} has {capability[0]}.{capability[1]}; use perf.precision=bf16"
        )
    if not hasattr(F, "scaled_mm"):
        raise ModelConfigError(
            f"perf.precision=fp8 on a CUDA device needs torch 2.10 or newer, and this is {torch.__version__}; update "
            "it, or use perf.precision=bf16"
        )
