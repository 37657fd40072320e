"""What all ranks decide alike in a step, from what each of them asks for."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist

from train.distributed.groups import World


@dataclass(frozen=True)
class Requests:
    """What one rank asks for."""

    stop: bool = False  # end the run: a signal, or its own time limit
    save: bool = False  # save a checkpoint: `checkpoint.every_minutes` has passed on this rank


NO_REQUESTS = Requests()


@dataclass(frozen=True)
class Decision:
    """What all ranks know after a step. A request of any rank is granted on every rank in the same step."""

    stop: bool
    save: bool
    bad_steps: int  # steps in a row that were skipped, up to the step before


class RankConsensus:
    """Carries the ranks' requests in the all-reduce that sums the counts of a step, so that they cost no other one.

    In each step call `exchange`, `note_skipped` and `decision`, in this order.
    """

    def __init__(self, world: World):
        self._world = world
        on_gpu = world.device.type == "cuda"
        self._bad_steps = torch.zeros((), dtype=torch.float64, device=world.device)  # skipped, in a row
        self._on_host = torch.zeros(3, dtype=torch.float64, pin_memory=on_gpu)  # stop, save, bad steps
        self._arrived = torch.cuda.Event() if on_gpu else None

    def exchange(self, counts: torch.Tensor, requests: Requests) -> torch.Tensor:
        """Sum `counts` over the ranks, on the device, and take in the requests of all. Collective; does not wait.

        `counts`: float64 [n] on the host. Tensor-parallel ranks hold the same batches and are counted once.
        """
        given = torch.cat([counts, torch.tensor([requests.stop, requests.save], dtype=torch.float64)])
        if self._world.device.type == "cuda":
            given = given.pin_memory()  # a copy from pageable memory would wait for the steps before
        summed = given.to(self._world.device, non_blocking=True)
        dist.all_reduce(summed)  # over the whole world, so that a signal to any rank stops all
        totals, votes = summed[:-2], summed[-2:]
        totals /= self._world.tensor_group.size()
        self._on_host.copy_(torch.cat([votes, self._bad_steps[None]]), non_blocking=True)
        if self._arrived is not None:
            self._arrived.record()
        return totals

    def note_skipped(self, skipped: torch.Tensor) -> None:
        """End the step: `skipped` (0-d, on the device) is 1 if it changed nothing, else 0, alike on all ranks."""
        self._bad_steps = (self._bad_steps + skipped) * skipped

    def skipped_in_a_row(self) -> int:
        """Steps in a row that were skipped, up to the last one; alike on all ranks. Waits for the device."""
        return int(self._bad_steps.item())

    def decision(self) -> Decision:
        """What all ranks knew when this step began.

        The device has passed that point long ago, so waiting for it only keeps the host from running more than a step
        ahead.
        """
        if self._arrived is not None:
            self._arrived.synchronize()
        stop, save, bad_steps = self._on_host.tolist()
        return Decision(stop > 0, save > 0, int(bad_steps))
