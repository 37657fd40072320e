"""Which kernels compute a model's operations: one object for each model, chosen by device and dtype.

Legend: n rows, H query heads, d head dimension.
"""

from __future__ import annotations

import functools
import warnings
from types import ModuleType

import torch

from ksa_model.config import CPU_LOSS_ROWS, FUSED_LOSS_ROWS, LOSS_ROWS, ModelConfigError
from ksa_model.ops import fp8, pooling, rows, rows_cpu
from ksa_model.ops.attention import blocked, cpu, reference
from ksa_model.ops.optional import import_if_installed

_HALF_DTYPES = (torch.bfloat16, torch.float16)
# Without gradients, GEMMs of up to this many rows use the gemv and skinny GEMM kernels. cuBLAS is as fast beyond, and
# for fp32, which the tensor cores do not multiply exactly, from three rows on.
_GEMV_ROWS, _GEMV_ROWS_FP32 = 16, 2


class Backend:
    """The kernels of one model, shared by all its layers. Each property is one set of kernels.

    A property is chosen when it is first used and then kept, so an error or a warning about kernels that are missing
    appears only where they are needed. Models are built on the CPU and moved later, under ZeRO-3 one shard at a time
    and without a call of `model.to`, so the decoder calls `select_for` with its rows at the start of each forward.

    Tests replace kernels by assigning a property: `model.backend.rows = triton_rows`.
    """

    def __init__(
        self,
        attention_backend: str = "auto",
        head_dim: int = 128,
        device: torch.device | None = None,
        dtype: torch.dtype = torch.float32,
    ):
        """`attention_backend` and `head_dim` as in `ModelConfig`; `device` defaults to the CPU."""
        self.attention_backend, self.head_dim = attention_backend, head_dim
        self.device, self.dtype = device or torch.device("cpu"), dtype

    def select_for(self, x: torch.Tensor) -> None:
        """Use the kernels for the device and dtype of `x`. Does nothing while these stay the same; otherwise every
        property is chosen anew, also one that a test assigned."""
        if x.device != self.device or x.dtype != self.dtype:
            settings = self.attention_backend, self.head_dim
            vars(self).clear()
            self.attention_backend, self.head_dim = settings
            self.device, self.dtype = x.device, x.dtype

    @functools.cached_property
    def attention(self) -> ModuleType:
        """Attention over parts: `attend`, `Gradient` and `summary_attention` of `ksa_model.ops.attention.blocked`,
        `cpu` or `cuda`; or the dense `reference`, which has whole mixers instead of parts.

        Raises `ModelConfigError` where `model.attention_backend=fused` is not supported, or Triton is broken.
        """
        wanted = self.attention_backend
        if wanted == "reference":
            return reference
        if wanted == "auto" and self.device.type == "cpu":
            return cpu
        if wanted == "blocked" or (wanted == "auto" and self.device.type != "cuda"):
            return blocked
        cuda = import_if_installed("ksa_model.ops.attention.cuda", "triton")
        if cuda is None:  # CPU builds of torch do not include it
            if wanted == "auto":
                return _slower_path("Triton is missing")
            raise ModelConfigError("model.attention_backend=fused needs Triton, which is not installed")
        if cuda.supports(self.device, self.dtype, self.head_dim):
            return cuda
        needs = "a CUDA device of compute capability 8.0 or newer, bf16 or fp16, and head_dim at most 256 in steps of 8"
        has = f"{self.device.type}, {str(self.dtype).removeprefix('torch.')}, head_dim={self.head_dim}"
        if self.device.type == "cuda":
            has += ", compute capability {}.{}".format(*torch.cuda.get_device_capability(self.device))
        if wanted == "fused":
            raise ModelConfigError(f"model.attention_backend=fused needs {needs}; this model runs on {has}")
        return _slower_path(f"the fused kernels need {needs}; this model runs on {has}")

    @functools.cached_property
    def rows(self) -> ModuleType:
        """Operations on single rows: `rms_norm`, `norm_rotate`, `swiglu` and `swiglu_and_gradients`."""
        if (kernels := self._triton("ksa_model.ops.triton_rows")) is not None:
            return kernels
        return rows_cpu if self.device.type == "cpu" else rows

    @functools.cached_property
    def pooling(self) -> ModuleType:
        """`pool` of the keys and values of chunks."""
        return self._triton("ksa_model.ops.triton_pooling") or pooling

    @functools.cached_property
    def recompute_in_backward(self) -> bool:
        """Whether backward recomputes normed rows and MLP activations. On the CPU a pass over memory costs more than
        keeping them."""
        return self.device.type == "cuda"

    @functools.cached_property
    def fp8(self) -> fp8.Fp8Kernels:
        """Quantization to fp8 and the fp8 GEMM."""
        if self.device.type != "cuda":
            return fp8.Fp8Kernels(fp8.plain_quantize_rows, fp8.plain_gemm)
        kernels = self._triton("ksa_model.ops.triton_rows")
        return fp8.Fp8Kernels(kernels.quantize_rows if kernels else fp8.plain_quantize_rows, fp8.scaled_gemm)

    @functools.cached_property
    def loss(self) -> ModuleType | None:
        """Loss kernels on 16-bit logits (`ksa_model.ops.triton_loss`); None: plain torch in fp32."""
        return self._triton("ksa_model.ops.triton_loss") if self.dtype in _HALF_DTYPES else None

    @functools.cached_property
    def loss_rows(self) -> int:
        """Rows of logits that the loss holds at a time."""
        if self.loss is not None:
            return FUSED_LOSS_ROWS
        return LOSS_ROWS if self.device.type == "cuda" else CPU_LOSS_ROWS

    @functools.cached_property
    def gemv(self) -> ModuleType | None:
        """GEMMs of few rows without gradients (`ksa_model.ops.triton_gemv`); None: those of torch."""
        return self._triton("ksa_model.ops.triton_gemv")

    @functools.cached_property
    def gemv_rows(self) -> int:
        """The most rows for which the GEMMs of `gemv` are the fastest."""
        return _GEMV_ROWS if self.dtype.itemsize == 2 else _GEMV_ROWS_FP32

    @functools.cached_property
    def decode(self) -> ModuleType | None:
        """Attention over a decoding cache (`ksa_model.ops.attention.triton_decode`); None: plain torch."""
        return self._triton("ksa_model.ops.attention.triton_decode")

    def gemv_for(self, num_rows: int, limit: int | None = None) -> ModuleType | None:
        """`gemv` for a call with up to `limit` rows (None: `gemv_rows`) and no gradients, as in decoding; else None."""
        if num_rows > (self.gemv_rows if limit is None else limit) or torch.is_grad_enabled():
            return None
        return self.gemv

    def _triton(self, module: str) -> ModuleType | None:
        """A module of Triton kernels, by its full name; None on other devices or where torch came without Triton."""
        return import_if_installed(module, "triton") if self.device.type == "cuda" else None


@functools.cache
def _slower_path(why: str) -> ModuleType:
    warnings.warn(f"attention runs on the slower blocked path: {why}", stacklevel=3)
    return blocked
