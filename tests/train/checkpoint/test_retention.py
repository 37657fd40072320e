"""Which checkpoints stay: by hand, and while a run goes bad."""

import pytest

from train.checkpoint.retention import kept, last_finite_step, removable


def state(step, finite=None, calm=None):
    health = {"last_finite_step": finite, "last_calm_step": calm}
    return {"step": step, "health": {key: value for key, value in health.items() if value is not None}}


@pytest.mark.parametrize(
    "steps, keep_last, keep_every, newest, stay",
    [
        ([5], 1, None, state(5, 5), {5}),
        ([5, 10, 15], 1, None, state(15, 15), {15}),
        ([5, 10, 15], 2, None, state(15), {10, 15}),  # written before checkpoints told of their health
        ([5, 10, 15], 5, None, state(15, 15), {5, 10, 15}),
        ([5, 10, 15, 20], 1, 10, state(20, 20), {10, 20}),
        ([5, 10, 15, 20], 2, None, state(20, 10), {5, 10, 20}),  # of the bad ones the newest alone
        ([5, 10, 15, 20], 2, None, state(20, 12), {5, 10, 20}),
        ([5, 10, 15, 20], 1, 15, state(20, 10), {10, 15, 20}),
        ([15, 20], 2, None, state(20, 0), {20}),  # nothing is known to be good
        ([5, 10, 15, 20], 1, None, state(20, 20, calm=12), {10, 20}),
        ([5, 10], 1, None, state(10, 10, calm=0), {10}),
        ([], 2, None, state(5), set()),
    ],
)
def test_by_hand(steps, keep_last, keep_every, newest, stay):
    assert kept(steps, keep_last, keep_every, newest) == stay


def test_a_run_that_goes_bad_keeps_its_good_checkpoints_for_ever():
    held: list[int] = []
    for step in range(5, 500, 5):
        held = sorted(kept([*held, step], 2, None, state(step, min(step, 42))))
    assert held == [35, 40, 495]


def test_what_may_go_before_the_next_is_finished():
    assert removable([5, 10], 2, None, state(15, 15)) == [5]
    assert removable([10], 1, None, state(15, 15)) == []  # the newest never: the one being written may fail
    assert removable([5, 10], 1, None, state(15, 15)) == [5]
    assert removable([5, 10], 1, 5, state(15, 15)) == []
    assert removable([5, 12], 1, 5, state(17, 17)) == []
    assert removable([5, 10, 15], 2, None, state(20, 10)) == [15]  # skipped steps led to it
    assert removable([5, 10, 15, 20], 2, None, state(25, 10)) == [15, 20]
    assert removable([15], 2, None, state(20, 10)) == []
    assert removable([], 2, None, state(5)) == []


def test_a_checkpoint_that_says_nothing_is_healthy():
    assert last_finite_step({"step": 7}) == 7 == last_finite_step({"step": 7, "health": {"recent_losses": []}})
