"""The training loop. `train` sets a run up and drives it, `train_step` is one optimizer step."""

from __future__ import annotations

import dataclasses
import math
import platform
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import yaml

import data_pipeline
from data_pipeline import Loader, Plan, PreparedData
from ksa_model.collectives import ContextParallel
from ksa_model.config import ModelConfig
from ksa_model.model import Decoder
from ksa_model.tensor_parallel import TensorParallel
from train import checkpoint, parallel
from train.batches import Batch, batch_maker
from train.checkpoint import Progress
from train.config import ConfigError, TrainConfig, to_mapping, validate
from train.engine import Engine
from train.evaluate import HeldOut
from train.metrics import RunLog, StepSums, Tracker
from train.parallel import World
from train.signals import StopRequest
from train.watchdog import Watchdog

# Sections and keys that may differ between two visits to one run directory: they do not change what is computed.
CHANGEABLE = (
    "logging",
    "checkpoint",
    "parallel",
    "resume",
    "dry_run",
    "dry_run_ranks",
    "dry_run_gpu",
    "run.root",
    "run.device",
    "run.log_every",
    "run.eval_every",
    "run.eval_samples",
    "run.stop_at_step",
    "run.max_minutes",
    "run.steps",
    "run.recompute",
    "data.cache_dir",
    "data.prefetch_samples",
    "model.attention_backend",
)


@dataclass(frozen=True)
class RunResult:
    """Where a run stands when `train` returns."""

    directory: Path
    step: int
    tokens: int
    validation_loss: float | None
    seconds: float
    interrupted: bool  # ended early on request, with steps left


def train(config: TrainConfig) -> RunResult:
    """Prepare data, build the model, resume where there is something to resume, train, leave a run directory behind."""
    began = time.perf_counter()
    rank, world_size, _ = parallel.environment_world()
    validate(config, world_size)
    device = parallel.pick_device(config.run.device)
    directory = Path(config.run.root) / config.run.name
    check_run_directory(directory, config)
    checkpoint.find(config.resume, directory / "checkpoints")  # a wrong path must not wait for the data
    prepared = data_pipeline.prepare(config.data, progress=rank == 0 and config.logging.progress)
    config = dataclasses.replace(config, model=with_vocabulary(config.model, prepared.vocab_size))
    world = parallel.initialize(config.parallel, device)
    try:
        return _train(config, world, prepared, directory, began)
    finally:
        parallel.shutdown()


def _train(config: TrainConfig, world: World, prepared: PreparedData, directory: Path, began: float) -> RunResult:
    """`train` once the world stands."""
    if world.is_main:
        _write_run_directory(directory, config, prepared)
    dist.barrier()
    run = _Run(config, world, prepared, directory)
    step, last_step = run.resume(), min(config.run.steps, config.run.stop_at_step or config.run.steps)
    stopping = False
    if step >= last_step:
        run.log.say(f"{directory} is at step {step} already: nothing to train")
    try:
        patience = 60 * config.parallel.timeout_minutes
        with (
            Watchdog(world.store, world.rank, world.size, patience) as watch,
            StopRequest(config.run.max_minutes) as request,
        ):
            while step < last_step and not stopping:
                step += 1
                watch.progress(step, "waiting for data")
                batches = [batch.to(world.device) for batch in run.loader.next_step()]
                watch.progress(step, "training")
                lr = config.optim.lr_at(step - 1, config.run.steps)
                grad_norm = train_step(run.engine, batches, world, run.sums, lr, stop=request.is_due)
                stopping = run.sums.stop_agreed()
                ending = stopping or step == last_step
                run.log.advance()
                if ending or step % config.run.log_every == 0:
                    run.report(step, grad_norm, lr)
                if step == last_step or step % config.run.eval_every == 0:
                    watch.progress(step, "validating")
                    run.evaluate(step)
                if ending or step % config.checkpoint.every_steps == 0:
                    watch.progress(step, "saving a checkpoint")
                    run.save(step)
        if stopping:
            why = request.reason or "by another rank"
            run.log.say(f"asked to stop ({why}): saved step {step}; start again to continue")
    finally:
        run.close()
    return RunResult(
        directory,
        step,
        run.sums.tokens,
        run.validation_loss,
        time.perf_counter() - began,
        interrupted=stopping and step < config.run.steps,
    )


