"""What is due after a training step, as a pure function of the step, the ranks' decision and the configuration."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from train.config.sections import CheckpointConfig, RunConfig
from train.distributed.consensus import Decision


class Action(Enum):
    """What a run does between two steps; the values are the words for it."""

    REPORT = "reporting"
    VALIDATE = "validating"
    PROBE = "asking probes"
    SAVE = "saving a checkpoint"


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

    The last step, and one at which the run was asked to stop, is always reported and saved. Validation comes before
    the save, so that the checkpoint follows everything recorded for its step. If the run was asked to stop, the save
    comes first, because a scheduler may not wait for a validation, and there are no probes.
    """
    ends = decision.stop or step == last_step(run)
    report = ends or step % run.log_every == 0
    validate = validates(step, run)
    probe = run.probe_every is not None and (step == last_step(run) or step % run.probe_every == 0)
    save = ends or decision.save or (checkpoint.every_steps is not None and step % checkpoint.every_steps == 0)
    order = [(report, Action.REPORT), (validate, Action.VALIDATE), (probe, Action.PROBE), (save, Action.SAVE)]
    if decision.stop:
        order = [(report, Action.REPORT), (save, Action.SAVE), (validate, Action.VALIDATE)]
    return Due(tuple(action for is_due, action in order if is_due), ends)
