"""Activation memory of the layers, by arithmetic: what forward keeps for backward, and what backward adds to it.

Each function describes the layer of the same name (`attention`, `delta`, and the MLP and the block in
`ksa_model.model`): when what a layer saves changes, it changes here too. `tests/ksa_model/layers` compares the counts
with what autograd keeps. They stand in a module of their own because a dry run, which uses them, should not import the
layers and with them megatron-core.

Legend: h hidden size, f MLP features, q and kv projected features, all of this tensor rank; b bytes per value.
"""

from __future__ import annotations

from dataclasses import dataclass

from ksa_model.config import DELTA_BLOCK_ROWS, FUSED_LOSS_ROWS, LOSS_ROWS, LayerConfig, ModelConfig

# Workspace of the library kernel for the backward of attention, as a share of its queries: see `CALL_SHARE` and its
# neighbours in ksa_model/ops/attention/cuda.py.
_WORKSPACE_SHARE = 0.8


@dataclass(frozen=True)
class RankShape:
    """What one rank computes in one micro-batch."""

    text_rows: int  # of this context rank, before sequence parallelism shards them
    summary_rows: int
    value_bytes: int  # 2 in bf16, 4 in fp32
    fused: bool  # the kernels of a GPU, which keep less than plain torch
    tensor: int = 1
    sequence: bool = False
    context: int = 1
    mlp_rows: int | None = None  # see `ksa_model.memory.MemoryConfig`
    sums_weight_grads: bool = False  # GEMMs add weight gradients to fp32 sums directly
    anneals: bool = False  # summaries mix their own projections with those of text

    @property
    def row_shards(self) -> int:
        """Into how many parts the rows between GEMMs are sharded."""
        return self.tensor if self.sequence else 1

    @property
    def norm_bytes(self) -> int:
        """Bytes per value of the input that a norm keeps; plain torch norms in fp32."""
        return self.value_bytes if self.fused else 4

    @property
    def keeps_normed(self) -> bool:
        """Whether the normed rows are kept for the GEMMs' backward. The GPU kernels of a single tensor rank recompute
        them from the input of the norm."""
        return not (self.fused and self.tensor == 1)

    def layer_rows(self, layer: LayerConfig) -> tuple[int, int]:
        """Rows that enter a layer and rows that it updates, before sequence parallelism shards them."""
        entering = self.text_rows + self.summary_rows * layer.carries_summaries
        return entering, self.text_rows + self.summary_rows * layer.updates_summaries


@dataclass(frozen=True)
class MixerBytes:
    """Bytes of the mixer of one layer, behind the norm and before the output projection."""

    saved: float  # what forward keeps for backward
    output: tuple[float, float]  # of `saved`, what `memory.recompute=selective` keeps: outputs and log-sum-exp of text
    backward: float  # what backward allocates in addition


@dataclass(frozen=True)
class BlockBytes:
    """Bytes of one block on one rank."""

    saved: float  # what forward keeps for backward without recomputation
    input: float  # the hidden rows that enter
    attention_output: tuple[float, float]  # `MixerBytes.output`
    saves_input: bool  # whether `saved` includes the very rows that enter
    backward: float  # the most that backward allocates on top of what is saved then

    def kept(self, recompute: str) -> list[float]:
        """The tensors that stay from forward to backward under `memory.recompute`."""
        return {"none": [self.saved], "full": [self.input], "selective": [self.input, *self.attention_output]}[
            recompute
        ]

    def transient_bytes(self, recompute: str) -> float:
        """What exists in addition to all kept tensors while backward runs this block."""
        if recompute == "none":
            return self.backward
        shared = self.input if self.saves_input else 0.0
        shared += sum(self.attention_output) if recompute == "selective" else 0.0
        return self.saved - shared + self.backward


def block_bytes(model: ModelConfig, layer: LayerConfig, shape: RankShape) -> BlockBytes:
    """The bytes of one block: the norms, the mixer and the MLP."""
    h, b = model.hidden_size, shape.value_bytes
    entering, updated = shape.layer_rows(layer)
    mixer = _delta_net(model, shape) if layer.mixer == "G" else _attention(model, layer, shape)
    mlp_saved, mlp_backward = _mlp(model, updated, shape)
    attention_norm = entering / shape.row_shards * h * shape.norm_bytes
    normed = entering * h * b if shape.keeps_normed else 0
    grad_out = updated / shape.row_shards * h * b  # the gradient of what leaves the block
    return BlockBytes(
        saved=attention_norm + normed + mixer.saved + mlp_saved,
        input=entering / shape.row_shards * h * b,
        attention_output=mixer.output,
        saves_input=shape.norm_bytes == b,
        # When backward reaches attention, the tensors of the MLP are gone.
        backward=max(mlp_backward, grad_out + mixer.backward - mlp_saved),
    )


