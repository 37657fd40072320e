"""Sums over training steps, kept on the device.

The host waits for the device in `read` and `read_parts` (every `run.log_every` steps) and in `tokens`, not in between.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist

from train.batches import Batch
from train.config import gpus
from train.distributed.groups import World


def peak_flops(device: torch.device) -> float | None:
    """Dense bf16 peak of one device in FLOP/s, or None where it is not known (every CPU)."""
    if device.type != "cuda":
        return None
    return gpus.peak_flops(torch.cuda.get_device_name(device))


def count(batches: Sequence[Batch]) -> torch.Tensor:
    """[labels, real tokens, model FLOPs] of this rank's micro-batches: float64 [3] on the host."""
    rows = [[batch.num_labels, batch.layout.num_tokens, batch.model_flops] for batch in batches]
    return torch.tensor(rows, dtype=torch.float64).sum(0)


class StepSums:
    """Loss of this rank, and labels, real tokens, model FLOPs and skipped steps of the world, since the last `read`."""

    def __init__(self, world: World, tokens: int = 0):
        """`tokens`: real tokens that the run has seen before."""
        self._world = world
        self._peak = peak_flops(world.device)
        self._tokens = torch.tensor(float(tokens), dtype=torch.float64, device=world.device)
        self._labels = 0.0  # of the steps of the last `read`
        self._start()

    def _start(self) -> None:
        self._loss = torch.zeros((), dtype=torch.float64, device=self._world.device)
        self._counts = torch.zeros(4, dtype=torch.float64, device=self._world.device)
        self._steps = 0
        self._began = time.perf_counter()

    def add(self, loss_sum: torch.Tensor, counts: torch.Tensor, skipped: torch.Tensor) -> None:
        """Add one step, without waiting for the device.

        `loss_sum`: this rank's summed loss, 0-d. `counts`: [labels, real tokens, model FLOPs] of the world, float64.
        `skipped`: 1 if the step changed nothing, else 0; 0-d.
        """
        done = 1 - skipped
        self._loss += torch.where(skipped > 0, torch.zeros_like(loss_sum), loss_sum)
        self._counts += torch.stack([counts[0] * done, counts[1], counts[2], skipped.double()])
        self._tokens += counts[1]
        self._steps += 1

    @property
    def tokens(self) -> int:
        """Real tokens of the run so far, all ranks together. Waits for the device."""
        return int(self._tokens.item())

    def read(self) -> dict[str, Any]:
        """Means and rates since the last call, equal on every rank; then start again. Collective.

        Skipped steps are left out of `loss` and counted in `skipped_steps`. Each of the two keys is there only if there
        was a step for it.
        """
        dist.all_reduce(self._loss, group=self._world.data_context_group)
        loss, (labels, tokens, flops, skipped) = self._loss.item(), self._counts.tolist()
        self._labels = labels
        seconds = time.perf_counter() - self._began
        record: dict[str, Any] = {"tokens": self.tokens}
        if skipped < self._steps:
            record["loss"] = loss / max(1.0, labels)
        if skipped:
            record["skipped_steps"] = int(skipped)
        record |= {
            "tokens_per_second": round(tokens / seconds, 1),
            "step_seconds": round(seconds / self._steps, 5),
            "ranks": self._world.size,  # step_seconds x steps x ranks: GPU seconds
        }
        if self._peak is not None:
            record["mfu"] = round(flops / seconds / (self._peak * self._world.size), 4)
        record |= _device_memory(self._world.device)
        self._start()
        return record

    def read_parts(self, sums: torch.Tensor | None, names: Sequence[str]) -> dict[str, float]:
        """Means per label of an objective's `sums` (this rank's, [len(names)]) over the steps of the last `read`.
        Collective."""
        if sums is None:
            return {}
        dist.all_reduce(sums, group=self._world.data_context_group)
        return {f"loss_{name}": value / max(1.0, self._labels) for name, value in zip(names, sums.tolist())}

    @contextlib.contextmanager
    def clock_stopped(self) -> Iterator[None]:
        """Leave the time of what runs inside (validation, a checkpoint) out of the rates."""
        left = time.perf_counter()
        yield
        self._began += time.perf_counter() - left


def _device_memory(device: torch.device) -> dict[str, float]:
    """GiB on the fullest rank: the most that tensors and torch's pool have taken, and what is in use on the card now.

    Empty on the CPU. Collective.
    """
    if device.type != "cuda":
        return {}
    free, total = torch.cuda.mem_get_info()
    used = [torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved(), total - free]
    gib = torch.tensor(used, dtype=torch.float64, device=device) / 2**30
    dist.all_reduce(gib, op=dist.ReduceOp.MAX)
    return dict(zip(("peak_gib", "reserved_gib", "card_gib"), (round(x, 2) for x in gib.tolist())))
