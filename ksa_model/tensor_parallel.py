"""Tensor and Megatron sequence parallelism behind five verbs, so that the model file reads like a single-GPU model.

Legend: t tensor ranks, rows = [text | summaries] of this context rank, h hidden size.

A block alternates between two states. *Sharded*: hidden rows, under sequence parallelism each tensor rank holds
1/t of the text rows and 1/t of the summary rows; otherwise every rank holds all. *Gathered*: all rows on every tensor
rank, each rank owning some heads or some MLP columns. `project` and `gated` enter the second state once per sub-layer
(one collective for all its products), `add_product` and `add_gated` leave it. `fp8` and `reuse` are as in
`ksa_model.linear`.

Megatron's layers hold and initialise the weights; `ksa_model.linear` multiplies with them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch

from ksa_model import linear, rows
from ksa_model.linear import Norm, Target
from ksa_model.megatron import (
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
    """How this rank takes part in tensor parallelism; `group` may hold a single rank.

    `dtype` is that of the parameters. Weights are initialised on the host from the global random state, whole, and then
    sliced: the same seed gives the same model on any number of tensor ranks.
    """

    group: torch.distributed.ProcessGroup
    sequence_parallel: bool = False
    dtype: torch.dtype = torch.float32

    @property
    def size(self) -> int:
        return self.group.size()

    @property
    def rank(self) -> int:
        return self.group.rank()

    @property
    def shards_rows(self) -> bool:
        return self.sequence_parallel and self.size > 1

    def local_rows(self, rows: int) -> int:
        """Rows of a stream that this rank holds in the sharded state."""
        return rows // self.size if self.shards_rows else rows

    # -- layers -----------------------------------------------------------------------------------------------------

    def column(self, in_size: int, out_size: int, init_std: float) -> ColumnParallelLinear:
        """The weight of gathered rows in, this rank's share of the output features out."""
        return ColumnParallelLinear(
            in_size,
            out_size,
            config=self._config(False),
            init_method=_normal(init_std),
            bias=False,
            disable_grad_reduce=True,
            tp_group=self.group,
        )

    def row(self, in_size: int, out_size: int, init_std: float) -> RowParallelLinear:
        """The weight of this rank's share of the features in, all output features out."""
        return RowParallelLinear(
            in_size,
            out_size,
            config=self._config(self.shards_rows),
            init_method=_normal(init_std),
            bias=False,
            input_is_parallel=True,
            skip_bias_add=False,
            tp_group=self.group,
        )

    def embedding(self, rows: int, hidden_size: int, init_std: float) -> VocabParallelEmbedding:
        return VocabParallelEmbedding(
            rows,
            hidden_size,
            init_method=_normal(init_std),
            config=self._config(False),
            reduce_scatter_embeddings=self.shards_rows,
            tp_group=self.group,
        )

    def share(self, whole: torch.Tensor, dim: int = 0) -> torch.nn.Parameter:
        """This rank's share of a parameter that no product takes, whole on every rank, cut along `dim`."""
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

    # -- verbs ------------------------------------------------------------------------------------------------------

    def gather(self, x: torch.Tensor) -> torch.Tensor:
        """Sharded rows -> all rows; backward sums the ranks' partial gradients (and scatters them again)."""
        if self.shards_rows:
            return gather_from_sequence_parallel_region(x, tensor_parallel_output_grad=True, group=self.group)
        return copy_to_tensor_model_parallel_region(x, group=self.group)

    def project(
        self,
        x: torch.Tensor,
        norm: Norm,
        num_text: int,
        text: Sequence[torch.Tensor],
        summary: Sequence[torch.Tensor] = (),
        exact: Sequence[torch.Tensor] = (),
        fp8: bool = False,
    ) -> list[torch.Tensor]:
        """Sharded rows x behind a norm, gathered, text rows times each of the weights `text` and summary rows times
        each of `summary`: one tensor [T or S, this rank's features] for each weight, rows in sequence order. Then text
        rows times each of `exact`, which stay as they are under `fp8`."""
        x, own_norm = self._enter(x, norm)
        if self.shards_rows and len(x) > num_text:
            # The gathered rows stand rank by rank, [text_0 | summaries_0 | text_1 | ...].
            by_rank, local_text = x.view(self.size, -1, *x.shape[1:]), num_text // self.size
            x = torch.cat([*by_rank[:, :local_text].unbind(), *by_rank[:, local_text:].unbind()])
        targets = [Target(0, num_text, weight, fp8) for weight in text]
        targets += [Target(num_text, len(x), weight, fp8) for weight in summary]
        return linear.project(x, own_norm, targets + [Target(0, num_text, weight) for weight in exact])

    def gated(
        self, x: torch.Tensor, norm: Norm, gate: torch.Tensor, up: torch.Tensor, fp8: bool = False
    ) -> tuple[torch.Tensor, ...]:
        """Sharded rows x behind a norm, gathered, as SwiGLU's two factors (or what `linear.gated` makes of them)."""
        return linear.gated(*self._enter(x, norm), gate, up, fp8)

    def add_product(
        self, x: torch.Tensor, y: torch.Tensor, weight: torch.Tensor, fp8: bool = False, reuse: bool = False
    ) -> torch.Tensor:
        """Sharded rows x plus gathered rows y, a share of their features, times a weight, summed over ranks."""
        return linear.add_product(x, y, weight, fp8, reuse) if self.size == 1 else x + self.product(y, weight, fp8)

    def add_gated(
        self,
        x: torch.Tensor,
        parts: tuple[torch.Tensor, ...],
        weight: torch.Tensor,
        fp8: bool = False,
        reuse: bool = False,
    ) -> torch.Tensor:
        """The same for y = swiglu of `parts`."""
        if self.size == 1:
            return linear.add_gated(x, parts, weight, fp8, reuse)
        return x + self._leave(linear.add_gated(None, parts, weight, fp8))

    def product(self, y: torch.Tensor, weight: torch.Tensor, fp8: bool = False) -> torch.Tensor:
        """What `add_product` adds."""
        return self._leave(linear.add_product(None, y, weight, fp8))

    def _enter(self, x: torch.Tensor, norm: Norm) -> tuple[torch.Tensor, Norm | None]:
        """Gathered rows, and the norm where it still has to be applied."""
        if self.size == 1:
            return x, norm
        return self.gather(rows.rms_norm(x, norm.gain, norm.eps)), None

    def _leave(self, x: torch.Tensor) -> torch.Tensor:
        if self.shards_rows:
            return reduce_scatter_to_sequence_parallel_region(x, group=self.group)
        return reduce_from_tensor_model_parallel_region(x, group=self.group)

    def join_streams(self, text: torch.Tensor, summary: torch.Tensor) -> torch.Tensor:
        """Text and summary rows, each in sequence order, as gathered rows stand."""
        if not self.shards_rows:
            if not torch.is_grad_enabled() and _is_followed_by(text, summary):  # as decoding has them
                return text.as_strided((len(text) + len(summary), *text.shape[1:]), text.stride())
            return torch.cat([text, summary])
        return torch.cat(
            [x.view(self.size, len(x) // self.size, *x.shape[1:]) for x in (text, summary)], dim=1
        ).flatten(0, 1)

    def replicated(self, weight: torch.Tensor, meets_all: bool) -> torch.Tensor:
        """A weight that every tensor rank holds whole, ready for use.

        When this rank's rows or heads are only a share of those that meet the weight (`meets_all` false), its gradient
        is summed over the ranks in backward. Without this the ranks' copies drift apart silently.
        """
        return weight if meets_all or self.size == 1 else copy_to_tensor_model_parallel_region(weight, group=self.group)


def _is_followed_by(x: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether they are rows of one tensor, one behind the other. Adjacent addresses alone are no sign: allocators give
    them to tensors that have nothing to do with each other."""
    same = x.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()
    behind = same and x.storage_offset() + x.numel() == other.storage_offset()
    return behind and x.is_contiguous() and other.is_contiguous()


def _normal(std: float):
    return partial(torch.nn.init.normal_, mean=0.0, std=std)
