"""The training loop. `train` sets a run up and drives it, `train_step` is one optimizer step."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

import data_pipeline
from data_pipeline import DataError, TrainingData
from data_pipeline.errors import StoreError
from ksa_model.layers import delta
from ksa_model.model import Objective
from ksa_model.ops import fp8
from train import cadence
from train.batches import Batch
from train.build import compute_dtype, with_vocabulary
from train.cadence import Action
from train.checkpoint import probe
from train.checkpoint.storage import CheckpointError
from train.config import run_directory
from train.config.errors import ConfigError, RunError
from train.config.one_start import only_one
from train.config.schema import USER_ERRORS, TrainConfig, validate
from train.distributed import environment, groups, same_start
from train.distributed.consensus import NO_REQUESTS, Decision, RankConsensus, Requests
from train.distributed.engine import Engine
from train.distributed.groups import World
from train.distributed.signals import StopRequest
from train.distributed.watchdog import Watchdog
from train.health import bad_norm, not_finite
from train.hf import tokenizers
from train.logs.run_log import line_printer
from train.logs.step_sums import StepSums, count
from train.run import Run
from train.start import Start, checkpoint_directory, choose_start, tokenizer_of, with_tokenizer


@dataclass(frozen=True)
class RunResult:
    """How far a run is when `train` returns."""

    directory: Path
    step: int
    tokens: int
    validation_loss: float | None
    seconds: float  # of this call, data preparation included
    interrupted: bool  # ended early on request, with steps left
    trained: bool = False  # whether this call trained a step


def train(config: TrainConfig) -> RunResult:
    """Prepare the data, build the model, resume if there is a checkpoint, train, and leave a run directory behind.

    Raises one of `USER_ERRORS` if the run cannot start. Once it trains, what it cannot read or write any more is a
    `RunError` or a `SaveError`, and `TrainingDiverged` says that it cannot go on.
    """
    began = time.perf_counter()
    _, world_size, _ = environment.environment_world()
    validate(config, world_size)
    environment.check()
    with StopRequest(config.run.max_minutes) as request, contextlib.ExitStack() as held:
        ranks = groups.rendezvous(config.parallel, line_printer(environment.is_first_of_host()))
        same_start.check_settings(ranks, config)
        with ranks.failing_together():
            device = groups.pick_device(config.run.device)
            _check_device(config, device)
            run_directory.check(config.run.directory, config)
            if ranks.is_main:
                key = f"run.root={config.run.root} and run.name={config.run.name}"
                held.enter_context(only_one(config.run.directory, key, line_printer(True)))
        start = choose_start(config, ranks)
        with ranks.failing_together():
            owned = tokenizer_of(config, start)
            chosen = with_tokenizer(config, owned)
        if owned is not None and chosen is not config:
            line_printer(ranks.is_main)(f"data.tokenizer={chosen.data.tokenizer}: the tokenizer of {owned.owner}")
        config = chosen
        own = checkpoint_directory(config)
        probe.check_writable(config, own, ranks)
        with ranks.failing_together():
            shared = config.checkpoint.dir is not None and own.is_local
            # A lock of the same file is not taken twice: the system drops both with the first.
            if ranks.is_main and shared and Path(own.path).absolute() != config.run.directory.absolute():
                key = f"checkpoint.dir={config.checkpoint.dir}"
                held.enter_context(only_one(Path(own.path), key, line_printer(True)))
            data = data_pipeline.open_data(config.data, progress=ranks.is_main and config.logging.progress)
            if owned is not None:
                tokenizers.check(owned, data.tokenizer_path, f"the tokenizer of the data, {data.tokenizer_path},")
            config = dataclasses.replace(config, model=with_vocabulary(config.model, data.vocab_size))
        same_start.check_data(ranks, data.fingerprint)
        world = groups.initialize(config.parallel, device, ranks)
        try:
            return _train(config, world, data, start, request, began)
        finally:
            groups.shutdown()


def _check_device(config: TrainConfig, device: torch.device) -> None:
    """Raise one of `USER_ERRORS` where `device` cannot compute what `config` asks for."""
    if config.model.attention_backend == "fused" and device.type != "cuda":
        raise ConfigError("model.attention_backend=fused needs a CUDA device; here it is the CPU: use auto")
    delta.check_device(config.model, device, compute_dtype(config))
    if config.perf.precision == "fp8":
        fp8.check_device(device)


def _train(
    config: TrainConfig, world: World, data: TrainingData, start: Start, request: StopRequest, began: float
) -> RunResult:
    """`train`, once the process groups are there."""
    run = Run.open(config, world, data, start)
    optim = config.optim.fitted(config.run.steps)
    step, last_step, stopped = run.first_step, cadence.last_step(config.run), False
    if step >= last_step:
        run.log_line(f"{run.directory} is at step {step} already: nothing to train")
    try:
        limit = 60 * config.parallel.timeout_minutes
        with _failing_as_started(run), Watchdog(world.store, world.rank, world.size, limit) as watch:
            run.tell_progress_to(watch.beat)
            if step and cadence.validates(step, config.run):
                watch.progress(step, Action.VALIDATE.value)
                run.evaluate_if_missing(step)
            request.begin_steps()
            while step < last_step and not stopped:
                run.skip_samples()
                step += 1
                with run.profiler.step():
                    watch.progress(step, "waiting for data")
                    with run.profiler.range("data"):
                        batches = [batch.to(world.device) for batch in run.loader.next_step()]
                    watch.progress(step, "training")
                    lr = optim.lr_at(step - 1, config.run.steps)
                    requests = Requests(stop=request.is_due, save=run.save_is_due)
                    run.engine.anneal(config.stage.summary_projection_weight(step - 1, config.run.steps))
                    grad_norm = train_step(
                        run.engine, batches, world, run.sums, run.consensus, lr, run.objective, requests
                    )
                run.has_trained = True
                decision = run.consensus.decision()
                run.check_bad_steps(step, decision.bad_steps)
                run.log.advance()
                step = _do_what_is_due(run, step, grad_norm, lr, decision, watch)
                stopped = decision.stop
        if stopped:
            reason = request.reason or "by another rank"
            run.log_line(f"asked to stop ({reason}): saved step {step}; start again to continue")
    finally:
        run.close()
    seconds, interrupted = time.perf_counter() - began, stopped and step < config.run.steps
    return RunResult(
        run.directory, step, run.sums.tokens, run.validation_loss, seconds, interrupted, trained=run.has_trained
    )


@contextmanager
def _failing_as_started(run: Run) -> Iterator[None]:
    """Turn `USER_ERRORS` of a run that trains into `RunError`: starting it again may help, and a launcher does so.

    Before the first step they stay what they are, except for a store that does not answer. A run that was resumed has
    read its data and its checkpoints before.
    """
    try:
        yield
    except USER_ERRORS as error:
        was_readable = run.first_step and isinstance(error, (DataError, CheckpointError))
        if not (run.has_trained or was_readable or isinstance(error, StoreError)):
            raise
        raise RunError(
            f"rank {run.world.rank}: {error}; the same command goes on from the newest checkpoint of {run.directory}"
        ) from error


def _do_what_is_due(
    run: Run, step: int, grad_norm: torch.Tensor | float, lr: float, decision: Decision, watch: Watchdog
) -> int:
    """Report, save, validate and probe after `step` as `cadence.due` says; returns the step to go on from.

    That is an earlier step if the loss jumped and the run went back to a checkpoint. Nothing else is due then: the
    checkpoint is there already, also for a run that was asked to stop.
    """
    due = cadence.due(step, decision, run.config.run, run.config.checkpoint)
    for action in due.actions:
        if action is Action.REPORT:
            earlier = run.report(step, grad_norm, lr)
            if earlier is not None:
                return earlier
            continue
        watch.progress(step, action.value)
        if action is Action.VALIDATE:
            run.evaluate(step)
        elif action is Action.PROBE:
            run.probe(step)
        else:
            run.save(step, last=due.ends)
    return step


def train_step(
    engine: Engine,
    batches: list[Batch],
    world: World,
    sums: StepSums,
    consensus: RankConsensus,
    lr: float,
    objective: Objective | None = None,
    requests: Requests = NO_REQUESTS,
) -> torch.Tensor | float:
    """One optimizer step over this rank's micro-batches; returns the global gradient norm before clipping.

    `objective` replaces the language-model loss. `requests` are this rank's; `consensus.decision` afterwards tells
    what all ranks decided.

    The loss is the sum over all ranks' valid tokens divided once by their number, so ranks and micro-batches with few
    labels, or none, weigh exactly what they hold. A step whose loss or gradient is not finite changes nothing, on all
    ranks alike.
    """
    # Count the labels of all ranks. The engine averages gradients over data x context ranks; `scale` turns that
    # average into the gradient of the mean over tokens.
    counts = consensus.exchange(count(batches), requests)
    scale = (world.data_context_group.size() / counts[0].clamp(min=1)).float()
    # Forward and backward.
    loss_sum = torch.zeros((), dtype=torch.float32, device=world.device)
    for batch in batches:
        loss = engine(batch.tokens, batch.labels, batch.layout, objective)
        engine.backward(loss * scale)
        loss_sum += loss.detach()
    # Update, unless the loss of any rank is not finite.
    bad_loss = not_finite(loss_sum)
    dist.all_reduce(bad_loss, op=dist.ReduceOp.MAX)
    grad_norm = engine.step(lr, skip=bad_loss)
    # Add up what the next report shows.
    skipped = torch.maximum(bad_loss, bad_norm(grad_norm, world.device))
    sums.add(loss_sum, counts, skipped)
    consensus.note_skipped(skipped)
    return grad_norm
