"""The model configuration: shapes, the layer pattern, and the counts that follow from them.

Three places use the counts: the parameter table that a run prints, model-FLOPs utilization (MFU), and the cache sizes
in reports. They are derived here once, from the attention rule in `ksa_model.ops.attention.reference`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

MIXERS = {
    "K": "KSA",
    "F": "full",
    "S": "sliding window",
    "C": "sliding chunk",
    "H": "learned pooling",
    "P": "mean pooling",
    "G": "gated delta net",
}
CONV_TOKENS = 4  # width of the convolutions of a `G` layer, in tokens
DELTA_BLOCK_ROWS = 64  # rows per block in the recurrence of a `G` layer
LOSS_ROWS = 1024  # rows of logits that the loss holds at a time, in fp32
CPU_LOSS_ROWS = 256  # on a CPU: this many rows stay in the cache of a core
FUSED_LOSS_ROWS = 4096  # with the kernels of `ksa_model.ops.triton_loss`, which keep logits in 16 bits
FP8_FEATURES = 16  # both sides of a weight in fp8 must be multiples of this
MAX_INT32 = 2**31 - 1  # upper limit of every size: the product of two such numbers is an int64


class ModelConfigError(ValueError):
    """A model that cannot be built. The message names the keys, their values and the relation that they break."""


# The options that each kind of `RopeScaling` reads besides its factor.
ROPE_SCALINGS = {
    "linear": (),
    "ntk": (),
    "yarn": ("original_max_positions", "beta_fast", "beta_slow", "attention_factor"),
    "llama3": ("original_max_positions", "low_freq_factor", "high_freq_factor"),
}


@dataclass(frozen=True)
class RopeScaling:
    """How RoPE extends to `factor` times the positions of the original training. See `ksa_model.layers.rope`.

    - `linear` divides every frequency by the factor (position interpolation, arXiv 2306.15595).
    - `ntk` multiplies the base by `factor^(d/(d-2))`. That divides the lowest frequency by the factor and keeps the
      highest.
    - `yarn` (arXiv 2309.00071) divides the frequencies that turn fewer than `beta_slow` times within
      `original_max_positions`, keeps those that turn more than `beta_fast` times, and interpolates between. It also
      multiplies queries and keys by `attention_factor` (null: 0.1 ln(factor) + 1).
    - `llama3` (arXiv 2407.21783) divides the frequencies with wavelengths above `original_max_positions /
      low_freq_factor`, keeps those below `original_max_positions / high_freq_factor`, and interpolates between.
    """

    kind: str  # linear | ntk | yarn | llama3
    factor: float
    original_max_positions: int | None = None  # required by yarn and llama3
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
                    f"model.rope_scaling.{option.name}={value} is not used by kind={self.kind}, which reads "
                    f"{', '.join(('factor', *reads))}; remove it"
                )
        if "original_max_positions" in reads and not 1 <= (self.original_max_positions or 0) <= MAX_INT32:
            raise ModelConfigError(
                f"model.rope_scaling.kind={self.kind} needs original_max_positions, the number of positions in the "
                f"original training; it is {self.original_max_positions} and must be from 1 to {MAX_INT32}"
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

    `layer_pattern` has one letter per layer and is repeated to `num_layers`: `K` KSA, `F` full attention, `S` sliding
    window, `C` sliding chunk, `H` and `P` KSA with pooled chunks instead of summaries (`ksa_model.ops.pooling`), `G`
    gated delta net (`num_heads` heads whose keys and values have `head_dim` features).
    `window_chunks` (W) is how many earlier chunks a text token attends to token by token: one number for every layer,
    or one per letter of the pattern. `attention_backend` chooses the kernels: `auto` takes the fastest that the device
    supports, `fused` the CUDA kernels or an error, `blocked` plain torch with linear memory, `reference` the dense fp32
    ground truth. Raises `ModelConfigError`.
    """

    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffn_size: int
    vocab_size: int | None = None  # None: taken from the tokenizer
    layer_pattern: str = "KKKF"
    chunk_size: int = 8
    summary_tokens: int = 1
    window_chunks: int | tuple[int, ...] = 128
    window_tokens: int = 1024  # `S` layers only
    independent_qkv: bool = True
    full_layers_update_summaries: bool = True
    qk_norm: bool = True
    qkv_bias: bool = False  # biases of the query, key and value projections; `G` layers have none
    tie_embeddings: bool = False
    rope_base: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    rotate_far: bool = True  # RoPE on far keys (`K`, `H`, `P`) and on the queries that read them
    rotate_full_layers: bool = True  # RoPE in `F` layers
    norm_eps: float = 1e-6
    init_std: float = 0.02
    vocab_multiple: int = 128  # of the padded vocabulary; shapes do not depend on the tensor-parallel size
    attention_backend: str = "auto"

    def __post_init__(self) -> None:
        if isinstance(self.window_chunks, list):  # from Python; configuration files give tuples
            object.__setattr__(self, "window_chunks", tuple(self.window_chunks))
        sizes = ("hidden_size", "num_layers", "num_heads", "num_kv_heads", "head_dim", "ffn_size", "chunk_size",
                 "summary_tokens", "window_tokens", "vocab_multiple")  # fmt: skip
        for name in sizes:
            if not 1 <= getattr(self, name) <= MAX_INT32:
                raise ModelConfigError(f"model.{name}={getattr(self, name)} must be from 1 to {MAX_INT32}")
        for name in ("norm_eps", "init_std"):
            if not 0 < getattr(self, name) < math.inf:
                raise ModelConfigError(f"model.{name}={getattr(self, name)} must be above 0 and finite")
        if self.vocab_size is not None and not 2 <= self.vocab_size <= MAX_INT32:
            raise ModelConfigError(
                f"model.vocab_size={self.vocab_size} must be from 2 to {MAX_INT32}, or null to take the tokenizer's"
            )
        wrong = sorted(set(self.layer_pattern) - set(MIXERS))
        if wrong or not self.layer_pattern:
            letters = ", ".join(f"{letter} ({name})" for letter, name in MIXERS.items())
            raise ModelConfigError(
                f"model.layer_pattern={self.layer_pattern!r} contains {', '.join(map(repr, wrong)) or 'no letter'}; "
                f"use the letters {letters}"
            )
        self._check_pooled()
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
            raise ModelConfigError(f"model.rope_base={self.rope_base} must be above 1 and finite")
        if self.rope_scaling is not None and self.rope_scaling.kind == "ntk" and self.head_dim == 2:
            raise ModelConfigError(
                "model.rope_scaling.kind=ntk keeps the highest frequency, and model.head_dim=2 has no other; "
                "use kind=linear"
            )
        if isinstance(self.window_chunks, tuple) and len(self.window_chunks) != len(self.layer_pattern):
            raise ModelConfigError(
                f"model.window_chunks={list(self.window_chunks)} must be one number, or one for each of the "
                f"{len(self.layer_pattern)} letters of model.layer_pattern={self.layer_pattern!r}"
            )
        if not all(0 <= window <= MAX_INT32 for window in self.window_per_letter):
            raise ModelConfigError(f"model.window_chunks={self.window_chunks} must be from 0 to {MAX_INT32} chunks")
        if self.attention_backend not in ("auto", "fused", "blocked", "reference"):
            raise ModelConfigError(
                f"model.attention_backend={self.attention_backend!r} is not one of auto, fused, blocked, reference"
            )

    def _check_pooled(self) -> None:
        """Raise `ModelConfigError` unless pooled layers, if any, can have their one entry for each chunk."""
        if not self.has_pooled:
            return
        pools = f"model.layer_pattern={self.layer_pattern!r} has layers that pool each chunk (H or P)"
        if self.has_summaries:
            raise ModelConfigError(
                f"{pools} beside KSA layers (K), whose chunks have summaries; a decoding cache keeps one kind: use K, "
                "or H and P, not both"
            )
        if self.summary_tokens != 1:
            raise ModelConfigError(
                f"{pools} into one key and value, and model.summary_tokens={self.summary_tokens}; set "
                f"model.summary_tokens=1, and for as many far keys model.chunk_size="
                f"{max(1, self.chunk_size // self.summary_tokens)}"
            )

    @property
    def window_per_letter(self) -> tuple[int, ...]:
        """`window_chunks` for each letter of the pattern."""
        if isinstance(self.window_chunks, tuple):
            return self.window_chunks
        return (self.window_chunks,) * len(self.layer_pattern)

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding and the head. Rows beyond `vocab_size` are padding and get no probability."""
        if self.vocab_size is None:
            raise ModelConfigError("model.vocab_size is not known yet: it is taken from the tokenizer")
        return -(-self.vocab_size // self.vocab_multiple) * self.vocab_multiple

    @property
    def layers(self) -> tuple[LayerConfig, ...]:
        """One entry per layer, bottom to top, that says what the layer does to the summary rows.

        Summary rows are carried only as long as a later `K` layer reads them. The last `K` layer computes their keys
        and values and nothing else, and the layers above it have no summary rows.
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

    @property
    def has_pooled(self) -> bool:
        """Whether any layer pools chunks of text (`H`, `P`). Such models have no summary rows."""
        return any(layer.pools for layer in self.layers)

    @property
    def has_far(self) -> bool:
        """Whether any layer attends to summaries or to pooled chunks."""
        return self.has_summaries or self.has_pooled

    @property
    def rotates_everything(self) -> bool:
        """Whether every query and key has RoPE."""
        return (self.rotate_far or not self.has_far) and (self.rotate_full_layers or not self.has_mixer("F"))

    def has_mixer(self, letter: str) -> bool:
        return letter in self.layer_pattern

    def rows_back(self, layer: LayerConfig) -> int:
        """How many text rows the near or sliding part of a layer reaches back; 0 for `F` and `G`, which have none."""
        if layer.mixer == "S":
            return self.window_tokens - 1
        return layer.window_chunks * self.chunk_size if layer.mixer in "KCHP" else 0

    @property
    def halo_rows(self) -> int:
        """The largest `rows_back` of any layer."""
        return max(self.rows_back(layer) for layer in self.layers)

    def parameter_shapes(self) -> dict[str, tuple[tuple[int, ...], int | None]]:
        """Parameter name -> (unsharded shape, dimension that tensor parallelism splits or None)."""
        h, f, d = self.hidden_size, self.ffn_size, self.head_dim
        q, kv = self.num_heads * d, self.num_kv_heads * d
        shapes: dict[str, tuple[tuple[int, ...], int | None]] = {"embedding.weight": ((self.padded_vocab_size, h), 0)}
        if self.has_summaries:
            shapes["summary_embedding"] = ((self.summary_tokens, h), None)
        for layer in self.layers:
            prefix = f"blocks.{layer.index}."
            columns = {"query": q, "key": kv, "value": kv}
            if layer.mixer == "G":
                columns = dict.fromkeys(("query", "key", "value", "gate"), q)
                columns |= dict.fromkeys(("beta", "decay"), self.num_heads)
                shapes[f"{prefix}attention.convolution"] = ((3, q, CONV_TOKENS), 1)
                shapes |= {f"{prefix}attention.{name}": ((self.num_heads,), 0) for name in ("decay_rate", "step_bias")}
            if layer.mixer == "H":
                columns["pool_score"] = self.num_kv_heads
                shapes[f"{prefix}attention.pool_bias"] = ((self.num_kv_heads * self.chunk_size,), 0)
            if self.independent_qkv and layer.updates_summaries:
                columns["summary_query"] = q
            if self.independent_qkv and layer.projects_summaries:
                columns |= {"summary_key": kv, "summary_value": kv}
            shapes |= {f"{prefix}attention.{name}.weight": ((size, h), 0) for name, size in columns.items()}
            if self.qkv_bias and layer.mixer != "G":
                columns.pop("pool_score", None)
                shapes |= {f"{prefix}attention.{name}.bias": ((size,), 0) for name, size in columns.items()}
            shapes[f"{prefix}attention.output.weight"] = ((h, q), 1)
            if layer.mixer == "G":
                shapes[f"{prefix}attention.output_norm.weight"] = ((d,), None)
            elif self.qk_norm:
                shapes |= {f"{prefix}attention.{name}_norm.weight": ((d,), None) for name in ("query", "key")}
            shapes |= {f"{prefix}mlp.{name}.weight": ((f, h), 0) for name in ("gate", "up")}
            shapes[f"{prefix}mlp.down.weight"] = ((h, f), 1)
            shapes |= {f"{prefix}{name}_norm.weight": ((h,), None) for name in ("attention", "mlp")}
        shapes["norm.weight"] = ((h,), None)
        if not self.tie_embeddings:
            shapes["head.weight"] = ((self.padded_vocab_size, h), 0)
        return shapes

    def num_parameters(self) -> dict[str, int]:
        """Number of parameters by role: `embedding`, `attention`, `summary` (the summary embedding and the summaries'
        own q/k/v projections), `mlp`, `norm`, `head`, and their `total`. Vocabulary padding is not counted."""
        counts = dict.fromkeys(("embedding", "attention", "summary", "mlp", "norm", "head"), 0)
        for name, (shape, _) in self.parameter_shapes().items():
            roles = [role for role in ("summary", "norm", "mlp", "attention", "embedding", "head") if role in name]
            rows = (self.vocab_size or 0) if roles[0] in ("embedding", "head") else shape[0]
            counts[roles[0]] += rows * math.prod(shape[1:])
        counts["total"] = sum(counts.values())
        return counts

    def dense_flops(self, num_text: int, num_summary: int) -> int:
        """Forward FLOPs of all GEMMs with a weight, for `num_text` text rows and `num_summary` summary rows.

        Includes the projections and the MLP of summary rows, and the head over text rows.
        """
        h, q, kv = self.hidden_size, self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        mlp = 3 * h * self.ffn_size
        macs = num_text * h * (self.vocab_size or 0)
        for layer in self.layers:
            projected = h * (4 * q + 2 * self.num_heads) if layer.mixer == "G" else h * (q + 2 * kv)
            projected += h * self.num_kv_heads * (layer.mixer == "H")
            macs += num_text * (projected + q * h + mlp)
            if layer.projects_summaries:
                macs += num_summary * h * 2 * kv
            if layer.updates_summaries:
                macs += num_summary * (2 * h * q + mlp)
        return 2 * macs

    def attention_flops(self, visible_keys: int) -> int:
        """Forward FLOPs of the scores and weighted values of one layer, over `visible_keys` query-key pairs."""
        return 4 * visible_keys * self.num_heads * self.head_dim

    def delta_flops(self, num_text: int) -> int:
        """Forward FLOPs of the recurrence of one `G` layer: read its state with the key, update it, read it with the
        query. Blocked kernels compute more."""
        return 6 * num_text * self.num_heads * self.head_dim**2

    def cache_rows(self, num_text: int) -> int:
        """Key/value rows of a decoding cache at length `num_text`, summed over the layers; `G` layers have none."""
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
                if layer.has_far:
                    rows += self.summary_tokens * max(0, num_chunks - window)
        return rows

    def cache_bytes(self, num_text: int, bytes_per_value: int = 2) -> int:
        """Bytes of a decoding cache at length `num_text`: keys and values (default bf16), for each `G` layer its fp32
        state and the inputs of its convolutions, and for each `H` and `P` layer the sums of the open chunk in fp32."""
        keys = 2 * self.cache_rows(num_text) * self.num_kv_heads * self.head_dim * bytes_per_value
        features = self.num_heads * self.head_dim
        state = features * self.head_dim * 4 + (CONV_TOKENS - 1) * 3 * features * bytes_per_value
        open_chunk = self.num_kv_heads * (2 * self.head_dim + 2) * 4
        pooling = sum(layer.pools and num_text > (layer.window_chunks + 1) * self.chunk_size for layer in self.layers)
        return keys + state * sum(layer.mixer == "G" for layer in self.layers) + open_chunk * pooling


