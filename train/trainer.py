"""The training loop. `train` sets a run up and drives it, `train_step` is one optimizer step."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import data_pipeline
from data_pipeline import Loader, TrainingData
from ksa_model import delta, fp8
from ksa_model.collectives import ContextParallel
from ksa_model.config import ModelConfig
from ksa_model.distillation import PARTS
from ksa_model.model import Decoder, Objective
from ksa_model.tensor_parallel import TensorParallel
from train import checkpoint, import_hf, parallel, run_directory, stages
from train.batches import Batch, batch_maker
from train.checkpoint import CheckpointError, Checkpoints, Place, Progress
from train.config import ConfigError, TrainConfig, flatten, to_mapping, validate
from train.engine import Engine
from train.evaluate import HeldOut
from train.health import MAX_ROLLBACKS, BadSteps, SpikeDetector, bad_norm, bad_steps_message, next_sample, not_finite
from train.metrics import Agreed, RunLog, StepSums, Tracker, read_records
from train.parallel import World
from train.profiling import StepProfiler
from train.signals import StopRequest
from train.watchdog import Watchdog


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
    if config.model.attention_backend == "fused" and device.type != "cuda":
        raise ConfigError("model.attention_backend=fused needs a CUDA device; here it is the CPU: use auto")
    delta.check_device(config.model, device, _dtype(config))
    if config.perf.precision == "fp8":
        fp8.check_device(device)
    directory = Path(config.run.root) / config.run.name
    run_directory.check(directory, config)
    # A wrong path must not wait for the data.
    own = checkpoint.own_directory(directory, config.checkpoint.dir, config.run.name)
    if checkpoint.find(config.resume, own) is None:
        _find_inherited(config)
        import_hf.check(config)
    with StopRequest(config.run.max_minutes) as request:
        data = data_pipeline.open_data(config.data, progress=rank == 0 and config.logging.progress)
        config = dataclasses.replace(config, model=with_vocabulary(config.model, data.vocab_size))
        world = parallel.initialize(config.parallel, device)
        try:
            return _train(config, world, data, directory, request, began)
        finally:
            parallel.shutdown()


def _train(
    config: TrainConfig,
    world: World,
    data: TrainingData,
    directory: Path,
    request: StopRequest,
    began: float,
) -> RunResult:
    """`train` once the world stands."""
    run = _Run(config, world, data, directory)
    step, last_step = run.resume(), min(config.run.steps, config.run.stop_at_step or config.run.steps)
    stopping = False
    if step >= last_step:
        run.log.say(f"{directory} is at step {step} already: nothing to train")
    try:
        if step and (step == last_step or step % config.run.eval_every == 0):
            run.evaluate_if_missing(step)
        patience = 60 * config.parallel.timeout_minutes
        with Watchdog(world.store, world.rank, world.size, patience) as watch:
            request.begin_steps()
            while step < last_step and not stopping:
                run.skip_samples()
                step += 1
                with run.profiler.step():
                    watch.progress(step, "waiting for data")
                    with run.profiler.range("data"):
                        batches = [batch.to(world.device) for batch in run.loader.next_step()]
                    watch.progress(step, "training")
                    lr = config.optim.lr_at(step - 1, config.run.steps)
                    wishes = dict(stop=request.is_due, save=run.save_is_due)
                    run.engine.anneal(config.stage.own_share(step - 1, config.run.steps))
                    grad_norm = train_step(run.engine, batches, world, run.sums, lr, objective=run.objective, **wishes)
                agreed = run.sums.agreed()
                run.check_bad_steps(step, agreed)
                stopping = agreed.stop
                ending = stopping or step == last_step
                run.log.advance()
                if ending or step % config.run.log_every == 0:
                    back = run.report(step, grad_norm, lr)
                    if back is not None:  # its checkpoint is there, so that a stop needs no other
                        step = back
                        continue
                evaluating = step == last_step or step % config.run.eval_every == 0
                if evaluating and not stopping:
                    watch.progress(step, "validating")
                    run.evaluate(step)
                if ending or agreed.save or _divides(config.checkpoint.every_steps, step):
                    watch.progress(step, "saving a checkpoint")
                    run.save(step, last=ending, waiting=partial(watch.progress, step, "saving a checkpoint"))
                if evaluating and stopping:  # whoever asked to stop may not wait: the checkpoint comes first
                    watch.progress(step, "validating")
                    run.evaluate(step)
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


def _divides(every: int | None, step: int) -> bool:
    return every is not None and step % every == 0


def train_step(
    engine: Engine,
    batches: list[Batch],
    world: World,
    sums: StepSums,
    lr: float,
    *,
    objective: Objective | None = None,
    stop: bool = False,
    save: bool = False,
) -> torch.Tensor | float:
    """One optimizer step over this rank's micro-batches; returns the global gradient norm before clipping.

    `objective` replaces the language-model loss.

    `stop`, `save`: this rank was asked to end the run, or finds that a checkpoint is due; all ranks then learn it from
    `StepSums.agreed`.

    The loss is the sum over all ranks' valid tokens divided once by their number, so ranks and micro-batches with few
    labels, or none, weigh exactly what they hold. A step whose loss or gradient is not finite changes nothing, on all
    ranks alike.
    """
    counts = sums.count(batches, stop, save)
    # The engine averages gradients over data x context ranks; the factor turns that mean into a sum over tokens' mean.
    scale = (world.data_context_group.size() / counts[0].clamp(min=1)).float()
    loss_sum = torch.zeros((), dtype=torch.float32, device=world.device)
    for batch in batches:
        loss = engine(batch.tokens, batch.labels, batch.layout, objective)
        engine.backward(loss * scale)
        loss_sum += loss.detach()
    bad_loss = not_finite(loss_sum)
    dist.all_reduce(bad_loss, op=dist.ReduceOp.MAX)
    grad_norm = engine.step(lr, skip=bad_loss)
    sums.add(loss_sum, counts, skipped=torch.maximum(bad_loss, bad_norm(grad_norm, world.device)))
    return grad_norm


class _Run:
    """What a run holds while it trains, and what it does between steps."""

    def __init__(self, config: TrainConfig, world: World, data: TrainingData, directory: Path):
        self.config, self.world, self.data, self.directory = config, world, data, directory
        self.loader = make_loader(config, data, world)
        self.held_out = _held_out(config, data, world)
        self.engine = build_engine(config, world)
        self.profiler = StepProfiler(config.perf, self.engine.module, world, directory)
        self.objective = config.stage.objective()
        self.validation_loss: float | None = None
        self.tokenizer_sha256 = hashlib.sha256(Path(data.tokenizer_path).read_bytes()).hexdigest()
        self.spikes = SpikeDetector(config.run.spike_factor)
        self._saved_at, self._saved_step = time.monotonic(), -1
        self._healthy_step, self._rolled_back_to, self._rollbacks = 0, -1, 0
        self._step_samples: deque[int] = deque(maxlen=config.run.max_bad_steps + 2)  # first sample of recent steps

    def resume(self) -> int:
        """Load the checkpoint the configuration asks for, open the log, and return the step to go on from."""
        progress = Progress(step=0, tokens=0, loader=self.loader.state())
        self._sayings: list[str] = []
        config = self.config
        self.checkpoints = Checkpoints(
            checkpoint.own_directory(self.directory, config.checkpoint.dir, config.run.name),
            self.engine,
            self.world,
            config.checkpoint,
            say=self._say,
        )
        found = self.checkpoints.choose(config.resume)
        if found is not None:
            progress = self._load(found)
        elif (inherited := _find_inherited(config)) is not None:
            self._inherit(inherited)
            progress = Progress(step=0, tokens=0, loader=self.loader.state())
        elif config.init_from is not None:
            self._say(import_hf.initialise(self.engine, self.world, config))
        if self.world.is_main:  # what is refused above leaves the directory as it was
            run_directory.write(self.directory, config, self.data)
        dist.barrier()
        self._healthy_step = progress.step
        self.checkpoints.abandon_after(progress.step)
        self.sums = StepSums(self.world, progress.tokens)
        self.log = _open_log(config, self.world, self.directory, progress.step)
        for text in self._sayings:
            self.log.say(text)
        self.log.say(f"resumed from {found} at step {progress.step}" if found else f"starting {self.directory} afresh")
        return progress.step

    def _load(self, found: Place) -> Progress:
        state = checkpoint.read_state(found)
        self._check_tokenizer(found, state)
        self._check_share(found, state)
        progress, _ = self.checkpoints.load(found, self.config.run.seed)
        self.loader.load_state(progress.loader)
        self.spikes = SpikeDetector(self.config.run.spike_factor, progress.health.get("recent_losses", ()))
        return progress

    def _check_tokenizer(self, found: Place, state: dict[str, Any]) -> None:
        tokenizer = state.get("tokenizer_sha256")
        if tokenizer not in (None, self.tokenizer_sha256):
            raise CheckpointError(
                f"{found} was trained with the tokenizer of sha256 {tokenizer[:12]}, this run has "
                f"{self.tokenizer_sha256[:12]}: give the tokenizer.model of that run as data.tokenizer"
            )

    def _check_share(self, found: Place, state: dict[str, Any]) -> None:
        """What is annealed away is in no checkpoint, and a longer run would bring it back with fresh weights."""
        steps, model = self.config.run.steps, self.config.model
        share = self.config.stage.own_share(state["step"], steps)
        if model.independent_qkv and model.has_summaries and share > 0 and state.get("own_share", 1.0) == 0:
            raise CheckpointError(
                f"{found} has no summary projections any more, annealed away at step {state['step']}, and with "
                f"run.steps={steps} they would have a share of {share:.2f} again: go on in another run with "
                f"stage=extend model.independent_qkv=false init_from={self.directory}"
            )

    def _inherit(self, found: Place) -> None:
        """Begin with another run's weights; where the data are the same, with those that it has not seen."""
        stage, state = self.config.stage, checkpoint.read_state(found)
        self._check_tokenizer(found, state)
        if stage.inherits_moments:
            self.checkpoints.inherit(found)
        else:
            self.checkpoints.verify(found)
            self._say(import_hf.initialise(self.engine, self.world, self.config, found))
        self._say(stages.what_is_inherited(stage, str(found), state, flatten(to_mapping(self.config))))
        if state.get("loader", {}).get("fingerprint") == self.loader.state()["fingerprint"]:
            self.loader.load_state(state["loader"])
            self._say(f"the data are the same: going on at sample {state['loader']['next_sample']}")

    def _say(self, text: str) -> None:
        """To the log, which opens once it is known where the run goes on."""
        if hasattr(self, "log"):
            self.log.say(text)
        else:
            self._sayings.append(text)

    def skip_samples(self) -> None:
        """Pass over samples that the configuration excludes."""
        run, state = self.config.run, self.loader.state()
        position = next_sample(state["next_sample"], run.samples_per_step, run.skip_samples)
        if position != state["next_sample"]:
            self.log.say(f"skipping samples {state['next_sample']} to {position - 1}, as run.skip_samples says")
            self.loader.load_state(state | {"next_sample": position})

    def check_bad_steps(self, step: int, agreed: Agreed) -> None:
        """Stop after too many skipped steps in a row. They end with the step before `step`."""
        self._step_samples.append(self.loader.state()["next_sample"] - self.config.run.samples_per_step)
        if agreed.bad_steps >= self.config.run.max_bad_steps:
            first = list(self._step_samples)[-1 - agreed.bad_steps]
            last = self._step_samples[-2] + self.config.run.samples_per_step - 1
            raise BadSteps(bad_steps_message(step - agreed.bad_steps, step - 1, first, last, str(self.directory)))

    def report(self, step: int, grad_norm: torch.Tensor | float, lr: float) -> int | None:
        """Record the numbers since the last report; the step to go on from instead, if the loss jumped."""
        record = self.sums.read()
        record |= {"grad_norm": norm} if math.isfinite(norm := float(grad_norm)) else {}
        if "skipped_steps" in record:
            self.log.say(
                f"step {step}: skipped {record['skipped_steps']} step(s) since the last report, loss or gradient was "
                "not finite"
            )
        if self.objective is not None:
            record |= self.sums.read_parts(self.objective.take(), PARTS)
        self.log.record({"step": step, **record, "lr": lr})
        if "loss" not in record or not self.spikes.sees(record["loss"]):
            self._healthy_step = step
            return None
        return self._roll_back(step, record["loss"])

    def _roll_back(self, step: int, loss: float) -> int | None:
        """Load the last checkpoint from before the loss jumped, and go on from there behind the samples seen since."""
        self.checkpoints.wait()
        found = self.checkpoints.choose("auto", before=self._healthy_step)
        if found is None:
            self.log.say(
                f"step {step}: the loss jumped to {loss:.4g}, but there is no checkpoint from before; going on"
            )
            return None
        position = self.loader.state()
        progress = self._load(found)
        self._rollbacks = self._rollbacks + 1 if self._rolled_back_to == progress.step else 1
        self._rolled_back_to = progress.step
        if self._rollbacks > MAX_ROLLBACKS:
            raise BadSteps(
                f"the loss jumped {self._rollbacks} times after step {progress.step}, each time with other samples, "
                f"the last to {loss:.4g} at step {step}; raise run.spike_factor="
                f"{self.config.run.spike_factor}, or lower optim.lr in another run: resume={self.directory} "
                "run.name=NEW"
            )
        samples = f"{progress.loader['next_sample']} to {position['next_sample'] - 1}"
        self.loader.load_state(position)
        self.checkpoints.abandon_after(progress.step)
        self.sums = StepSums(self.world, progress.tokens)
        self.log.rewind(progress.step)
        self.log.say(f"step {step}: the loss jumped to {loss:.4g}: back to {found}, going on without samples {samples}")
        self._healthy_step, self._saved_step = progress.step, -1
        return progress.step

    def evaluate(self, step: int) -> None:
        with self.sums.clock_stopped():
            self.engine.anneal(self.config.stage.own_share(step, self.config.run.steps))
            self.engine.look_at_gains()  # they drift apart slowly
            self.validation_loss = self.held_out.loss(self.engine)
            if self.validation_loss is not None:
                self.log.record({"step": step, "tokens": self.sums.tokens, "validation_loss": self.validation_loss})

    def evaluate_if_missing(self, step: int) -> None:
        """Where the run was ended between the save of `step` and its validation, make up for it."""
        recorded = [None]
        if self.world.is_main:
            records = read_records(self.directory / "metrics.jsonl")
            recorded = [r["validation_loss"] for r in records if r["step"] == step and "validation_loss" in r][:1]
        recorded = recorded or [None]
        dist.broadcast_object_list(recorded, src=0)
        self.validation_loss = recorded[0]
        if self.validation_loss is None:
            self.evaluate(step)

    @property
    def save_is_due(self) -> bool:
        """Whether this rank's clock says so; the ranks agree on it in the next step."""
        minutes = self.config.checkpoint.every_minutes
        return minutes is not None and time.monotonic() - self._saved_at >= 60 * minutes

    def save(self, step: int, last: bool, waiting: Callable[[], None]) -> None:
        """Begin to save; the `last` one is waited for. `waiting` is called now and then meanwhile."""
        self.checkpoints.waiting = waiting
        if step == self._saved_step and (not last or self.checkpoints.wait() is None):
            return
        with self.sums.clock_stopped():
            share = self.config.stage.own_share(step, self.config.run.steps)
            model = dataclasses.replace(
                self.config.model, independent_qkv=self.config.model.independent_qkv and share > 0
            )
            facts = {
                "config": to_mapping(dataclasses.replace(self.config, model=model)),
                "own_share": share,
                "data_fingerprint": self.data.fingerprint,
                "tokenizer_sha256": self.tokenizer_sha256,
            }
            health = {"recent_losses": self.spikes.recent}
            progress = Progress(step, self.sums.tokens, self.loader.state(), health)
            save = self.checkpoints.save_last if last else self.checkpoints.save
            seconds = round(save(progress, facts, partial(stages.is_dropped, own_share=share)), 4)
            self.log.record({"step": step, "tokens": progress.tokens, "checkpoint_seconds": seconds})
        self._saved_at, self._saved_step = time.monotonic(), step

    def close(self) -> None:
        self.profiler.close()
        self.loader.close()
        self.checkpoints.close()
        self.log.close()


