"""The sections of a run's configuration that belong to the trainer. Each key stands here with its default and meaning.

`model`, `memory` and `data` are declared in `ksa_model/config.py`, `ksa_model/memory.py` and `data_pipeline/config.py`,
and `stage` in `train/config/stage.py`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path

from data_pipeline.config import TASKS
from data_pipeline.values import expand_home
from train.config.errors import ConfigError

DEVICES = ("auto", "cpu", "cuda")
MAX_NAME_BYTES = 240  # file systems allow 255, and suffixes are added to some names


@dataclass(frozen=True)
class RunConfig:
    """What one run is and where it writes: `{root}/{name}` is its run directory."""

    name: str = "default"
    root: str = "runs"
    steps: int = 240
    stop_at_step: int | None = None  # end early, as if interrupted; the schedule still spans `steps`
    max_minutes: float | None = None  # save and exit with code 75 (REQUEUE) after this time in the training loop
    samples_per_step: int = 1  # packed samples per optimizer step, over all ranks
    samples_per_micro_batch: int = 1  # samples of one forward pass
    seed: int = 0
    device: str = "auto"  # auto | cpu | cuda
    precision: str = "fp32"  # fp32 | bf16 (bf16 compute, fp32 master weights and gradient accumulation)
    log_every: int = 10  # steps
    eval_every: int = 60  # steps between validations
    eval_samples: int = 8  # held-out samples of a validation; 0: none
    probe_every: int | None = None  # steps between probes of what the model recalls; null: none
    probe_tasks: tuple[str, ...] = ("needle", "multiquery")  # keys of TASKS in data_pipeline/corpora/probe_tasks.py
    probe_lengths: tuple[int, ...] = ()  # tokens of a probe; empty: seq_len
    probe_samples: int = 8  # probes of each task and length
    max_bad_steps: int = 10  # stop after this many consecutive steps whose loss or gradient is not finite
    skip_samples: tuple[tuple[int, int], ...] = ()  # [[first, last], ...] of the global order of samples, left out
    spike_factor: float | None = None  # on a loss this many times the recent median, go back and skip its samples

    def __post_init__(self) -> None:
        if self.device not in DEVICES:
            raise ConfigError(f"run.device={self.device!r} is not one of {', '.join(DEVICES)}")
        object.__setattr__(self, "root", expand_home(self.root))
        for name in (
            "steps",
            "samples_per_step",
            "samples_per_micro_batch",
            "log_every",
            "eval_every",
            "max_bad_steps",
        ):
            if getattr(self, name) < 1:
                raise ConfigError(f"run.{name}={getattr(self, name)} must be at least 1")
        if self.stop_at_step is not None and self.stop_at_step < 1:
            raise ConfigError(f"run.stop_at_step={self.stop_at_step} must be at least 1, or null to go to the end")
        if self.max_minutes is not None and self.max_minutes <= 0:
            raise ConfigError(f"run.max_minutes={self.max_minutes} must be positive, or null for no limit")
        self._check_probes()
        for first, last in self.skip_samples:
            if not 0 <= first <= last:
                raise ConfigError(
                    f"run.skip_samples=[[{first}, {last}]] must be [[first, last], ...] of sample indices"
                )
        if self.spike_factor is not None and self.spike_factor <= 1:
            raise ConfigError(f"run.spike_factor={self.spike_factor} must be above 1, or null for no rollback")
        if self.eval_samples < 0:
            raise ConfigError(f"run.eval_samples={self.eval_samples} must not be negative; 0 turns validation off")
        if self.precision not in ("fp32", "bf16"):
            raise ConfigError(f"run.precision={self.precision!r} is not one of fp32, bf16")
        if any(ord(character) < 32 for character in self.name + self.root):
            raise ConfigError(f"run.name={self.name!r} and run.root={self.root!r} must hold no control characters")
        for part in self.name.split("/"):
            if (size := len(part.encode("utf-8", "surrogateescape"))) > MAX_NAME_BYTES:
                raise ConfigError(
                    f"run.name={part[:40]}... has {size} bytes between slashes, and a directory's name at most "
                    f"{MAX_NAME_BYTES}: choose a shorter one"
                )
        if not self.name or self.name.startswith("/") or ".." in self.name.split("/"):
            raise ConfigError(f"run.name={self.name!r} must be a relative path below run.root={self.root!r}")

    def _check_probes(self) -> None:
        if self.probe_every is not None and self.probe_every < 1:
            raise ConfigError(f"run.probe_every={self.probe_every} must be at least 1, or null for no probes")
        if not self.probe_tasks or any(task not in TASKS for task in self.probe_tasks):
            raise ConfigError(f"run.probe_tasks={list(self.probe_tasks)} must be a list of {', '.join(TASKS)}")
        if self.probe_samples < 1 or any(length < 1 for length in self.probe_lengths):
            raise ConfigError(
                f"run.probe_samples={self.probe_samples} and run.probe_lengths={list(self.probe_lengths)} must be at "
                "least 1"
            )

    @property
    def directory(self) -> Path:
        """The run directory, `{root}/{name}`."""
        return Path(self.root) / self.name


@dataclass(frozen=True)
class CheckpointConfig:
    """When a run saves, which checkpoints it keeps, and what it does when one is damaged."""

    every_steps: int | None = 60  # null: by time alone
    every_minutes: float | None = None  # also after this time since the last save
    keep_last: int = 2
    keep_every: int | None = None  # also keep every checkpoint whose step is a multiple of this
    dir: str | None = None  # checkpoints go to `{dir}/{run.name}`, a path or an fsspec URL; null: the run directory
    asynchronous: bool = True  # write in the background, from a copy in host memory
    on_damage: str = "fallback"  # fallback: rename it and use the one before; fail: stop

    def __post_init__(self) -> None:
        object.__setattr__(self, "dir", expand_home(self.dir))
        for name in ("every_steps", "keep_last", "keep_every"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"checkpoint.{name}={value} must be at least 1")
        if self.every_minutes is not None and self.every_minutes <= 0:
            raise ConfigError(f"checkpoint.every_minutes={self.every_minutes} must be positive, or null")
        if self.on_damage not in ("fallback", "fail"):
            raise ConfigError(f"checkpoint.on_damage={self.on_damage!r} is not one of fallback, fail")


@dataclass(frozen=True)
class LoggingConfig:
    """Weights & Biases and the progress bar; metrics.jsonl is always written."""

    wandb: str = "offline"  # online | offline | off
    wandb_project: str = "ksa"
    wandb_group: str | None = None
    progress: bool = True  # a bar on standard error

    def __post_init__(self) -> None:
        if self.wandb not in ("online", "offline", "off"):
            raise ConfigError(f"logging.wandb={self.wandb!r} is not one of online, offline, off")


@dataclass(frozen=True)
class OptimConfig:
    """AdamW (arXiv 1711.05101) and its schedule.

    `wsd` warms up linearly, stays constant, and decays linearly over the last `decay_steps`; `cosine` decays over all
    steps after the warm-up; `constant` only warms up. Decay ends at `lr * min_lr_ratio`.
    """

    lr: float = 1e-3
    min_lr_ratio: float = 0.1
    schedule: str = "wsd"  # wsd | cosine | constant
    warmup_steps: int = 20
    decay_steps: int = 80  # wsd alone
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    grad_clip: float = 1.0  # global norm; 0 turns clipping off

    def __post_init__(self) -> None:
        if self.schedule not in ("wsd", "cosine", "constant"):
            raise ConfigError(f"optim.schedule={self.schedule!r} is not one of wsd, cosine, constant")
        for name in ("lr", "eps"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"optim.{name}={getattr(self, name)} must be positive")
        for name in ("min_lr_ratio", "warmup_steps", "decay_steps", "weight_decay", "grad_clip"):
            if getattr(self, name) < 0:
                raise ConfigError(f"optim.{name}={getattr(self, name)} must not be negative")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ConfigError(f"optim.betas={list(self.betas)} must each be at least 0 and below 1")

    def fitted(self, total_steps: int) -> OptimConfig:
        """This schedule, with warm-up and decay made shorter where both together do not fit into `total_steps`.

        They keep their proportion. Otherwise the rate would jump where warm-up ends inside the decay, or end before it
        has reached `lr`.
        """
        decay = self.decay_steps if self.schedule == "wsd" else 0
        if self.warmup_steps + decay <= total_steps:
            return self
        warmup = min(total_steps, round(total_steps * self.warmup_steps / (self.warmup_steps + decay)))
        return replace(self, warmup_steps=warmup, decay_steps=total_steps - warmup if decay else self.decay_steps)

    def lr_at(self, step: int, total_steps: int) -> float:
        """Learning rate of 0-based `step` of `total_steps`."""
        floor = self.lr * self.min_lr_ratio
        if step < self.warmup_steps:
            return self.lr * (step + 1) / self.warmup_steps
        if self.schedule == "cosine":
            progress = (step + 1 - self.warmup_steps) / max(1, total_steps - self.warmup_steps)
            return floor + (self.lr - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
        left = total_steps - (step + 1)
        if self.schedule == "wsd" and left < self.decay_steps:
            return floor + (self.lr - floor) * max(0, left) / self.decay_steps
        return self.lr


@dataclass(frozen=True)
class ParallelConfig:
    """The parallel layout. The data-parallel size is the number of ranks / (tensor x context)."""

    tensor: int = 1
    sequence: bool = False  # Megatron sequence parallelism; needs tensor > 1
    context: int = 1
    zero: int = 1  # ZeRO stage; shards over data x context ranks 1: optimizer state, 2: and gradients, 3: and weights
    offload: str = "none"  # none | optimizer: optimizer state and fp32 weights stay in host memory
    timeout_minutes: float = 10.0  # a rank that hangs ends the job after this

    def __post_init__(self) -> None:
        for name in ("tensor", "context"):
            if getattr(self, name) < 1:
                raise ConfigError(f"parallel.{name}={getattr(self, name)} must be at least 1")
        if self.zero not in (0, 1, 2, 3):
            raise ConfigError(f"parallel.zero={self.zero} is not a ZeRO stage: 0, 1, 2 or 3")
        if self.offload not in ("none", "optimizer"):
            raise ConfigError(f"parallel.offload={self.offload!r} is not one of none, optimizer")
        if self.offload == "optimizer" and self.zero == 0:
            raise ConfigError("parallel.offload=optimizer needs parallel.zero=1, 2 or 3")
        if self.timeout_minutes <= 0:
            raise ConfigError(f"parallel.timeout_minutes={self.timeout_minutes} must be positive")

    def zero_in_use(self, precision: str, shards: int) -> int:
        """`zero`, or 0 for a single rank in fp32, where stages 1 and 2 would only copy every gradient."""
        alone = shards == 1 and precision == "fp32" and self.offload == "none"
        return 0 if alone and self.zero < 3 else self.zero

    def data(self, world_size: int) -> int:
        """The data-parallel size in a launch of `world_size` ranks."""
        model_ranks = self.tensor * self.context
        if world_size % model_ranks:
            raise ConfigError(
                f"the world of {world_size} ranks is not a multiple of parallel.tensor={self.tensor} x "
                f"parallel.context={self.context} = {model_ranks}"
            )
        return world_size // model_ranks


@dataclass(frozen=True)
class PerfConfig:
    """The precision of the GEMMs inside blocks, and profiling."""

    precision: str = (
        "bf16"  # bf16 | fp8: of the GEMMs inside blocks; fp8 needs run.precision=bf16, see `ksa_model.ops.fp8`
    )
    profile: bool = False  # record a trace, a memory snapshot and a table of some steps
    profile_after: int = 3  # steps before the profiled ones, while kernels compile and memory settles
    profile_steps: int = 2

    def __post_init__(self) -> None:
        if self.precision not in ("bf16", "fp8"):
            raise ConfigError(f"perf.precision={self.precision!r} is not one of bf16, fp8")
        for name, least in (("profile_after", 0), ("profile_steps", 1)):
            if getattr(self, name) < least:
                raise ConfigError(f"perf.{name}={getattr(self, name)} must be at least {least}")