def _attention(model: ModelConfig, layer: LayerConfig, shape: RankShape) -> MixerBytes:
    b, text = shape.value_bytes, shape.text_rows
    q, kv = model.num_heads * model.head_dim // shape.tensor, model.num_kv_heads * model.head_dim // shape.tensor
    entering, updated = shape.layer_rows(layer)
    projected = entering - text if layer.projects_summaries else 0  # summary rows with keys and values
    if layer.pools:
        projected = shape.summary_rows  # pooled keys and values, one for each chunk
    summaries = updated - text  # summary rows with queries

    heads: float = text * (q + 2 * kv) * b + projected * 2 * kv * b + summaries * q * b
    if model.qk_norm:  # The norm's input too: RoPE makes a new tensor of its output. On a GPU one scale per head.
        per_feature = 4 / model.head_dim if shape.fused else shape.norm_bytes
        heads += (text * (q + kv) + projected * kv + summaries * q) * per_feature
        if shape.anneals and not layer.pools:  # two norms of the summaries' queries and keys, which keep both inputs
            heads += (projected * kv + summaries * q) * (2 * shape.norm_bytes - per_feature)
    if summaries and not shape.fused:  # copies of keys and values by chunk for the summary queries
        heads += (text + projected) * 2 * kv * b + summaries * q * b
    if layer.has_far and not model.rotate_far:  # far queries and keys besides those with RoPE; only a summary's own
        own_key = projected if summaries else 0  # attention reads its rotated key
        heads += (text * q + own_key * kv) * b
    heads += _pooling(model, layer, shape)
    log_sum_exp = text * q // model.head_dim * 4
    out = updated * q * b * (2 if summaries else 1)  # the joined streams are a copy
    exchanged = exchanged_rows(model, layer, shape) * 2 * kv * b

    # Gradients of outputs, queries, keys and values, those of other ranks' keys and values and what these return.
    backward: float = (updated * q + (text + summaries) * q + (text + projected) * 2 * kv) * b
    backward += (1.5 if shape.context == 2 else 2) * exchanged
    backward += _WORKSPACE_SHARE * text * q * b if shape.fused else 0.0
    return MixerBytes(
        saved=heads + log_sum_exp + out + exchanged,
        output=(float(text * q * b), float(log_sum_exp)),
        backward=backward,
    )


def _pooling(model: ModelConfig, layer: LayerConfig, shape: RankShape) -> float:
    """Bytes that learned pooling saves: scores, and keys before their norm. Means save nothing."""
    if layer.mixer != "H":
        return 0.0
    b, text, heads = shape.value_bytes, shape.text_rows, model.num_kv_heads // shape.tensor
    weights = text * heads * (b if shape.fused else 4)
    # A norm in plain torch and fp32 keeps the same tensor.
    shared = model.qk_norm and not shape.fused and shape.norm_bytes == b
    return weights + (0 if shared else text * heads * model.head_dim * b)


def exchanged_rows(model: ModelConfig, layer: LayerConfig, shape: RankShape) -> int:
    """Rows of keys and values that attention reads from copies: those of other context ranks, and, in a gathered
    sample, this rank's own."""
    if shape.context == 1 or layer.mixer == "G":
        return 0
    if layer.mixer == "F":
        return shape.text_rows * shape.context
    return 2 * model.rows_back(layer) + (shape.summary_rows * shape.context if layer.has_far else 0)


def _delta_net(model: ModelConfig, shape: RankShape) -> MixerBytes:
    b, text = shape.value_bytes, shape.text_rows
    heads = model.num_heads // shape.tensor
    q = heads * model.head_dim
    # Queries, keys and values before and after the convolution, the input of the output norm, and for each head four
    # numbers in fp32, beta and decay among them.
    rows = text * q * (6 * b + shape.norm_bytes) + text * heads * 4 * 4
    out = text * q * (3 if shape.fused else 4) * b  # gate, normed rows and their product
    systems = text * heads * DELTA_BLOCK_ROWS * b if shape.fused else 0  # the solved systems of the GPU kernels
    # The recurrence is linear work, so `selective` recomputes it. Its backward: gradients of outputs, of the rows
    # before and after the convolution, and of the gate.
    return MixerBytes(saved=rows + out + systems, output=(0.0, 0.0), backward=8 * text * q * b)


def _mlp(model: ModelConfig, updated: int, shape: RankShape) -> tuple[float, float]:
    """Bytes that the MLP and its norm save for `updated` rows, and the bytes that exist besides in its backward."""
    h, f, b = model.hidden_size, model.ffn_size // shape.tensor, shape.value_bytes
    local, rows = updated / shape.row_shards, shape.mlp_rows
    features = f * (2 if shape.fused else 4) * b  # gate and up; plain torch also keeps silu(gate) and the product
    # Gradients of gate and up. A GPU also recomputes their product and holds its gradient. FP8 copies come when those
    # two are gone, and are smaller if f is above 4/3 h.
    gradients = (4 if shape.fused else 2) * f
    if rows is None or rows >= local:
        saved = local * h * shape.norm_bytes + (updated * h * b if shape.keeps_normed else 0) + updated * features
        return saved, local * h * b + updated * (gradients + h) * b
    # In slices: the rows before the norm are kept. Backward holds one slice's forward and gradients, the gradient of
    # the input, and those of the weights, in fp32 beside a slice's own, unless GEMMs add them to the step's sums.
    backward = 2 * local * h * b + rows * shape.row_shards * (features + (gradients + 2 * h) * b)
    return local * h * b, backward + (0 if shape.sums_weight_grads else 3 * h * f * (4 + b))


def loss_bytes(model: ModelConfig, shape: RankShape) -> float:
    """The most that the loss holds: gradients of the head and of the hidden rows, and one slice of logits."""
    b, text = shape.value_bytes, shape.text_rows
    vocabulary = model.padded_vocab_size // shape.tensor
    gradients = model.hidden_size * vocabulary * 4 + text * model.hidden_size * (2 * b + 4)
    rows, logit_bytes = (FUSED_LOSS_ROWS, b) if shape.fused else (LOSS_ROWS, 4 + b)
    return gradients + min(rows, text) * vocabulary * logit_bytes
