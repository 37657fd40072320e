"""Whether every rank can write where checkpoints go, tried before anything heavy starts."""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Iterator
from pathlib import Path

from train.checkpoint.storage import CheckpointPath
from train.config.errors import ConfigError
from train.config.schema import TrainConfig
from train.distributed.ranks import Ranks


def check_writable(config: TrainConfig, directory: CheckpointPath, ranks: Ranks) -> None:
    """Raise `ConfigError` on every rank unless all can write below `directory`, and to the same place. Collective.

    `directory` is the run's directory of checkpoints. It is not created, so a start that is refused later leaves
    nothing behind: the probes go to the nearest directory that exists, or behind a URL to `directory` itself.
    """
    key = f"run.root={config.run.root} and run.name={config.run.name}"
    with ranks.failing_together():
        if ranks.is_main and config.checkpoint.dir is not None:
            with _probe(CheckpointPath(config.run.directory), key, ranks) as folder:
                _write(folder, key, ranks)
    key = key if config.checkpoint.dir is None else f"checkpoint.dir={config.checkpoint.dir}"
    with contextlib.ExitStack() as stack:
        place = ""
        with ranks.failing_together():
            if ranks.is_main:
                folder = stack.enter_context(_probe(directory, key, ranks))
                _write(folder, key, ranks)
                place = str(folder)
        folder = CheckpointPath(ranks.from_main(place, "rank 0, which tries whether it can write checkpoints"))
        with ranks.failing_together():
            if not ranks.is_main:
                _write(folder, key, ranks)

        def judge(names: list[str]) -> str:
            return next((_not_shared(key, names[0], name) for name in names if not (folder / _file(name)).exists()), "")

        ranks.judge(ranks.name(), judge, "which tries whether it can write checkpoints")


@contextlib.contextmanager
def _probe(directory: CheckpointPath, key: str, ranks: Ranks) -> Iterator[CheckpointPath]:
    """A new folder to write to; it is removed in the end."""
    folder = directory / f".probe-{uuid.uuid4().hex[:12]}"
    if directory.is_local:
        with _refusing(key, folder, ranks):
            folder = CheckpointPath(_existing(directory.path)) / folder.name
    try:
        with _refusing(key, folder, ranks):
            if folder.is_local:
                os.mkdir(folder.path)
        yield folder
    finally:
        with contextlib.suppress(Exception):
            folder.remove()


def _write(folder: CheckpointPath, key: str, ranks: Ranks) -> None:
    """Write this rank's file."""
    if not ranks.is_main and folder.is_local and not Path(folder.path).is_dir():
        raise ConfigError(_not_shared(key, "rank 0", ranks.name()))
    with _refusing(key, folder, ranks):
        (folder / _file(ranks.name())).write(b"probe")


@contextlib.contextmanager
def _refusing(key: str, folder: CheckpointPath, ranks: Ranks) -> Iterator[None]:
    """Turn any error of a file system or an object store into `ConfigError`."""
    try:
        yield
    except Exception as error:
        reason = getattr(error, "strerror", None) or f"{type(error).__name__}: {' '.join(str(error).split())}"
        above = str(folder).rpartition("/")[0]
        raise ConfigError(
            f"{key}: {ranks.name()} cannot write below {above} ({reason}): name a place that every rank can write to"
        ) from error


def _not_shared(key: str, first: str, other: str) -> str:
    return (
        f"{key}: {other} does not write to the same place as {first}, so no checkpoint would be whole: name a "
        "directory that all hosts share, or a URL"
    )


def _file(name: str) -> str:
    """The file of a rank, by the rank's name."""
    return name.split(" on ")[0].replace(" ", "-")


def _existing(path: str) -> str:
    """The nearest entry that exists at or above a local path. Raises `OSError`."""
    return str(next(p for p in (Path(path), *Path(path).absolute().parents) if p.exists()))
