"""`python -m train dry_run=true`: what a run would look like on every rank, by arithmetic alone.

No process group, no device, no data: a world of thousands of ranks is planned on a laptop. Memory is counted from the
same shapes the model is built from; activations from what each layer keeps for its backward, which a test compares with
what autograd really keeps.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ksa_model.config import DELTA_BLOCK_ROWS, FUSED_LOSS_ROWS, LOSS_ROWS, LayerConfig, ModelConfig
from train.config import ConfigError, TrainConfig, validate

GIB = 2**30
GPU_MEMORY = {  # bytes a process can really have, below the label's number
    "a100-40gb": 39.4 * GIB,
    "a100-80gb": 79.1 * GIB,
    "h100-80gb": 79.1 * GIB,
    "h200-141gb": 139.8 * GIB,
    "b200-192gb": 178.0 * GIB,
}
WITHOUT_FP8 = ("a100-40gb", "a100-80gb")
# In use beyond what torch has handed out, as measured on H100 and H200: alone, with other ranks, and for every context
# rank that slices are sent to (with one and with three of them): docs/log.md.
CUDA_CONTEXT, NCCL, NCCL_PEER = 1.5 * GIB, 1.7 * GIB, 0.36 * GIB
REDUCE_BUCKET = 500_000_000  # elements: DeepSpeed's default
_WORKSPACE = 0.8  # of a library attention kernel's backward, in shares of its queries: see ksa_model/fused.py


@dataclass(frozen=True)
class Plan:
    """Bytes of the fullest rank, by purpose, on its device and its host; bytes it receives in one micro-batch, by
    exchange."""

    world_size: int
    data_size: int
    parameters: int
    parameters_per_rank: int
    memory: dict[str, float]
    exchange: dict[str, float]
    host: dict[str, float]

    @property
    def total(self) -> float:
        return sum(self.memory.values())


def plan(config: TrainConfig, world_size: int) -> Plan:
    """Count for a checked configuration; `model.vocab_size` must be known."""
    validate(config, world_size)
    if config.model.vocab_size is None:
        raise ConfigError(
            "dry_run needs model.vocab_size: the tokenizer that would decide it is not opened; "
            "give it, e.g. model.vocab_size=151936"
        )
    parallel, model = config.parallel, config.model
    data_size = parallel.data(world_size)
    local = sum(
        math.prod(shape) // (parallel.tensor if dim is not None else 1)
        for shape, dim in model.parameter_shapes().values()
    )
    return Plan(
        world_size=world_size,
        data_size=data_size,
        parameters=model.num_parameters()["total"],
        parameters_per_rank=local,
        memory=_state_bytes(config, local, data_size * parallel.context) | _working_bytes(config),
        exchange=_exchange_bytes(config, local, data_size * parallel.context),
        host=_host_bytes(config, local, data_size * parallel.context),
    )


def _state_bytes(config: TrainConfig, local: int, shards: int) -> dict[str, float]:
    """Weights, gradients and optimizer state of one rank, as the ZeRO stage shards them."""
    parallel, model, bf16 = config.parallel, config.model, config.run.precision == "bf16"
    zero, value = parallel.zero_in_use(config.run.precision, shards), 2 if bf16 else 4
    state = _optimizer_bytes(config, local, shards)
    gradients, buckets = float(value * local), 0.0
    if zero >= 2:  # DeepSpeed adds up this rank's share in fp32, out of a bucket of the reduction
        gradients = 0.0 if zero == 3 and parallel.offload == "optimizer" else 4 * local / shards
        buckets = value * min(REDUCE_BUCKET, local)
        if parallel.offload == "optimizer":  # the largest gradient once more, on its way to the host
            buckets += value * max(math.prod(shape) for shape, _ in model.parameter_shapes().values())
    elif bf16:  # sums in fp32, to which products add; the vocabulary's gradients come in bf16 first
        vocabulary = model.padded_vocab_size * model.hidden_size * (1 if model.tie_embeddings else 2)
        gradients = 4 * local + value * vocabulary // parallel.tensor
    counts = {
        "weights": value * local / (shards if zero == 3 else 1),
        "gradients": gradients,
        "optimizer": 0.0 if parallel.offload == "optimizer" else state,
    }
    return counts | ({"gradient bucket": buckets} if buckets else {})


def _optimizer_bytes(config: TrainConfig, local: int, shards: int) -> float:
    zero = config.parallel.zero_in_use(config.run.precision, shards)
    if zero == 0 and config.run.precision != "bf16":
        return 8 * local
    # Two moments and the fp32 master copy (kept beside fp32 weights too, except in stage 0).
    return (8 + 4) * local / (shards if zero else 1)


def _host_bytes(config: TrainConfig, local: int, shards: int) -> dict[str, float]:
    counts = {"activations, pinned": host_bytes(config)[0], "optimizer": 0.0}
    if config.parallel.offload == "optimizer":
        # Beside it the gradients that it reads, in fp32, and the weights on their way back, both pinned.
        value = 2 if config.run.precision == "bf16" else 4
        counts["optimizer"] = _optimizer_bytes(config, local, shards) + (4 + value) * local / shards
    return {name: count for name, count in counts.items() if count}


def _fused(config: TrainConfig) -> bool:
    """Whether the plan is for the GPU's kernels, which keep less than plain torch."""
    return config.run.precision == "bf16" and config.run.device != "cpu"


