"""Process groups: the only module that initialises torch.distributed and megatron-core's parallel state.

Rank order, fastest first: tensor, context, data. So tensor ranks share a host, and the ranks of one data-parallel
replica are neighbours.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from train.config.errors import ConfigError, StartError
from train.config.sections import ParallelConfig
from train.distributed.environment import environment_world
from train.distributed.ranks import Ranks
from train.distributed.torch_patches import abort_process_groups, current_device_is_the_cpu


@dataclass(frozen=True)
class World:
    """This process among the ranks of the job: its process groups (`*_group`) and its rank in them (`*_rank`)."""

    rank: int
    size: int
    device: torch.device
    store: dist.Store  # shared by the ranks of the job, for small messages
    tensor_group: dist.ProcessGroup
    context_group: dist.ProcessGroup
    data_group: dist.ProcessGroup
    data_context_group: dist.ProcessGroup  # gradients are reduced and ZeRO shards over this group

    @property
    def tensor_rank(self) -> int:
        return self.tensor_group.rank()

    @property
    def data_rank(self) -> int:
        return self.data_group.rank()

    @property
    def data_size(self) -> int:
        return self.data_group.size()

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def mpu(self) -> DeepSpeedTopology:
        return DeepSpeedTopology(self)


class DeepSpeedTopology:
    """The Megatron-style `mpu` that DeepSpeed expects; its data-parallel group is data x context.

    Without the context ranks in that group, ZeRO-3 silently loses their gradients.
    """

    def __init__(self, world: World):
        self._world = world

    def get_model_parallel_rank(self) -> int:
        return self._world.tensor_group.rank()

    def get_model_parallel_world_size(self) -> int:
        return self._world.tensor_group.size()

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        return self._world.tensor_group

    get_tensor_model_parallel_rank = get_model_parallel_rank
    get_tensor_model_parallel_world_size = get_model_parallel_world_size
    get_tensor_model_parallel_group = get_model_parallel_group

    def get_pipeline_model_parallel_world_size(self) -> int:
        return 1

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        return self._world.data_context_group

    def get_data_parallel_world_size(self) -> int:
        return self._world.data_context_group.size()

    def get_data_parallel_rank(self) -> int:
        return self._world.data_context_group.rank()


def pick_device(name: str) -> torch.device:
    """`auto`, `cpu` or `cuda` -> this rank's device."""
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("run.device=cuda, but this process sees no CUDA device; use run.device=cpu or auto")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", environment_world()[2] % torch.cuda.device_count())


def rendezvous(config: ParallelConfig, log_line: Callable[[str], object] = lambda line: None) -> Ranks:
    """The ranks of the job, once all are there. Needs no device.

    Raises `ConfigError` if the address in the environment cannot be used, and `StartError` if some ranks do not come
    within `parallel.timeout_minutes`. `log_line` takes a line for the user.
    """
    rank, size, _ = environment_world()
    store = dist.HashStore() if size == 1 else _job_store(rank, size, timedelta(minutes=config.timeout_minutes))
    return Ranks(store, rank, size, "start", log_line)


def initialize(config: ParallelConfig, device: torch.device, ranks: Ranks | None = None) -> World:
    """Start torch.distributed (NCCL on CUDA, gloo on the CPU) and the groups; one process alone gets groups of one.

    `ranks`: those of the job, if they have met already.
    """
    rank, size, _ = environment_world()
    config.data(size)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    elif not torch.cuda.is_available():
        current_device_is_the_cpu()
    timeout = timedelta(minutes=config.timeout_minutes)
    store = (ranks or rendezvous(config)).store
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(
        backend,
        timeout=timeout,
        rank=rank,
        world_size=size,
        store=dist.PrefixStore("groups", store),
    )
    from ksa_model.parallel.megatron import parallel_state  # takes seconds, which a refused configuration should not

    os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed insists on it
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=config.tensor,
        context_parallel_size=config.context,
        create_gloo_process_groups=False,
        distributed_timeout_minutes=max(1, round(config.timeout_minutes)),
    )
    alone = dist.group.WORLD if size == 1 else None  # a single rank uses this for every group: one communicator
    world = World(
        rank=rank,
        size=size,
        device=device,
        store=store,
        tensor_group=alone or parallel_state.get_tensor_model_parallel_group(),
        context_group=alone or parallel_state.get_context_parallel_group(),
        data_group=alone or parallel_state.get_data_parallel_group(),
        data_context_group=alone or parallel_state.get_data_parallel_group(with_context_parallel=True),
    )
    if device.type == "cuda":
        _connect(world)
    return world


