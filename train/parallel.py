"""Process groups: the only place that initialises torch.distributed and megatron-core's parallel state.

Rank order, fastest first: tensor, context, data. So tensor ranks share a host, and the ranks of one data-parallel
replica are neighbours.
"""

from __future__ import annotations

import contextlib
import os
import threading
import warnings
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist


class ParallelConfigError(ValueError):
    """A layout that the world or the model does not allow; the message names the sizes and their relation."""


@dataclass(frozen=True)
class ParallelConfig:
    """How the world is divided; data parallelism takes what tensor and context parallelism leave."""

    tensor: int = 1
    sequence: bool = False  # Megatron sequence parallelism: needs tensor > 1
    context: int = 1
    zero: int = 1  # DeepSpeed ZeRO stage: shards over data x context ranks 1 optimizer state, 2 gradients, 3 weights
    offload: str = "none"  # none | optimizer: optimizer state and master weights live in host memory
    timeout_minutes: float = 10.0  # a rank that hangs ends the job after this

    def __post_init__(self) -> None:
        for name in ("tensor", "context"):
            if getattr(self, name) < 1:
                raise ParallelConfigError(f"parallel.{name}={getattr(self, name)} must be at least 1")
        if self.zero not in (0, 1, 2, 3):
            raise ParallelConfigError(f"parallel.zero={self.zero} is not a ZeRO stage: 0, 1, 2 or 3")
        if self.offload not in ("none", "optimizer"):
            raise ParallelConfigError(f"parallel.offload={self.offload!r} is not one of none, optimizer")
        if self.offload == "optimizer" and self.zero == 0:
            raise ParallelConfigError("parallel.offload=optimizer needs parallel.zero=1, 2 or 3")
        if self.timeout_minutes <= 0:
            raise ParallelConfigError(f"parallel.timeout_minutes={self.timeout_minutes} must be positive")

    def zero_in_use(self, precision: str, shards: int) -> int:
        """`zero`, or 0 where fp32 has no other rank to share with: stages 1 and 2 would copy every gradient."""
        is_alone = shards == 1 and precision == "fp32" and self.offload == "none"
        return 0 if is_alone and self.zero < 3 else self.zero

    def data(self, world_size: int) -> int:
        """Data-parallel replicas in a world of `world_size` ranks."""
        model_ranks = self.tensor * self.context
        if world_size % model_ranks:
            raise ParallelConfigError(
                f"the world of {world_size} ranks is not a multiple of parallel.tensor={self.tensor} x "
                f"parallel.context={self.context} = {model_ranks}"
            )
        return world_size // model_ranks


@dataclass(frozen=True)
class World:
    """This process's place: `*_group` are process groups, `*_rank` its rank inside each."""

    rank: int
    size: int
    device: torch.device
    store: dist.Store  # shared by the ranks of the job, for words rather than tensors
    tensor_group: dist.ProcessGroup
    context_group: dist.ProcessGroup
    data_group: dist.ProcessGroup
    data_context_group: dist.ProcessGroup  # ZeRO shards and gradients are summed over this

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
    """What DeepSpeed asks of a Megatron-style `mpu`, with "data parallel" meaning data x context.

    Without the context ranks in it, ZeRO-3 loses their gradients silently.
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


def environment_world() -> tuple[int, int, int]:
    """(rank, world size, local rank) as torchrun and its kin set them; a lone process is a world of one."""
    return tuple(
        int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))
    )  # type: ignore[return-value]


def pick_device(name: str) -> torch.device:
    """`auto`, `cpu` or `cuda` -> this rank's device."""
    if name not in ("auto", "cpu", "cuda"):
        raise ParallelConfigError(f"run.device={name!r} is not one of auto, cpu, cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise ParallelConfigError("run.device=cuda, but this process sees no CUDA device; use run.device=cpu or auto")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", environment_world()[2] % torch.cuda.device_count())


