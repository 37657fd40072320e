import hashlib
import json
import threading

import numpy as np
import pytest

from data_pipeline import DataError, Loader, build_plan
from data_pipeline.packing.samples import index_in_plan


@pytest.fixture(scope="module")
def plan(prepared, tmp_path_factory):
    return build_plan(prepared.train, 512, 8, seed=5, cache_dir=tmp_path_factory.mktemp("plans"))


def make(plan, per_step, rank=0, size=1, **options):
    return Loader(plan, samples_per_step=per_step, dp_rank=rank, dp_size=size, **options)


def read_steps(plan, num_steps, per_step, size, state=None):
    """The global order as `size` ranks see it together, and the state after it."""
    loaders = [make(plan, per_step, rank, size) for rank in range(size)]
    order = []
    for loader in loaders:
        if state is not None:
            loader.load_state(state)
    for _ in range(num_steps):
        parts = [loader.next_step() for loader in loaders]
        order += [parts[rank][j].index for j in range(per_step // size) for rank in range(size)]
    states = [loader.state() for loader in loaders]
    for loader in loaders:
        loader.close()
    assert all(one == states[0] for one in states)
    return order, states[0]


def test_one_rank_reads_each_row_once_per_epoch_in_a_new_order(plan):
    n = plan.num_samples
    assert n > 20
    rows = [index_in_plan(index, n, plan.seed) for index in range(3 * n)]
    epochs = [rows[i * n : (i + 1) * n] for i in range(3)]
    assert all(sorted(epoch) == list(range(n)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] and epochs[0] != sorted(epochs[0])


def test_a_sample_is_that_row_of_the_plan(plan):
    loader = make(plan, 3)
    for step in range(4):
        for j, sample in enumerate(loader.next_step()):
            row = plan.sample(index_in_plan(3 * step + j, plan.num_samples, plan.seed))
            assert sample.index == 3 * step + j
            assert np.array_equal(sample.tokens, row.tokens) and np.array_equal(sample.labels, row.labels)
            assert np.array_equal(sample.doc_starts, row.doc_starts)
    loader.close()


@pytest.mark.parametrize("size, joined", [(1, 2), (1, 3), (2, 3)])
def test_joined_samples_are_the_same_samples_in_one_pack(plan, size, joined):
    together, apart = (make(plan, 6, size - 1, size, joined=count, prefetch=3) for count in (joined, 1))
    for _ in range(3):
        singles = apart.next_step()
        for i, pack in enumerate(together.next_step()):
            parts = singles[i * joined : (i + 1) * joined]
            assert pack.index == parts[0].index
            assert np.array_equal(pack.tokens, np.concatenate([part.tokens for part in parts]))
            assert np.array_equal(pack.labels, np.concatenate([part.labels for part in parts]))
            starts = [start + 512 * j for j, part in enumerate(parts) for start in part.doc_starts]
            assert pack.doc_starts.tolist() == starts and len(pack.doc_lengths) == len(pack.continuation) == len(starts)
        assert together.state() == apart.state()
    together.close(), apart.close()
    with pytest.raises(DataError, match="joined=4"):
        make(plan, 6, joined=4)


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("resumed_size", [1, 2, 4])
def test_resume_at_every_step_keeps_the_global_order(plan, size, resumed_size):
    num_steps = 2 * plan.num_samples // 4 + 2  # beyond two epochs
    expected = list(range(4 * num_steps))
    for stop in range(0, num_steps + 1):
        first, state = read_steps(plan, stop, 4, size)
        state = json.loads(json.dumps(state))
        assert state["fingerprint"] == plan.fingerprint and state["next_sample"] == 4 * stop
        second, _ = read_steps(plan, min(2, num_steps - stop), 4, resumed_size, state)
        assert first + second == expected[: len(first) + len(second)]


def test_the_samples_do_not_depend_on_the_number_of_ranks(plan):
    def digest(size):
        loaders = [make(plan, 4, rank, size, transform=lambda sample: sample.tokens.tobytes()) for rank in range(size)]
        order = hashlib.sha256()
        for _ in range(plan.num_samples // 2 + 1):
            parts = [loader.next_step() for loader in loaders]
            for j in range(4 // size):
                for part in parts:
                    order.update(part[j])
        for loader in loaders:
            loader.close()
        return order.hexdigest()

    assert digest(1) == digest(2) == digest(4)


def test_samples_per_step_may_change_at_a_resume(plan):
    first, state = read_steps(plan, 3, 4, 2)
    second, state = read_steps(plan, 2, 6, 3, state)
    assert first + second == list(range(24)) and state["next_sample"] == 24


def test_state_counts_what_was_returned_not_what_was_read_ahead(plan):
    fetched = threading.Semaphore(0)
    loader = make(plan, 1, prefetch=5, transform=lambda sample: fetched.release() or sample)
    loader.next_step()
    for _ in range(5):
        assert fetched.acquire(timeout=30)
    assert loader.state()["next_sample"] == 1
    assert loader.next_step()[0].index == 1
    loader.close()


def test_load_state_rewinds_and_drops_what_was_read_ahead(plan):
    loader = make(plan, 2)
    start = loader.state()
    first = [sample.index for _ in range(3) for sample in loader.next_step()]
    loader.load_state(start)
    assert [sample.index for _ in range(3) for sample in loader.next_step()] == first == [0, 1, 2, 3, 4, 5]
    loader.close()
    assert loader.state()["next_sample"] == 6
    with pytest.raises(RuntimeError, match="closed Loader"):
        loader.next_step()


def test_far_ahead_is_as_near_as_the_start(plan):
    loader = make(plan, 1)
    loader.load_state({"version": 1, "fingerprint": plan.fingerprint, "next_sample": 10**15})
    assert loader.next_step()[0].index == 10**15
    loader.close()


def test_prefetch_smaller_than_a_step_and_transform_in_one_thread(plan):
    threads = set()

    def note(sample):
        threads.add(threading.current_thread())
        return sample.index

    loader = make(plan, 8, prefetch=1, transform=note)
    assert loader.next_step() + loader.next_step() == list(range(16))
    assert len(threads) == 1 and threading.main_thread() not in threads
    assert loader.wait_seconds > 0
    loader.close()
    assert not next(iter(threads)).is_alive()


def test_a_loader_nobody_holds_ends_its_thread(plan):
    threads = []
    loader = make(plan, 1, transform=lambda sample: threads.append(threading.current_thread()))
    loader.next_step()
    del loader
    threads[0].join(timeout=30)
    assert not threads[0].is_alive()


def test_an_error_in_the_thread_comes_out_of_next_step_as_it_is(plan):
    class Unlucky(Exception):
        pass

    def transform(sample):
        if sample.index == 5:
            raise Unlucky("thirteen")
        return sample.index

    loader = make(plan, 2, transform=transform)
    assert [loader.next_step(), loader.next_step()] == [[0, 1], [2, 3]]
    for _ in range(2):
        with pytest.raises(Unlucky, match="thirteen"):
            loader.next_step()
    assert loader.state()["next_sample"] == 4
    loader.load_state({**loader.state(), "next_sample": 6})
    assert loader.next_step() == [6, 7]
    loader.close()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"samples_per_step": 6, "dp_rank": 0, "dp_size": 4},
            "samples_per_step=6 must be a positive multiple of dp_size=4",
        ),
        ({"samples_per_step": 0, "dp_rank": 0, "dp_size": 1}, "samples_per_step=0 must be a positive multiple"),
        ({"samples_per_step": 4, "dp_rank": 2, "dp_size": 2}, r"dp_rank=2 must be in range\(dp_size=2\)"),
        ({"samples_per_step": 4, "dp_rank": 0, "dp_size": 1, "prefetch": 0}, "prefetch=0 must be at least 1"),
    ],
)
def test_counts_that_do_not_fit(plan, options, message):
    with pytest.raises(DataError, match=message):
        Loader(plan, **options)


def test_states_that_are_not_ours(plan):
    loader = make(plan, 1)
    good = loader.state()
    with pytest.raises(DataError) as error:
        loader.load_state({**good, "fingerprint": "f" * 64})
    assert "f" * 64 in str(error.value) and plan.fingerprint in str(error.value)
    for change in ({"version": 2}, {"next_sample": -1}, {"next_sample": "3"}):
        with pytest.raises(DataError, match="is not a loader state of version 1"):
            loader.load_state({**good, **change})
    with pytest.raises(DataError, match="is not a loader state"):
        loader.load_state({})
    assert loader.next_step()[0].index == 0
    loader.close()