def _rows(config: TrainConfig) -> tuple[int, int]:
    """Text and summary rows of one context rank in a micro-batch."""
    text = config.seq_len * config.run.samples_per_micro_batch // config.parallel.context
    return text, text // config.model.chunk_size * config.model.summary_tokens


def _working_bytes(config: TrainConfig) -> dict[str, float]:
    """What stays on the device from forward to backward, and the largest passing tensors: the loss's, or a block's."""
    model, parallel = config.model, config.parallel
    value = 2 if config.run.precision == "bf16" else 4
    text, _ = _rows(config)
    blocks = [block_bytes(model, layer, config) for layer in model.layers]
    kept = [block.kept(config.memory.recompute) for block in blocks]
    activations = float(sum(map(sum, kept)))
    if config.memory.offload:
        _, left = host_bytes(config)
        # The block that is run, and its neighbour on the way out or back.
        activations = left + 2 * max(map(sum, kept))
    block = max(block.passing(config.memory.recompute) for block in blocks)
    vocabulary = model.padded_vocab_size // parallel.tensor
    head = model.hidden_size * vocabulary * 4 + text * model.hidden_size * (2 * value + 4)
    rows, bytes_each = (FUSED_LOSS_ROWS, value) if _fused(config) else (LOSS_ROWS, 4 + value)
    logits = min(rows, text) * vocabulary * bytes_each
    return {"activations": activations, "passing": max(block, head + logits)}


def host_bytes(config: TrainConfig) -> tuple[float, float]:
    """Bytes of kept tensors that a rank moves to the host, and of those that it has no room for there."""
    moved, left = 0.0, 0.0
    if config.memory.offload:
        for layer in config.model.layers:
            for size in block_bytes(config.model, layer, config).kept(config.memory.recompute):
                if moved + size <= config.memory.host_gib * GIB:  # as `ksa_model.memory.HostPool` gives it out
                    moved += size
                else:
                    left += size
    return moved, left


def _stream_rows(layer: LayerConfig, config: TrainConfig) -> tuple[int, int, int]:
    """Rows that enter the layer, rows it updates, text rows (all of one context rank, before sequence sharding)."""
    text, summary = _rows(config)
    return text + summary * layer.carries_summaries, text + summary * layer.updates_summaries, text


