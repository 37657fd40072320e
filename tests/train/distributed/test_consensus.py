"""A request of any rank is granted on all of them in the same step, with one all-reduce."""

import itertools

import pytest
import torch
import torch.distributed as dist

from tests.ranks import run_on_ranks
from train.distributed import groups
from train.distributed.consensus import Decision, RankConsensus, Requests


def exchange_on_ranks(requests: list[list[Requests]], skipped: list[int], tensor: int):
    """Per step: totals, decision and number of all-reduces. `requests[step][rank]`."""
    world = groups.initialize(groups.ParallelConfig(tensor=tensor), torch.device("cpu"))
    consensus, found, reduced, real = RankConsensus(world), [], [], dist.all_reduce
    dist.all_reduce = lambda *arguments, **options: (reduced.append(1), real(*arguments, **options))[1]
    for asked, skip in zip(requests, skipped):
        counts = torch.tensor([1.0 + world.data_rank, 10.0], dtype=torch.float64)
        totals = consensus.exchange(counts, asked[world.rank])
        consensus.note_skipped(torch.tensor(float(skip)))
        found.append((totals.tolist(), consensus.decision(), len(reduced)))
    dist.all_reduce = real
    groups.shutdown()
    return found


@pytest.mark.parametrize("tensor", [1, 2])
def test_all_ranks_decide_alike(tensor):
    steps = [list(pair) for pair in itertools.product((Requests(), Requests(stop=True), Requests(save=True)), repeat=2)]
    got = run_on_ranks(2, exchange_on_ranks, steps, [0] * len(steps), tensor)
    assert got[0] == got[1]
    # Data-parallel ranks count 1 and 2; tensor-parallel ranks hold the same batches, which count once.
    totals = [3.0, 20.0] if tensor == 1 else [1.0, 10.0]
    for number, (asked, (found, decision, reduced)) in enumerate(zip(steps, got[0]), start=1):
        assert found == totals and reduced == number
        assert decision == Decision(any(a.stop for a in asked), any(a.save for a in asked), 0)


def test_skipped_steps_in_a_row_are_known_one_step_later():
    skipped = [0, 1, 1, 1, 0, 1, 0, 0]
    (got,) = run_on_ranks(1, exchange_on_ranks, [[Requests()]] * 8, skipped, 1)
    assert [decision.bad_steps for _, decision, _ in got] == [0, 0, 1, 2, 3, 0, 1, 0]
