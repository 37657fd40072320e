"""The ranks of a run, as checkpoints need them: the main rank acts for all, and a failure of one is raised on all."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from train.checkpoint.storage import CheckpointError
from train.distributed.groups import World


class CheckpointGroup:
    """All ranks over a gloo group of their own, so that a thread can use it beside training. Every call is collective.

    Its timeout is long, because ranks wait for storage here; a rank that died ends the wait at once.
    """

    def __init__(self, world: World):
        self.group = dist.new_group(backend="gloo", timeout=timedelta(hours=2))
        self.rank, self.size, self.is_main = world.rank, world.size, world.is_main

    def barrier(self) -> None:
        dist.barrier(self.group)

    def gather(self, value: Any) -> list[Any]:
        """The values of all ranks, on all ranks."""
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def on_main(self, action: Callable[[], str]) -> str:
        """Run `action` on the main rank; all ranks return its result, or raise its failure as `CheckpointError`."""
        answer: list[Any] = [None, None]
        if self.is_main:
            try:
                answer[0] = action()
            except BaseException as error:
                answer[1] = str(error) if isinstance(error, CheckpointError) else describe_error(error)
        dist.broadcast_object_list(answer, src=0, group=self.group)
        if answer[1] is not None:
            raise CheckpointError(answer[1])
        return answer[0]

    def raise_together(self, error: CheckpointError | None) -> None:
        """Raise the first rank's error on all ranks; return when there is none."""
        for message in self.gather(None if error is None else str(error)):
            if message is not None:
                raise CheckpointError(message)


def describe_error(error: BaseException) -> str:
    """Class and message of an error; of DCP's collection of errors, the first rank's."""
    failures = getattr(error, "failures", None)
    if failures:
        rank, (cause, _) = next(iter(failures.items()))
        return f"rank {rank}: {describe_error(cause)}"
    return f"{type(error).__name__}: {error}"