def train_step(
    engine: Engine, batches: list[Batch], world: World, sums: StepSums, lr: float, stop: bool = False
) -> torch.Tensor | float:
    """One optimizer step over this rank's micro-batches; returns the global gradient norm before clipping.

    `stop`: this rank was asked to end the run, which all ranks then learn in `StepSums.stop_agreed`.

    The loss is the sum over all ranks' valid tokens divided once by their number, so ranks and micro-batches with few
    labels, or none, weigh exactly what they hold.
    """
    counts = sums.count(batches, stop)
    # The engine averages gradients over data x context ranks; the factor turns that mean into a sum over tokens' mean.
    scale = (world.data_context_group.size() / counts[0].clamp(min=1)).float()
    loss_sum = torch.zeros((), dtype=torch.float32, device=world.device)
    for batch in batches:
        loss = engine(batch.tokens, batch.labels, batch.layout)
        engine.backward(loss * scale)
        loss_sum += loss.detach()
    grad_norm = engine.step(lr)
    sums.add(loss_sum, counts)
    return grad_norm


class _Run:
    """What a run holds while it trains, and what it does between steps."""

    def __init__(self, config: TrainConfig, world: World, prepared: PreparedData, directory: Path):
        self.config, self.world, self.prepared, self.directory = config, world, prepared, directory
        self.loader = make_loader(config, prepared, world)
        self.held_out = _held_out(config, prepared, world)
        self.engine = build_engine(config, world)
        self.validation_loss: float | None = None

    def resume(self) -> int:
        """Load the checkpoint the configuration asks for, open the log, and return the step to go on from."""
        progress = Progress(step=0, tokens=0, loader=self.loader.state())
        found = checkpoint.find(self.config.resume, self.directory / "checkpoints")
        if found is not None:
            progress = checkpoint.load(found, self.engine, self.world)
            self.loader.load_state(progress.loader)
        self.sums = StepSums(self.world, progress.tokens)
        self.log = _open_log(self.config, self.world, self.directory, progress.step)
        if found is not None:
            self.log.say(f"resumed from {found} at step {progress.step}")
        return progress.step

    def report(self, step: int, grad_norm: torch.Tensor | float, lr: float) -> None:
        record = self.sums.read()
        if not math.isfinite(record["loss"]):
            raise FloatingPointError(
                f"the loss is {record['loss']} at step {step}: stopping before this state is saved"
            )
        self.log.record({"step": step, **record, "grad_norm": float(grad_norm), "lr": lr})

    def evaluate(self, step: int) -> None:
        with self.sums.clock_stopped():
            self.validation_loss = self.held_out.loss(self.engine)
            if self.validation_loss is not None:
                self.log.record({"step": step, "tokens": self.sums.tokens, "validation_loss": self.validation_loss})

    def save(self, step: int) -> None:
        with self.sums.clock_stopped():
            began = time.perf_counter()
            facts = {
                "config": to_mapping(self.config),
                "data_fingerprint": self.prepared.fingerprint,
                "versions": {"torch": torch.__version__, "python": platform.python_version()},
            }
            progress = Progress(step, self.sums.tokens, self.loader.state())
            checkpoint.save(
                self.directory / "checkpoints",
                self.engine,
                self.world,
                progress,
                facts,
                self.config.checkpoint.keep_last,
            )
            self.log.record(
                {"step": step, "tokens": progress.tokens, "checkpoint_seconds": round(time.perf_counter() - began, 3)}
            )

    def close(self) -> None:
        self.loader.close()
        self.log.close()


# -- parts of a run ---------------------------------------------------------------------------------------------------


