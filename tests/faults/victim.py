"""A run that suffers faults, and the undisturbed run that it must equal in the end."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import io
import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from random import Random
from typing import Any

import torch

from tests.faults import harms
from tests.faults.worlds import Harm, World
from tests.train.runs import newest_tensors
from train.checkpoint import locate
from train.checkpoint.__main__ import verify
from train.checkpoint.storage import CheckpointPath, finished
from train.config.one_start import LOCK
from train.distributed.signals import BAD_INPUT
from train.logs.metrics import METRICS, SUPERSEDED, read_records

RANKS, STEPS, EVERY, KEEP = 2, 24, 3, 3
RUN: dict[str, Any] = dict(
    run__steps=STEPS,
    run__max_minutes=30,
    checkpoint__every_steps=EVERY,
    checkpoint__every_minutes=30,
    checkpoint__keep_last=KEEP,
    parallel__timeout_minutes=0.5,
    optim__decay_steps=8,
)
COMPARED = ("step", "tokens", "loss", "validation_loss", "grad_norm", "lr")  # keys of metrics.jsonl
DISK_MB = 32


class TooLate(Exception):
    """The run came to its end before the fault could be injected."""


@dataclass(frozen=True)
class Reference:
    """What an undisturbed run has in the end."""

    records: list[dict[str, Any]]
    tensors: dict[str, torch.Tensor]
    loader: dict[str, Any]

    @classmethod
    def of(cls, directory: Path, records: list[dict[str, Any]] | None = None) -> Reference:
        """`records`: of the run in `directory`, if they are not all in its own file."""
        records = read_records(directory / METRICS) if records is None else records
        compared = [{key: record[key] for key in COMPARED if key in record} for record in records]
        loader = locate.read_state(finished(directory / "checkpoints")[-1])["loader"]
        return cls([r for r in compared if {"loss", "validation_loss"} & r.keys()], newest_tensors(directory), loader)

    def assert_equal(self, other: Reference) -> None:
        """Fail unless `other` is the same, bit for bit."""
        steps, wanted = [r["step"] for r in other.records], [r["step"] for r in self.records]
        assert steps == wanted, f"the records are of the steps {steps}, not {wanted}"
        assert other.records == self.records, "the records differ"
        assert other.loader["next_sample"] == self.loader["next_sample"], "the run is at another sample"
        assert other.tensors.keys() == self.tensors.keys()
        for name, tensor in self.tensors.items():
            assert torch.equal(tensor, other.tensors[name]), f"{name} differs"


def are_whole(checkpoints: Sequence[CheckpointPath]) -> bool:
    """Whether all files of checkpoints are as their manifests say."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        return verify(list(checkpoints)) == 0


def mount(*arguments: str) -> bool:
    """Run `mount`; returns whether this user may."""
    return subprocess.run(["mount", *arguments], capture_output=True).returncode == 0


