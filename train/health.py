"""What a run does about losses and gradients that are not finite, and about losses that jump.

A step whose loss or gradient is not finite is skipped on all ranks alike. That is decided on the device; the host
learns of it one step later, with numbers it reads anyway. Rollback after a jump is off unless `run.spike_factor` is
set.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence

import torch

from train.config import ConfigError

WINDOW = 16  # recent log points whose median a loss is compared with
FEWEST = 4  # of them, before anything is called a jump
MAX_ROLLBACKS = 3  # to one checkpoint; the fourth jump from it is not the samples' fault


class BadSteps(ConfigError):
    """Too many steps in a row were not finite, or losses kept jumping; the message names the samples."""


def not_finite(loss: torch.Tensor) -> torch.Tensor:
    """Whether a 0-d loss is NaN or infinite: fp32 0 or 1, on its device."""
    return (~torch.isfinite(loss)).float()


def bad_norm(norm: torch.Tensor | float | None, device: torch.device) -> torch.Tensor:
    """Whether a gradient norm is NaN or infinite: fp32 0 or 1, 0-d, on the device. DeepSpeed writes -1 for such a norm,
    or hands out a plain number; None is a norm nobody computed."""
    if norm is None:
        return torch.zeros((), device=device)
    if not isinstance(norm, torch.Tensor):
        norm = torch.full((), float(norm), device=device)
    return (~torch.isfinite(norm) | (norm < 0)).float()


def bad_steps_message(first_step: int, last_step: int, first_sample: int, last_sample: int, checkpoint: str) -> str:
    """The words a run ends with after too many bad steps."""
    return (
        f"loss or gradient was not finite in each of the steps {first_step} to {last_step}, which were skipped: "
        f"samples {first_sample} to {last_sample} of the global order. Checkpoints are below {checkpoint}. To go "
        f"on past these samples start again with run.skip_samples=[[{first_sample},{last_sample}]]; if it comes "
        f"back with other samples, go on in another run: resume={checkpoint} run.name=NEW and a lower optim.lr"
    )


def next_sample(position: int, count: int, skipped: Sequence[tuple[int, int]]) -> int:
    """Where a step of `count` samples that would begin at `position` begins instead, so that it meets none to skip."""
    for first, last in sorted(skipped):
        if first < position + count and last >= position:
            position = last + 1
    return position


class SpikeDetector:
    """Says when a loss stands out of the recent ones. Pure: the same losses give the same answers."""

    def __init__(self, factor: float | None, recent: Sequence[float] = ()):
        self._factor = factor
        self.recent = list(recent)[-WINDOW:]

    def sees(self, loss: float) -> bool:
        """True if `loss` is more than `factor` times the median of recent ones; otherwise it becomes one of them."""
        if self._factor is not None and len(self.recent) >= FEWEST:
            if loss > self._factor * statistics.median(self.recent):
                return True
        self.recent = [*self.recent, loss][-WINDOW:]
        return False
