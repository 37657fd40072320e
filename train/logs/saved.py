"""What a run directory remembers of the run's checkpoints, so that a start that cannot find them stops.

`last_checkpoint.json` is written each time that a checkpoint is finished. It is never used to choose one: the newest is
found by listing (`train.checkpoint.storage`). A run from before that file has its `config.yaml`, which says where its
checkpoints were, and its `metrics.jsonl`, which tells of saves that were begun.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from data_pipeline.store.files import atomic_write
from train.checkpoint import locate
from train.checkpoint.storage import CheckpointError, CheckpointPath, finished
from train.config import run_directory
from train.config.errors import ConfigError
from train.config.schema import TrainConfig
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


def check_nothing_is_missing(config: TrainConfig, own: CheckpointPath) -> None:
    """Raise `CheckpointError` if the run of `config` has finished checkpoints, and they are not in `own`.

    Call where `own`, its directory of checkpoints, holds none. A run that would begin afresh by mistake would count its
    steps again from 0.
    """
    directory = config.run.directory
    known = _remembered(directory, own)
    if known is None or (config.resume != "auto" and known.resume != config.resume):
        return  # a path that the user gives now is a decision
    if known.place is not None and str(known.place) != str(own) and (left := finished(known.place)):
        raise CheckpointError(
            f"checkpoint.dir={config.checkpoint.dir} and run.name={config.run.name} name {own}, which holds no "
            f"checkpoint, but {directory} has its checkpoints in {known.place} (the newest is {left[-1].name}): move "
            f"them there, or give resume={known.place} to go on from them, or resume=never to start from scratch"
        )
    raise CheckpointError(
        f"{directory} has been saved at step {known.step}"
        + ("" if known.place is None else f" below {known.place}")
        + f", but there is no checkpoint in {own}: mount that file system, or set checkpoint.dir and run.name to where "
        "the checkpoints are; resume=never starts from scratch"
    )


@dataclass(frozen=True)
class _Known:
    """The last save that a run directory tells of: its step, the directory of checkpoints, and the run's `resume`."""

    step: int
    place: CheckpointPath | None
    resume: str


def _remembered(directory: Path, own: CheckpointPath) -> _Known | None:
    try:
        known = json.loads((directory / MEMORY).read_bytes())
        return _Known(int(known["step"]), CheckpointPath(known["path"]).parent, str(known["resume"]))
    except (OSError, ValueError, KeyError, TypeError):
        pass  # absent, or not ours; so is a run of an earlier version
    resume = "auto"
    with contextlib.suppress(ConfigError):  # no config.yaml, or a damaged one, which its own check reports
        before = run_directory.read_config(directory)
        resume = before.resume
        place = locate.checkpoint_directory(directory, before.checkpoint.dir, before.run.name)
        if str(place) != str(own) and (left := finished(place)):
            return _Known(left[-1].step, place, resume)
    try:
        saves = [record["step"] for record in read_records(directory / METRICS) if "checkpoint_seconds" in record]
    except OSError:
        return None
    if not saves or own.exists():  # a save that was begun need not have been finished
        return None
    return _Known(max(saves), None, resume)
