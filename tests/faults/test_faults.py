"""Runs that suffer kills, full disks and damaged files end bit for bit like an undisturbed run.

Ten faults by default; `FAULTS=50 python -m pytest tests/faults -s` injects fifty, half of them kills. Their moments are
drawn from a seed, which is printed; set another with `FAULT_SEED=n`.
"""

import contextlib
import os
import random
import signal
import subprocess
import time

import pytest
import torch

from tests.faults.worlds import World
from tests.train.runs import losses, newest_tensors
from train.checkpoint import storage
from train.checkpoint.__main__ import verify
from train.checkpoint.storage import finished
from train.distributed.signals import REQUEUE
from train.logs.metrics import read_records

FAULTS = int(os.environ.get("FAULTS", "10"))
SEED = int(os.environ.get("FAULT_SEED", "6"))
RANKS, STEPS, EVERY = 2, 24, 3
RUN = dict(
    run__steps=STEPS,
    checkpoint__every_steps=EVERY,
    checkpoint__keep_last=3,
    parallel__timeout_minutes=0.5,
    optim__decay_steps=8,
)
pytestmark = pytest.mark.slow


def checkpoints(world):
    return finished(world.directory / "checkpoints")


def is_saving(world):
    """Whether a checkpoint is being written."""
    with contextlib.suppress(FileNotFoundError):
        return any(p.name.endswith(".incomplete") for p in (world.directory / "checkpoints").iterdir())
    return False


@pytest.fixture(scope="module")
def undisturbed(corpus, tmp_path_factory):
    root = tmp_path_factory.mktemp("undisturbed")
    world = World(RANKS, corpus, root, RUN)
    assert world.end() == [0] * RANKS, world.output()
    return losses(read_records(world.directory / "metrics.jsonl")), newest_tensors(world.directory)


def assert_same_end(directory, undisturbed):
    want, tensors = undisturbed
    assert losses(read_records(directory / "metrics.jsonl")) == want and len(want) == STEPS
    mine = newest_tensors(directory)
    assert mine.keys() == tensors.keys()
    for name, tensor in mine.items():
        assert torch.equal(tensor, tensors[name]), name


# -- faults: each gets a training world and a random generator, and returns when the world has ended ------------------


def kill(world, draw, ranks, seconds=None):
    if seconds is not None:
        time.sleep(seconds)
    world.signal(signal.SIGKILL, ranks)
    world.end(patience=2)


def kill_one(world, draw):
    kill(world, draw, [draw.randrange(RANKS)], draw.uniform(0, 0.3))


def kill_all(world, draw):
    kill(world, draw, None, draw.uniform(0, 0.3))


def kill_while_saving(world, draw):
    world.wait_until(lambda: is_saving(world), every=0.0005)
    kill(world, draw, draw.choice([None, [0], [1]]), draw.uniform(0, 0.02))


def stop_while_saving(world, draw):
    world.wait_until(lambda: is_saving(world), every=0.0005)
    world.signal(signal.SIGTERM)
    assert set(world.end()) <= {REQUEUE, 0}, world.output()


def two_checkpoints(world):
    world.wait_until(lambda: len(checkpoints(world)) >= 2)
    world.signal(signal.SIGKILL)
    world.end()
    return checkpoints(world)[-1]


def flip_a_byte(world, draw):
    newest = two_checkpoints(world)
    with open(newest / draw.choice(sorted(newest.entries().keys() - {"manifest.json"})), "r+b") as file:
        at = draw.randrange(os.fstat(file.fileno()).st_size)
        file.seek(at)
        byte = file.read(1)[0] ^ (1 << draw.randrange(8))
        file.seek(at)
        file.write(bytes([byte]))


def truncate_a_file(world, draw):
    newest = two_checkpoints(world)
    path = newest / draw.choice(sorted(newest.entries()))
    os.truncate(path, draw.randrange(os.path.getsize(path)))


def remove_a_file(world, draw):
    newest = two_checkpoints(world)
    (newest / draw.choice(sorted(newest.entries()))).remove()


KILLS = [kill_one, kill_while_saving, kill_all]
DAMAGE = [flip_a_byte, truncate_a_file, remove_a_file]
# Most are kills, as in practice; every kind occurs among the first seven.
KINDS = [kill_one, kill_while_saving, flip_a_byte, kill_all, stop_while_saving, truncate_a_file, remove_a_file]


def test_kills_and_damage_at_random_moments(corpus, tmp_path, undisturbed):
    draw = random.Random(SEED)
    injected, recovered, steps_lost, runs, log = 0, 0, 0, 0, []
    while injected < FAULTS:
        runs += 1
        changes = RUN | dict(run__name=f"run-{runs}")
        pending = None  # the fault from which the next start must recover
        for _ in range(12):
            world = World(RANKS, corpus, tmp_path, changes)
            begun = world.wait_until(lambda w=world: w.has_begun)
            if pending is not None:
                kind, before, damaged = pending
                assert begun, world.output()
                lost = max(0, before - world.resumed_at)
                if damaged:
                    assert "DAMAGED CHECKPOINT" in world.output() and "set aside as" in world.output()
                recovered, steps_lost = recovered + 1, steps_lost + lost
                log.append(f"{kind} after step {before}: resumed at {world.resumed_at}, {lost} steps lost")
                pending = None
            # At most four per run, and none near its end.
            if injected < FAULTS and injected < 4 * runs and world.step < STEPS - 2 * EVERY and world.alive:
                fault = KINDS[injected] if injected < len(KINDS) else draw.choice(KINDS + KILLS)
                moment = world.step + draw.randrange(EVERY + 1)
                world.wait_until(lambda w=world, step=moment: w.step >= step)
                fault(world, draw)
                injected += 1
                pending = (fault.__name__, world.step, fault in DAMAGE)
                continue
            assert world.end() == [0] * RANKS, world.output()
            break
        assert pending is None, f"not finished after 12 starts: {log}"
        assert_same_end(tmp_path / changes["run__name"], undisturbed)
    print(f"\nseed {SEED}, {runs} runs of {STEPS} steps on {RANKS} ranks, a checkpoint every {EVERY} steps")
    print("\n".join(f"  {line}" for line in log))
    kills = sum(line.startswith("kill") for line in log)
    print(f"faults injected {injected} ({kills} of them kills), recovered {recovered}, steps lost {steps_lost}")
    assert recovered == injected == FAULTS


