"""How fast a run computes: its settings, and the names that `train.profiling` goes by."""

from __future__ import annotations

from dataclasses import dataclass

PREFIX = "part: "  # of the names of ranges whose time is counted together


@dataclass(frozen=True)
class PerfConfig:
    """In how few bits the products are, and what is measured beside training."""

    precision: str = "bf16"  # bf16 | fp8 (the products inside blocks, where run.precision is bf16): `ksa_model.fp8`
    profile: bool = False
    profile_after: int = 3  # steps of this start that run before: kernels are compiled and memory is warm
    profile_steps: int = 2

    def __post_init__(self) -> None:
        if self.precision not in ("bf16", "fp8"):
            raise PerfConfigError(f"perf.precision={self.precision!r} is not one of bf16, fp8")
        for name, least in (("profile_after", 0), ("profile_steps", 1)):
            if getattr(self, name) < least:
                raise PerfConfigError(f"perf.{name}={getattr(self, name)} must be at least {least}")


class PerfConfigError(ValueError):
    """A setting of `perf` that has no meaning; the message names it and its value."""