@dataclass(frozen=True)
class LayerConfig:
    """One layer of the pattern; see `ModelConfig.layers`."""

    index: int
    mixer: str
    window_chunks: int
    carries_summaries: bool  # summary rows enter this layer
    is_last_ksa: bool  # the last layer that reads summary rows
    updates_summaries: bool  # attention and MLP are applied to summary rows too

    @property
    def projects_summaries(self) -> bool:
        """Whether this layer computes keys and values of summary rows."""
        return self.mixer == "K" or self.updates_summaries

    @property
    def pools(self) -> bool:
        """Whether this layer pools the text keys and values of each chunk into one."""
        return self.mixer in "HP"

    @property
    def has_far(self) -> bool:
        """Whether text attends to chunks before its window through their summaries or pooled keys."""
        return self.mixer in "KHP"


def check_tensor_parallel(config: ModelConfig, tensor_ranks: int) -> None:
    """Raise `ModelConfigError` unless `tensor_ranks` divides every size that tensor parallelism splits."""
    for name in ("num_heads", "num_kv_heads", "ffn_size", "vocab_multiple"):
        if getattr(config, name) % tensor_ranks:
            raise ModelConfigError(
                f"model.{name}={getattr(config, name)} is not divisible by parallel.tensor={tensor_ranks}"
            )


