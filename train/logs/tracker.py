"""Weights & Biases: the only module that imports it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from train.config.sections import LoggingConfig


class Tracker:
    """A W&B run that never stops training: a failure in it is reported once, and the run continues without it."""

    def __init__(self, settings: LoggingConfig, directory: Path, *, name: str, config: dict[str, Any]):
        """`name` and `config` are those of the training run. W&B's own files go below `directory`."""
        self._run: Any = None
        if settings.wandb != "off":
            self._attempt("start", lambda: self._start(settings, directory, name, config))

    def _start(self, settings: LoggingConfig, directory: Path, name: str, config: dict[str, Any]) -> None:
        import wandb

        self._run = wandb.init(
            mode=settings.wandb,  # type: ignore[arg-type]
            dir=str(directory),
            project=settings.wandb_project,
            group=settings.wandb_group,
            name=name,
            config=config,
            settings=wandb.Settings(silent=True, console="off", init_timeout=60),
        )

    def log(self, numbers: dict[str, Any], step: int) -> None:
        """Send the numbers of `step`."""
        if self._run is not None:
            self._attempt("log", lambda: self._run.log(numbers, step=step))

    def finish(self) -> None:
        """End the W&B run."""
        if self._run is not None:
            self._attempt("finish", lambda: self._run.finish())

    def _attempt(self, what: str, action: Callable[[], Any]) -> None:
        try:
            action()
        except Exception as error:
            self._run = None
            print(
                f"W&B could not {what} ({type(error).__name__}: {error}); the run continues without it", file=sys.stderr
            )