@dataclass
class Victim:
    """A run that is killed, starved and lied to. `world` is its current start.

    A fault leaves `world` training, or ends it and starts the next one. `finish` checks what must be so in the end.
    """

    corpus: Path
    root: Path
    reference: Callable[[], Reference]
    changes: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    with_disks: bool = False  # whether the run directory and its checkpoints are file systems of their own

    def __post_init__(self) -> None:
        self.changes = RUN | self.changes
        self.root.mkdir(parents=True)
        self._inherited: list[dict[str, Any]] = []  # records up to the checkpoint from which the run goes on
        self._lines: set[bytes] = set()  # sound lines that metrics.jsonl has held
        self._mounts: list[Path] = []
        harms.set_clock(self.clock, 0.0)
        self._own_disks()

    @property
    def clock(self) -> Path:
        return self.root / "clock"

    @property
    def directory(self) -> Path:
        return self.root / self.changes.get("run__name", "default")

    @property
    def place(self) -> Path:
        """Where the checkpoints are."""
        return self.directory / "checkpoints"

    def checkpoints(self) -> list[CheckpointPath]:
        return finished(self.place)

    # -- starts --------------------------------------------------------------------------------------------------------

    def launch(self, harm: Sequence[Harm] = (), **once: Any) -> World:
        """Start the ranks, without waiting for them. `once`: configuration of this start alone."""
        self._remember_lines()
        of_ranks = once.pop("of_ranks", None)
        self.world = World(
            RANKS,
            self.corpus,
            self.root,
            self.changes | once,
            changes_of_ranks=of_ranks,
            harms=[(harms.wrong_clock, str(self.clock)), *([(harms.quick_store,)] if self.environment else []), *harm],
            environment=self.environment,
        )
        return self.world

    def start(self, harm: Sequence[Harm] = (), **once: Any) -> World:
        """Start the ranks, and wait until they train."""
        world = self.launch(harm, **once)
        assert world.wait_until(lambda: world.has_begun), f"the run does not start:\n{world.outputs()}"
        return world

    def refused(self, *words: str, **once: Any) -> str:
        """A start that must be refused by all ranks, in one line with `words`, and change nothing; returns the line."""
        before = self._contents()
        world = self.launch(**once)
        codes = world.end()
        assert codes == [BAD_INPUT] * RANKS, f"exit codes {codes}:\n{world.outputs()}"
        line = self.error_of(world)
        for word in words:
            assert word in line, f"{word!r} is not in: {line}"
        after = self._contents()
        changed = {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}
        assert not changed, f"the refused start changed {sorted(changed)}"
        return line

    @staticmethod
    def error_of(world: World) -> str:
        """The line with which the ranks ended; fails where there is more than that."""
        output = world.output()
        assert "Traceback" not in output, output
        lines = [line for line in output.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1, f"one line of error is right, not {lines}:\n{output}"
        return lines[0]

    def refusal(self) -> str:
        """A start that may go on; where all ranks refuse it instead, the line with which they do, else nothing."""
        world = self.launch()
        if world.wait_until(lambda: world.has_begun):
            return ""
        codes = world.end()
        assert codes == [BAD_INPUT] * RANKS, f"exit codes {codes}:\n{world.outputs()}"
        return self.error_of(world)

    def kill(self, ranks: list[int] | None = None) -> None:
        """SIGKILL; where some ranks live on, a launcher ends them soon."""
        self.check_alive()
        self.world.signal(signal.SIGKILL, ranks)
        self.world.end(patience=2)

    def check_alive(self) -> None:
        """Raise `TooLate` where no rank runs any more."""
        if not self.world.alive:
            raise TooLate

    def wait_for_step(self, step: int) -> None:
        self.world.wait_until(lambda: self.world.step >= step)

    def wait_for_checkpoints(self, number: int) -> list[CheckpointPath]:
        """Wait until there are as many finished checkpoints, and return them."""
        assert self.world.wait_until(lambda: len(self.checkpoints()) >= number), self.world.outputs()
        return self.checkpoints()

    def go_on_as(self, name: str, checkpoint: CheckpointPath) -> None:
        """From now on the run is the new one `name`, which continues `checkpoint`."""
        step = locate.read_state(checkpoint)["step"]
        self._inherited += [r for r in read_records(self.directory / METRICS) if r["step"] <= step]
        self._lines = set()
        self.changes |= dict(run__name=name, resume=str(checkpoint))
        self._own_disks()

    # -- the end -------------------------------------------------------------------------------------------------------

    def finish(self) -> None:
        """Wait for the end, and fail unless it is that of the undisturbed run and nothing was lost on the way."""
        world = self.world
        assert world.end() == [0] * RANKS, world.outputs()
        self._remember_lines()
        records = [*self._inherited, *read_records(self.directory / METRICS)]
        self.reference().assert_equal(Reference.of(self.directory, records))
        lost = self._lines - self.held_records()
        assert not lost, f"{len(lost)} records are lost"
        checkpoints = self.checkpoints()
        assert checkpoints[-1].step == STEPS
        assert are_whole(checkpoints), "a checkpoint is damaged"
        left = [name for name in os.listdir(self.place) if name.endswith((".incomplete", ".removed", ".replaced"))]
        assert not left, f"left behind: {left}"

    def close(self, keep: bool = False) -> None:
        """End what still runs and remove everything, except for the outputs with `keep`."""
        if hasattr(self, "world"):
            self.world.signal(signal.SIGKILL)
            self.world.end()
        for path in reversed(self._mounts):
            subprocess.run(["umount", "--lazy", str(path)], capture_output=True)
        if not keep:
            shutil.rmtree(self.root, ignore_errors=True)

    # -- files ---------------------------------------------------------------------------------------------------------

    def disk(self, path: Path, size: str) -> None:
        """Make `path` a file system of its own, which ends with the victim."""
        path.mkdir(parents=True, exist_ok=True)
        assert mount("-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(path))
        self._mounts.append(path)

    def _own_disks(self) -> None:
        if self.with_disks:
            self.disk(self.directory, f"{DISK_MB}m")
            self.disk(self.place, f"{DISK_MB}m")

    def _contents(self) -> dict[str, str]:
        """A hash of each file of the run."""
        return {
            str(path): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in self.directory.rglob("*")
            if path.is_file() and path.name != LOCK
        }

    def held_records(self) -> set[bytes]:
        """The sound lines of the run's records, those that were set aside included."""
        return self._sound_lines(METRICS) | self._sound_lines(SUPERSEDED)

    def _sound_lines(self, name: str) -> set[bytes]:
        path = self.directory / name
        lines = path.read_bytes().split(b"\n") if path.exists() else []
        return {line for line in lines if line.startswith(b'{"step"') and line.endswith(b"}")}

    def _remember_lines(self) -> None:
        self._lines |= self._sound_lines(METRICS)


class Setting:
    """A corpus, what undisturbed runs on it give, and an object store; shared by the runs of a campaign."""

    def __init__(self, folder: Path, corpus: Path):
        self.folder, self.corpus = folder, corpus
        self._number = 0
        self._references: dict[str, Reference] = {}

    @cached_property
    def may_mount(self) -> bool:
        """Whether this user may mount a small file system."""
        probe = self.folder / "probe"
        probe.mkdir()
        if not mount("-t", "tmpfs", "-o", "size=1m", "tmpfs", str(probe)):
            return False
        subprocess.run(["umount", str(probe)], check=True)
        return True

    @property
    def has_store(self) -> bool:
        """Whether what an object store on this machine needs is installed."""
        return all(importlib.util.find_spec(name) for name in ("s3fs", "moto", "flask"))

    @cached_property
    def store(self) -> Any:
        """An object store with the corpus and its prepared shards."""
        from tests.faults.stores import Store

        self.reference("prepared")  # prepares the shards
        (prepared,) = (path.parent for path in (self.corpus.parent / "cache").glob("corpus*/manifest.json"))
        return Store(self.corpus, prepared, self.folder)

    def reference(self, data: str) -> Reference:
        """What an undisturbed run has in the end. Shards are the same data as the corpus that is prepared."""
        data = "stream" if data == "stream" else "prepared"
        if data not in self._references:
            changes = RUN | (self.store.streamed_here if data == "stream" else {})
            world = World(RANKS, self.corpus, self.folder / f"undisturbed-{data}", changes)
            assert world.end() == [0] * RANKS, world.outputs()
            self._references[data] = Reference.of(world.directory)
        return self._references[data]

    def victim(self, data: str) -> Victim:
        """A run that has not begun yet, on data of a kind: prepared, stream or shards."""
        self._number += 1
        root = self.folder / f"run-{self._number}"
        environment = {} if data == "prepared" else self.store.environment
        changes = {} if data == "prepared" else self.store.changes(data, self.folder / f"cache-{self._number}")
        return Victim(self.corpus, root, lambda: self.reference(data), changes, environment, with_disks=self.may_mount)

    def close(self) -> None:
        if "store" in self.__dict__:
            self.store.close()


@dataclass
class Case:
    """One injection: the run that suffers it, its own random numbers, and what is shared."""

    victim: Victim
    draw: Random
    setting: Setting
