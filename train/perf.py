"""What is measured beside training: its settings, and the names that `train.profiling` goes by."""

from __future__ import annotations

from dataclasses import dataclass

PREFIX = "part: "  # of the names of ranges whose time is counted together


@dataclass(frozen=True)
class PerfConfig:
    """What is measured beside training."""

    profile: bool = False
    profile_after: int = 3  # steps of this start that run before: kernels are compiled and memory is warm
    profile_steps: int = 2

    def __post_init__(self) -> None:
        for name, least in (("profile_after", 0), ("profile_steps", 1)):
            if getattr(self, name) < least:
                raise PerfConfigError(f"perf.{name}={getattr(self, name)} must be at least {least}")


class PerfConfigError(ValueError):
    """A setting of `perf` that has no meaning; the message names it and its value."""