# -- parts of a run ---------------------------------------------------------------------------------------------------


def _dtype(config: TrainConfig) -> torch.dtype:
    """Of the weights that compute."""
    return torch.bfloat16 if config.run.precision == "bf16" else torch.float32


def build_engine(config: TrainConfig, world: World) -> Engine:
    """The model, initialised from the seed alike on every layout, under its engine."""
    torch.manual_seed(config.run.seed)
    tp = TensorParallel(world.tensor_group, config.parallel.sequence, _dtype(config))
    in_fp8 = config.perf.precision == "fp8"
    model = Decoder(config.model, tp, ContextParallel(world.context_group), config.memory, in_fp8)
    return Engine(
        model,
        config.optim,
        config.parallel,
        world,
        precision=config.run.precision,
        micro_batches=config.micro_batches(world.data_size),
        trains=config.stage.trains,
    )


def make_loader(config: TrainConfig, data: TrainingData, world: World) -> Loader:
    return Loader(
        data.samples("train", config.seq_len, config.alignment),
        samples_per_step=config.run.samples_per_step,
        dp_rank=world.data_rank,
        dp_size=world.data_size,
        prefetch=config.data.prefetch_samples,
        joined=config.run.samples_per_micro_batch,
        transform=batch_maker(config.model, world.context_group.rank(), world.context_group.size()),
    )


def with_vocabulary(model: ModelConfig, vocab_size: int) -> ModelConfig:
    """`model` with the tokenizer's vocabulary, or `ConfigError` when it names a smaller one itself."""
    if model.vocab_size is not None and model.vocab_size < vocab_size:
        raise ConfigError(
            f"model.vocab_size={model.vocab_size} is smaller than the tokenizer's {vocab_size} pieces; "
            "leave it null to take the tokenizer's"
        )
    return dataclasses.replace(model, vocab_size=model.vocab_size or vocab_size)


def _find_inherited(config: TrainConfig) -> Place | None:
    """The run's checkpoint that `init_from` means, if it suits the model; not verified."""
    if config.init_from is None or config.init_from.startswith(import_hf.HF_PREFIX):
        return None
    found = checkpoint.find(config.init_from, "", key="init_from")
    assert found is not None
    before = checkpoint.read_state(found).get("config", {}).get("model", {})
    stages.check_inherited(config.stage, config.model, str(found), before)
    return found


def _held_out(config: TrainConfig, data: TrainingData, world: World) -> HeldOut:
    samples = data.samples("validation", config.seq_len, config.alignment) if config.run.eval_samples else None
    return HeldOut(samples, config.model, world, config.run.eval_samples)


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
