"""`python -m train dry_run=true`: estimates memory and communication of a run on every rank, by arithmetic alone.

It needs no process group, no device and no data, so a world of thousands of ranks can be planned on a laptop. Shapes
come from `ModelConfig.parameter_shapes`, activations from `ksa_model.layers.activation_bytes`, which tests compare with
what autograd keeps.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ksa_model.layers.activation_bytes import RankShape, block_bytes, loss_bytes
from train.config.errors import ConfigError
from train.config.gpus import GIB, GPUS
from train.config.schema import TrainConfig, validate

# Device memory in use beyond torch's own, measured on H100 and H200 (docs/log.md): by a single rank, by NCCL, and for
# each other context rank (with one and with three of them).
CUDA_CONTEXT, NCCL, NCCL_PEER = 1.5 * GIB, 1.7 * GIB, 0.36 * GIB
REDUCE_BUCKET = 500_000_000  # elements: DeepSpeed's default


@dataclass(frozen=True)
class Plan:
    """Bytes on the rank with the most, by purpose: on its device (`memory`), on its host, and received for one
    micro-batch (`exchange`)."""

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
    """The plan for `world_size` ranks. Raises `ConfigError`, also where `model.vocab_size` is not known."""
    validate(config, world_size)
    if config.model.vocab_size is None:
        raise ConfigError(
            "dry_run needs model.vocab_size, because it does not open the tokenizer; set it, e.g. "
            "model.vocab_size=151936"
        )
    parallel, model = config.parallel, config.model
    data_size = parallel.data(world_size)
    local = sum(
        math.prod(shape) // (parallel.tensor if dim is not None else 1)
        for shape, dim in model.parameter_shapes().values()
    )
    shards = data_size * parallel.context
    return Plan(
        world_size=world_size,
        data_size=data_size,
        parameters=model.num_parameters()["total"],
        parameters_per_rank=local,
        memory=_state_bytes(config, local, shards) | _activation_bytes(config),
        exchange=_exchange_bytes(config, local, shards),
        host=_host_bytes(config, local, shards),
    )


def rank_shape(config: TrainConfig) -> RankShape:
    """What one rank computes in one micro-batch."""
    parallel, bf16 = config.parallel, config.run.precision == "bf16"
    text = config.seq_len * config.run.samples_per_micro_batch // parallel.context
    return RankShape(
        text_rows=text,
        summary_rows=text // config.model.chunk_size * config.model.summary_tokens,
        value_bytes=_value_bytes(config),
        fused=bf16 and config.run.device != "cpu",
        tensor=parallel.tensor,
        sequence=parallel.sequence,
        context=parallel.context,
        mlp_rows=config.memory.mlp_rows,
        sums_weight_grads=bf16 and parallel.zero < 2,
        anneals=config.stage.kind == "anneal",
    )


def _value_bytes(config: TrainConfig) -> int:
    return 2 if config.run.precision == "bf16" else 4


def _state_bytes(config: TrainConfig, local: int, shards: int) -> dict[str, float]:
    """Weights, gradients and optimizer state of one rank, sharded as the ZeRO stage says."""
    parallel, model, value = config.parallel, config.model, _value_bytes(config)
    zero = parallel.zero_in_use(config.run.precision, shards)
    gradients, buckets = float(value * local), 0.0
    if zero >= 2:  # DeepSpeed sums this rank's shard in fp32, out of a bucket of the reduction
        gradients = 0.0 if zero == 3 and parallel.offload == "optimizer" else 4 * local / shards
        buckets = value * min(REDUCE_BUCKET, local)
        if parallel.offload == "optimizer":  # and a copy of the largest gradient on its way to the host
            buckets += value * max(math.prod(shape) for shape, _ in model.parameter_shapes().values())
    elif config.run.precision == "bf16":  # GEMMs add to fp32 sums; gradients of the vocabulary arrive in bf16 first
        vocabulary = model.padded_vocab_size * model.hidden_size * (1 if model.tie_embeddings else 2)
        gradients = 4 * local + value * vocabulary // parallel.tensor
    counts = {
        "weights": value * local / (shards if zero == 3 else 1),
        "gradients": gradients,
        "optimizer": 0.0 if parallel.offload == "optimizer" else _optimizer_bytes(config, local, shards),
    }
    return counts | ({"gradient bucket": buckets} if buckets else {})


def _optimizer_bytes(config: TrainConfig, local: int, shards: int) -> float:
    zero = config.parallel.zero_in_use(config.run.precision, shards)
    if zero == 0 and config.run.precision != "bf16":
        return 8 * local
    # Two moments and an fp32 master copy (DeepSpeed keeps one of fp32 weights too, except in stage 0).
    return (8 + 4) * local / (shards if zero else 1)


def _host_bytes(config: TrainConfig, local: int, shards: int) -> dict[str, float]:
    counts = {"activations, pinned": offloaded_bytes(config)[0], "optimizer": 0.0}
    if config.parallel.offload == "optimizer":
        # In addition the fp32 gradients that it reads and the weights that it returns, both pinned.
        counts["optimizer"] = _optimizer_bytes(config, local, shards) + (4 + _value_bytes(config)) * local / shards
    return {name: count for name, count in counts.items() if count}


def _activation_bytes(config: TrainConfig) -> dict[str, float]:
    """What stays on the device from forward to backward, and the most that exists besides, in a block or the loss."""
    model, shape, recompute = config.model, rank_shape(config), config.memory.recompute
    blocks = [block_bytes(model, layer, shape) for layer in model.layers]
    kept = [block.kept(recompute) for block in blocks]
    activations = float(sum(map(sum, kept)))
    if config.memory.offload:
        _, left = offloaded_bytes(config)
        activations = left + 2 * max(map(sum, kept))  # the running block, and its neighbour on the way out or back
    transient = max(block.transient_bytes(recompute) for block in blocks)
    return {"activations": activations, "transient": max(transient, loss_bytes(model, shape))}


def offloaded_bytes(config: TrainConfig) -> tuple[float, float]:
    """Bytes of kept tensors that a rank moves to the host, and of those that `memory.host_gib` leaves no room for."""
    moved, left = 0.0, 0.0
    if config.memory.offload:
        for layer in config.model.layers:
            for size in block_bytes(config.model, layer, rank_shape(config)).kept(config.memory.recompute):
                if moved + size <= config.memory.host_gib * GIB:  # the rule of `ksa_model.memory.HostPool`
                    moved += size
                else:
                    left += size
    return moved, left


def _exchange_bytes(config: TrainConfig, local: int, shards: int) -> dict[str, float]:
    """Bytes that one rank receives for one micro-batch, forward and backward, without recomputation; for gradients and
    weights, per step."""
    model, parallel, shape, b = config.model, config.parallel, rank_shape(config), _value_bytes(config)
    tensor, context = parallel.tensor, parallel.context
    kv = 2 * model.num_kv_heads * model.head_dim // tensor * b
    counts = {"halo": 0.0, "summaries": 0.0, "text keys": 0.0, "tensor": 0.0}
    for layer in model.layers:
        if context > 1:
            if layer.mixer == "F":
                counts["text keys"] += 2 * shape.text_rows * (context - 1) * kv
            counts["halo"] += 2 * 2 * model.rows_back(layer) * kv
            if layer.has_far:
                counts["summaries"] += 2 * shape.summary_rows * (context - 1) * kv
        # Two gathers and two reductions per block, and their counterparts in backward; an all-reduce moves twice that.
        counts["tensor"] += 4 * sum(shape.layer_rows(layer)) * model.hidden_size * b * (tensor - 1) / tensor
    transfers = 3 if parallel.zero == 3 else 2  # gradients reduced, weights gathered, in stage 3 twice
    counts["data (a step)"] = transfers * local * b * (shards - 1) / shards
    return {name: count for name, count in counts.items() if count}


def describe(config: TrainConfig, world_size: int, gpu: str) -> str:
    """The plan as text. Raises `ConfigError` for a GPU that is not in the table or that lacks the run's precision."""
    if gpu not in GPUS:
        raise ConfigError(f"dry_run_gpu={gpu!r} is not one of {', '.join(GPUS)}")
    fp8, capacity = config.perf.precision == "fp8", GPUS[gpu].memory
    if fp8 and not GPUS[gpu].has_fp8:
        raise ConfigError(f"dry_run_gpu={gpu} has no FP8 GEMMs for perf.precision=fp8; use perf.precision=bf16")
    counted, parallel, model, shape = plan(config, world_size), config.parallel, config.model, rank_shape(config)
    outside = CUDA_CONTEXT + (NCCL if world_size > 1 else 0.0) + NCCL_PEER * (parallel.context - 1)
    total = counted.total + outside
    lines = [
        f"{counted.parameters / 1e9:.3f} B parameters, {len(model.layers)} layers {model.layer_pattern}, "
        f"k={model.chunk_size}, seq_len {config.seq_len:,}, {config.run.precision}{', GEMMs in fp8' if fp8 else ''}",
        f"{world_size} ranks = tensor {parallel.tensor}{' + sequence' if parallel.sequence else ''} x context "
        f"{parallel.context} x data {counted.data_size}, ZeRO-{parallel.zero}; "
        f"{config.micro_batches(counted.data_size)} micro-batches per step",
        "",
        "sharding",
        *_ranks(config, counted),
        f"  every rank: {counted.parameters_per_rank / 1e9:.3f} B parameters, {shape.text_rows:,} text and "
        f"{shape.summary_rows:,} {'pooled' if model.has_pooled else 'summary'} rows, "
        f"{model.num_heads // parallel.tensor} query and "
        f"{model.num_kv_heads // parallel.tensor} key/value heads",
        "",
        "memory per rank",
        *(f"  {name:<22}{size / GIB:9.2f} GiB" for name, size in counted.memory.items()),
        f"  {'CUDA context, NCCL':<22}{outside / GIB:9.2f} GiB",
        f"  {'total':<22}{total / GIB:9.2f} GiB of {capacity / GIB:.1f} on {gpu}: "
        + ("fits" if total <= capacity else f"does NOT fit, {(total - capacity) / GIB:.1f} GiB too much"),
    ]
    if counted.host:
        lines += ["", "host memory per rank, for tensors of the device"]
        lines += [f"  {name:<22}{size / GIB:9.2f} GiB" for name, size in counted.host.items()]
    if counted.exchange:
        lines += ["", "received per rank for one micro-batch, forward and backward"]
        lines += [f"  {name:<22}{size / 1e9:9.3f} GB" for name, size in counted.exchange.items()]
    if total > capacity:
        lines += ["", "to make it fit: " + _advice(config)]
    return "\n".join(lines)


def _ranks(config: TrainConfig, counted: Plan) -> list[str]:
    """The first ranks and the last one: their indices on the three axes and their slices of the sample."""
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
    """Settings that need less memory, cheapest first."""
    options = []
    memory = config.memory
    if memory.recompute == "none":
        options.append("memory=selective")
    if not memory.offload:
        options.append("memory=offload")
    elif memory.mlp_rows is None:
        options.append("memory.mlp_rows=65536")
    elif offloaded_bytes(config)[1]:
        options.append(f"memory.host_gib above {memory.host_gib:g}")
    if config.parallel.zero < 3:
        options.append(f"parallel.zero={config.parallel.zero + 1}")
    if config.parallel.offload == "none" and config.parallel.zero:
        options.append("parallel.offload=optimizer")
    options += ["more parallel.context or parallel.tensor", "a shorter seq_len"]
    return ", ".join(options)
