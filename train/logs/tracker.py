"""Weights & Biases: the only module that imports it."""

from __future__ import annotations

import contextlib
import os
import re
import sys
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from data_pipeline.store.files import atomic_write
from train.config.sections import LoggingConfig
from train.logs.streams import Unbreakable

_ID = re.compile(r"[\w-]{1,64}")


RUN_ID = "wandb_run_id.txt"  # in the run directory


def _run_id(directory: Path) -> str:
    """The id of the W&B run: the one that the environment asks for, or that of the first start in `directory`."""
    path = directory / RUN_ID
    try:
        known = path.read_text(encoding="utf-8").strip()
    except OSError:
        known = ""
    chosen = os.environ.get("WANDB_RUN_ID") or (known if _ID.fullmatch(known) else uuid.uuid4().hex[:12])
    if chosen != known:
        with contextlib.suppress(OSError), atomic_write(path) as file:  # a full disk; the id is good for this start
            file.write(f"{chosen}\n".encode())
    return chosen


def forget_run(directory: Path) -> None:
    """Let the next start in `directory` open a new W&B run."""
    (directory / RUN_ID).unlink(missing_ok=True)


class Tracker:
    """A W&B run that never stops training: a failure in it is reported once, and the run continues without it.

    A training run that is started again continues the same W&B run, whose id is in the run directory. Offline, W&B
    writes a directory for each start, and all of them have the id.
    """

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
            id=_run_id(directory),
            resume="allow" if settings.wandb == "online" else None,  # offline, W&B has nobody to ask
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
            text = f"W&B could not {what} ({type(error).__name__}: {error}); the run continues without it"
            print(text, file=Unbreakable(sys.stderr))
