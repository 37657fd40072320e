"""What a model is: its shape, its layer pattern and the counts that follow from them.

The same counts feed three readers: the parameter table a run prints, model-FLOPs utilisation, and the cache sizes in
reports. They are derived here once, from the attention rule in `ksa_model.reference`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

MIXERS = {"K": "KSA", "F": "full", "S": "sliding window", "C": "sliding chunk", "G": "gated delta net"}
CONV_TOKENS = 4  # tokens that the convolutions of a `G` layer see, the row's own included
DELTA_BLOCK_ROWS = 64  # rows whose products with each other a `G` layer forms
LOSS_ROWS = 1024  # rows of logits that the loss holds at a time, in fp32
CPU_LOSS_ROWS = 256  # so many stay in the cache of a core
FUSED_LOSS_ROWS = 4096  # where the kernels of `ksa_model.triton_loss` keep them in 16 bits
MOST = 2**31 - 1  # of anything that is counted: products of two such numbers are int64


class ModelConfigError(ValueError):
    """A model that cannot be built; the message names the keys, their values and the relation they break."""


# What each kind of `RopeScaling` reads besides its factor.
ROPE_SCALINGS = {
    "linear": (),
    "ntk": (),
    "yarn": ("original_max_positions", "beta_fast", "beta_slow", "attention_factor"),
    "llama3": ("original_max_positions", "low_freq_factor", "high_freq_factor"),
}


@dataclass(frozen=True)
class RopeScaling:
    """How RoPE reaches `factor` times the positions that a model was trained on; `ksa_model.rope` computes it.

    `linear` divides every frequency by the factor (position interpolation, arXiv 2306.15595); `ntk` raises the base by
    `factor^(d/(d-2))`, which divides the lowest frequency by the factor and leaves the highest; `yarn` (arXiv
    2309.00071) divides those that turn less than `beta_slow` times within `original_max_positions`, leaves those that
    turn more than `beta_fast` times, and sharpens attention by `attention_factor` (null: 0.1 ln(factor) + 1) on
    queries and on keys; `llama3` (arXiv 2407.21783) does so between wavelengths of `original_max_positions` over
    `low_freq_factor` and over `high_freq_factor`.
    """

    kind: str  # linear | ntk | yarn | llama3
    factor: float
    original_max_positions: int | None = None  # yarn and llama3 need it: the positions trained on before
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0

    def __post_init__(self) -> None:
        if self.kind not in ROPE_SCALINGS:
            raise ModelConfigError(f"model.rope_scaling.kind={self.kind!r} is not one of {', '.join(ROPE_SCALINGS)}")
        if not 1 <= self.factor < math.inf:
            raise ModelConfigError(
                f"model.rope_scaling.factor={self.factor} must be at least 1 and finite: it extends positions"
            )
        reads = ROPE_SCALINGS[self.kind]
        for option in fields(self)[2:]:
            value = getattr(self, option.name)
            if value != option.default and option.name not in reads:
                raise ModelConfigError(
                    f"model.rope_scaling.{option.name}={value} has no part in kind={self.kind}, which reads "
                    f"{', '.join(('factor', *reads))}; leave it out"
                )
        if "original_max_positions" in reads and not 1 <= (self.original_max_positions or 0) <= MOST:
            raise ModelConfigError(
                f"model.rope_scaling.kind={self.kind} needs original_max_positions, the positions that the model was "
                f"trained on before; it is {self.original_max_positions} and must be from 1 to {MOST}"
            )
        for low, high in (("beta_slow", "beta_fast"), ("low_freq_factor", "high_freq_factor")):
            if not 0 < getattr(self, low) < getattr(self, high) < math.inf:
                raise ModelConfigError(
                    f"model.rope_scaling.{low}={getattr(self, low)} must be above 0 and below "
                    f"model.rope_scaling.{high}={getattr(self, high)}, which must be finite"
                )
        if self.attention_factor is not None and not 0 < self.attention_factor < math.inf:
            raise ModelConfigError(
                f"model.rope_scaling.attention_factor={self.attention_factor} must be above 0 and finite"
            )


@dataclass(frozen=True)
class ModelConfig:
    """Shape of a decoder with interleaved KSA and full-attention layers (arXiv 2604.24432).

    `layer_pattern` is one letter per layer (`K` KSA, `F` full, `S` sliding window, `C` sliding chunk, `G` gated delta
    net, which has `num_heads` heads with keys and values of `head_dim`), repeated to `num_layers`. `window_chunks` is
    how many earlier chunks a text token still sees as text: one number for every layer, or one per letter of the
    pattern. `attention_backend` picks the kernels: `auto` the fastest that fits the device, `fused` the CUDA kernels or
    an error, `blocked` plain torch with linear memory, `reference` the dense fp32 ground truth.
    """

    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffn_size: int
    vocab_size: int | None = None  # None: the tokenizer decides
    layer_pattern: str = "KKKF"
    chunk_size: int = 8
    summary_tokens: int = 1
    window_chunks: int | tuple[int, ...] = 128
    window_tokens: int = 1024  # `S` layers only
    independent_qkv: bool = True
    full_layers_update_summaries: bool = True
    qk_norm: bool = True
    tie_embeddings: bool = False
    rope_base: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    norm_eps: float = 1e-6
    init_std: float = 0.02
    vocab_multiple: int = 128  # embedding rows are padded to this, so that shapes do not depend on tensor parallelism
    attention_backend: str = "auto"

    def __post_init__(self) -> None:
        if isinstance(self.window_chunks, list):  # from Python; configurations give tuples
            object.__setattr__(self, "window_chunks", tuple(self.window_chunks))
        for name in (
            "hidden_size",
            "num_layers",
            "num_heads",
            "num_kv_heads",
            "head_dim",
            "ffn_size",
            "chunk_size",
            "summary_tokens",
            "window_tokens",
            "vocab_multiple",
        ):
            if not 1 <= getattr(self, name) <= MOST:
                raise ModelConfigError(f"model.{name}={getattr(self, name)} must be at least 1 and at most {MOST}")
        for name in ("norm_eps", "init_std"):
            if not 0 < getattr(self, name) < math.inf:
                raise ModelConfigError(f"model.{name}={getattr(self, name)} must be above 0 and finite")
        if self.vocab_size is not None and not 2 <= self.vocab_size <= MOST:
            raise ModelConfigError(
                f"model.vocab_size={self.vocab_size} must be at least 2 and at most {MOST}, or null for the tokenizer's"
            )
        wrong = sorted(set(self.layer_pattern) - set(MIXERS))
        if wrong or not self.layer_pattern:
            letters = ", ".join(f"{letter} ({name})" for letter, name in MIXERS.items())
            raise ModelConfigError(
                f"model.layer_pattern={self.layer_pattern!r} holds {', '.join(map(repr, wrong)) or 'no letter'}; "
                f"it is made of {letters}"
            )
        if self.num_layers % len(self.layer_pattern):
            raise ModelConfigError(
                f"model.layer_pattern={self.layer_pattern!r} has {len(self.layer_pattern)} letters and does not divide "
                f"model.num_layers={self.num_layers}"
            )
        if self.num_heads % self.num_kv_heads:
            raise ModelConfigError(
                f"model.num_heads={self.num_heads} is not a multiple of model.num_kv_heads={self.num_kv_heads}"
            )
        if self.head_dim % 2:
            raise ModelConfigError(f"model.head_dim={self.head_dim} must be even: RoPE rotates pairs")
        if not 1 < self.rope_base < math.inf:
            raise ModelConfigError(
                f"model.rope_base={self.rope_base} must be above 1 and finite: frequencies fall with it"
            )
        if self.rope_scaling is not None and self.rope_scaling.kind == "ntk" and self.head_dim == 2:
            raise ModelConfigError(
                "model.rope_scaling.kind=ntk leaves the highest frequency as it is, and model.head_dim=2 has no other; "
                "use kind=linear"
            )
        if isinstance(self.window_chunks, tuple) and len(self.window_chunks) != len(self.layer_pattern):
            raise ModelConfigError(
                f"model.window_chunks={list(self.window_chunks)} must be one number, or one for each of the "
                f"{len(self.layer_pattern)} letters of model.layer_pattern={self.layer_pattern!r}"
            )
        if not all(0 <= window <= MOST for window in self.window_per_letter):
            raise ModelConfigError(
                f"model.window_chunks={self.window_chunks} must not be negative, and at most {MOST} chunks"
            )
        if self.attention_backend not in ("auto", "fused", "blocked", "reference"):
            raise ModelConfigError(
                f"model.attention_backend={self.attention_backend!r} is not one of auto, fused, blocked, reference"
            )

    @property
    def window_per_letter(self) -> tuple[int, ...]:
        """`window_chunks` for each letter of the pattern."""
        if isinstance(self.window_chunks, tuple):
            return self.window_chunks
        return (self.window_chunks,) * len(self.layer_pattern)

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding and the head; those beyond `vocab_size` are never a token and get no probability."""
        if self.vocab_size is None:
            raise ModelConfigError("model.vocab_size is not known yet: it is filled in from the tokenizer")
        return -(-self.vocab_size // self.vocab_multiple) * self.vocab_multiple

    @property
    def layers(self) -> tuple[LayerConfig, ...]:
        """One entry per layer, bottom to top, with what it does to the summary stream resolved.

        Summary rows are carried only while a later `K` layer reads them, so the last `K` layer computes their keys and
        values and nothing more, and the layers above it have no summary rows at all.
        """
        letters = self.layer_pattern * (self.num_layers // len(self.layer_pattern))
        windows = self.window_per_letter * (self.num_layers // len(self.layer_pattern))
        last_ksa = letters.rfind("K")
        return tuple(
            LayerConfig(
                index=i,
                mixer=letter,
                window_chunks=window,
                carries_summaries=i <= last_ksa,
                is_last_ksa=i == last_ksa,
                updates_summaries=i < last_ksa
                and (letter == "K" or (letter == "F" and self.full_layers_update_summaries)),
            )
            for i, (letter, window) in enumerate(zip(letters, windows))
        )

    @property
    def has_summaries(self) -> bool:
        return "K" in self.layer_pattern

    def has_mixer(self, letter: str) -> bool:
        return letter in self.layer_pattern

    @property
    def halo_rows(self) -> int:
        """Text rows that the furthest-looking near or sliding part of any layer reaches back."""
        back = {"K": lambda w: w * self.chunk_size, "C": lambda w: w * self.chunk_size,
                "S": lambda w: self.window_tokens - 1, "F": lambda w: 0, "G": lambda w: 0}  # fmt: skip
        return max(back[layer.mixer](layer.window_chunks) for layer in self.layers)

    def parameter_shapes(self) -> dict[str, tuple[tuple[int, ...], int | None]]:
        """Every parameter by name: its whole shape, and the dimension that tensor parallelism splits (or None)."""
        h, f, d = self.hidden_size, self.ffn_size, self.head_dim
        q, kv = self.num_heads * d, self.num_kv_heads * d
        shapes: dict[str, tuple[tuple[int, ...], int | None]] = {"embedding.weight": ((self.padded_vocab_size, h), 0)}
        if self.has_summaries:
            shapes["summary_embedding"] = ((self.summary_tokens, h), None)
        for layer in self.layers:
            at = f"blocks.{layer.index}."
            columns = {"query": q, "key": kv, "value": kv}
            if layer.mixer == "G":
                columns = dict.fromkeys(("query", "key", "value", "gate"), q)
                columns |= dict.fromkeys(("beta", "decay"), self.num_heads)
                shapes[f"{at}attention.convolution"] = ((3, q, CONV_TOKENS), 1)
                shapes |= {f"{at}attention.{name}": ((self.num_heads,), 0) for name in ("decay_rate", "step_bias")}
            if self.independent_qkv and layer.updates_summaries:
                columns["summary_query"] = q
            if self.independent_qkv and layer.projects_summaries:
                columns |= {"summary_key": kv, "summary_value": kv}
            shapes |= {f"{at}attention.{name}.weight": ((size, h), 0) for name, size in columns.items()}
            shapes[f"{at}attention.output.weight"] = ((h, q), 1)
            if layer.mixer == "G":
                shapes[f"{at}attention.output_norm.weight"] = ((d,), None)
            elif self.qk_norm:
                shapes |= {f"{at}attention.{name}_norm.weight": ((d,), None) for name in ("query", "key")}
            shapes |= {f"{at}mlp.{name}.weight": ((f, h), 0) for name in ("gate", "up")}
            shapes[f"{at}mlp.down.weight"] = ((h, f), 1)
            shapes |= {f"{at}{name}_norm.weight": ((h,), None) for name in ("attention", "mlp")}
        shapes["norm.weight"] = ((h,), None)
        if not self.tie_embeddings:
            shapes["head.weight"] = ((self.padded_vocab_size, h), 0)
        return shapes

    def num_parameters(self) -> dict[str, int]:
        """Parameters by role: `embedding`, `attention`, `summary` (the embedding rows and q/k/v of their own), `mlp`,
        `norm`, `head`, and their `total`. Rows of vocabulary padding are left out."""
        counts = dict.fromkeys(("embedding", "attention", "summary", "mlp", "norm", "head"), 0)
        for name, (shape, _) in self.parameter_shapes().items():
            roles = [role for role in ("summary", "norm", "mlp", "attention", "embedding", "head") if role in name]
            rows = (self.vocab_size or 0) if roles[0] in ("embedding", "head") else shape[0]
            counts[roles[0]] += rows * math.prod(shape[1:])
        counts["total"] = sum(counts.values())
        return counts

    def dense_flops(self, num_text: int, num_summary: int) -> int:
        """Forward FLOPs of every matrix multiplication by a weight, for `num_text` text and `num_summary` summary rows.

        Counts the summary stream's own projections and MLP, and the head over text rows.
        """
        h, q, kv = self.hidden_size, self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        mlp = 3 * h * self.ffn_size
        weights_met = num_text * h * (self.vocab_size or 0)
        for layer in self.layers:
            projected = h * (4 * q + 2 * self.num_heads) if layer.mixer == "G" else h * (q + 2 * kv)
            weights_met += num_text * (projected + q * h + mlp)
            if layer.projects_summaries:
                weights_met += num_summary * h * 2 * kv
            if layer.updates_summaries:
                weights_met += num_summary * (2 * h * q + mlp)
        return 2 * weights_met

    def attention_flops(self, visible_keys: int) -> int:
        """Forward FLOPs of scores and weighted values over `visible_keys` query-key pairs of one layer."""
        return 4 * visible_keys * self.num_heads * self.head_dim

    def delta_flops(self, num_text: int) -> int:
        """Forward FLOPs of the recurrence of one `G` layer: its state is read with the key, written, and read with the
        query. Blocked kernels do more."""
        return 6 * num_text * self.num_heads * self.head_dim**2

    def cache_rows(self, num_text: int) -> int:
        """Key/value rows a decoding cache holds at length `num_text`, summed over the layers; `G` layers have none."""
        k, rows = self.chunk_size, 0
        num_chunks = -(-num_text // k)
        for layer in self.layers:
            window = layer.window_chunks
            if layer.mixer == "F":
                rows += num_text
            elif layer.mixer == "S":
                rows += min(num_text, self.window_tokens)
            elif layer.mixer != "G":
                rows += min(num_text, (window + 1) * k)
                if layer.mixer == "K":
                    rows += self.summary_tokens * max(0, num_chunks - window)
        return rows

    def cache_bytes(self, num_text: int, bytes_per_value: int = 2) -> int:
        """Bytes of a decoding cache at length `num_text`: keys and values (default bf16), and for each `G` layer its
        state, in fp32, and the tokens that its convolutions look back to."""
        keys = 2 * self.cache_rows(num_text) * self.num_kv_heads * self.head_dim * bytes_per_value
        features = self.num_heads * self.head_dim
        state = features * self.head_dim * 4 + (CONV_TOKENS - 1) * 3 * features * bytes_per_value
        return keys + state * sum(layer.mixer == "G" for layer in self.layers)


@dataclass(frozen=True)
class LayerConfig:
    """One layer of the pattern; see `ModelConfig.layers`."""

    index: int
    mixer: str
    window_chunks: int
    carries_summaries: bool  # summary rows enter this layer
    is_last_ksa: bool  # the last layer that reads them
    updates_summaries: bool  # summary rows leave it changed by attention and MLP

    @property
    def projects_summaries(self) -> bool:
        """Whether this layer needs the summaries' keys and values."""
        return self.mixer == "K" or self.updates_summaries


def check_tensor_parallel(config: ModelConfig, tensor_ranks: int) -> None:
    """Raise `ModelConfigError` unless `tensor_ranks` divide what tensor parallelism divides."""
    for name in ("num_heads", "num_kv_heads", "ffn_size", "vocab_multiple"):
        if getattr(config, name) % tensor_ranks:
            raise ModelConfigError(
                f"model.{name}={getattr(config, name)} is not divisible by parallel.tensor={tensor_ranks}"
            )


def check_context_ranks(config: ModelConfig, context_ranks: int) -> None:
    """Raise `ModelConfigError` unless every mixer can share a sample among `context_ranks`."""
    if context_ranks > 1 and config.has_mixer("G"):
        raise ModelConfigError(
            f"model.layer_pattern={config.layer_pattern!r} has gated delta net layers (G), whose state passes from row "
            f"to row through the whole sample, and parallel.context={context_ranks} cuts it; use parallel.context=1"
        )
