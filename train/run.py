"""A run while it trains: its state and everything that reports, validates and saves it between steps."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable

import torch
import torch.distributed as dist

from data_pipeline import TrainingData
from ksa_model.objectives.distillation import PARTS
from train.build import make_held_out, make_probes
from train.checkpoint import owner
from train.checkpoint.manager import Progress
from train.config import run_directory
from train.config.conversion import to_mapping
from train.config.quoting import override
from train.config.schema import TrainConfig
from train.distributed.consensus import RankConsensus
from train.distributed.groups import World
from train.evaluate.held_out import HeldOut
from train.evaluate.in_loop import InLoopProbes
from train.health import MAX_ROLLBACKS, TrainingDiverged, bad_steps_message, last_finite_step, next_sample
from train.logs import saved, tracker
from train.logs.metrics import METRICS, read_records
from train.logs.profiling import StepProfiler
from train.logs.run_log import RunLog, line_printer
from train.logs.step_sums import StepSums
from train.start import Resume, Start, changes_of_resumed
from train.state import TrainState


class Run:
    """What a run holds while it trains. `Run.open` makes one; it is complete from then on.

    Collective: every rank makes the same calls in the same order.
    """

    def __init__(
        self,
        config: TrainConfig,
        world: World,
        state: TrainState,
        progress: Progress,
        held_out: HeldOut,
        probes: InLoopProbes | None,
        log: RunLog,
        log_line: Callable[[str], None],
    ):
        """`state` is that of a run that has come as far as `progress`; `log_line` takes a line for the user."""
        self.config, self.world, self.state, self.log, self.log_line = config, world, state, log, log_line
        self.directory = config.run.directory
        self.first_step, self.has_trained = progress.step, False
        self.engine, self.loader = state.engine, state.loader
        self.profiler = StepProfiler(config.perf, self.engine.module, world, self.directory)
        self.objective = config.stage.objective()
        self.sums, self.consensus = StepSums(world, progress.tokens), RankConsensus(world)
        self.validation_loss: float | None = None
        self._held_out, self._probes = held_out, probes
        self._saved_at = time.monotonic()
        self._rolled_back_to, self._rollbacks = -1, 0
        self._take_over_health(progress)
        self._step_samples: deque[int] = deque(maxlen=config.run.max_bad_steps + 2)  # first sample of recent steps

    @classmethod
    def open(cls, config: TrainConfig, world: World, data: TrainingData, start: Start) -> Run:
        """Build the run's parts and take over what it starts with.

        The run directory is written only after all checks, so a start that is refused leaves it as it was. Raises one
        of `USER_ERRORS`. Nothing that needs closing is open then: the loaders read from the first step on, and the log
        is opened last.
        """
        log_line, directory = line_printer(world.is_main), config.run.directory
        held_out, probes = make_held_out(config, data, world), make_probes(config, data, world)
        state = TrainState(config, world, data, log_line)
        start = state.verify(start)
        progress = state.begin(start)
        if config.checkpoint.dir is not None:  # below its own directory a run meets no other
            state.checkpoints.claim(directory)
        if world.is_main:
            run_directory.write(directory, config, data)
            owner.note_run_id(directory)
            if not isinstance(start, Resume):
                saved.forget(directory)
            if config.resume == "never":
                tracker.forget_run(directory)
        dist.barrier()
        state.checkpoints.quarantine_after(progress.step)
        if isinstance(start, Resume):
            assert start.state is not None
            changed = changes_of_resumed(config, start.checkpoint, start.state)
            note = f"; changed since: {changed}" if changed else ""
            log_line(f"resumed from {start.checkpoint} at step {progress.step}{note}")
            if (finite := progress.health.get("last_finite_step", progress.step)) < progress.step:
                log_line(
                    f"the steps {finite + 1} to {progress.step} before it were skipped, because the loss or the "
                    "gradient was not finite: if that goes on, its weights are bad"
                )
        else:
            log_line(f"starting {directory} afresh")
        if shortened := _shortened_schedule(config):
            log_line(shortened)
        log = _open_log(config, world, progress.step)
        return cls(config, world, state, progress, held_out, probes, log, log_line)

    def _take_over_health(self, progress: Progress) -> None:
        """Go on from `progress`: the last step that was not skipped, and the last report without a jump, up to it."""
        self._counted_from = progress.step
        self._finite_step = progress.health.get("last_finite_step", progress.step)
        self._calm_step = progress.health.get("last_calm_step", progress.step)

    def tell_progress_to(self, beat: Callable[[], None]) -> None:
        """Call `beat` while steps, validations and waits for data and checkpoints make progress."""
        self.engine.on_backward = self._held_out.on_batch = beat
        self.loader.on_sample = self.state.checkpoints.on_wait = beat
        if self._probes is not None:
            self._probes.on_batch = beat

    # -- before and after a step ---------------------------------------------------------------------------------------

    def skip_samples(self) -> None:
        """Move the loader past the samples that `run.skip_samples` excludes."""
        run, position = self.config.run, self.loader.state()
        following = next_sample(position["next_sample"], run.samples_per_step, run.skip_samples)
        if following != position["next_sample"]:
            self.log_line(f"skipping samples {position['next_sample']} to {following - 1} (run.skip_samples)")
            self.loader.load_state(position | {"next_sample": following})

    def check_bad_steps(self, step: int, bad_steps: int) -> None:
        """Raise `TrainingDiverged` if the `bad_steps` steps before `step` were skipped and these are too many.

        That is one step late by design: whether `step` itself was skipped is known on the device only, and to ask now
        would wait for the device in every step. So a run trains one step beyond its `run.max_bad_steps`-th bad one,
        and bad steps at its very end do not stop it. A checkpoint knows of all of them, the last one included
        (`RankConsensus.skipped_in_a_row`).
        """
        self._step_samples.append(self.loader.state()["next_sample"] - self.config.run.samples_per_step)
        if bad_steps >= self.config.run.max_bad_steps:
            first = list(self._step_samples)[-1 - bad_steps]
            last = self._step_samples[-2] + self.config.run.samples_per_step - 1
            finite = last_finite_step(step - 1, bad_steps, self._counted_from, self._finite_step)
            found = self.state.checkpoints.newest_healthy(finite)
            healthy = None if found is None else override("resume", str(found))
            steps, samples = (step - bad_steps, step - 1), (first, last)
            raise TrainingDiverged(bad_steps_message(steps, samples, healthy, str(self.directory)))

    def report(self, step: int, grad_norm: torch.Tensor | float, lr: float) -> int | None:
        """Record the numbers since the last report.

        Returns the step of the checkpoint that the run was taken back to, if the loss jumped, else None.
        """
        record = self.sums.read()
        record |= {"grad_norm": norm} if math.isfinite(norm := float(grad_norm)) else {}
        if "skipped_steps" in record:
            self.log_line(
                f"step {step}: skipped {record['skipped_steps']} step(s) since the last report, because the loss or "
                "the gradient was not finite"
            )
        if self.objective is not None:
            record |= self.sums.read_parts(self.objective.take(), PARTS)
        self.log.record({"step": step, **record, "lr": lr})
        if "loss" not in record:  # all steps were skipped: nothing is known of the weights
            return None
        if not self.state.spikes.is_spike(record["loss"]):
            self._calm_step = step
            return None
        return self._roll_back(step, record["loss"])

    def _roll_back(self, step: int, loss: float) -> int | None:
        """Load the last checkpoint from before the loss jumped, and go on from there after the samples seen since."""
        checkpoints = self.state.checkpoints
        checkpoints.wait()
        found = checkpoints.choose("auto", before=self._calm_step)
        if found is None:
            self.log_line(
                f"step {step}: the loss jumped to {loss:.4g}, but there is no checkpoint from before that; continuing"
            )
            return None
        position = self.loader.state()
        progress = self.state.load(found)
        self._rollbacks = self._rollbacks + 1 if self._rolled_back_to == progress.step else 1
        self._rolled_back_to = progress.step
        if self._rollbacks > MAX_ROLLBACKS:
            raise TrainingDiverged(
                f"the loss jumped {self._rollbacks} times after step {progress.step}, each time with other samples, "
                f"the last time to {loss:.4g} at step {step}; raise run.spike_factor={self.config.run.spike_factor}, "
                f"or lower optim.lr in another run: {override('resume', str(found))} run.name=NEW"
            )
        samples = f"{progress.loader['next_sample']} to {position['next_sample'] - 1}"
        self.loader.load_state(position)
        checkpoints.quarantine_after(progress.step)
        self.sums, self.consensus = StepSums(self.world, progress.tokens), RankConsensus(self.world)
        self.log.rewind(progress.step)
        self.log_line(
            f"step {step}: the loss jumped to {loss:.4g}: back to {found}, continuing without samples {samples}"
        )
        self._take_over_health(progress)
        return progress.step

    # -- validation and checkpoints ------------------------------------------------------------------------------------

    def evaluate(self, step: int) -> None:
        """Record the loss on the held-out documents after `step`."""
        with self.sums.clock_stopped():
            self.engine.anneal(self.config.stage.summary_projection_weight(step, self.config.run.steps))
            self.engine.refresh_norm_gain_flags()  # they drift apart slowly
            self.validation_loss = self._held_out.loss(self.engine)
            if self.validation_loss is not None and not math.isfinite(self.validation_loss):
                self.log_line(f"step {step}: the loss on the held-out documents is not finite")
                self.validation_loss = None
            if self.validation_loss is not None:
                self.log.record({"step": step, "tokens": self.sums.tokens, "validation_loss": self.validation_loss})

    def probe(self, step: int) -> None:
        """Record how much the model recalls after `step`."""
        assert self._probes is not None  # `cadence.due` asks for probes only where run.probe_every is set
        with self.sums.clock_stopped():
            self.engine.anneal(self.config.stage.summary_projection_weight(step, self.config.run.steps))
            self.log.record({"step": step, "tokens": self.sums.tokens, **self._probes.score(self.engine)})

    def evaluate_if_missing(self, step: int) -> None:
        """Validate if the run was ended between saving `step` and validating it; else take the recorded loss."""
        recorded: list[float | None] = [None]
        if self.world.is_main:
            records = read_records(self.directory / METRICS)
            found = [r["validation_loss"] for r in records if r["step"] == step and "validation_loss" in r]
            recorded = found[:1] or [None]
        dist.broadcast_object_list(recorded, src=0)
        self.validation_loss = recorded[0]
        if self.validation_loss is None:
            self.evaluate(step)

    @property
    def save_is_due(self) -> bool:
        """Whether `checkpoint.every_minutes` has passed on this rank; the ranks agree on it in the next step."""
        minutes = self.config.checkpoint.every_minutes
        return minutes is not None and time.monotonic() - self._saved_at >= 60 * minutes

    def save(self, step: int, last: bool) -> None:
        """Begin to save; wait for it if it is the `last` one."""
        with self.sums.clock_stopped():
            tokens = self.sums.tokens
            seconds = self.state.save(step, tokens, last, self._health(step))
            self.log.record({"step": step, "tokens": tokens, "checkpoint_seconds": round(seconds, 4)})
        self._saved_at = time.monotonic()

    def _health(self, step: int) -> dict[str, int]:
        """Health facts of the checkpoint of `step`; see `train.checkpoint.retention`."""
        skipped = self.consensus.skipped_in_a_row()
        health = {"last_finite_step": last_finite_step(step, skipped, self._counted_from, self._finite_step)}
        return health | ({} if self.config.run.spike_factor is None else {"last_calm_step": self._calm_step})

    def close(self) -> None:
        """End the run's threads and files; a save in flight is given time to finish."""
        self.profiler.close()
        self.loader.close()
        self.state.checkpoints.close()
        self.log.close()


def _shortened_schedule(config: TrainConfig) -> str:
    """A log line about a schedule that does not fit into the run; empty where it fits."""
    optim, steps = config.optim, config.run.steps
    fitted = optim.fitted(steps)
    if fitted == optim:
        return ""
    asked, got = f"optim.warmup_steps={optim.warmup_steps}", f"{fitted.warmup_steps}"
    if optim.schedule == "wsd" and optim.decay_steps:
        asked, got = f"{asked} and optim.decay_steps={optim.decay_steps}", f"{got} and {fitted.decay_steps}"
    return f"{asked} do not fit into run.steps={steps}: this run warms up and decays over {got} steps"


def _open_log(config: TrainConfig, world: World, first_step: int) -> RunLog:
    directory, wandb = config.run.directory, None
    if world.is_main:
        wandb = tracker.Tracker(config.logging, directory, name=config.run.name, config=to_mapping(config))
    return RunLog(
        directory,
        tracker=wandb,
        total_steps=config.run.steps,
        first_step=first_step,
        progress=config.logging.progress,
    )
