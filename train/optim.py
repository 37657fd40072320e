"""What the optimizer is told: parameter groups, and learning rates as pure functions of the step."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch


class OptimConfigError(ValueError):
    """Optimizer settings that contradict each other."""


@dataclass(frozen=True)
class OptimConfig:
    """AdamW (arXiv 1711.05101) and its schedule.

    `wsd` warms up linearly, stays, and decays linearly over the last `decay_steps`; `cosine` decays over all steps
    after the warm-up; `constant` only warms up. Decay ends at `lr * min_lr_ratio`.
    """

    lr: float = 4e-4
    min_lr_ratio: float = 0.1
    schedule: str = "wsd"
    warmup_steps: int = 100
    decay_steps: int = 100
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    grad_clip: float = 1.0  # global norm; 0 turns clipping off

    def __post_init__(self) -> None:
        if self.schedule not in ("wsd", "cosine", "constant"):
            raise OptimConfigError(f"optim.schedule={self.schedule!r} is not one of wsd, cosine, constant")
        for name in ("lr", "eps"):
            if getattr(self, name) <= 0:
                raise OptimConfigError(f"optim.{name}={getattr(self, name)} must be positive")
        for name in ("min_lr_ratio", "warmup_steps", "decay_steps", "weight_decay", "grad_clip"):
            if getattr(self, name) < 0:
                raise OptimConfigError(f"optim.{name}={getattr(self, name)} must not be negative")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise OptimConfigError(f"optim.betas={list(self.betas)} must each be at least 0 and below 1")

    def lr_at(self, step: int, total_steps: int) -> float:
        """Learning rate of 0-based `step` of `total_steps`."""
        floor = self.lr * self.min_lr_ratio
        if step < self.warmup_steps:
            return self.lr * (step + 1) / self.warmup_steps
        if self.schedule == "cosine":
            progress = (step + 1 - self.warmup_steps) / max(1, total_steps - self.warmup_steps)
            return floor + (self.lr - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
        left = total_steps - (step + 1)
        if self.schedule == "wsd" and left < self.decay_steps:
            return floor + (self.lr - floor) * max(0, left) / self.decay_steps
        return self.lr


def parameter_groups(
    model: torch.nn.Module, weight_decay: float, trains: Callable[[str], bool] = lambda name: True
) -> list[dict]:
    """Matrices decay; norm gains and embeddings (text and summary) do not. What `trains` refuses by name is in groups
    of its own, marked `frozen`: it is state of the run, to be saved and handed on, that no step changes."""
    groups: dict[tuple[bool, bool], list[torch.nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        decays = parameter.ndim >= 2 and "embedding" not in name
        groups.setdefault((trains(name), decays), []).append(parameter)
    return [
        dict(params=groups[trained, decays], weight_decay=weight_decay if decays else 0.0, frozen=not trained)
        for trained in (True, False)
        for decays in (True, False)
        if (trained, decays) in groups
    ]
