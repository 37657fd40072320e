"""Tensor and Megatron sequence parallelism behind a few methods, so that the model reads like a single-GPU model.

Legend: t tensor ranks, rows = [text | summaries] of this context rank, h hidden size.

A block alternates between two states. *Sharded*: under sequence parallelism each tensor rank holds 1/t of the text rows
and 1/t of the summary rows; otherwise every rank holds all rows. *Gathered*: every tensor rank holds all rows, and some
heads or some MLP columns. `project` and `gated` enter the gathered state once per sub-layer (one collective for all its
GEMMs); `add_gemm` and `add_gated_gemm` leave it.

Megatron's layers hold and initialise the weights; `ksa_model.ops.linear` multiplies with them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch

from ksa_model.ops import linear
from ksa_model.ops.backend import Backend
from ksa_model.ops.linear import Norm, Target, Weight
from ksa_model.parallel.megatron import (
    ColumnParallelLinear,
    ModelParallelConfig,
    RowParallelLinear,
    VocabParallelEmbedding,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
    set_tensor_model_parallel_attributes,
)


@dataclass(frozen=True)
class TensorParallel:
    """How this rank takes part in tensor parallelism; `group` may have a single rank.

    `dtype` is that of the parameters. Whole weights are initialised on the host from the global random state and then
    sliced, so the same seed gives the same model on any number of tensor ranks.
    """

    group: torch.distributed.ProcessGroup
    sequence_parallel: bool = False
    dtype: torch.dtype = torch.float32

    @property
    def size(self) -> int:
        """The number of tensor ranks."""
        return self.group.size()

    @property
    def rank(self) -> int:
        """This rank's index among them."""
        return self.group.rank()

    @property
    def shards_rows(self) -> bool:
        """Whether the sharded state splits rows."""
        return self.sequence_parallel and self.size > 1

    def local_rows(self, rows: int) -> int:
        """The number of a stream's rows that this rank holds in the sharded state."""
        return rows // self.size if self.shards_rows else rows

    # -- layers -----------------------------------------------------------------------------------------------------

    def column(
        self, in_size: int, out_size: int, init_std: float, fp8: bool = False, bias: bool = False
    ) -> ColumnParallelLinear:
        """A weight from all input features to this rank's share of the output features, and with `bias` one for these,
        which starts at zero. `fp8`: see `weight_of`."""
        layer = ColumnParallelLinear(
            in_size,
            out_size,
            config=self._config(False),
            init_method=_normal(init_std),
            bias=bias,
            disable_grad_reduce=True,
            tp_group=self.group,
        )
        layer.fp8 = fp8
        return layer

    def row(self, in_size: int, out_size: int, init_std: float, fp8: bool = False) -> RowParallelLinear:
        """A weight from this rank's share of the input features to all output features. `fp8`: see `weight_of`."""
        layer = RowParallelLinear(
            in_size,
            out_size,
            config=self._config(self.shards_rows),
            init_method=_normal(init_std),
            bias=False,
            input_is_parallel=True,
            skip_bias_add=False,
            tp_group=self.group,
        )
        layer.fp8 = fp8
        return layer

    def embedding(self, rows: int, hidden_size: int, init_std: float) -> VocabParallelEmbedding:
        """A table of `rows` embeddings, this rank's share of them."""
        return VocabParallelEmbedding(
            rows,
            hidden_size,
            init_method=_normal(init_std),
            config=self._config(False),
            reduce_scatter_embeddings=self.shards_rows,
            tp_group=self.group,
        )

    def share(self, whole: torch.Tensor, dim: int = 0) -> torch.nn.Parameter:
        """This rank's share along `dim` of a parameter that no GEMM uses, given whole on every rank."""
        parameter = torch.nn.Parameter(whole.chunk(self.size, dim)[self.rank].to(self.dtype).contiguous())
        set_tensor_model_parallel_attributes(parameter, is_parallel=True, dim=dim, stride=1)
        return parameter

    def _config(self, sequence_parallel: bool) -> ModelParallelConfig:
        return ModelParallelConfig(
            tensor_model_parallel_size=self.size,
            sequence_parallel=sequence_parallel,
            params_dtype=self.dtype,
            use_cpu_initialization=True,
            perform_initialization=True,
            gradient_accumulation_fusion=False,
        )

    # -- changes of state -------------------------------------------------------------------------------------------

    def gather(self, x: torch.Tensor) -> torch.Tensor:
        """Sharded rows -> all rows. Backward sums the ranks' partial gradients (and scatters the sum)."""
        if self.shards_rows:
            return gather_from_sequence_parallel_region(x, tensor_parallel_output_grad=True, group=self.group)
        return copy_to_tensor_model_parallel_region(x, group=self.group)

    def project(
        self,
        backend: Backend,
        x: torch.Tensor,
        norm: Norm,
        num_text: int,
        text: Sequence[Weight],
        summary: Sequence[Weight] = (),
    ) -> list[torch.Tensor]:
        """Norm and gather sharded rows x; multiply the `num_text` text rows with each weight of `text` and the summary
        rows with each of `summary`. Returns one tensor [T or S, this rank's features] per weight, in sequence order."""
        x, own_norm = self._enter(backend, x, norm)
        if self.shards_rows and len(x) > num_text:
            # The gathered rows are ordered by rank: [text_0 | summaries_0 | text_1 | ...].
            by_rank, local_text = x.view(self.size, -1, *x.shape[1:]), num_text // self.size
            x = torch.cat([*by_rank[:, :local_text].unbind(), *by_rank[:, local_text:].unbind()])
        targets = [Target(0, num_text, weight) for weight in text]
        targets += [Target(num_text, len(x), weight) for weight in summary]
        return linear.project(backend, x, own_norm, targets)

    def gated(
        self, backend: Backend, x: torch.Tensor, norm: Norm, gate: Weight, up: Weight
    ) -> tuple[torch.Tensor, ...]:
        """Norm and gather sharded rows x; return `linear.gated` of them."""
        return linear.gated(backend, *self._enter(backend, x, norm), gate, up)

    def add_gemm(
        self, backend: Backend, x: torch.Tensor, y: torch.Tensor, weight: Weight, reuse: bool = False
    ) -> torch.Tensor:
        """Sharded rows x plus `gemm` of gathered rows y. `reuse` as in `linear.add_gemm`."""
        if self.size == 1:
            return linear.add_gemm(backend, x, y, weight, reuse)
        return x + self.gemm(backend, y, weight)

    def add_gated_gemm(
        self, backend: Backend, x: torch.Tensor, parts: tuple[torch.Tensor, ...], weight: Weight, reuse: bool = False
    ) -> torch.Tensor:
        """`add_gemm` for y = swiglu of `parts`, which are those of `gated`."""
        if self.size == 1:
            return linear.add_gated_gemm(backend, x, parts, weight, reuse)
        return x + self._leave(linear.add_gated_gemm(backend, None, parts, weight))

    def gemm(self, backend: Backend, y: torch.Tensor, weight: Weight) -> torch.Tensor:
        """Gathered rows y, with this rank's features, times a weight: summed over ranks and sharded."""
        return self._leave(linear.add_gemm(backend, None, y, weight))

    def _enter(self, backend: Backend, x: torch.Tensor, norm: Norm) -> tuple[torch.Tensor, Norm | None]:
        """Gathered rows, and the norm if it still has to be applied."""
        if self.size == 1:
            return x, norm
        return self.gather(backend.rows.rms_norm(x, norm.gain, norm.eps)), None

    def _leave(self, x: torch.Tensor) -> torch.Tensor:
        if self.shards_rows:
            return reduce_scatter_to_sequence_parallel_region(x, group=self.group)
        return reduce_from_tensor_model_parallel_region(x, group=self.group)

    def join_streams(self, text: torch.Tensor, summary: torch.Tensor) -> torch.Tensor:
        """Text and summary rows, each in sequence order, in the order of gathered rows."""
        if not self.shards_rows:
            if not torch.is_grad_enabled() and _is_followed_by(text, summary):  # in decoding
                return text.as_strided((len(text) + len(summary), *text.shape[1:]), text.stride())
            return torch.cat([text, summary])
        return torch.cat(
            [x.view(self.size, len(x) // self.size, *x.shape[1:]) for x in (text, summary)], dim=1
        ).flatten(0, 1)

    def replicated(self, weight: torch.Tensor, grad_is_complete: bool) -> torch.Tensor:
        """A weight that every tensor rank holds whole, ready for use.

        If only a share of the rows or heads that use the weight are on this rank (`grad_is_complete` false), its
        gradient is summed over the ranks in backward. Without the sum the ranks' copies would drift apart silently.
        """
        return (
            weight
            if grad_is_complete or self.size == 1
            else copy_to_tensor_model_parallel_region(weight, group=self.group)
        )


def weight_of(layer: torch.nn.Module) -> Weight:
    """The weight of a layer made by `column` or `row`, with its bias. Its GEMMs run in fp8 where the layer's do and
    gradients are computed; without gradients, as in validation and decoding, they do not."""
    return Weight(layer.weight, bool(layer.fp8) and torch.is_grad_enabled(), layer.bias)  # type: ignore[arg-type]


def _is_followed_by(x: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether both are rows of one tensor, `other` directly after `x`. Adjacent addresses do not prove it: allocators
    give them to unrelated tensors."""
    same = x.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()
    behind = same and x.storage_offset() + x.numel() == other.storage_offset()
    return behind and x.is_contiguous() and other.is_contiguous()


def _normal(std: float):
    if std == 0:  # draws no random numbers, so that the other weights are those of a model without this one
        return torch.nn.init.zeros_
    return partial(torch.nn.init.normal_, mean=0.0, std=std)
