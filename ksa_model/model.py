"""The decoder: embedding -> blocks -> norm -> head, and the loss.

Legend: T text rows, S summary rows, h hidden size, V vocabulary rows of this tensor rank.

One hidden tensor runs through the blocks, `[text rows | summary rows]`, so that norms, MLP and output projection act
once on both streams; attention splits it by two views. There is no batch axis: a micro-batch is one packed sequence
and documents separate samples.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from ksa_model import loss
from ksa_model.attention import Attention, Mix, RMSNorm, RotaryTables
from ksa_model.collectives import ContextParallel
from ksa_model.config import LayerConfig, ModelConfig, ModelConfigError, check_context_ranks, check_tensor_parallel
from ksa_model.delta import DeltaNet
from ksa_model.layout import SequenceLayout
from ksa_model.linear import Norm
from ksa_model.megatron import gather_from_tensor_model_parallel_region
from ksa_model.memory import GIB, HostPool, Kept, MemoryConfig, Pass, in_slices
from ksa_model.rows import is_uneven
from ksa_model.tensor_parallel import TensorParallel

# (model, tokens, labels, layout) -> loss, summed over the rows that carry one
Objective = Callable[["Decoder", torch.Tensor, torch.Tensor, SequenceLayout], torch.Tensor]


class Decoder(nn.Module):
    """A decoder LLM whose layers follow `config.layer_pattern`.

    With `context` of several ranks, every call is given this rank's slices of the sample and a `ShardedLayout`, and
    the loss is this rank's share of the sum. `memory` says what blocks keep for their backward. With `fp8` the blocks'
    products run in 8 bits where gradients are asked for; without gradients, as in validation and decoding, they do not.
    """

    def __init__(
        self,
        config: ModelConfig,
        tp: TensorParallel,
        context: ContextParallel | None = None,
        memory: MemoryConfig | None = None,
        fp8: bool = False,
    ):
        super().__init__()
        check_tensor_parallel(config, tp.size)
        check_context_ranks(config, 1 if context is None else context.size)
        self.config, self.tp, self.context, self.memory = config, tp, context, memory or MemoryConfig()
        self.fp8 = fp8
        self.host_pool = HostPool(self.memory.host_gib * GIB)
        self.embedding = tp.embedding(config.padded_vocab_size, config.hidden_size, config.init_std)
        if config.has_summaries:
            self.summary_embedding = nn.Parameter(
                torch.empty(config.summary_tokens, config.hidden_size, dtype=tp.dtype).normal_(0, config.init_std)
            )
        self.blocks = nn.ModuleList(Block(config, layer, tp, context, self.memory.mlp_rows) for layer in config.layers)
        self.norm = RMSNorm(config.hidden_size, config.norm_eps, tp, meets_all=not tp.shards_rows)
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

        A sum, not a mean: ranks and micro-batches hold unequal numbers of valid rows, so the division by their global
        number happens once, outside. `objective` replaces the loss; it runs inside this call because ZeRO-3 brings in
        weights nowhere else.
        """
        if objective is not None:
            return objective(self, tokens, labels, layout)
        hidden = self.tp.gather(self.norm(self.hidden(tokens, layout)))
        return loss.cross_entropy(hidden, self.head_weight, labels, self.valid_columns, self.tp)

    def logits(
        self, tokens: torch.Tensor, layout: SequenceLayout, mix: Mix | None = None, rows: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Scores of the next token, [T, vocab_size]; for some text `rows` only where given, which saves the rest and
        needs all rows on every rank."""
        hidden = self.hidden(tokens, layout, mix)
        if rows is not None:
            hidden = hidden[rows]
        count = len(hidden) * (self.tp.size if self.tp.shards_rows else 1)
        (local,) = self.tp.project(hidden, self.norm.ready(), count, [self.head_weight])
        return gather_from_tensor_model_parallel_region(local, group=self.tp.group)[:, : self.config.vocab_size]

    def hidden(self, tokens: torch.Tensor, layout: SequenceLayout, mix: Mix | None = None) -> torch.Tensor:
        """Text rows after the last block, before the final norm: [T, h], or this rank's share of them."""
        self._check_layout(layout)
        x = self.embedding(tokens[None]).flatten(0, 1)
        if self.config.has_summaries and layout.num_summary:
            rows = self.tp.replicated(self.summary_embedding, meets_all=not self.tp.shards_rows)
            x = torch.cat([x, rows.repeat(self.tp.local_rows(layout.num_summary // self.config.summary_tokens), 1)])
        rotary = RotaryTables.build(layout, self.config, x.device)
        if not torch.is_grad_enabled():
            for block in self.blocks:
                x = block(x, layout, rotary, mix)
            return x
        running = Pass(self.memory, self.host_pool)
        for block in self.blocks:
            x = running.run(partial(_run_block, block, layout=layout, rotary=rotary, mix=mix, fp8=self.fp8), x)
        return x

    def look_at_gains(self) -> None:
        """Let layers whose query or key gains are uneven keep what backward needs then (`rows.norm_rotate`). Waits for
        the device; to be called when weights were loaded, and now and then while they change."""
        for module in self.modules():
            if isinstance(module, Attention) and self.config.qk_norm:
                gains = module.query_norm.weight, module.key_norm.weight
                module.gains_are_uneven = any(map(is_uneven, gains))

    def anneal(self, own_share: float) -> None:
        """Summary queries, keys and values become `own_share` of their own projection and the rest of text's.

        1 is the model with projections of its own, at 0 they have no part any more (annealing of arXiv 2604.24432).
        """
        # A tensor on the host: kernels take it as a number without waiting, and it is no state of the model's.
        share = None if own_share == 1 else torch.tensor(own_share, dtype=torch.float32)
        for module in self.modules():
            if isinstance(module, Attention):
                module.own_share = share

    @property
    def head_weight(self) -> torch.Tensor:
        """[V, h]: what turns hidden rows into scores."""
        return self.embedding.weight if self.head is None else self.head.weight

    @property
    def valid_columns(self) -> int:
        """Columns of this rank's logits that are real tokens; the rest is vocabulary padding, always at the end."""
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
    block: Any,  # a `Block`, which a ModuleList gives as any module
    x: torch.Tensor,
    kept: Kept | None,
    *,
    layout: SequenceLayout,
    rotary: RotaryTables,
    mix: Mix | None,
    fp8: bool,
) -> torch.Tensor:
    return block(x, layout, rotary, mix or partial(block.attention.mix, kept=kept), fp8)


class Block(nn.Module):
    """Pre-norm decoder layer: norm, attention, residual, norm, SwiGLU, residual."""

    def __init__(
        self,
        config: ModelConfig,
        layer: LayerConfig,
        tp: TensorParallel,
        context: ContextParallel | None,
        mlp_rows: int | None = None,
    ):
        super().__init__()
        self.layer, self.tp = layer, tp
        self.attention_norm = RMSNorm(config.hidden_size, config.norm_eps, tp, meets_all=not tp.shards_rows)
        self.attention = DeltaNet(config, layer, tp) if layer.mixer == "G" else Attention(config, layer, tp, context)
        self.mlp_norm = RMSNorm(config.hidden_size, config.norm_eps, tp, meets_all=not tp.shards_rows)
        self.mlp = MLP(config, tp, mlp_rows)

    def forward(
        self,
        x: torch.Tensor,
        layout: SequenceLayout,
        rotary: RotaryTables,
        mix: Mix | None = None,
        fp8: bool = False,
    ) -> torch.Tensor:
        """x [rows, h]: both streams while some layer from here on reads summaries, text alone above that."""
        mixed = self.attention(x, self.attention_norm.ready(), layout, rotary, mix, fp8)
        # A layer that leaves summaries as they are updates the text rows alone; the last `K` layer drops them.
        updated, kept = x, None
        if self.layer.carries_summaries and not self.layer.updates_summaries:
            text_rows = self.tp.local_rows(layout.num_text)
            updated, kept = x.split([text_rows, len(x) - text_rows])
        reuse = not torch.is_grad_enabled()  # then the rows that enter are needed no more
        x = self.tp.add_product(updated, mixed, self.attention.output.weight, fp8, reuse)
        x = self.mlp(x, self.mlp_norm.ready(), fp8, reuse)
        return x if kept is None or self.layer.is_last_ksa else torch.cat([x, kept])

    def attended(self, mixed: torch.Tensor) -> torch.Tensor:
        """What attention adds to the residual stream, for what it returned; never in 8 bits."""
        return self.tp.product(mixed, self.attention.output.weight)


class MLP(nn.Module):
    """SwiGLU (arXiv 2002.05202) behind a norm, added to the residual stream; where `rows` are given, so many rows at a
    time, of this rank's in the sharded state."""

    def __init__(self, config: ModelConfig, tp: TensorParallel, rows: int | None = None):
        super().__init__()
        h, f = config.hidden_size, config.ffn_size
        self.tp, self.rows = tp, rows
        self.gate, self.up = tp.column(h, f, config.init_std), tp.column(h, f, config.init_std)
        self.down = tp.row(f, h, config.init_std / (2 * config.num_layers) ** 0.5)

    def forward(self, x: torch.Tensor, norm: Norm, fp8: bool = False, reuse: bool = False) -> torch.Tensor:
        if self.rows is None or len(x) <= self.rows:
            return self._of_rows(x, norm, fp8, reuse)
        of_rows = partial(self._of_rows, norm=norm, fp8=fp8, reuse=reuse)
        return in_slices(of_rows, x, self.rows, (*self.parameters(), norm.gain))

    def _of_rows(self, x: torch.Tensor, norm: Norm, fp8: bool, reuse: bool) -> torch.Tensor:
        parts = self.tp.gated(x, norm, self.gate.weight, self.up.weight, fp8)
        return self.tp.add_gated(x, parts, self.down.weight, fp8, reuse)
