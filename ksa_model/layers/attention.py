"""The attention sub-layer of the mixers `K`, `F`, `S`, `C`, `H` and `P`: project, pool, rotate, attend.

Legend: T text rows, S summary rows, H query heads and G key/value heads *of this tensor rank*, d head dimension, h
hidden size. Rows enter in the sharded state of `TensorParallel` and leave in the gathered one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from ksa_model.config import LayerConfig, ModelConfig
from ksa_model.layers.rope import inverse_frequencies
from ksa_model.layers.tensor_parallel import TensorParallel, weight_of
from ksa_model.layout.ranges import to_device
from ksa_model.layout.sequence import SequenceLayout
from ksa_model.memory import SavedOutput
from ksa_model.ops.attention import joint
from ksa_model.ops.backend import Backend
from ksa_model.ops.linear import Norm, Weight
from ksa_model.ops.pooling import ChunkRows
from ksa_model.parallel.context import ContextParallel

SMALL_BATCH = 256  # up to this many rows of a decoding step, one launch for queries and keys is faster than two


@dataclass(frozen=True)
class RotaryTables:
    """cos and sin of every row's angles, [rows, 1, d/2] fp32, for text and for summaries or pooled keys, which have the
    positions of summaries. YaRN multiplies both by its attention factor.

    `unrotated`: tables of angle 0, where the far part of a layer or an `F` layer has no RoPE.
    """

    text: tuple[torch.Tensor, torch.Tensor]
    summary: tuple[torch.Tensor, torch.Tensor]
    unrotated: RotaryTables | None = None

    @staticmethod
    def build(layout: SequenceLayout, config: ModelConfig, device: torch.device) -> RotaryTables:
        """The tables of all rows of a sample; angles are computed in fp64."""
        inverse, factor = inverse_frequencies(config, device)

        def table(positions) -> tuple[torch.Tensor, torch.Tensor]:
            if not isinstance(positions, torch.Tensor):
                positions = to_device(positions, device)
            angles = positions[:, None, None] * inverse  # fp64
            cos, sin = angles.cos(), angles.sin()
            if factor != 1:
                cos, sin = cos * factor, sin * factor
            return cos.float(), sin.float()

        text, summary = table(layout.text_positions), table(layout.summary_positions)
        if config.rotates_everything:
            return RotaryTables(text, summary)

        def of_angle_0(cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return torch.full_like(cos, factor), torch.zeros_like(sin)

        return RotaryTables(text, summary, unrotated=RotaryTables(of_angle_0(*text), of_angle_0(*summary)))


class RMSNorm(nn.Module):
    """Root-mean-square norm (arXiv 1910.07467) over the last dimension, in fp32, with a learned gain.

    `grad_is_complete`: whether this tensor rank has every row and head that the gain is applied to.
    """

    def __init__(self, size: int, eps: float, tp: TensorParallel, backend: Backend, grad_is_complete: bool):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size, dtype=tp.dtype))
        self.eps, self.tp, self.backend, self.grad_is_complete = eps, tp, backend, grad_is_complete

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.backend.rows.rms_norm(x, *self.ready())

    def ready(self) -> Norm:
        """The norm with its gain ready for use (see `TensorParallel.replicated`), for a GEMM that applies it."""
        return Norm(self.tp.replicated(self.weight, self.grad_is_complete), self.eps)


@dataclass
class Heads:
    """One layer's projections: q [T, H, d], k and v [T, G, d], and those of summaries with S rows, or None.

    In a layer that pools, the pooled keys and values take the place of those of summaries. `unpooled` holds the rows
    that they are pooled from, and `pooled_table` the rotation of pooled keys, for a decoding cache.

    `q_far` [T, H, d] and `k_far` [S, G, d] replace q and k_summary in a far part without RoPE.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    q_summary: torch.Tensor | None = None
    k_summary: torch.Tensor | None = None
    v_summary: torch.Tensor | None = None
    unpooled: ChunkRows | None = None
    pooled_table: tuple[torch.Tensor, torch.Tensor] | None = None
    q_far: torch.Tensor | None = None
    k_far: torch.Tensor | None = None

    @property
    def far_keys(self) -> torch.Tensor | None:
        """The keys [S, G, d] that text attends to in the far part, which a decoding cache keeps."""
        return self.k_summary if self.k_far is None else self.k_far


# (attention, heads, layout) -> outputs of text rows, and of summary rows where the layer updates them. A gated delta
# net (`ksa_model.layers.delta`) passes itself and its `DeltaRows` as the first two.
MixerCore = Callable[["Attention", Heads, SequenceLayout], "tuple[torch.Tensor, torch.Tensor | None]"]