def initialize(config: ParallelConfig, device: torch.device) -> World:
    """Start torch.distributed (NCCL on CUDA, gloo on the CPU) and the groups; one process alone gets groups of one."""
    rank, size, _ = environment_world()
    config.data(size)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    elif not torch.cuda.is_available():
        # megatron-core allocates communication buffers on `torch.cuda.current_device()`; here that is the host.
        torch.cuda.current_device = lambda: torch.device("cpu")  # type: ignore[assignment,return-value]
    timeout = timedelta(minutes=config.timeout_minutes)
    store: dist.Store = dist.HashStore()
    if "MASTER_ADDR" in os.environ:
        store = _job_store(rank, size, timeout)
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(
        backend,
        timeout=timeout,
        rank=rank,
        world_size=size,
        store=dist.PrefixStore("groups", store),
    )
    from ksa_model.megatron import parallel_state  # seconds of imports, which a refused configuration need not wait for

    os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed insists on it
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=config.tensor,
        context_parallel_size=config.context,
        create_gloo_process_groups=False,
        distributed_timeout_minutes=max(1, round(config.timeout_minutes)),
    )
    alone = dist.group.WORLD if size == 1 else None  # which then is every group, with one communicator
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
    """Make the communicators of all ranks together and of the groups of several, on every rank in one order.

    Left alone, NCCL makes one at a group's first use, which an exchange between neighbours need not be for all of its
    ranks. Told the device when it starts, it makes one for each of megatron's two dozen groups, used or not: while it
    was, 7.8 GiB of an H100 were in use beyond what torch had handed out, and closing them took 15 s (docs/log.md).
    """
    dist.all_reduce(torch.zeros(1, device=world.device), group=dist.group.WORLD)
    for group in (world.tensor_group, world.context_group, world.data_group, world.data_context_group):
        if group.size() > 1:
            dist.all_reduce(torch.zeros(1, device=world.device), group=group)


SHUTDOWN_WAIT = timedelta(seconds=30)  # for the other ranks, and for NCCL
_rendezvous: list[dist.Store] = []  # of this process: it outlives a job, and jobs of one process are told apart
_jobs = 0


def _job_store(rank: int, size: int, timeout: timedelta) -> dist.Store:
    """The store that all ranks of the environment share, with names that no earlier job of these processes has used."""
    global _jobs
    if not _rendezvous:
        _rendezvous.append(next(dist.rendezvous("env://", rank, size, timeout=timeout))[0])
    _rendezvous[0].set_timeout(timeout)
    _jobs += 1
    return dist.PrefixStore(f"job{_jobs}", _rendezvous[0])


def shutdown() -> None:
    """Undo `initialize`, so that one process can run several jobs in turn (Hydra's multirun does)."""
    from ksa_model.megatron import parallel_state

    parallel_state.destroy_model_parallel()
    if not dist.is_initialized():
        return
    if dist.get_backend() != "nccl" or dist.get_world_size() == 1:
        dist.destroy_process_group()
        return
    _close_nccl()


def _close_nccl() -> None:
    """Abort NCCL's communicators once every rank is done with them.

    Closing them in good order waits for the other ranks, one communicator at a time; with three over the same two ranks
    (context parallelism) it was seen to wait for ever. When nobody has anything left to say they can be aborted too.
    Neither a rank that failed and never comes here nor an abort that hangs holds up a run that has saved its work.
    """
    torch.cuda.synchronize()
    store = dist.PrefixStore(f"shutdown{_jobs}", _rendezvous[0])
    if store.add("ranks", 1) == dist.get_world_size():
        store.set("all", "1")
    with contextlib.suppress(RuntimeError):
        store.wait(["all"], SHUTDOWN_WAIT)
    device = torch.cuda.current_device()

    def abort() -> None:
        torch.cuda.set_device(device)  # a thread begins on the first one
        dist.distributed_c10d._abort_process_group()

    closing = threading.Thread(target=abort, name="abort-nccl", daemon=True)
    closing.start()
    closing.join(SHUTDOWN_WAIT.total_seconds())
    if closing.is_alive():
        warnings.warn("NCCL's communicators did not close; going on without them", stacklevel=2)
        _forget_groups()


def _forget_groups() -> None:
    """Let torch.distributed believe that there are no groups, so that it can be started again."""
    world = dist.distributed_c10d._world
    dist.distributed_c10d._update_default_pg(None)
    for known in (world.pg_map, world.pg_names, world.pg_group_ranks, world.pg_backend_config, world.pg_to_tag,
                  world.tags_to_pg, world.pg_coalesce_state):  # fmt: skip
        known.clear()
    dist.distributed_c10d._unregister_all_process_groups()
    world.group_count = 0
