"""What is due after a training step, as a pure function of the step, the ranks' decision and the configuration."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from train.config.sections import CheckpointConfig, RunConfig
from train.distributed.consensus import Decision


class Action(Enum):
    """What a run does between two steps; the values are the words for it."""

    REPORT = "reporting"
    SAVE = "saving a checkpoint"
    VALIDATE = "validating"
    PROBE = "asking probes"


@dataclass(frozen=True)
class Due:
    """`actions`: what to do, in this order. `ends`: train no further step after them."""

    actions: tuple[Action, ...]
    ends: bool


def last_step(run: RunConfig) -> int:
    """The step at which this call of the trainer ends, if nobody asks it to stop earlier."""
    return min(run.steps, run.stop_at_step or run.steps)


def validates(step: int, run: RunConfig) -> bool:
    """Whether a run that is not interrupted validates after `step`."""
    return step == last_step(run) or step % run.eval_every == 0


def due(step: int, decision: Decision, run: RunConfig, checkpoint: CheckpointConfig) -> Due:
    """What is due after `step` (1-based).

    The last step, and one at which the run was asked to stop, is always reported and saved. The save comes before the
    validation: one that is too long, or that fails, must not take the steps since the last checkpoint with it, and a
    scheduler may not wait for it. A run that is started again from there makes up for a validation that is missing.
    Probes come last, and a run that was asked to stop asks none.
    """
    ends = decision.stop or step == last_step(run)
    report = ends or step % run.log_every == 0
    validate = validates(step, run)
    probe = run.probe_every is not None and (step == last_step(run) or step % run.probe_every == 0)
    save = ends or decision.save or (checkpoint.every_steps is not None and step % checkpoint.every_steps == 0)
    order = (
        (report, Action.REPORT),
        (save, Action.SAVE),
        (validate, Action.VALIDATE),
        (probe and not decision.stop, Action.PROBE),
    )
    return Due(tuple(action for is_due, action in order if is_due), ends)
