"""Run directories as the launcher sees them: progress, lock, and how the run was launched. Imports no torch."""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from launch.errors import LaunchError
from train.checkpoint.storage import CheckpointError, finished
from train.logs.metrics import METRICS, is_number, read_records


@dataclass(frozen=True)
class Run:
    """One training run to submit: a sweep has one for each point, any other launch has one."""

    name: str
    overrides: Sequence[str]
    directory: Path


@dataclass(frozen=True)
class Record:
    """`RUN/launch/launch.json`: the last launch of a run."""

    target: str
    command: list[str]  # `python -m launch` and its arguments
    jobs: list[str]  # Slurm job ids, oldest first; on Kubernetes NAMESPACE/NAME of each TrainJob
    started: str


@dataclass(frozen=True)
class Progress:
    """How far a run has come."""

    step: int  # of the newest complete checkpoint
    steps: int | None  # None: config.yaml does not exist yet
    last_line: dict[str, Any] | None  # the newest record of metrics.jsonl with a loss

    @property
    def finished(self) -> bool:
        """Whether the newest checkpoint is at the last step."""
        return self.steps is not None and self.step >= self.steps


def launch_directory(run: Path) -> Path:
    """Where the launcher keeps its files of a run."""
    return run / "launch"


# Any of these makes a directory a run or a sweep. A folder `launch` alone does not: the source package has that name.
MARKERS = ("launch/launch.json", "launch/lock", "launch/logs", "config.yaml", "sweep.json")


def find(text: str) -> Path:
    """The run directory `text`, or the one with that name below `runs/`. Raises `LaunchError`."""
    if not text.strip():
        raise LaunchError(f"{text!r} names no run: give its directory, or its name below runs/")
    for path in (Path(text), Path("runs") / text):
        if any((path / marker).exists() for marker in MARKERS):
            return path.resolve()
    raise LaunchError(f"{text} is neither a run directory nor the name of a run below runs/")


def make_directory(path: Path) -> None:
    """Create `path` and its parents. Raises `LaunchError`."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LaunchError(f"{path} cannot be created ({error.strerror}): choose another run.root or run.name") from None


def progress(run: Path) -> Progress:
    """Read a run's progress from config.yaml, its checkpoints and metrics.jsonl.

    A file that is missing, damaged or half written counts as empty. Raises `LaunchError` where the checkpoints cannot
    be listed.
    """
    config = _mapping(_yaml(run / "config.yaml"))
    settings = _mapping(config.get("run"))
    remote = _mapping(config.get("checkpoint")).get("dir")
    checkpoints = run / "checkpoints" if remote is None else f"{remote}/{settings.get('name')}"
    try:
        step = max((checkpoint.step for checkpoint in finished(checkpoints)), default=0)
    except (OSError, CheckpointError) as error:
        raise LaunchError(f"{checkpoints} cannot be listed: {error}") from error
    steps = settings.get("steps")
    return Progress(step, steps if isinstance(steps, int) else None, _last_line(run))


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _yaml(path: Path) -> Any:
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8", errors="replace"))
    except (OSError, yaml.YAMLError):
        return None


def _last_line(run: Path) -> dict[str, Any] | None:
    try:
        records = read_records(run / METRICS)
    except OSError:
        return None
    return next((record for record in reversed(records) if is_number(record.get("loss"))), None)


def write_record(run: Path, record: Record) -> None:
    """Replace the run's record. Raises `LaunchError` or `OSError`."""
    path = launch_directory(run) / "launch.json"
    make_directory(path.parent)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(asdict(record), indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def now() -> str:
    """The time in UTC, in ISO 8601."""
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


def read_record(run: Path) -> Record | None:
    """The run's record; None where it is missing or damaged."""
    try:
        return Record(**json.loads((launch_directory(run) / "launch.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


@contextlib.contextmanager
def locked(run: Path, wait_seconds: float = 0.0) -> Iterator[int]:
    """Lock the run directory for this process and for every process that inherits the yielded descriptor.

    Agents inherit it: when a launcher is killed, its agents keep the lock until their ranks have ended.
    Raises `LaunchError` if another launch still holds the lock after `wait_seconds`.
    """
    path = launch_directory(run) / "lock"
    make_directory(path.parent)
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise LaunchError(f"{path} cannot be written ({error.strerror}): choose another run.root or run.name") from None
    deadline, announced = time.monotonic() + wait_seconds, False
    try:
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError:
                if time.monotonic() >= deadline:
                    raise LaunchError(
                        f"{run} is locked by another launch (process {holder(run) or 'unknown'}); stop that one first"
                    ) from None
                if not announced:
                    announced = True
                    print(
                        f"{run} is locked by process {holder(run) or 'unknown'}; waiting up to {wait_seconds:.0f} s",
                        file=sys.stderr,
                    )
                time.sleep(0.2)
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        yield descriptor
    finally:
        os.close(descriptor)


def holder(run: Path) -> int | None:
    """The process that holds the run's lock, or held it last."""
    try:
        return int((launch_directory(run) / "lock").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def is_held(run: Path) -> bool:
    """Whether some process holds the run's lock now."""
    try:
        descriptor = os.open(launch_directory(run) / "lock", os.O_RDWR)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return False
    except OSError:
        return True
    finally:
        os.close(descriptor)