def _connect(world: World) -> None:
    """Create NCCL's communicators of the world and of every group of several ranks, in the same order on all ranks.

    By default NCCL creates a communicator at a group's first use, which for an exchange between neighbours does not
    involve all of its ranks. With a `device_id` it creates one for each of megatron's two dozen groups, used or not:
    that took 7.8 GiB of an H100 outside torch's allocator, and 15 s to close (docs/log.md).
    """
    dist.all_reduce(torch.zeros(1, device=world.device), group=dist.group.WORLD)
    for group in (world.tensor_group, world.context_group, world.data_group, world.data_context_group):
        if group.size() > 1:
            dist.all_reduce(torch.zeros(1, device=world.device), group=group)


SHUTDOWN_WAIT = timedelta(seconds=30)  # for the other ranks, and again for NCCL
_rendezvous: list[dist.Store] = []  # the store of this process; it outlives a job
_jobs = 0  # jobs that this process has started, one after the other


def _job_store(rank: int, size: int, timeout: timedelta) -> dist.Store:
    """The store that all ranks share, with a prefix that no earlier job of these processes used."""
    global _jobs
    if not _rendezvous:
        _rendezvous.append(_rendezvous_store(rank, size, timeout))
    _rendezvous[0].set_timeout(timeout)
    _jobs += 1
    return dist.PrefixStore(f"job{_jobs}", _rendezvous[0])


def _rendezvous_store(rank: int, size: int, timeout: timedelta) -> dist.Store:
    """The store at MASTER_ADDR and MASTER_PORT, which all ranks have reached."""
    address, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")
    place = f"MASTER_ADDR={address} MASTER_PORT={port}"
    try:
        return next(dist.rendezvous("env://", rank, size, timeout=timeout))[0]
    except dist.DistNetworkError as error:
        if "EADDRINUSE" in str(error) or "in use" in str(error):
            raise ConfigError(
                f"MASTER_PORT={port} is in use on {address} by another process: set another port on all ranks, or let "
                "torchrun find one (--rdzv-backend=c10d --rdzv-endpoint=HOST:0), as `python -m launch` does"
            ) from error
        raise StartError(
            f"{place}: rank {rank} cannot reach rank 0 there: check address, port and firewall, and that rank 0 runs"
        ) from error
    except dist.DistStoreError as error:
        raise StartError(
            f"{place}: not all of WORLD_SIZE={size} ranks came within parallel.timeout_minutes="
            f"{timeout.total_seconds() / 60:g} ({' '.join(str(error).split())}): start them all, or raise "
            "parallel.timeout_minutes"
        ) from error


def shutdown() -> None:
    """Undo `initialize`, so that one process can run several jobs one after the other, as Hydra's multirun does."""
    from ksa_model.parallel.megatron import parallel_state

    parallel_state.destroy_model_parallel()
    if not dist.is_initialized():
        return
    if dist.get_backend() != "nccl" or dist.get_world_size() == 1:
        dist.destroy_process_group()
        return
    _close_nccl()


def _close_nccl() -> None:
    """Abort NCCL's communicators once every rank has arrived here, or after `SHUTDOWN_WAIT`.

    By then no rank has anything left to send, so that an abort loses nothing. A rank that failed and never arrives does
    not hold up a run that has saved its work, and neither does an abort that hangs.
    """
    torch.cuda.synchronize()
    store = dist.PrefixStore(f"shutdown{_jobs}", _rendezvous[0])
    if store.add("ranks", 1) == dist.get_world_size():
        store.set("all", "1")
    with contextlib.suppress(RuntimeError):
        store.wait(["all"], SHUTDOWN_WAIT)
    abort_process_groups(SHUTDOWN_WAIT)
