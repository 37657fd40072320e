"""What a run directory remembers of the run's checkpoints, so that a start that cannot find them stops.

`last_checkpoint.json` is written each time that a checkpoint is finished. It is never used to choose one: the newest is
found by listing (`train.checkpoint.storage`). A run from before that file has its `metrics.jsonl`, which tells of saves
that were begun.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from data_pipeline.store.files import atomic_write
from train.checkpoint.storage import CheckpointError, CheckpointPath
from train.logs.metrics import METRICS, read_records

MEMORY = "last_checkpoint.json"


def remember(directory: Path, resume: str, say: Callable[[str], object]) -> Callable[[CheckpointPath, int], None]:
    """A function that notes in the run directory that a checkpoint of a step is finished.

    `resume`: the run's. `say` takes a line for the user, where the note cannot be written.
    """

    def note(checkpoint: CheckpointPath, step: int) -> None:
        try:
            with atomic_write(directory / MEMORY) as file:
                file.write(json.dumps({"step": step, "path": str(checkpoint), "resume": resume}).encode() + b"\n")
        except OSError as error:
            say(f"{directory / MEMORY} cannot be written ({error.strerror or error}); {checkpoint} is finished anyway")

    return note


def forget(directory: Path) -> None:
    """Call when the run begins at step 0 on purpose."""
    (directory / MEMORY).unlink(missing_ok=True)


def check_nothing_is_missing(directory: Path, resume: str, checkpoints: CheckpointPath) -> None:
    """Raise `CheckpointError` if the run in `directory` has finished checkpoints that are not in `checkpoints`.

    Call where that holds none. A run that would begin afresh by mistake would count its steps again from 0.
    """
    known = _remembered(directory, checkpoints)
    if known is None or (resume != "auto" and known["resume"] != resume):
        return  # a path that the user gives now is a decision
    raise CheckpointError(
        f"{directory} has been saved at step {known['step']}"
        + (f" as {known['path']}" if "path" in known else "")
        + f", but there is no checkpoint in {checkpoints}: mount that file system, or set checkpoint.dir and run.name "
        "to where the checkpoints are; resume=never starts from scratch"
    )


def _remembered(directory: Path, checkpoints: CheckpointPath) -> dict[str, Any] | None:
    try:
        known = json.loads((directory / MEMORY).read_bytes())
        return {"step": int(known["step"]), "path": str(known["path"]), "resume": str(known["resume"])}
    except (OSError, ValueError, KeyError, TypeError):
        pass  # absent, or not ours
    try:
        saves = [record["step"] for record in read_records(directory / METRICS) if "checkpoint_seconds" in record]
    except OSError:
        return None
    if not saves or checkpoints.exists():  # a save that was begun need not have been finished
        return None
    try:
        resume = yaml.safe_load((directory / "config.yaml").read_text(encoding="utf-8"))["resume"]
    except (OSError, ValueError, yaml.YAMLError, KeyError, TypeError):
        resume = "auto"
    return {"step": max(saves), "resume": resume}
