"""Run a function on several gloo ranks of this machine, each its own process.

Ranks are forked from a server process that has imported the heavy libraries already, so a world starts in well under a
second instead of one import of torch, megatron-core and DeepSpeed per rank.
"""

from __future__ import annotations

import contextlib
import io
import multiprocessing
import os
import random
import socket
import traceback
from collections.abc import Callable
from typing import Any

import torch

# All that a training run imports, also what it imports late: matplotlib draws the loss, DeepSpeed looks at every model,
# an optimizer asks for torch._dynamo.
PRELOAD = [
    "train.trainer",
    "train.dry_run",
    "hydra.main",
    "matplotlib.pyplot",
    "matplotlib.backends.backend_agg",
    "PIL.BmpImagePlugin",
    "PIL.GifImagePlugin",
    "PIL.JpegImagePlugin",
    "PIL.PngImagePlugin",
    "PIL.PpmImagePlugin",
    "sentencepiece",
    "numpy.random",
    "torch._dynamo",
    "torch.distributed.checkpoint",
    "torch.utils.checkpoint",
    "torch.profiler",
    "deepspeed.module_inject.auto_ep_layer",
    "deepspeed.runtime.engine",
    "deepspeed.runtime.superoffload",
    "fsspec.implementations.chained",
    "fsspec.implementations.local",
    "tests.ranks",
    "tests.train.runs",
    "tests.freeze",
]


def server() -> Any:
    """The multiprocessing context whose processes are forked from a server that has imported all of `PRELOAD`."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    return context


def run_on_ranks(num_ranks: int, function: Callable[..., Any], *args: Any, timeout: float = 300) -> list[Any]:
    """[function(*args) on rank 0, on rank 1, ...]; the environment is what torchrun would set.

    `function` must be importable (defined at module level); its result must pickle. A rank's exception is raised here
    with its traceback.
    """
    context = server()
    port = free_port()
    pipes, processes = [], []
    for rank in range(num_ranks):
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=_rank_main, args=(sender, rank, num_ranks, port, function, args), daemon=True)
        process.start()
        sender.close()
        pipes.append(receiver)
        processes.append(process)
    results, failures = [], []
    try:
        for rank, pipe in enumerate(pipes):
            if not pipe.poll(timeout):
                failures.append(f"rank {rank} said nothing for {timeout} s")
                break
            try:
                ok, value = pipe.recv()
            except EOFError:
                ok, value = False, f"died with exit code {processes[rank].exitcode}"
            if not ok:
                failures.append(f"rank {rank}: {value}")
                break
            results.append(torch.load(io.BytesIO(value), weights_only=False))
    finally:
        for process in processes:
            process.join(timeout=30 if not failures else 1)
            if process.is_alive():
                process.kill()
    if failures:
        raise AssertionError("\n".join(failures))
    return results


def free_port() -> int:
    """A port below those that the system hands out, so that no connection made meanwhile takes it."""
    while True:
        port = random.SystemRandom().randrange(15000, 32000)
        with socket.socket() as free, contextlib.suppress(OSError):
            free.bind(("127.0.0.1", port))
            return port


def _rank_main(pipe, rank: int, num_ranks: int, port: int, function, args) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(num_ranks),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        OMP_NUM_THREADS="1",
    )
    torch.set_num_threads(1)
    try:
        # Plain bytes: a tensor sent as itself would be a handle to memory that dies with this process.
        result = io.BytesIO()
        torch.save(function(*args), result)
        pipe.send((True, result.getvalue()))
    except BaseException:
        pipe.send((False, traceback.format_exc()))
        raise
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
