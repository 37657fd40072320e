"""Which checkpoints of a run are kept, as a pure function of their steps and of what the newest says about its health.

A skipped step changes no weights, so a run whose weights are bad goes on saving the same bad weights. A checkpoint is
known to be healthy once a later step trained from it with a finite loss and gradient. `health` in state.json holds
what this needs:

    last_finite_step   the last step up to the checkpoint that was not skipped
    last_calm_step     the last report up to it whose loss had not jumped; only with `run.spike_factor`
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def last_finite_step(state: Mapping[str, Any]) -> int:
    """The last step that was not skipped, from a checkpoint's state.json; its own step where it does not say."""
    return int(state.get("health", {}).get("last_finite_step", state["step"]))


def kept(steps: Sequence[int], keep_last: int, keep_every: int | None, state: Mapping[str, Any]) -> set[int]:
    """Those of `steps` (ascending) whose checkpoints stay, where the newest has the state.json `state`.

    The newest `keep_last` stay, and the multiples of `keep_every`. While steps are skipped, the newest stays beside
    the newest `keep_last` from before: kept([5, 10, 15, 20], 2, None, <10 was the last finite step>) == {5, 10, 20}.
    """
    if not steps:
        return set()
    healthy = [step for step in steps if step <= last_finite_step(state)]
    stay = {*healthy[-keep_last:], steps[-1]}
    if keep_every:
        stay |= {step for step in steps if step % keep_every == 0}
    calm = state.get("health", {}).get("last_calm_step")
    if calm is not None:  # a jump would take the run back to the newest of these
        stay |= set([step for step in steps if step <= calm][-1:])
    return stay


def removable(steps: Sequence[int], keep_last: int, keep_every: int | None, state: Mapping[str, Any]) -> list[int]:
    """Those of the finished `steps` that go anyway once the checkpoint of `state` is finished, oldest first.

    Something must be left if that checkpoint fails: the newest one goes only if skipped steps led to it and an earlier
    one stays.
    """
    later = kept(sorted({*steps, state["step"]}), keep_last, keep_every, state)
    going = [step for step in sorted(steps) if step not in later]
    if going and going[-1] == max(steps) and (going[-1] <= last_finite_step(state) or len(going) == len(steps)):
        going.pop()
    return going
