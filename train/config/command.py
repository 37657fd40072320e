"""How commands end: `data_pipeline.commands`, which the launcher uses through this module."""

from __future__ import annotations

from data_pipeline.commands import fail, printable, robust_streams, run

__all__ = ["fail", "printable", "robust_streams", "run"]
