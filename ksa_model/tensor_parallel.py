"""Tensor and Megatron sequence parallelism behind five verbs, so that the model file reads like a single-GPU model.

Legend: t tensor ranks, rows = [text | summaries] of this context rank, h hidden size.

A block alternates between two states. *Sharded*: hidden rows, under sequence parallelism each tensor rank holds
1/t of the text rows and 1/t of the summary rows; otherwise every rank holds all. *Gathered*: all rows on every tensor
rank, each rank owning some heads or some MLP columns. `gather` enters the second state once per sub-layer (one
collective for all its projections), the row-parallel output projection leaves it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch

from ksa_model.megatron import (
    ColumnParallelLinear,
    ModelParallelConfig,
    RowParallelLinear,
    VocabParallelEmbedding,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
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
        """Gathered rows in, this rank's share of the output features out. Its input comes from `gather`, which also
        reduces the input's gradient, so the layer itself must not."""
        return _QuietColumn(
            in_size,
            out_size,
            config=self._config(False),
            init_method=_normal(init_std),
            bias=False,
            disable_grad_reduce=True,
            tp_group=self.group,
        )

    def row(self, in_size: int, out_size: int, init_std: float) -> RowParallelLinear:
        """This rank's share of the features in, summed over ranks and back in the sharded state out."""
        return _QuietRow(
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

    def split_streams(self, x: torch.Tensor, num_text: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Gathered rows -> (text [T, ...], summaries [S, ...]), each in sequence order.

        Under sequence parallelism the gathered rows stand rank by rank, `[text_0 | summaries_0 | text_1 | ...]`.
        """
        if not self.shards_rows:
            return x[:num_text], x[num_text:]
        by_rank = x.view(self.size, -1, *x.shape[1:])
        local_text = num_text // self.size
        return by_rank[:, :local_text].flatten(0, 1), by_rank[:, local_text:].flatten(0, 1)

    def join_streams(self, text: torch.Tensor, summary: torch.Tensor) -> torch.Tensor:
        """Inverse of `split_streams`."""
        if not self.shards_rows:
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


class _QuietColumn(ColumnParallelLinear):
    """Returns the output alone; Megatron's layers return (output, bias)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x)[0]


class _QuietRow(RowParallelLinear):
    """Returns the output alone."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x)[0]


def _normal(std: float):
    return partial(torch.nn.init.normal_, mean=0.0, std=std)