@dataclass(frozen=True)
class BlockBytes:
    """Bytes of one block on one rank."""

    saved: float  # what forward keeps for backward where all is kept
    input: float  # the hidden rows that enter
    attention: tuple[float, float]  # the result of attention of text rows: outputs, log-sum-exp
    holds_input: bool  # whether `saved` holds the very rows that enter
    gradients: float  # and copies, the most that exist beside `saved` at one time of backward

    def kept(self, recompute: str) -> list[float]:
        """Tensors that stay from forward to backward."""
        return {"none": [self.saved], "full": [self.input], "selective": [self.input, *self.attention]}[recompute]

    def passing(self, recompute: str) -> float:
        """What comes on top of it while backward is at this block."""
        if recompute == "none":
            return self.gradients
        held = (self.input if self.holds_input else 0.0) + (sum(self.attention) if recompute == "selective" else 0.0)
        return self.saved - held + self.gradients


def block_bytes(model: ModelConfig, layer: LayerConfig, config: TrainConfig) -> BlockBytes:
    """Count one block.

    Legend: h hidden, q and kv projected features of this tensor rank, f MLP features of it, b bytes a value.
    """
    tensor = config.parallel.tensor
    share = tensor if config.parallel.sequence else 1
    b = 2 if config.run.precision == "bf16" else 4
    fused = _fused(config)
    # A norm keeps its input, in fp32 where plain torch computes it; the normalised rows are made again.
    norm = b if fused else 4
    h, f = model.hidden_size, model.ffn_size // tensor
    q, kv = model.num_heads * model.head_dim // tensor, model.num_kv_heads * model.head_dim // tensor
    entering, updated, text = _stream_rows(layer, config)
    summary_in, summary_out = entering - text, updated - text
    projected = summary_in if layer.projects_summaries else 0

    # What products take is behind a norm, gathered. On a GPU a single tensor rank makes it again from the norm's input.
    remade = fused and tensor == 1
    attention_norm = entering / share * h * norm  # the residual stream, and the norm's own
    attention_input = 0.0 if remade else entering * h * b
    heads: float = text * (q + 2 * kv) * b + projected * 2 * kv * b + summary_out * q * b  # as attention saved them
    if (
        model.qk_norm
    ):  # the norm's input beside its output, which RoPE turns into another tensor; on a GPU a scale a head
        heads += (text * (q + kv) + projected * kv + summary_out * q) * (4 / model.head_dim if fused else norm)
    log_sum_exp = text * q // model.head_dim * 4
    out = updated * q * b * (2 if summary_out else 1)  # joined streams are a copy
    if summary_out and not fused:  # per-chunk copies of keys and values for the summary queries
        heads += (text + projected) * 2 * kv * b + summary_out * q * b
    attention = float(text * q * b), float(log_sum_exp)
    if layer.mixer == "G":
        # Before the convolution and behind it; the recurrence's output, which a norm takes; gate, normed and product.
        heads = text * q * (6 * b + norm) + text * (q // model.head_dim) * 4 * 4
        out = text * q * (3 if fused else 4) * b
        log_sum_exp = text * (q // model.head_dim) * DELTA_BLOCK_ROWS * b if fused else 0  # the kernels' solved systems
        attention = 0.0, 0.0  # linear work, which a re-run does again
    exchanged = _exchanged_rows(model, layer, config) * 2 * kv * b

    # gate and up; plain torch keeps silu(gate) and the product as well
    wide = f * (2 if fused else 4) * b
    local, rows = updated / share, config.memory.mlp_rows
    mlp_norm, mlp_input, mlp = local * h * norm, 0.0 if remade else float(updated * h * b), float(updated * wide)
    # Backward of the MLP: the gradient of what leaves the block, and those of gate and up; on a GPU their product, made
    # again, and its gradient stand beside them. Copies in 8 bits (perf.precision=fp8) come when those two are
    # gone, and are smaller wherever f is above 4/3 h.
    passing = (4 if fused else 2) * f
    of_mlp = local * h * b + updated * (passing + h) * b
    if rows is not None and rows < local:
        mlp_norm, mlp_input, mlp = 0.0, local * h * b, 0.0  # rows as they stand, before the norm
        # One slice's forward and gradients, the input's gradient, and the weights' in fp32 beside a slice's own, unless
        # they go to the sums that the step adds up.
        of_mlp = 2 * local * h * b + rows * share * (wide + (passing + 2 * h) * b)
        of_mlp += 0.0 if b == 2 and config.parallel.zero < 2 else 3 * h * f * (4 + b)
    # Backward of attention, with the MLP's tensors gone: gradients of outputs, queries, keys and values (other ranks'
    # too, and what those return), and the library kernel's workspace.
    of_attention = (local * h + updated * q + (text + summary_out) * q + (text + projected) * 2 * kv) * b
    of_attention += (
        (1.5 if config.parallel.context == 2 else 2) * exchanged
        + (_WORKSPACE * text * q * b if fused else 0.0)
        - (mlp_norm + mlp_input + mlp)
    )
    if layer.mixer == "G":  # of outputs, and of what stands before and behind the convolution and in the gate
        of_attention = (local * h + 8 * text * q) * b - (mlp_norm + mlp_input + mlp)
    return BlockBytes(
        saved=attention_norm + attention_input + heads + log_sum_exp + out + exchanged + mlp_norm + mlp_input + mlp,
        input=entering / share * h * b,
        attention=attention,
        holds_input=norm == b,
        gradients=max(of_mlp, of_attention),
    )


def _exchanged_rows(model: ModelConfig, layer: LayerConfig, config: TrainConfig) -> float:
    """Rows of keys and values that attention sees as copies: other context ranks', and of a gathered sample its own."""
    context = config.parallel.context
    if context == 1 or layer.mixer == "G":
        return 0.0
    text, summary = _rows(config)
    if layer.mixer == "F":
        return text * context
    back = model.window_tokens - 1 if layer.mixer == "S" else layer.window_chunks * model.chunk_size
    return 2 * back + (summary * context if layer.mixer == "K" else 0)


def _exchange_bytes(config: TrainConfig, local: int, shards: int) -> dict[str, float]:
    """Bytes one rank receives for one micro-batch, forward and backward, without recomputation; gradients per step."""
    model, parallel = config.model, config.parallel
    b = 2 if config.run.precision == "bf16" else 4
    tensor, context = parallel.tensor, parallel.context
    kv = 2 * model.num_kv_heads * model.head_dim // tensor * b
    text, summary = _rows(config)
    counts = {"halo": 0.0, "summaries": 0.0, "text keys": 0.0, "tensor": 0.0}
    for layer in model.layers:
        if context > 1:
            if layer.mixer == "F":
                counts["text keys"] += 2 * text * (context - 1) * kv
            else:
                back = model.window_tokens - 1 if layer.mixer == "S" else layer.window_chunks * model.chunk_size
                counts["halo"] += 2 * 2 * back * kv
            if layer.mixer == "K":
                counts["summaries"] += 2 * summary * (context - 1) * kv
        entering, updated, _ = _stream_rows(layer, config)
        # Two gathers and two reductions a block, and their mirror images in backward; an all-reduce moves twice that.
        moved = 4 * (entering + updated) * model.hidden_size * b * (tensor - 1) / tensor
        counts["tensor"] += moved
    passes = {0: 2, 1: 2, 2: 2, 3: 3}[parallel.zero]  # gradients reduced, weights gathered again
    counts["data (a step)"] = passes * local * b * (shards - 1) / shards
    return {name: count for name, count in counts.items() if count}


def describe(config: TrainConfig, world_size: int, gpu: str) -> str:
    """The plan in words and tables. Raises `ConfigError` for a device whose memory is not known, or which cannot."""
    if gpu not in GPU_MEMORY:
        raise ConfigError(f"dry_run_gpu={gpu!r} is not one of {', '.join(GPU_MEMORY)}")
    fp8 = config.perf.precision == "fp8"
    if fp8 and gpu in WITHOUT_FP8:
        raise ConfigError(f"dry_run_gpu={gpu} has no products for perf.precision=fp8; use perf.precision=bf16")
    counted, parallel, model = plan(config, world_size), config.parallel, config.model
    text, summary = _rows(config)
    outside = CUDA_CONTEXT + (NCCL if world_size > 1 else 0.0) + NCCL_PEER * (parallel.context - 1)
    total = counted.total + outside
    capacity = GPU_MEMORY[gpu]
    lines = [
        f"{counted.parameters / 1e9:.3f} B parameters, {len(model.layers)} layers {model.layer_pattern}, "
        f"k={model.chunk_size}, seq_len {config.seq_len:,}, {config.run.precision}{', products in fp8' if fp8 else ''}",
        f"{world_size} ranks = tensor {parallel.tensor}{' + sequence' if parallel.sequence else ''} x context "
        f"{parallel.context} x data {counted.data_size}, ZeRO-{parallel.zero}; "
        f"{config.micro_batches(counted.data_size)} micro-batches a step",
        "",
        "who holds what",
        *_ranks(config, counted),
        f"  every rank: {counted.parameters_per_rank / 1e9:.3f} B parameters, {text:,} text and {summary:,} summary "
        f"rows, {model.num_heads // parallel.tensor} query and {model.num_kv_heads // parallel.tensor} key/value heads",
        "",
        "memory of a rank",
        *(f"  {name:<22}{size / GIB:9.2f} GiB" for name, size in counted.memory.items()),
        f"  {'CUDA context, NCCL':<22}{outside / GIB:9.2f} GiB",
        f"  {'together':<22}{total / GIB:9.2f} GiB of {capacity / GIB:.1f} on {gpu}: "
        + ("fits" if total <= capacity else f"does NOT fit, {(total - capacity) / GIB:.1f} GiB too much"),
    ]
    if counted.host:
        lines += ["", "host memory of a rank, for tensors of the device"]
        lines += [f"  {name:<22}{size / GIB:9.2f} GiB" for name, size in counted.host.items()]
    if counted.exchange:
        lines += ["", "received by a rank for one micro-batch, forward and backward"]
        lines += [f"  {name:<22}{size / 1e9:9.3f} GB" for name, size in counted.exchange.items()]
    if total > capacity:
        lines += ["", "to make it fit: " + _advice(config)]
    return "\n".join(lines)


def _ranks(config: TrainConfig, counted: Plan) -> list[str]:
    """The first ranks and the last one: their places on the three axes and the slices of the sample they hold."""
    tensor, context = config.parallel.tensor, config.parallel.context
    shown = [*range(min(4, counted.world_size)), *([counted.world_size - 1] if counted.world_size > 4 else [])]
    lines: list[str] = []
    for rank in shown:
        t, c, d = rank % tensor, rank // tensor % context, rank // (tensor * context)
        rows = config.seq_len // (2 * context)
        if context == 1:
            held = f"rows 0-{config.seq_len - 1}"
        else:
            held = " and ".join(f"rows {i * rows}-{(i + 1) * rows - 1}" for i in (c, 2 * context - 1 - c))
        if lines and rank > shown[len(lines) - 1] + 1:
            lines.append("  ...")
        lines.append(f"  rank {rank:<5} tensor {t}, context {c}, data {d}: {held}")
    return lines


def _advice(config: TrainConfig) -> str:
    options = []
    memory = config.memory
    if memory.recompute == "none":
        options.append("memory=selective")
    if not memory.offload:
        options.append("memory=offload")
    elif memory.mlp_rows is None:
        options.append("memory.mlp_rows=65536")
    elif host_bytes(config)[1]:
        options.append(f"memory.host_gib above {memory.host_gib:g}")
    if config.parallel.zero < 3:
        options.append(f"parallel.zero={config.parallel.zero + 1}")
    if config.parallel.offload == "none" and config.parallel.zero:
        options.append("parallel.offload=optimizer")
    options += ["more parallel.context or parallel.tensor", "a shorter seq_len"]
    return ", ".join(options)