class Attention(nn.Module):
    """Attention of one layer over both streams.

    Parameters: `query`, `key`, `value`, `output`. If the layer handles summaries and these have projections of their
    own: `summary_key`, `summary_value`, and `summary_query` where the layer updates summaries. With `qkv_bias` each of
    these but `output` has a bias, added before norm and rotation. In a layer with learned
    pooling: `pool_score` [G, h] and `pool_bias` [G*k]; both start at zero, which makes every weight 1/k.
    """

    def __init__(
        self,
        config: ModelConfig,
        layer: LayerConfig,
        tp: TensorParallel,
        backend: Backend,
        context: ContextParallel | None = None,
        fp8: bool = False,
    ):
        """`fp8`: whether the GEMMs with the projections run in 8 bits, see `weight_of`."""
        super().__init__()
        self.config, self.layer, self.tp, self.backend, self.context = config, layer, tp, backend, context
        h, q, kv = config.hidden_size, config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        column = partial(tp.column, h, init_std=config.init_std, fp8=fp8, bias=config.qkv_bias)
        self.query, self.key, self.value = column(q), column(kv), column(kv)
        own = config.independent_qkv
        self.summary_query = column(q) if own and layer.updates_summaries else None
        self.summary_key = column(kv) if own and layer.projects_summaries else None
        self.summary_value = column(kv) if own and layer.projects_summaries else None
        self.summary_projection_weight = 1.0  # see `Decoder.anneal`
        # Never in fp8: it is small.
        self.pool_score = tp.column(h, config.num_kv_heads, init_std=0.0) if layer.mixer == "H" else None
        self.pool_bias = tp.share(torch.zeros(config.num_kv_heads * config.chunk_size)) if layer.mixer == "H" else None
        self.output = tp.row(q, h, config.init_std / (2 * config.num_layers) ** 0.5, fp8)
        if config.qk_norm:
            # Every rank norms its own heads only.
            self.query_norm = RMSNorm(config.head_dim, config.norm_eps, tp, backend, grad_is_complete=tp.size == 1)
            self.key_norm = RMSNorm(config.head_dim, config.norm_eps, tp, backend, grad_is_complete=tp.size == 1)
        self.gains_are_uneven = False  # see `Decoder.refresh_norm_gain_flags`

    def forward(
        self, x: torch.Tensor, norm: Norm, layout: SequenceLayout, rotary: RotaryTables, core: MixerCore | None = None
    ) -> torch.Tensor:
        """x: rows before the norm, [text | summaries] while the layer carries summaries, text alone otherwise.

        Returns the heads' outputs [rows, H*d] for the rows that the layer updates, both streams or text alone; the
        block multiplies them with `output`. `core` replaces the attention itself; decoding passes its cache this way.
        """
        heads = self.project(x, norm, layout, rotary)
        out, out_summary = (core or self.core)(self, heads, layout)
        if out_summary is None:
            return out.flatten(1)
        return self.tp.join_streams(out.flatten(1), out_summary.flatten(1))

    def project(self, x: torch.Tensor, norm: Norm, layout: SequenceLayout, rotary: RotaryTables) -> Heads:
        """Queries, keys and values of both streams, normed and rotated. Those that the layer does not need are None."""
        text = [weight_of(self.query), weight_of(self.key), weight_of(self.value)]
        if self.pool_score is not None:
            text.append(weight_of(self.pool_score))
        names = ["key", "value"] * self.layer.projects_summaries + ["query"] * self.layer.updates_summaries
        summary = [w for name in names for w in self._summary_weights(name)] if layout.num_summary else []
        q, k, v, *rest = self.tp.project(self.backend, x, norm, layout.num_text, text, summary)
        scores, of_summary = rest[: len(text) - 3], rest[len(text) - 3 :]
        heads = Heads(self._heads(q), self._heads(k), self._heads(v))
        own = {name: self._summary_rows(name, of_summary) for name in names} if layout.num_summary else {}
        heads.q_summary, heads.k_summary, heads.v_summary = (own.get(name) for name in ("query", "key", "value"))
        if self.layer.pools:
            heads.unpooled = ChunkRows(heads.k, heads.v, scores[0] if scores else None, self.pool_bias)
            table = rotary if self.config.rotate_far else rotary.unrotated
            assert table is not None
            heads.pooled_table = table.summary
            if layout.num_summary:
                pooled = self.backend.pooling.pool(heads.unpooled, self.config.chunk_size)
                heads.k_summary, heads.v_summary = pooled
        self._norm_rotate(heads, rotary)
        if not layout.num_summary:  # kernels need at least one row
            if self.layer.projects_summaries:
                heads.k_summary, heads.v_summary = heads.k[:0], heads.v[:0]
                heads.k_far = None if heads.q_far is None else heads.k[:0]
            if self.layer.updates_summaries:
                heads.q_summary = heads.q[:0]
        return heads

    def rotate_pooled(self, k: torch.Tensor, table: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        """Pooled keys [C, G, d] normed and rotated, as `project` does it for the chunks of a sample."""
        norm = self.norm_of_keys
        return self.backend.rows.norm_rotate(k, norm and norm.gain, self.config.norm_eps, *table)

    @property
    def norm_of_keys(self) -> Norm | None:
        """The norm of each key's head, if the model has one."""
        return self.key_norm.ready() if self.config.qk_norm else None

    def _summary_weights(self, name: str) -> list[Weight]:
        """The weights of one projection of summary rows: their own, that of text, or both during annealing."""
        base, own = weight_of(getattr(self, name)), getattr(self, f"summary_{name}")
        if own is None:
            return [base]
        return [weight_of(own)] if self.summary_projection_weight == 1 else [weight_of(own), base]

    def _summary_rows(self, name: str, projected: list[torch.Tensor]) -> torch.Tensor:
        """Remove the results of one projection's `_summary_weights` from the front of `projected`; return their
        weighted mean by heads. Queries and keys are normed before, see `_norms_before_mixing`."""
        own = self._heads(projected.pop(0))
        if self.summary_projection_weight == 1 or self.summary_key is None:
            return own
        base = self._heads(projected.pop(0))
        if self._norms_before_mixing and name != "value":
            norm = self.query_norm if name == "query" else self.key_norm
            own, base = norm(own), norm(base)
        return torch.lerp(base, own, self.summary_projection_weight)

    @property
    def _norms_before_mixing(self) -> bool:
        """Whether summary queries and keys are mixtures of normed ones, so that they must not be normed again. A norm
        is not linear: the norm of a mixture is another row. At a weight of 0 nothing is mixed."""
        return self.config.qk_norm and self.summary_key is not None and 0 < self.summary_projection_weight < 1

    @staticmethod
    def core(
        attention: Attention, heads: Heads, layout: SequenceLayout, kept: SavedOutput | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attention of every row of a sample at once: outputs of text rows, and of summary rows where the layer updates
        them.

        `kept` holds the result of text rows for a recomputation; that of summary rows is cheap and is computed again.
        """
        layer, kernels, context = attention.layer, attention.backend.attention, attention.context
        q, k, v, k_summary, v_summary = heads.q, heads.k, heads.v, heads.k_summary, heads.v_summary
        if layer.has_far:
            far_keys = heads.far_keys
            assert far_keys is not None and v_summary is not None
            inputs = q, k, v, far_keys, v_summary
            out = joint.ksa_attention(inputs, layout, layer.window_chunks, kernels, context, kept, q_far=heads.q_far)
        else:
            window = attention.config.window_tokens if layer.mixer == "S" else layer.window_chunks
            out = joint.text_attention((q, k, v), layout, layer.mixer, window, kernels, context, kept)
        if heads.q_summary is None:
            return out, None
        # A chunk is on one rank with its summaries, so this part needs no exchange.
        return out, kernels.summary_attention(heads.q_summary, k, v, k_summary, v_summary, layout)

    def _norm_rotate(self, heads: Heads, rotary: RotaryTables) -> None:
        """Norm and rotate the queries and keys of both streams; replaces them in `heads`."""
        normed, eps = self.config.qk_norm, self.config.norm_eps
        summaries_are_normed = self._norms_before_mixing and heads.k_summary is not None
        far = None
        if self.layer.mixer == "F" and not self.config.rotate_full_layers:
            assert rotary.unrotated is not None
            rotary = rotary.unrotated
        elif self.layer.has_far and not self.config.rotate_far:
            far = rotary.unrotated
        gemv = None if summaries_are_normed else self.backend.gemv_for(len(heads.q), SMALL_BATCH)
        if far is None and gemv is not None:
            streams = [gemv.Stream(heads.q, heads.k, *rotary.text)]
            if heads.k_summary is not None:
                streams.append(gemv.Stream(heads.q_summary, heads.k_summary, *rotary.summary))
            gains = (self.query_norm.weight, self.key_norm.weight) if normed else None
            (heads.q, heads.k), *of_summary = gemv.norm_rotate_heads(streams, gains, eps)
            if of_summary:
                ((heads.q_summary, heads.k_summary),) = of_summary
            return
        q_gain, k_gain = (self.query_norm.ready().gain, self.key_norm.ready().gain) if normed else (None, None)
        summary_q_gain, summary_k_gain = (None, None) if summaries_are_normed else (q_gain, k_gain)
        if far is not None:
            heads.q_far, heads.k_far = heads.q, heads.k_summary
        for name, gain, table in (
            ("q_far", q_gain, None if far is None else far.text),
            ("k_far", summary_k_gain, None if far is None else far.summary),
            ("q", q_gain, rotary.text),
            ("k", k_gain, rotary.text),
            ("q_summary", summary_q_gain, rotary.summary),
            # With `k_far`, only summaries read their rotated keys.
            ("k_summary", summary_k_gain, rotary.summary if far is None or heads.q_summary is not None else None),
        ):
            if (x := getattr(heads, name)) is not None and table is not None:
                rotated = self.backend.rows.norm_rotate(x, gain, eps, *table, keep_input=self.gains_are_uneven)
                setattr(heads, name, rotated)

    def _heads(self, x: torch.Tensor) -> torch.Tensor:
        """[rows, heads*d] -> [rows, heads, d]."""
        return x.unflatten(-1, (-1, self.config.head_dim))
