"""What is due after a step: a table by hand, and whole runs against a plain restatement of the rules."""

import dataclasses
import itertools

import pytest

from train import cadence
from train.cadence import Action
from train.config.sections import CheckpointConfig, RunConfig
from train.distributed.consensus import Decision

REPORT, VALIDATE, PROBE, SAVE = Action.REPORT, Action.VALIDATE, Action.PROBE, Action.SAVE
RUN = RunConfig(steps=100, log_every=10, eval_every=30)
CHECKPOINT = CheckpointConfig(every_steps=20)
NOTHING, STOP, TIMER = Decision(False, False, 0), Decision(True, False, 0), Decision(False, True, 0)


@pytest.mark.parametrize(
    "step, decision, actions, ends",
    [
        (1, NOTHING, [], False),
        (10, NOTHING, [REPORT], False),
        (20, NOTHING, [REPORT, SAVE], False),
        (30, NOTHING, [REPORT, VALIDATE], False),
        (60, NOTHING, [REPORT, SAVE, VALIDATE], False),  # a validation that never ends must not cost the checkpoint
        (100, NOTHING, [REPORT, SAVE, VALIDATE], True),  # the last step: all of them, whatever divides it
        (1, TIMER, [SAVE], False),  # checkpoint.every_minutes
        (10, TIMER, [REPORT, SAVE], False),
        (1, STOP, [REPORT, SAVE], True),
        (30, STOP, [REPORT, SAVE, VALIDATE], True),
        (100, STOP, [REPORT, SAVE, VALIDATE], True),
        (7, Decision(True, True, 3), [REPORT, SAVE], True),
    ],
)
def test_by_hand(step, decision, actions, ends):
    assert cadence.due(step, decision, RUN, CHECKPOINT) == cadence.Due(tuple(actions), ends)


@pytest.mark.parametrize(
    "step, decision, actions",
    [
        (20, NOTHING, [REPORT, SAVE]),
        (25, NOTHING, [PROBE]),
        (50, NOTHING, [REPORT, PROBE]),
        (75, TIMER, [SAVE, PROBE]),
        (100, NOTHING, [REPORT, SAVE, VALIDATE, PROBE]),  # the last step, whatever divides it
        (50, STOP, [REPORT, SAVE]),  # a run that was asked to stop asks no probes
    ],
)
def test_probes(step, decision, actions):
    run = dataclasses.replace(RUN, probe_every=25)
    assert cadence.due(step, decision, run, CHECKPOINT).actions == tuple(actions)


@pytest.mark.parametrize("steps, stop_at_step, last", [(7, None, 7), (7, 3, 3), (7, 7, 7), (7, 9, 7)])
def test_the_last_step_is_the_earlier_of_two(steps, stop_at_step, last):
    assert cadence.last_step(RunConfig(steps=steps, stop_at_step=stop_at_step)) == last


def restated(config: RunConfig, checkpoint: CheckpointConfig, asked: dict[int, str]) -> list[tuple[int, str]]:
    """(step, what happens) over a whole run. `asked`: step -> "stop" or "save"."""
    happened = []
    for step in range(1, config.steps + 1):
        stopping = asked.get(step) == "stop"
        is_last = stopping or step == config.steps or step == config.stop_at_step
        planned_last = step in (config.steps, config.stop_at_step)
        if is_last or step % config.log_every == 0:
            happened.append((step, "report"))
        validation = [(step, "validate")] if planned_last or step % config.eval_every == 0 else []
        on_schedule = checkpoint.every_steps and step % checkpoint.every_steps == 0
        save = [(step, "save")] if is_last or asked.get(step) == "save" or on_schedule else []
        happened += save + validation
        if is_last:
            break
    return happened


@pytest.mark.parametrize("asked", [{}, {3: "save"}, {4: "stop"}, {3: "save", 12: "stop"}, {11: "stop"}], ids=str)
@pytest.mark.parametrize("stop_at_step", [None, 6, 12, 40])
def test_over_whole_runs(asked, stop_at_step):
    names = {REPORT: "report", VALIDATE: "validate", SAVE: "save"}
    for log_every, eval_every, every_steps in itertools.product((1, 2, 5), (1, 3, 50), (1, 4, None)):
        run = RunConfig(steps=12, stop_at_step=stop_at_step, log_every=log_every, eval_every=eval_every)
        checkpoint = CheckpointConfig(every_steps=every_steps)
        happened, step, ends = [], 0, False
        while not ends:
            step += 1
            what = asked.get(step)
            due = cadence.due(step, Decision(what == "stop", what == "save", 0), run, checkpoint)
            happened += [(step, names[action]) for action in due.actions]
            ends = due.ends
        assert happened == restated(run, checkpoint, asked), (log_every, eval_every, every_steps)
