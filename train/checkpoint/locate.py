"""Which directory holds a run's checkpoints, and which checkpoint `resume` or `init_from` means."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from train.checkpoint.storage import MANIFEST, STATE, CheckpointError, CheckpointPath, finished

FORMAT = 2
READABLE = (1, 2)  # 1 has no random generators, no count of optimizer steps and no health


def checkpoint_directory(run_directory: Path, remote: str | None, run_name: str) -> CheckpointPath:
    """Where a run keeps its checkpoints: in its own directory, or with `remote` (`checkpoint.dir`) below that."""
    return CheckpointPath(run_directory / "checkpoints") if remote is None else CheckpointPath(remote) / run_name


def directory_of(location: str) -> CheckpointPath:
    """The directory of checkpoints that `location` means: a run directory, or the directory itself."""
    inner, settings = CheckpointPath(location) / "checkpoints", Path(location) / "config.yaml"
    if inner.exists():
        return inner
    try:
        written = yaml.safe_load(settings.read_text(encoding="utf-8"))
        remote, name = written["checkpoint"]["dir"], written["run"]["name"]
    except (OSError, ValueError, yaml.YAMLError, KeyError, TypeError):  # not a run directory, or no such keys in it
        return CheckpointPath(location)
    return CheckpointPath(location) if remote is None else checkpoint_directory(Path(location), remote, name)


def find(resume: str, own: str | os.PathLike, key: str = "resume") -> CheckpointPath | None:
    """The checkpoint that `resume` means for a run that keeps its checkpoints in `own`; None: start from scratch.

    `resume` is auto (the newest in `own`), never, or a path: a checkpoint, or a run directory, which means its newest.
    The result is not verified. `key` names the configuration key in messages.
    """
    if resume == "never":
        return None
    if resume == "auto":
        checkpoints = finished(own)
        return checkpoints[-1] if checkpoints else None
    try:
        for directory in (CheckpointPath(resume), directory_of(resume)):
            if MANIFEST in directory.entries():
                return directory
            if checkpoints := finished(directory):
                return checkpoints[-1]
    except OSError as error:  # a name that is too long, no permission, a file system that does not answer
        raise CheckpointError(
            f"{key}={resume}: cannot be read ({error.strerror or error}); give another path"
        ) from error
    raise CheckpointError(
        f"{key}={resume}: neither a checkpoint (a directory with {MANIFEST}) nor a run directory that holds one; "
        "give such a path"
        + (", or resume=auto to continue this run, or resume=never to start from scratch" if key == "resume" else "")
    )


def began_with(checkpoints: Sequence[CheckpointPath], resume: str) -> bool:
    """Whether the newest of a run's checkpoints that can be read was written under the same `resume`.

    Such a run goes on from its own checkpoints, whatever has become of the path since.
    """
    for checkpoint in reversed(checkpoints):
        try:
            return json.loads((checkpoint / STATE).read())["config"]["resume"] == resume
        except (OSError, ValueError, KeyError, TypeError):
            continue  # damaged: choosing one reports it
    return False


def read_state(checkpoint: CheckpointPath) -> dict[str, Any]:
    """state.json of a checkpoint. Raises `CheckpointError` for a format that this version cannot read."""
    try:
        state = json.loads((checkpoint / STATE).read())
        version = state.get("format")
    except (OSError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{checkpoint / STATE} cannot be read: {error}") from error
    if version not in READABLE:
        libraries = ", ".join(f"{name} {version}" for name, version in state.get("versions", {}).items())
        raise CheckpointError(
            f"{checkpoint} has checkpoint format {version}{f' (written with {libraries})' if libraries else ''}, this "
            f"version reads {', '.join(map(str, READABLE))}: use the version of this project that wrote it"
        )
    return state
