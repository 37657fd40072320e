"""What a run directory says from outside: how far the run is, who works on it, how it was launched. No torch."""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import json
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from launch.config import LaunchError


@dataclass(frozen=True)
class Record:
    """`RUN/launch/launch.json`: how a run was started last."""

    target: str
    command: list[str]  # `python -m launch` and its arguments
    jobs: list[str]  # Slurm job ids, oldest first; on Kubernetes NAMESPACE/NAME of each TrainJob
    started: str


@dataclass(frozen=True)
class Progress:
    """How far a run is."""

    step: int  # of the newest complete checkpoint
    steps: int | None  # None: no configuration was written yet
    last_line: dict[str, Any] | None  # newest record with a step and a loss

    @property
    def finished(self) -> bool:
        return self.steps is not None and self.step >= self.steps


def launch_directory(run: Path) -> Path:
    return run / "launch"


# What makes a directory a run or a sweep. A folder `launch` alone does not: the project's own package has that name.
MARKS = ("launch/launch.json", "launch/lock", "launch/logs", "config.yaml", "sweep.json")


def find(text: str) -> Path:
    """A run directory, or the name of one below `runs/`."""
    if not text.strip():
        raise LaunchError(f"{text!r} names no run: give its directory, or its name below runs/")
    for path in (Path(text), Path("runs") / text):
        if any((path / mark).exists() for mark in MARKS):
            return path.resolve()
    raise LaunchError(f"{text}: neither a run directory nor a run below runs/")


def make_directory(path: Path) -> None:
    """With its parents, or `LaunchError`."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LaunchError(f"{path} cannot be made ({error.strerror}): choose another run.root or run.name") from None


def progress(run: Path) -> Progress:
    """Read from config.yaml, the checkpoints and metrics.jsonl; a run that has none of them is at step 0.

    Any of them may be damaged, or half written: what cannot be read is as if it were not there.
    """
    config = _mapping(_yaml(run / "config.yaml"))
    settings = _mapping(config.get("run"))
    elsewhere = _mapping(config.get("checkpoint")).get("dir")
    place = run / "checkpoints" if elsewhere is None else f"{elsewhere}/{settings.get('name')}"
    steps = settings.get("steps")
    return Progress(
        max(_saved_steps(str(place)), default=0), steps if isinstance(steps, int) else None, _last_line(run)
    )


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _yaml(path: Path) -> Any:
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8", errors="replace"))
    except (OSError, yaml.YAMLError):
        return None


def _last_line(run: Path) -> dict[str, Any] | None:
    last = None
    with contextlib.suppress(OSError):
        for line in (run / "metrics.jsonl").read_text(encoding="utf-8", errors="replace").splitlines():
            with contextlib.suppress(ValueError):
                entry = _mapping(json.loads(line))
                last = entry if _is_number(entry.get("loss")) and _is_number(entry.get("step")) else last
    return last


def _saved_steps(place: str) -> list[int]:
    """Steps of the complete checkpoints in a directory, or behind a URL."""
    if "://" in place:
        from train.checkpoint_files import Place, finished  # imports torch

        return [saved.step for saved in finished(Place(place))]
    return [int(p.name[5:]) for p in Path(place).glob("step-*") if p.name[5:].isdigit()]


def write_record(run: Path, record: Record) -> None:
    path = launch_directory(run) / "launch.json"
    make_directory(path.parent)
    aside = path.with_suffix(".tmp")
    aside.write_text(json.dumps(asdict(record), indent=1) + "\n", encoding="utf-8")
    os.replace(aside, path)


def now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


def read_record(run: Path) -> Record | None:
    try:
        return Record(**json.loads((launch_directory(run) / "launch.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


@contextlib.contextmanager
def locked(run: Path, wait_seconds: float = 0.0) -> Iterator[int]:
    """Hold the run directory for this process and for those that inherit the yielded descriptor.

    Agents inherit it, so a launcher that was killed leaves the lock with them until their ranks have ended.
    """
    path = launch_directory(run) / "lock"
    make_directory(path.parent)
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise LaunchError(f"{path} cannot be written ({error.strerror}): choose another run.root or run.name") from None
    deadline, told = time.monotonic() + wait_seconds, False
    try:
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError:
                if time.monotonic() >= deadline:
                    raise LaunchError(
                        f"{run} is held by another launch (process {holder(run) or 'unknown'}); end that one first"
                    ) from None
                if not told:
                    told = True
                    print(
                        f"{run} is held by process {holder(run) or 'unknown'}; waiting up to {wait_seconds:.0f} s",
                        file=sys.stderr,
                    )
                time.sleep(0.2)
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        yield descriptor
    finally:
        os.close(descriptor)


def holder(run: Path) -> int | None:
    """The process that holds the lock or held it last."""
    try:
        return int((launch_directory(run) / "lock").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def is_held(run: Path) -> bool:
    """Whether some process holds the run directory now."""
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
