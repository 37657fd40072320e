"""What begins and ends a job under NCCL, as far as ranks without GPUs can show it."""

import functools
import threading
import warnings
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from tests.ranks import run_on_ranks
from train.distributed import groups


def end_twice(hangs: bool, leaves: bool):
    """Two jobs one after the other, each closed as NCCL's groups are; the abort of gloo groups is a plain destroy.
    `leaves`: the last rank fails and never comes to the end of the first."""
    torch.cuda.synchronize, torch.cuda.current_device, torch.cuda.set_device = lambda: None, lambda: 0, lambda _: None
    abort = threading.Event().wait if hangs else dist.destroy_process_group
    dist.distributed_c10d._abort_process_group = abort
    groups.SHUTDOWN_WAIT = timedelta(seconds=2)
    waits, said, wait = [], [], dist.PrefixStore.wait
    dist.PrefixStore.wait = lambda store, keys, patience: (waits.append((keys, patience)), wait(store, keys, patience))
    for _ in range(2):
        world = groups.initialize(groups.ParallelConfig(context=2), torch.device("cpu"))
        total = torch.ones(1)
        dist.all_reduce(total, group=world.context_group)
        assert total == 2
        if leaves and world.rank == 1:
            return None
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            from megatron.core import parallel_state

            parallel_state.destroy_model_parallel()
            groups._close_nccl()
        said += [str(w.message) for w in caught if "did not close" in str(w.message)]
        assert not dist.is_initialized()
        if leaves:
            break
    return [patience for keys, patience in waits if keys == ["all"]], len(said)


@pytest.mark.parametrize("hangs", [False, True])
def test_jobs_in_turn_end_and_start(hangs):
    for _, warned in run_on_ranks(2, end_twice, hangs, False, timeout=240):
        assert warned == 2 * hangs


def test_a_rank_that_never_comes_is_not_waited_for():
    patience, _ = run_on_ranks(2, end_twice, False, True, timeout=240)[0]
    assert patience == [timedelta(seconds=2)]


def sizes_of_connected_groups(**settings):
    world = groups.initialize(groups.ParallelConfig(**settings), torch.device("cpu"))
    used, real = [], dist.all_reduce
    dist.all_reduce = lambda tensor, group: (used.append(group.size()), real(tensor, group=group))
    groups._connect(world)
    return used


@pytest.mark.parametrize("ranks, settings, sizes", [
    (1, {}, [1]),  # the world serves as every group
    (2, dict(context=2), [2, 2, 2]),  # the world, context, data x context
    (4, dict(tensor=2), [4, 2, 2, 2]),  # the world, tensor, data, data x context
], ids=str)  # fmt: skip
def test_groups_of_several_ranks_are_connected(ranks, settings, sizes):
    assert run_on_ranks(ranks, functools.partial(sizes_of_connected_groups, **settings)) == [sizes] * ranks
