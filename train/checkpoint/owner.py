"""Whose directory of checkpoints it is, noted there before the first of them.

Two runs that start at the same moment in one empty directory would otherwise find each other at their first save. Once
there is a checkpoint, its configuration tells whether another run may go on from it (`train.start`). That the same run
is not started twice at the same time is the matter of `train.config.one_start`.
"""

from __future__ import annotations

import hashlib
import json
import socket
from datetime import datetime, timezone
from pathlib import Path

from data_pipeline.store.files import atomic_write
from train.checkpoint.storage import CheckpointError, CheckpointPath, finished

OWNER = "owner.json"  # in the directory of checkpoints
RUN_ID = "run_id.txt"  # in the run directory


def run_id(directory: Path) -> str:
    """What the run in `directory` is known by: the line in its `run_id.txt`, which moves with it, or its path's hash.

    So a run that was killed, and one whose directory is lost and made again, is the same run.
    """
    try:
        known = (directory / RUN_ID).read_text(encoding="utf-8").strip()
    except (OSError, ValueError):
        known = ""
    return known or hashlib.sha256(str(directory.absolute()).encode(errors="surrogateescape")).hexdigest()[:12]


def claim(own: CheckpointPath, directory: Path) -> None:
    """Note in `own`, if it holds no checkpoint, that the run in `directory` writes there. For one process of the run.

    Raises `CheckpointError` if another run has done so, and `OSError`. On an object store that cannot create a file
    exclusively, two starts within one request of each other may both pass.
    """
    if finished(own):
        return
    mine = run_id(directory)
    facts = {
        "run_id": mine,
        "run_directory": str(directory.absolute()),
        "host": socket.gethostname(),
        "since": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
    own.make()
    held = (own / OWNER).create_exclusively(json.dumps(facts, indent=1).encode())
    try:
        there = json.loads(held)
        owner, place = there["run_id"], f"{there['run_directory']} on {there['host']}, since {there['since']}"
    except (ValueError, KeyError, TypeError):
        owner, place = None, f"another run ({own / OWNER} cannot be read)"
    if owner != mine:
        raise CheckpointError(
            f"{own} holds no checkpoint yet and belongs to the run in {place}: choose another run.name or "
            f"checkpoint.dir, or, if that run is over, remove {own / OWNER}"
        )


def note_run_id(directory: Path) -> None:
    """Write the run's id into its directory, where it has none."""
    if not (directory / RUN_ID).is_file():
        with atomic_write(directory / RUN_ID) as file:
            file.write(f"{run_id(directory)}\n".encode())
