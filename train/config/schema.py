"""The whole configuration of a run: typed, frozen, and validated across sections before anything heavy starts.

The dataclasses own every default; YAML names only what it changes (`train/config/compose.py`). A section checks itself;
`validate` checks what no section can check alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from data_pipeline import DataConfig, DataError
from data_pipeline.values import expand_home
from ksa_model.config import (
    MemoryConfig,
    MemoryConfigError,
    ModelConfig,
    ModelConfigError,
    check_context_parallel,
    check_context_ranks,
    check_features,
    check_tensor_parallel,
)
from train.config.conversion import from_mapping
from train.config.errors import ConfigError
from train.config.sections import CheckpointConfig, LoggingConfig, OptimConfig, ParallelConfig, PerfConfig, RunConfig
from train.config.stage import StageConfig

# A user's mistake, wherever it is found: commands print its one line and end with exit code 2.
USER_ERRORS = (ConfigError, ModelConfigError, MemoryConfigError, DataError)


@dataclass(frozen=True)
class TrainConfig:
    """One pretraining run."""

    model: ModelConfig
    seq_len: int
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    run: RunConfig = field(default_factory=RunConfig)
    perf: PerfConfig = field(default_factory=PerfConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    stage: StageConfig = field(default_factory=StageConfig)
    # A chain of runs, each with what it changes, see train/chain.py: [{name: ..., stage: ..., tokens: ..., KEY: VALUE}]
    stages: tuple[dict[str, Any], ...] = ()
    resume: str = "auto"  # auto | never | path of a checkpoint or of another run's directory
    init_from: str | None = None  # initial weights, when nothing is resumed: a run, a checkpoint, or hf:DIR
    # For a summary embedding that hf:DIR does not hold: the vocabulary's mean, or a token (its id or text).
    init_summary_from: str = "mean"
    dry_run: bool = False  # print the shards, memory and communication of each rank, and stop
    dry_run_ranks: int | None = None  # number of ranks to plan for; null: those of this launch
    dry_run_gpu: str = "h100-80gb"
    document_alignment: int | None = None  # documents start on multiples of this; null: model.chunk_size

    def __post_init__(self) -> None:
        object.__setattr__(self, "resume", expand_home(self.resume))
        object.__setattr__(self, "init_from", expand_home(self.init_from, prefix="hf:"))
        if self.dry_run_ranks is not None and self.dry_run_ranks < 1:
            raise ConfigError(
                f"dry_run_ranks={self.dry_run_ranks} must be at least 1, or null for the ranks of this launch"
            )

    @property
    def alignment(self) -> int:
        """Tokens; every document starts on a multiple of this."""
        return self.document_alignment or self.model.chunk_size

    def micro_batches(self, data_size: int) -> int:
        """Micro-batches of a step on each of `data_size` data-parallel ranks."""
        return self.run.samples_per_step // data_size // self.run.samples_per_micro_batch


def validate(config: TrainConfig, world_size: int) -> None:
    """Raise one of `USER_ERRORS` unless the sections fit each other and a launch of `world_size` ranks."""
    _check_parallel(config, world_size)
    _check_precision(config)
    if config.alignment % config.model.chunk_size:
        raise ConfigError(
            f"document_alignment={config.alignment} is not a multiple of model.chunk_size={config.model.chunk_size}: "
            "documents start on chunk boundaries"
        )
    config.stage.check(config.model, config.run.steps, config.init_from)
    _check_seq_len(config)
    check_context_ranks(config.model, config.parallel.context)
    check_context_parallel(config.seq_len, config.model.chunk_size, config.model.halo_rows, config.parallel.context)
    if config.parallel.context > 1 and config.model.attention_backend == "reference":
        raise ConfigError("model.attention_backend=reference reads the rows of one rank and needs parallel.context=1")


def _check_parallel(config: TrainConfig, world_size: int) -> None:
    model, parallel, run = config.model, config.parallel, config.run
    data_size = parallel.data(world_size)
    check_tensor_parallel(model, parallel.tensor)
    if parallel.sequence and parallel.tensor == 1:
        raise ConfigError("parallel.sequence=true shares rows among tensor ranks and needs parallel.tensor > 1")
    if run.samples_per_step % data_size:
        raise ConfigError(
            f"run.samples_per_step={run.samples_per_step} is not a multiple of the {data_size} data-parallel "
            f"ranks ({world_size} ranks / parallel.tensor={parallel.tensor} / parallel.context={parallel.context})"
        )
    if run.samples_per_step // data_size % run.samples_per_micro_batch:
        raise ConfigError(
            f"run.samples_per_micro_batch={run.samples_per_micro_batch} does not divide the "
            f"{run.samples_per_step // data_size} samples that a data-parallel rank has in a step "
            f"(run.samples_per_step={run.samples_per_step} / {data_size} ranks)"
        )


def _check_precision(config: TrainConfig) -> None:
    model, precision = config.model, config.run.precision
    if precision == "bf16" and config.parallel.zero == 0:
        raise ConfigError(
            "run.precision=bf16 sums gradients in fp32, for which DeepSpeed needs parallel.zero=1 or more (on a "
            "single rank stage 1 shards nothing)"
        )
    if config.perf.precision == "fp8":
        if precision != "bf16":
            raise ConfigError(
                f"perf.precision=fp8 replaces 16-bit GEMMs, and run.precision={precision} has none; use "
                "run.precision=bf16, or perf.precision=bf16"
            )
        check_features(model, config.parallel.tensor)
    if model.attention_backend == "fused" and precision != "bf16":
        raise ConfigError(
            f"model.attention_backend=fused computes in 16 bits, and run.precision={precision}; use "
            "run.precision=bf16, or model.attention_backend=auto"
        )


def from_saved(mapping: Mapping[str, Any]) -> TrainConfig:
    """The configuration in a run directory or a checkpoint.

    Runs before 0.1.0 have `run.recompute`, which became `memory.recompute`; keys that are newer get their defaults.
    """
    run, memory = mapping.get("run", {}), mapping.get("memory", {})
    if not isinstance(run, Mapping) or not isinstance(memory, Mapping):
        raise ConfigError("run and memory must hold keys and values")
    run, memory = dict(run), dict(memory)
    if run.pop("recompute", False):
        memory.setdefault("recompute", "full")
    return from_mapping(TrainConfig, {**mapping, "run": run, "memory": memory})


def _check_seq_len(config: TrainConfig) -> None:
    parallel, chunk = config.parallel, config.model.chunk_size
    unit, reasons = config.alignment, [f"document alignment {config.alignment}"]
    if parallel.context > 1:
        unit = math.lcm(unit, 2 * parallel.context * chunk)
        reasons.append(f"2 x parallel.context={parallel.context} slices of whole chunks of {chunk}")
    if parallel.sequence:
        unit = math.lcm(unit, parallel.context * parallel.tensor * chunk)
        reasons.append(f"parallel.tensor={parallel.tensor} equal shares of chunks (parallel.sequence=true)")
    if config.seq_len < 1 or config.seq_len % unit:
        below = config.seq_len // unit * unit
        raise ConfigError(
            f"seq_len={config.seq_len} is not a multiple of {unit} ({', '.join(reasons)}); "
            f"the nearest that fit are {max(below, unit)} and {below + unit}"
        )