def build_engine(config: TrainConfig, world: World) -> Engine:
    """The model, initialised from the seed alike on every layout, under its engine."""
    torch.manual_seed(config.run.seed)
    dtype = torch.bfloat16 if config.run.precision == "bf16" else torch.float32
    tp = TensorParallel(world.tensor_group, config.parallel.sequence, dtype)
    model = Decoder(config.model, tp, ContextParallel(world.context_group), recompute=config.run.recompute)
    return Engine(
        model,
        config.optim,
        config.parallel,
        world,
        precision=config.run.precision,
        micro_batches=config.run.samples_per_step // world.data_size,
    )


def make_loader(config: TrainConfig, prepared: PreparedData, world: World) -> Loader:
    plan = _plan(config, prepared.train)
    return Loader(
        plan,
        samples_per_step=config.run.samples_per_step,
        dp_rank=world.data_rank,
        dp_size=world.data_size,
        prefetch=config.data.prefetch_samples,
        transform=batch_maker(config.model, world.context_group.rank(), world.context_group.size()),
    )


def _plan(config: TrainConfig, shards: list[Path]) -> Plan:
    data = config.data
    return data_pipeline.build_plan(shards, config.seq_len, config.alignment, data.seed, data.cache_dir)


def with_vocabulary(model: ModelConfig, vocab_size: int) -> ModelConfig:
    """`model` with the tokenizer's vocabulary, or `ConfigError` when it names a smaller one itself."""
    if model.vocab_size is not None and model.vocab_size < vocab_size:
        raise ConfigError(
            f"model.vocab_size={model.vocab_size} is smaller than the tokenizer's {vocab_size} pieces; "
            "leave it null to take the tokenizer's"
        )
    return dataclasses.replace(model, vocab_size=model.vocab_size or vocab_size)


def check_run_directory(directory: Path, config: TrainConfig) -> None:
    """Refuse a run directory that was begun with another configuration."""
    path = directory / "config.yaml"
    if not path.exists():
        return
    before = _flatten(yaml.safe_load(path.read_text(encoding="utf-8")))
    now = _flatten(to_mapping(config))
    before["model.vocab_size"] = now["model.vocab_size"]  # filled in from the tokenizer
    changed = [
        key
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key) and not any(key == c or key.startswith(f"{c}.") for c in CHANGEABLE)
    ]
    if changed:
        shown = ", ".join(f"{key} was {before.get(key)} and is now {now.get(key)}" for key in changed[:4])
        more = f" and {len(changed) - 4} more" if len(changed) > 4 else ""
        raise ConfigError(
            f"{directory} holds a run with another configuration: {shown}{more}; choose another run.name, or remove "
            "the directory"
        )


def _flatten(mapping: dict, place: str = "") -> dict:
    flat: dict[str, object] = {}
    for key, value in mapping.items():
        flat.update(_flatten(value, f"{place}{key}.") if isinstance(value, dict) else {f"{place}{key}": value})
    return flat


def _write_run_directory(directory: Path, config: TrainConfig, prepared: PreparedData) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(prepared.tokenizer_path, directory / "tokenizer.model")
    text = yaml.safe_dump(to_mapping(config), sort_keys=False)
    (directory / "config.yaml").write_text(text, encoding="utf-8")


def _held_out(config: TrainConfig, prepared: PreparedData, world: World) -> HeldOut:
    plan = None
    if prepared.validation and config.run.eval_samples:
        plan = _plan(config, prepared.validation)
    return HeldOut(plan, config.model, world, config.run.eval_samples)


def _open_log(config: TrainConfig, world: World, directory: Path, first_step: int) -> RunLog:
    tracker = None
    if world.is_main:
        tracker = Tracker(
            config.logging.wandb,
            directory,
            project=config.logging.wandb_project,
            group=config.logging.wandb_group,
            name=config.run.name,
            config=to_mapping(config),
        )
    return RunLog(
        directory,
        tracker=tracker,
        total_steps=config.run.steps,
        first_step=first_step,
        progress=config.logging.progress,
    )
