"""One attention sub-layer: project, rotate, attend, project back, for the four mixers.

Legend: T text rows, S summary rows, H query heads and G key/value heads *of this tensor rank*, d head dimension,
h hidden size. Rows enter and leave in the sharded state of `TensorParallel`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from ksa_model import kernels, linear, rows
from ksa_model.collectives import ContextParallel
from ksa_model.config import LayerConfig, ModelConfig
from ksa_model.layout import SequenceLayout
from ksa_model.linear import Norm
from ksa_model.memory import Kept
from ksa_model.ranges import to_device
from ksa_model.rope import inverse_frequencies
from ksa_model.tensor_parallel import TensorParallel

SMALL_BATCH = 256  # rows of a decoding step up to which one launch for queries and keys is worth more than larger tiles


@dataclass(frozen=True)
class RotaryTables:
    """cos and sin of every row's angles, [rows, 1, d/2] fp32, for text and for summaries.

    Where positions are scaled by YaRN they are multiplied by its attention factor.
    """

    text: tuple[torch.Tensor, torch.Tensor]
    summary: tuple[torch.Tensor, torch.Tensor]

    @staticmethod
    def build(layout: SequenceLayout, config: ModelConfig, device: torch.device) -> RotaryTables:
        inverse, factor = inverse_frequencies(config, device)

        def table(positions) -> tuple[torch.Tensor, torch.Tensor]:
            if not isinstance(positions, torch.Tensor):
                positions = to_device(positions, device)
            angles = positions[:, None, None] * inverse  # fp64
            cos, sin = angles.cos(), angles.sin()
            if factor != 1:
                cos, sin = cos * factor, sin * factor
            return cos.float(), sin.float()

        return RotaryTables(table(layout.text_positions), table(layout.summary_positions))


class RMSNorm(nn.Module):
    """Root-mean-square norm (arXiv 1910.07467) over the last dimension, in fp32, with a learned gain.

    `meets_all`: whether this tensor rank sees every row and head that the gain is applied to.
    """

    def __init__(self, size: int, eps: float, tp: TensorParallel, meets_all: bool):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size, dtype=tp.dtype))
        self.eps, self.tp, self.meets_all = eps, tp, meets_all

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return rows.rms_norm(x, *self.ready())

    def ready(self) -> Norm:
        """The gain, ready for use."""
        return Norm(self.tp.replicated(self.weight, self.meets_all), self.eps)


@dataclass
class Heads:
    """One layer's projections: q [T, H, d]; k, v [T, G, d]; the summaries' likewise with S rows, or None."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    q_summary: torch.Tensor | None = None
    k_summary: torch.Tensor | None = None
    v_summary: torch.Tensor | None = None


# (attention, heads, layout) -> outputs of text rows, and of summary rows where the layer updates them. A gated delta
# net (`ksa_model.delta`) gives itself and its `DeltaRows` in the first two places.
Mix = Callable[["Attention", Heads, SequenceLayout], "tuple[torch.Tensor, torch.Tensor | None]"]