def check_context_ranks(config: ModelConfig, context_ranks: int) -> None:
    """Raise `ModelConfigError` unless every mixer supports context parallelism with `context_ranks` ranks."""
    if context_ranks > 1 and config.has_mixer("G"):
        raise ModelConfigError(
            f"model.layer_pattern={config.layer_pattern!r} has gated delta net layers (G), whose recurrence runs "
            f"through the whole sample; parallel.context={context_ranks} would split it; use parallel.context=1"
        )


def check_context_parallel(num_text: int, chunk_size: int, halo_rows: int, size: int) -> None:
    """Raise `ModelConfigError` unless a sample of `num_text` rows divides into slices for `size` context ranks.

    `halo_rows` is how far back any near or sliding part reaches.
    """
    unit = 2 * size * chunk_size
    below = num_text // unit * unit
    if size > 1 and num_text % unit:
        raise ModelConfigError(
            f"seq_len={num_text} does not divide into 2 x parallel.context={size} slices of whole chunks of "
            f"{chunk_size} tokens; use {max(unit, below)} or {below + unit}"
        )
    if size > 1 and num_text // (2 * size) < halo_rows:
        most = max(1, num_text // (2 * max(1, halo_rows)))
        raise ModelConfigError(
            f"parallel.context={size} cuts seq_len={num_text} into slices of {num_text // (2 * size)} rows, shorter "
            f"than the {halo_rows} rows that a window reaches back; use parallel.context={most} or less, or a longer "
            "seq_len"
        )


def check_features(config: ModelConfig, tensor_ranks: int) -> None:
    """Raise `ModelConfigError` where a side of a tensor rank's share of a weight is not a multiple of
    `FP8_FEATURES`."""
    for names, divided in (
        (("hidden_size",), 1),
        (("num_heads", "head_dim"), tensor_ranks),
        (("num_kv_heads", "head_dim"), tensor_ranks),
        (("ffn_size",), tensor_ranks),
    ):
        size = math.prod(getattr(config, name) for name in names)
        if size // divided % FP8_FEATURES:
            factors = " x ".join(f"model.{name}={getattr(config, name)}" for name in names)
            share = f" over parallel.tensor={divided}" if divided > 1 else ""
            raise ModelConfigError(
                f"perf.precision=fp8 needs multiples of {FP8_FEATURES} features, and {factors}{share} gives "
                f"{size // divided}; choose another size, or perf.precision=bf16"
            )


RECOMPUTE = ("none", "full", "selective")


class MemoryConfigError(ValueError):
    """Settings that exclude each other; the message names the keys, their values and the relation they break."""


@dataclass(frozen=True)
class MemoryConfig:
    """Which tensors of a block are kept from forward to backward, and where."""

    recompute: str = "none"  # keep none: everything | full: the input | selective: the input and the attention output
    offload: bool = False  # move the tensors that `full` or `selective` keeps to host memory
    host_gib: float = 128.0  # limit of host memory per rank; tensors beyond it stay on the device
    mlp_rows: int | None = None  # rows of this rank that the MLP computes at a time; null: all at once

    def __post_init__(self) -> None:
        if self.recompute not in RECOMPUTE:
            raise MemoryConfigError(f"memory.recompute={self.recompute!r} is not one of {', '.join(RECOMPUTE)}")
        if self.offload and self.recompute == "none":
            raise MemoryConfigError(
                "memory.offload=true moves the tensors that recomputation starts from, and memory.recompute=none "
                "recomputes nothing; use memory.recompute=selective or full, or memory=offload for both"
            )
        if self.host_gib <= 0:
            raise MemoryConfigError(f"memory.host_gib={self.host_gib} must be positive")
        if self.mlp_rows is not None and self.mlp_rows < 1:
            raise MemoryConfigError(f"memory.mlp_rows={self.mlp_rows} must be at least 1, or null for all at once")
