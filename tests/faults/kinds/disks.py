"""Faults of file systems: full, read-only, not mounted. Each needs a user who may mount."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator
from pathlib import Path

from tests.faults.victim import DISK_MB, EVERY, RANKS, Case, TooLate, mount
from train.distributed.signals import NOT_SAVED


@contextlib.contextmanager
def full(disk: Path) -> Iterator[None]:
    """A file takes all the room of a file system; in the end it is removed."""
    filler = disk / "filler"
    try:
        with contextlib.suppress(OSError), open(filler, "wb", buffering=0) as file:
            while file.write(b"x" * (1 << 16)):
                pass
        with contextlib.suppress(OSError), open(filler, "ab", buffering=0) as file:
            while file.write(b"x"):
                pass
        yield
    finally:
        filler.unlink(missing_ok=True)


def full_disk_at_a_log_line(case: Case) -> None:
    victim = case.victim
    with full(victim.directory):
        failed = victim.world.wait_until(lambda: "metrics.jsonl cannot be written" in victim.world.output())
    if not failed:
        raise TooLate
    assert victim.world.wait_until(lambda: "metrics.jsonl is written again" in victim.world.output())


def full_disk_at_a_save(case: Case) -> None:
    """Room comes back after the first failure, or only once the run has ended without its last checkpoint."""
    victim, to_the_end = case.victim, case.draw.random() < 0.5
    world = victim.world
    with full(victim.place):
        tried = world.wait_until(lambda: "CHECKPOINT FAILED" in world.output() or "is full: removed" in world.output())
        assert tried, world.outputs()
        if not to_the_end:
            return
        codes = world.end()
    if codes != [0] * RANKS:  # it found room by removing what goes anyway
        assert codes == [NOT_SAVED] * RANKS, f"exit codes {codes}:\n{world.outputs()}"
        assert "could not be saved below" in victim.error_of(world)
        victim.start()


def read_only_checkpoints(case: Case) -> None:
    """The file system of the checkpoints becomes read-only, while the run trains or between two starts."""
    victim = case.victim
    if case.draw.random() < 0.5:
        victim.kill()
        assert mount("-o", "remount,ro", str(victim.place))
        try:
            victim.refused(str(victim.place), "cannot write below", "Read-only file system")
        finally:
            assert mount("-o", "remount,rw", str(victim.place))
        victim.start()
        return
    world = victim.world
    while not mount("-o", "remount,ro", str(victim.place)):  # refused while a file is open for writing
        victim.check_alive()
    try:
        failed = world.wait_until(lambda: "CHECKPOINT FAILED" in world.output())
    finally:
        assert mount("-o", "remount,rw", str(victim.place))
    assert failed and "Read-only file system" in world.output(), world.outputs()


def unmounted_checkpoints(case: Case) -> None:
    """A start finds an empty directory where the checkpoints were: it must not begin from scratch."""
    victim = case.victim
    victim.wait_for_checkpoints(1)
    victim.kill()
    elsewhere = victim.root / "elsewhere"
    elsewhere.mkdir(exist_ok=True)
    assert mount("--move", str(victim.place), str(elsewhere))
    try:
        victim.refused(str(victim.directory), "has been saved at step", "mount that file system", "resume=never")
    finally:
        assert mount("--move", str(elsewhere), str(victim.place))
    world = victim.start()
    assert world.resumed_at >= EVERY


def full_disk_in_the_data_cache(case: Case) -> None:
    """The disk of the data cache is too small for what is prepared; more room comes later."""
    victim = case.victim
    victim.kill()
    cache = victim.root / f"cache-{case.draw.randrange(10**9)}"
    victim.disk(cache, f"{case.draw.randrange(8, 100)}k")
    victim.changes["data__cache_dir"] = str(cache)
    victim.refused(str(cache), "No space left on device")
    subprocess.run(["mount", "-o", f"remount,size={DISK_MB}m", str(cache)], check=True)
    victim.start()