# -- storage that fails while the run continues -----------------------------------------------------------------------


def mounted(*command):
    """Run `mount`; returns whether this user may."""
    return subprocess.run(["mount", *command], capture_output=True).returncode == 0


def train_while(corpus, root, location, break_it, repair):
    """Run with storage that fails from step 2 on, and that is repaired once a failure is reported."""
    changes = RUN | dict(checkpoint__dir=str(location))
    world = World(RANKS, corpus, root, changes)
    assert world.wait_until(lambda: world.step >= 2)
    break_it()
    try:
        failed = world.wait_until(lambda: "CHECKPOINT FAILED" in world.output())
    finally:
        repair()
    codes = world.end()
    assert failed, world.output()
    if codes != [0] * RANKS:  # the last save failed before the repair: the run reports it and can be continued
        assert "could not be saved" in world.output()
        assert World(RANKS, corpus, root, changes).end() == [0] * RANKS
    assert verify(finished(location / "default")) == 0
    return world


def test_full_disk(corpus, tmp_path, undisturbed):
    disk = tmp_path / "disk"
    disk.mkdir()
    if not mounted("-t", "tmpfs", "-o", "size=16m", "tmpfs", str(disk)):
        pytest.skip("needs to mount a small tmpfs, which this user may not")
    try:
        filler = disk / "filler"

        def fill():
            with contextlib.suppress(OSError), open(filler, "wb", buffering=0) as file:
                while file.write(b"x" * 4096):
                    pass

        world = train_while(corpus, tmp_path, disk, fill, filler.unlink)
        assert "No space left on device" in world.output()
        (tmp_path / "default" / "checkpoints").symlink_to(disk / "default")
        assert_same_end(tmp_path / "default", undisturbed)
    finally:
        subprocess.run(["umount", str(disk)])


def test_a_disk_with_room_for_two_checkpoints_and_a_half_keeps_two(corpus, tmp_path, undisturbed):
    measured = World(RANKS, corpus, tmp_path / "measured", RUN | dict(run__stop_at_step=1))
    assert measured.end() == [0] * RANKS, measured.output()
    size = storage.size(checkpoints(measured)[-1])
    disk = tmp_path / "disk"
    disk.mkdir()
    if not mounted("-t", "tmpfs", "-o", f"size={int(2.6 * size)}", "tmpfs", str(disk)):
        pytest.skip("needs to mount a small tmpfs, which this user may not")
    try:
        world = World(RANKS, corpus, tmp_path, RUN | dict(checkpoint__dir=str(disk), checkpoint__keep_last=2))
        assert world.end() == [0] * RANKS, world.output()
        assert [place.step for place in finished(disk / "default")] == [STEPS - EVERY, STEPS]
        assert "is full: removed step-00000003 before step 9 is saved" in world.output()
        assert "CHECKPOINT FAILED" not in world.output() and verify(finished(disk / "default")) == 0
        (tmp_path / "default" / "checkpoints").symlink_to(disk / "default")
        assert_same_end(tmp_path / "default", undisturbed)
    finally:
        subprocess.run(["umount", str(disk)])


def test_read_only_directory(corpus, tmp_path, undisturbed):
    disk = tmp_path / "disk"
    disk.mkdir()
    if not mounted("--bind", str(disk), str(disk)):
        pytest.skip("needs to mount a directory on itself, which this user may not")
    try:
        world = train_while(
            corpus,
            tmp_path,
            disk,
            lambda: subprocess.run(["mount", "-o", "remount,ro,bind", str(disk)], check=True),
            lambda: subprocess.run(["mount", "-o", "remount,rw,bind", str(disk)], check=True),
        )
        assert "Read-only file system" in world.output()
        (tmp_path / "default" / "checkpoints").symlink_to(disk / "default")
        assert_same_end(tmp_path / "default", undisturbed)
    finally:
        subprocess.run(["umount", str(disk)])


def test_a_second_signal_ends_at_once(corpus, tmp_path, undisturbed):
    world = World(RANKS, corpus, tmp_path, RUN)
    assert world.wait_until(lambda: world.step >= 4)
    world.signal(signal.SIGTERM)
    world.signal(signal.SIGUSR1)
    codes = world.end(patience=5)
    assert set(codes) <= {REQUEUE, 128 + signal.SIGTERM, 128 + signal.SIGUSR1, -signal.SIGKILL, 1}
    assert World(RANKS, corpus, tmp_path, RUN).end() == [0] * RANKS
    assert_same_end(tmp_path / "default", undisturbed)
