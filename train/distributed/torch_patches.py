"""What torch does that a run cannot have, changed here and nowhere else. Written for torch 2.13.

Each function changes one thing and says why. `tests/train/distributed/test_torch_patches.py` has a test for each that
fails when torch no longer needs it. torch is imported inside the functions, because the first of them must run before
anything that imports `torch.utils.cpp_extension`.
"""

from __future__ import annotations

import logging
import threading
import warnings
from datetime import timedelta


def silence_missing_cuda_runtime() -> None:
    """Drop torch's warning "No CUDA runtime is found" and nothing else.

    `torch.utils.cpp_extension` logs it when it is imported on a machine with nvcc and without a GPU. megatron-core and
    DeepSpeed import that module in every process; nothing here compiles an extension.
    Test: `test_the_missing_cuda_runtime_is_not_reported`.
    """
    logging.getLogger("torch.utils.cpp_extension").addFilter(_is_not_about_the_cuda_runtime)


def _is_not_about_the_cuda_runtime(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith("No CUDA runtime is found")


def silence_undistributed_checkpoints() -> None:
    """Drop the warning of `torch.distributed.checkpoint` that it runs in a single process.

    Every rank reads a checkpoint by itself, and the commands have one process, so it is always true here.
    Test: `test_torch_warns_of_a_checkpoint_without_a_process_group`.
    """
    warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")


def current_device_is_the_cpu() -> None:
    """Let `torch.cuda.current_device()` return the CPU on a machine without CUDA.

    megatron-core 0.16.1 allocates communication buffers on that device, also for gloo.
    Test: `test_megatron_allocates_on_the_current_cuda_device`.
    """
    import torch

    torch.cuda.current_device = lambda: torch.device("cpu")  # type: ignore[assignment,return-value]


def abort_process_groups(timeout: timedelta) -> None:
    """Abort all NCCL communicators of this process, and forget the groups when that takes longer than `timeout`.

    `destroy_process_group` closes the communicators one after the other and waits for the other ranks in each; with
    three over the same two ranks (context parallelism) it waited for ever. An abort does not wait.
    Test: `tests/train/distributed/test_groups.py::test_jobs_in_turn_end_and_start`; only two GPUs show the hang itself.
    """
    import torch
    import torch.distributed as dist

    device = torch.cuda.current_device()

    def abort() -> None:
        torch.cuda.set_device(device)  # a new thread starts on device 0
        dist.distributed_c10d._abort_process_group()

    closing = threading.Thread(target=abort, name="abort-nccl", daemon=True)
    closing.start()
    closing.join(timeout.total_seconds())
    if closing.is_alive():
        warnings.warn("NCCL's communicators did not close; continuing without them", stacklevel=2)
        _forget_process_groups()


def _forget_process_groups() -> None:
    """Clear torch.distributed's tables of groups, so that it can be initialised again. torch has no public call."""
    import torch.distributed as dist

    world = dist.distributed_c10d._world
    dist.distributed_c10d._update_default_pg(None)
    for table in (world.pg_map, world.pg_names, world.pg_group_ranks, world.pg_backend_config, world.pg_to_tag,
                  world.tags_to_pg, world.pg_coalesce_state):  # fmt: skip
        table.clear()
    dist.distributed_c10d._unregister_all_process_groups()
    world.group_count = 0
