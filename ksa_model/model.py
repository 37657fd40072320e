"""The decoder: embedding -> blocks -> norm -> head, and the loss.

Legend: T text rows, S summary rows, h hidden size, V vocabulary rows of this tensor rank.

One hidden tensor `[text rows | summary rows]` goes through the blocks, so norms, MLP and output projection act on both
streams at once; attention splits it into two views. There is no batch axis: a micro-batch is one packed sequence.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from ksa_model import loss
from ksa_model.config import (
    LayerConfig,
    MemoryConfig,
    ModelConfig,
    ModelConfigError,
    check_context_ranks,
    check_tensor_parallel,
)
from ksa_model.layers.attention import Attention, MixerCore, RMSNorm, RotaryTables
from ksa_model.layers.delta import DeltaNet
from ksa_model.layers.tensor_parallel import TensorParallel, weight_of
from ksa_model.layout.sequence import SequenceLayout
from ksa_model.memory import GIB, CheckpointedForward, HostPool, SavedOutput, in_slices
from ksa_model.ops.backend import Backend
from ksa_model.ops.linear import Norm, Weight
from ksa_model.ops.rows import is_uneven
from ksa_model.parallel.context import ContextParallel
from ksa_model.parallel.megatron import gather_from_tensor_model_parallel_region

# (model, tokens, labels, layout) -> loss, summed over the rows with a label
Objective = Callable[["Decoder", torch.Tensor, torch.Tensor, SequenceLayout], torch.Tensor]


class Decoder(nn.Module):
    """A decoder LLM whose layers follow `config.layer_pattern`.

    With a `context` of several ranks, every call gets this rank's slices of the sample and a `ShardedLayout`, and the
    loss is this rank's share of the sum. `memory` sets what blocks keep for backward. With `fp8` the GEMMs of the
    blocks run in 8 bits where gradients are computed; without gradients, as in validation and decoding, they do not.

    `backend` has the kernels of all layers; by default those for the device and dtype of the rows.
    """

    def __init__(
        self,
        config: ModelConfig,
        tp: TensorParallel,
        context: ContextParallel | None = None,
        memory: MemoryConfig | None = None,
        fp8: bool = False,
        backend: Backend | None = None,
    ):
        super().__init__()
        check_tensor_parallel(config, tp.size)
        check_context_ranks(config, 1 if context is None else context.size)
        self.config, self.tp, self.context, self.memory = config, tp, context, memory or MemoryConfig()
        self.backend = backend or Backend(config.attention_backend, config.head_dim, dtype=tp.dtype)
        self.host_pool = HostPool(self.memory.host_gib * GIB)
        self.embedding = tp.embedding(config.padded_vocab_size, config.hidden_size, config.init_std)
        if config.has_summaries:
            self.summary_embedding = nn.Parameter(
                torch.empty(config.summary_tokens, config.hidden_size, dtype=tp.dtype).normal_(0, config.init_std)
            )
        self.blocks = nn.ModuleList(
            Block(config, layer, tp, self.backend, context, self.memory.mlp_rows, fp8) for layer in config.layers
        )
        self.norm = RMSNorm(config.hidden_size, config.norm_eps, tp, self.backend, grad_is_complete=not tp.shards_rows)
        self.head = (
            None if config.tie_embeddings else tp.column(config.hidden_size, config.padded_vocab_size, config.init_std)
        )

    def forward(
        self,
        tokens: torch.Tensor,
        labels: torch.Tensor,
        layout: SequenceLayout,
        objective: Objective | None = None,
    ) -> torch.Tensor:
        """tokens, labels: int64 [T] (`IGNORE_INDEX` where a row has no loss) -> sum of the rows' losses, fp32 scalar.

        The loss is a sum because ranks and micro-batches have different numbers of labelled rows; the caller divides by
        their global number. `objective` replaces the loss. It runs inside this call, since ZeRO-3 gathers weights
        nowhere else.
        """
        if objective is not None:
            return objective(self, tokens, labels, layout)
        hidden = self.tp.gather(self.norm(self.hidden(tokens, layout)))
        return loss.cross_entropy(self.backend, hidden, self.head_weight, labels, self.valid_columns, self.tp)

    def logits(
        self,
        tokens: torch.Tensor,
        layout: SequenceLayout,
        core: MixerCore | None = None,
        rows: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Logits of the next token, [T, vocab_size]. `rows`: int64 indices of text rows, to compute theirs only; every
        rank must hold all rows (no sequence or context parallelism)."""
        hidden = self.hidden(tokens, layout, core)
        if rows is not None:
            hidden = hidden[rows]
        count = len(hidden) * (self.tp.size if self.tp.shards_rows else 1)
        (local,) = self.tp.project(self.backend, hidden, self.norm.ready(), count, [Weight(self.head_weight)])
        return gather_from_tensor_model_parallel_region(local, group=self.tp.group)[:, : self.config.vocab_size]

    def hidden(self, tokens: torch.Tensor, layout: SequenceLayout, core: MixerCore | None = None) -> torch.Tensor:
        """Text rows after the last block, before the final norm: [T, h], or this rank's share of them."""
        self._check_layout(layout)
        x = self.embedding(tokens[None]).flatten(0, 1)
        self.backend.select_for(x)
        if self.config.has_summaries and layout.num_summary:
            rows = self.tp.replicated(self.summary_embedding, grad_is_complete=not self.tp.shards_rows)
            x = torch.cat([x, rows.repeat(self.tp.local_rows(layout.num_summary // self.config.summary_tokens), 1)])
        rotary = RotaryTables.build(layout, self.config, x.device)
        if not torch.is_grad_enabled():
            for block in self.blocks:
                x = block(x, layout, rotary, core)
            return x
        running = CheckpointedForward(self.memory, self.host_pool)
        for block in self.blocks:
            x = running.run(partial(_run_block, block, layout=layout, rotary=rotary, core=core), x)
        return x

    def refresh_norm_gain_flags(self) -> None:
        """Let layers with uneven query or key gains keep more for backward (see `rows.norm_rotate`). Waits for the
        device. Call this after loading weights, and from time to time in training."""
        for module in self.modules():
            if isinstance(module, Attention) and self.config.qk_norm:
                gains = module.query_norm.weight, module.key_norm.weight
                module.gains_are_uneven = any(map(is_uneven, gains))

    def anneal(self, summary_projection_weight: float) -> None:
        """Set the weight of the summary projections: summary queries, keys and values become this weight times their
        own projection plus the rest times that of text. With QK-norm, queries and keys are normed before that.

        1 is a model with independent projections, 0 a model without them (annealing of arXiv 2604.24432).
        """
        for module in self.modules():  # it is no state of the model
            if isinstance(module, Attention):
                module.summary_projection_weight = summary_projection_weight

    @property
    def head_weight(self) -> torch.Tensor:
        """The weight [V, h] from hidden rows to logits."""
        return self.embedding.weight if self.head is None else self.head.weight

    @property
    def valid_columns(self) -> int:
        """The number of this rank's logit columns that are real tokens; vocabulary padding comes after them."""
        assert self.config.vocab_size is not None
        local = self.config.padded_vocab_size // self.tp.size
        return max(0, min(local, self.config.vocab_size - self.tp.rank * local))

    def _check_layout(self, layout: SequenceLayout) -> None:
        config = self.config
        if (layout.chunk_size, layout.summary_tokens) != (config.chunk_size, config.summary_tokens):
            raise ModelConfigError(
                f"the layout has chunk_size={layout.chunk_size}, summary_tokens={layout.summary_tokens}; the model "
                f"{config.chunk_size} and {config.summary_tokens}"
            )
        if self.tp.shards_rows and layout.num_chunks % self.tp.size:
            raise ModelConfigError(
                f"{layout.num_text} text rows are {layout.num_chunks} chunks: {self.tp.size} tensor ranks cannot share "
                "them equally"
            )


def _run_block(
    block: Any,  # a `Block`; a ModuleList types it as a Module
    x: torch.Tensor,
    kept: SavedOutput | None,
    *,
    layout: SequenceLayout,
    rotary: RotaryTables,
    core: MixerCore | None,
) -> torch.Tensor:
    return block(x, layout, rotary, core or partial(block.attention.core, kept=kept))


class Block(nn.Module):
    """Pre-norm decoder layer: norm, attention, residual, norm, SwiGLU, residual."""

    def __init__(
        self,
        config: ModelConfig,
        layer: LayerConfig,
        tp: TensorParallel,
        backend: Backend,
        context: ContextParallel | None,
        mlp_rows: int | None = None,
        fp8: bool = False,
    ):
        """`mlp_rows` as `MLP.rows`; `fp8` as in `Decoder`."""
        super().__init__()
        self.layer, self.tp, self.backend = layer, tp, backend
        norm = partial(RMSNorm, config.hidden_size, config.norm_eps, tp, backend, grad_is_complete=not tp.shards_rows)
        self.attention_norm = norm()
        self.attention = (
            DeltaNet(config, layer, tp, backend, fp8)
            if layer.mixer == "G"
            else Attention(config, layer, tp, backend, context, fp8)
        )
        self.mlp_norm = norm()
        self.mlp = MLP(config, tp, backend, mlp_rows, fp8)

    def forward(
        self, x: torch.Tensor, layout: SequenceLayout, rotary: RotaryTables, core: MixerCore | None = None
    ) -> torch.Tensor:
        """x [rows, h]: both streams while this or a later layer reads summaries, otherwise text alone."""
        mixer_output = self.attention(x, self.attention_norm.ready(), layout, rotary, core)
        # A layer that does not update summaries updates text rows only; the last `K` layer drops the summaries.
        updated, passthrough = x, None
        if self.layer.carries_summaries and not self.layer.updates_summaries:
            text_rows = self.tp.local_rows(layout.num_text)
            updated, passthrough = x.split([text_rows, len(x) - text_rows])
        reuse = not torch.is_grad_enabled()  # then the input rows are not needed any more
        x = self.tp.add_gemm(self.backend, updated, mixer_output, weight_of(self.attention.output), reuse)
        x = self.mlp(x, self.mlp_norm.ready(), reuse)
        return x if passthrough is None or self.layer.is_last_ksa else torch.cat([x, passthrough])

    def attended(self, mixer_output: torch.Tensor) -> torch.Tensor:
        """What attention adds to the residual stream, given the output of `attention`; never in fp8."""
        return self.tp.gemm(self.backend, mixer_output, Weight(self.attention.output.weight))


class MLP(nn.Module):
    """SwiGLU (arXiv 2002.05202) after a norm, added to the residual stream. With `rows`, that many of this rank's rows
    in the sharded state are computed at a time."""

    def __init__(
        self, config: ModelConfig, tp: TensorParallel, backend: Backend, rows: int | None = None, fp8: bool = False
    ):
        super().__init__()
        h, f = config.hidden_size, config.ffn_size
        self.tp, self.backend, self.rows = tp, backend, rows
        self.gate, self.up = tp.column(h, f, config.init_std, fp8), tp.column(h, f, config.init_std, fp8)
        self.down = tp.row(f, h, config.init_std / (2 * config.num_layers) ** 0.5, fp8)

    def forward(self, x: torch.Tensor, norm: Norm, reuse: bool = False) -> torch.Tensor:
        """x [rows, h] -> x plus the MLP of its norm. `reuse`: x may be overwritten, see `linear.add_gemm`."""
        # Chosen here, because slices run without gradients first: they must use fp8 as their backward does.
        weights = weight_of(self.gate), weight_of(self.up), weight_of(self.down)
        if self.rows is None or len(x) <= self.rows:
            return self._of_rows(x, norm, weights, reuse)
        of_rows = partial(self._of_rows, norm=norm, weights=weights, reuse=reuse)
        return in_slices(of_rows, x, self.rows, (*self.parameters(), norm.gain))

    def _of_rows(
        self, x: torch.Tensor, norm: Norm, weights: tuple[Weight, Weight, Weight], reuse: bool
    ) -> torch.Tensor:
        gate, up, down = weights
        parts = self.tp.gated(self.backend, x, norm, gate, up)
        return self.tp.add_gated_gemm(self.backend, x, parts, down, reuse)
