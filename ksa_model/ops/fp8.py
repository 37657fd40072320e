"""GEMMs in fp8 (e4m3, arXiv 2209.05433), with a scale for each row.

Legend: n rows, h features of a row; a weight is [out, h].

The recipe is torchao's "rowwise with grad-weight in high precision". Forward, x W^T: a scale for each row of x and of
W. Backward, dy W: a scale for each row of dy and each column of W. Scales are computed from the tensors that are
multiplied. The gradient of a weight, dy^T x, stays a 16-bit GEMM.

On a GPU torch's `scaled_mm` multiplies and Triton quantizes (`ksa_model.ops.triton_rows`). Other devices use the twins
`plain_gemm` and `plain_quantize_rows`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch.nn import functional as F

from ksa_model.config import ModelConfigError

E4M3_MAX = 448.0
MIN_AMAX = 1e-30  # smaller rows, such as zeros, are scaled as if they held this: fp32 has no scales much below
CAPABILITY = (8, 9)  # the lowest compute capability with fp8 GEMMs


class Quantized(NamedTuple):
    """values [n, h] float8_e4m3fn and scales [n, 1] fp32; the rows are values * scales."""

    values: torch.Tensor
    scales: torch.Tensor


class Fp8Kernels(NamedTuple):
    """How a device quantizes rows and multiplies them."""

    quantize_rows: Callable[[torch.Tensor], Quantized]
    gemm: Callable[[Quantized, Quantized, bool], torch.Tensor]


def scaled_gemm(x: Quantized, weight: Quantized, fast_accumulation: bool = False) -> torch.Tensor:
    """x [n, h] times weight [out, h] transposed: bf16 [n, out]. Needs torch 2.10.

    `fast_accumulation` lets Hopper's tensor cores accumulate with fewer bits than fp32. torchao's recipe does so in
    forward but not in backward.
    """
    by_row = F.ScalingType.RowWise
    return F.scaled_mm(
        x.values,
        weight.values.t(),
        x.scales,
        by_row,
        weight.scales.view(1, -1),
        by_row,
        output_dtype=torch.bfloat16,
        use_fast_accum=fast_accumulation,
    )


def plain_quantize_rows(x: torch.Tensor) -> Quantized:
    """x [n, h] with each row divided by its largest magnitude / 448. Rows that are not finite stay so. Twin:
    `triton_rows.quantize_rows`."""
    x = x.contiguous().float()
    scales = x.abs().amax(1, keepdim=True).clamp_(min=MIN_AMAX).div_(E4M3_MAX)
    return Quantized((x / scales).to(torch.float8_e4m3fn), scales)


def plain_gemm(x: Quantized, weight: Quantized, fast_accumulation: bool = False) -> torch.Tensor:
    """Twin of `scaled_gemm`; always accumulates in fp32."""
    x32, weight32 = (side.values.float() * side.scales for side in (x, weight))
    return (x32 @ weight32.t()).bfloat16()


def check_device(device: torch.device) -> None:
    """Raise `ModelConfigError` for a CUDA device, or a version of torch, without fp8 GEMMs."""
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
