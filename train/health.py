"""What a run does about losses and gradients that are not finite, and about losses that jump.

A step whose loss or gradient is not finite is skipped on all ranks alike. The device decides that, and the host learns
of it one step later, with numbers it reads anyway. Rollback after a jump is off unless `run.spike_factor` is set.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence

import torch

WINDOW = 16  # recent log points whose median a loss is compared with
MIN_HISTORY = 4  # log points that must be there before anything is called a jump
MAX_ROLLBACKS = 3  # to one checkpoint; a fourth jump from there is not the fault of the samples


class TrainingDiverged(RuntimeError):
    """Too many steps in a row were not finite, or losses kept jumping; the message names the samples.

    The configuration is valid and the run has trained, so this is not one of `USER_ERRORS`: the command exits with
    `train.distributed.signals.DIVERGED`.
    """


def not_finite(loss: torch.Tensor) -> torch.Tensor:
    """Whether a 0-d loss is NaN or infinite: fp32 0 or 1, on its device."""
    return (~torch.isfinite(loss)).float()


def bad_norm(norm: torch.Tensor | float | None, device: torch.device) -> torch.Tensor:
    """Whether a gradient norm is NaN or infinite: fp32 0 or 1, 0-d, on the device.

    DeepSpeed gives -1 for such a norm, and sometimes a plain number; None is a norm that was not computed.
    """
    if norm is None:
        return torch.zeros((), device=device)
    if not isinstance(norm, torch.Tensor):
        norm = torch.full((), float(norm), device=device)
    return (~torch.isfinite(norm) | (norm < 0)).float()


def last_finite_step(step: int, bad_steps: int, counted_from: int, before: int) -> int:
    """The last step up to `step` that was not skipped, where the `bad_steps` up to `step` were.

    These are counted from step `counted_from` on, where the process went on; until then it was `before`.
    """
    return before if bad_steps >= step - counted_from else step - bad_steps


def bad_steps_message(steps: tuple[int, int], samples: tuple[int, int], healthy: str | None, directory: str) -> str:
    """What a run that ends after too many bad steps tells its user.

    `steps`, `samples`: first and last that were skipped. `healthy`: how to name the newest checkpoint from which a
    later step trained with a finite loss, as a command-line word; None where there is none.
    """
    elsewhere = (
        f"the weights themselves are bad: continue in another run, with a lower optim.lr, from the newest checkpoint "
        f"that is known to be healthy: {healthy} run.name=NEW"
        if healthy is not None
        else "the weights themselves are bad, and no checkpoint is known to be healthy: begin another run, with a "
        "lower optim.lr or a longer optim.warmup_steps"
    )
    return (
        f"loss or gradient was not finite in each of the steps {steps[0]} to {steps[1]}, which were skipped: samples "
        f"{samples[0]} to {samples[1]} of the global order. To continue {directory} without these samples, start again "
        f"with run.skip_samples=[[{samples[0]},{samples[1]}]]. If it happens again with other samples, {elsewhere}"
    )


def next_sample(position: int, count: int, skipped: Sequence[tuple[int, int]]) -> int:
    """The first index from `position` on at which `count` samples in a row hold none of the ranges `skipped`.

    `skipped`: (first, last) pairs, both included.
    """
    for first, last in sorted(skipped):
        if first < position + count and last >= position:
            position = last + 1
    return position


class SpikeDetector:
    """Compares each loss with the recent ones. Deterministic: the same losses give the same answers."""

    def __init__(self, factor: float | None, recent: Sequence[float] = ()):
        """`factor` None: nothing is a spike. `recent`: the losses before, oldest first; the last `WINDOW` are kept."""
        self._factor = factor
        self.recent = list(recent)[-WINDOW:]

    def is_spike(self, loss: float) -> bool:
        """Whether `loss` is more than `factor` times the median of the recent ones. If not, it becomes one of them."""
        if self._factor is not None and len(self.recent) >= MIN_HISTORY:
            if loss > self._factor * statistics.median(self.recent):
                return True
        self.recent = [*self.recent, loss][-WINDOW:]
        return False
