"""Run a function on several gloo ranks of this machine, each in its own process.

Ranks are forked from a server process that has imported the heavy libraries. They start in less than a second, because
no rank imports torch, megatron-core and DeepSpeed itself.
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

# All modules that a training run imports, also late: matplotlib draws the loss, DeepSpeed inspects every model, an
# optimizer imports torch._dynamo.
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
    """Run `function(*args)` on every rank, with the environment that torchrun sets; returns the results by rank.

    `function` must be defined at module level, and its result must pickle. If a rank raises, this raises
    `AssertionError` with the rank's traceback.
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
                failures.append(f"rank {rank} did not answer within {timeout} s")
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
    """A free port below the range from which the system assigns ports, so that no new connection takes it."""
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
        # Plain bytes: a tensor would be sent as a handle to memory that ends with this process.
        result = io.BytesIO()
        torch.save(function(*args), result)
        pipe.send((True, result.getvalue()))
    except BaseException:
        pipe.send((False, traceback.format_exc()))
        raise
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