class Attention(nn.Module):
    """Attention of one layer over both streams.

    Parameters: `query`, `key`, `value`, `output`; where the layer treats summaries and they have projections of their
    own, `summary_query` (only if the layer updates them), `summary_key`, `summary_value`.
    """

    def __init__(
        self, config: ModelConfig, layer: LayerConfig, tp: TensorParallel, context: ContextParallel | None = None
    ):
        super().__init__()
        self.config, self.layer, self.tp, self.context = config, layer, tp, context
        h, q, kv = config.hidden_size, config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        std = config.init_std
        self.query, self.key, self.value = tp.column(h, q, std), tp.column(h, kv, std), tp.column(h, kv, std)
        own = config.independent_qkv
        self.summary_query = tp.column(h, q, std) if own and layer.updates_summaries else None
        self.summary_key = tp.column(h, kv, std) if own and layer.projects_summaries else None
        self.summary_value = tp.column(h, kv, std) if own and layer.projects_summaries else None
        self.own_share: torch.Tensor | None = None  # see `Decoder.anneal`
        self.output = tp.row(q, h, std / (2 * config.num_layers) ** 0.5)
        if config.qk_norm:
            # Every rank norms its own heads only.
            self.query_norm = RMSNorm(config.head_dim, config.norm_eps, tp, meets_all=tp.size == 1)
            self.key_norm = RMSNorm(config.head_dim, config.norm_eps, tp, meets_all=tp.size == 1)
        self.gains_are_uneven = False  # see `Decoder.look_at_gains`

    def forward(
        self,
        x: torch.Tensor,
        norm: Norm,
        layout: SequenceLayout,
        rotary: RotaryTables,
        mix: Mix | None = None,
        fp8: bool = False,
    ) -> torch.Tensor:
        """x: rows before the norm, [text | summaries] while the layer carries summaries, text alone otherwise.

        Returns the heads' outputs [rows, H*d] for the rows that the layer updates, both streams or text alone, which
        `output` brings back to the hidden size. `mix` replaces the attention itself; decoding brings its cache so.
        `fp8`: projections in 8 bits.
        """
        heads = self.project(x, norm, layout, rotary, fp8)
        out, out_summary = (mix or self.mix)(self, heads, layout)
        if out_summary is None:
            return out.flatten(1)
        return self.tp.join_streams(out.flatten(1), out_summary.flatten(1))

    def project(
        self, x: torch.Tensor, norm: Norm, layout: SequenceLayout, rotary: RotaryTables, fp8: bool = False
    ) -> Heads:
        """Queries, keys and values of both streams, normed and rotated; what the layer does not need is left out."""
        text = [self.query.weight, self.key.weight, self.value.weight]
        names = ["key", "value"] * self.layer.projects_summaries + ["query"] * self.layer.updates_summaries
        summary = [w for name in names for w in self._summary_weights(name)] if layout.num_summary else []
        q, k, v, *of_summary = self.tp.project(x, norm, layout.num_text, text, summary, fp8=fp8)
        heads = Heads(*(self._heads(x) for x in (q, k, v)))
        own = {name: self._heads(self._summary_rows(of_summary)) for name in names} if layout.num_summary else {}
        heads.q_summary, heads.k_summary, heads.v_summary = (own.get(name) for name in ("query", "key", "value"))
        self._norm_rotate(heads, rotary)
        if not layout.num_summary:  # kernels are for rows that exist
            if self.layer.projects_summaries:
                heads.k_summary, heads.v_summary = heads.k[:0], heads.v[:0]
            if self.layer.updates_summaries:
                heads.q_summary = heads.q[:0]
        return heads

    def _summary_weights(self, name: str) -> list[torch.Tensor]:
        """What summary rows are multiplied with: their own projection, text's, or both while their own is annealed."""
        base, own = getattr(self, name).weight, getattr(self, f"summary_{name}")
        if own is None:
            return [base]
        return [own.weight] if self.own_share is None else [own.weight, base]

    def _summary_rows(self, products: list[torch.Tensor]) -> torch.Tensor:
        """Takes the products of one projection's `_summary_weights` from the front of `products`: their mean."""
        own = products.pop(0)
        if self.own_share is None or self.summary_key is None:
            return own
        share = self.own_share.to(own.dtype)
        return share * own + (1 - share) * products.pop(0)

    @staticmethod
    def mix(
        attention: Attention, heads: Heads, layout: SequenceLayout, kept: Kept | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attention of every row of a sample at once: text rows' outputs, and the summaries' where they are updated.

        `kept` holds the text rows' result for a re-run; the summaries' is so little work that it is done again.
        """
        layer, config = attention.layer, attention.config
        backend, context = config.attention_backend, attention.context
        q, k, v, k_summary, v_summary = heads.q, heads.k, heads.v, heads.k_summary, heads.v_summary
        if layer.mixer == "K":
            window = layer.window_chunks
            out = kernels.ksa_attention(q, k, v, k_summary, v_summary, layout, window, backend, context, kept)
        else:
            windows = (layer.window_chunks, config.window_tokens)
            out = kernels.text_attention(q, k, v, layout, layer.mixer, *windows, backend, context, kept)
        if heads.q_summary is None:
            return out, None
        # A chunk lies on one rank with its summaries, so this part never exchanges anything.
        return out, kernels.summary_attention(heads.q_summary, k, v, k_summary, v_summary, layout, backend)

    def _norm_rotate(self, heads: Heads, rotary: RotaryTables) -> None:
        """Norm and rotate queries and keys of both streams, in place of what they were."""
        normed, eps = self.config.qk_norm, self.config.norm_eps
        if (fast := linear.decoding(heads.q, most=SMALL_BATCH)) is not None:
            streams = [fast.Stream(heads.q, heads.k, *rotary.text)]
            if heads.k_summary is not None:
                streams.append(fast.Stream(heads.q_summary, heads.k_summary, *rotary.summary))
            gains = (self.query_norm.weight, self.key_norm.weight) if normed else None
            (heads.q, heads.k), *of_summary = fast.norm_rotate_heads(streams, gains, eps)
            if of_summary:
                ((heads.q_summary, heads.k_summary),) = of_summary
            return
        q_gain, k_gain = (self.query_norm.ready().gain, self.key_norm.ready().gain) if normed else (None, None)
        for name, gain, table in (
            ("q", q_gain, rotary.text),
            ("k", k_gain, rotary.text),
            ("q_summary", q_gain, rotary.summary),
            ("k_summary", k_gain, rotary.summary),
        ):
            if (x := getattr(heads, name)) is not None:
                setattr(heads, name, rows.norm_rotate(x, gain, eps, *table, keep_input=self.gains_are_uneven))

    def _heads(self, x: torch.Tensor) -> torch.Tensor:
        """[rows, heads*d] -> [rows, heads, d]."""
        return x.unflatten(-1, (-1, self.config.head_dim))
