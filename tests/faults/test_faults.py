"""Runs that suffer faults end bit for bit like an undisturbed run: a sample of `python -m tests.faults`, and disks.

The sample has one injection of each kind. The command injects 200; see its module for what counts as recovered.
"""

import contextlib
import signal
import subprocess

import pytest

from tests.faults import campaign
from tests.faults.campaign import KINDS
from tests.faults.victim import EVERY, RANKS, RUN, STEPS, Reference, Setting, mount
from tests.faults.worlds import World
from train.checkpoint import storage
from train.checkpoint.__main__ import verify
from train.checkpoint.storage import finished
from train.distributed.signals import REQUEUE

SEED = 6  # that of docs/results/faults.json
SAMPLE = campaign.runs(campaign.plan(len(KINDS), SEED))
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def setting(corpus, tmp_path_factory):
    setting = Setting(tmp_path_factory.mktemp("faults"), corpus)
    yield setting
    setting.close()


@pytest.mark.parametrize(
    "injections", SAMPLE, ids=[" ".join(injection.kind.name for injection in injections) for injections in SAMPLE]
)
def test_a_run_recovers(injections, setting):
    obstacles = {injection.kind.obstacle(setting) for injection in injections} - {""}
    here = [injection for injection in injections if not injection.kind.obstacle(setting)]
    lost = [f"{result.injection.kind.name}: {result.lost}" for result in campaign.suffer(setting, here) if result.lost]
    assert not lost, "\n".join(lost)
    if obstacles:
        pytest.skip(f"{len(injections) - len(here)} of {len(injections)} kinds left out: {'; '.join(obstacles)}")


def test_every_kind_is_in_the_sample():
    assert {injection.kind.name for run in SAMPLE for injection in run} == {kind.name for kind in KINDS}
    assert len({kind.name for kind in KINDS}) == len(KINDS) >= 25


def test_a_lost_run_is_counted(setting):
    """A run whose record is changed behind its back has not recovered."""

    def falsify(case):
        victim = case.victim
        victim.wait_for_checkpoints(1)
        victim.kill()
        path = victim.directory / "metrics.jsonl"
        path.write_bytes(path.read_bytes().replace(b'"loss": ', b'"loss": 1', 1))
        victim.start()

    kind = campaign.Kind(falsify, "a changed record", campaign.RECOVERS)
    (result,) = campaign.suffer(setting, [campaign.Injection(kind, campaign.PREPARED, "1")])
    assert "the records differ" in result.lost


# -- storage that fails while the run continues -----------------------------------------------------------------------


@pytest.fixture
def undisturbed(setting):
    return setting.reference("prepared")


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
    if not mount("-t", "tmpfs", "-o", "size=16m", "tmpfs", str(disk)):
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
        undisturbed.assert_equal(Reference.of(tmp_path / "default"))
    finally:
        subprocess.run(["umount", str(disk)])


def test_a_disk_with_room_for_two_checkpoints_and_a_half_keeps_two(corpus, tmp_path, undisturbed):
    measured = World(RANKS, corpus, tmp_path / "measured", RUN | dict(run__stop_at_step=1))
    assert measured.end() == [0] * RANKS, measured.output()
    size = storage.size(finished(measured.directory / "checkpoints")[-1])
    disk = tmp_path / "disk"
    disk.mkdir()
    if not mount("-t", "tmpfs", "-o", f"size={int(2.6 * size)}", "tmpfs", str(disk)):
        pytest.skip("needs to mount a small tmpfs, which this user may not")
    try:
        world = World(RANKS, corpus, tmp_path, RUN | dict(checkpoint__dir=str(disk), checkpoint__keep_last=2))
        assert world.end() == [0] * RANKS, world.output()
        assert [place.step for place in finished(disk / "default")] == [STEPS - EVERY, STEPS]
        assert "is full: removed step-00000003 before step 9 is saved" in world.output()
        assert "CHECKPOINT FAILED" not in world.output() and verify(finished(disk / "default")) == 0
        (tmp_path / "default" / "checkpoints").symlink_to(disk / "default")
        undisturbed.assert_equal(Reference.of(tmp_path / "default"))
    finally:
        subprocess.run(["umount", str(disk)])


def make_read_only(disk):
    while not mount("-o", "remount,ro,bind", str(disk)):  # refused while a file there is open for writing
        pass


def test_read_only_directory(corpus, tmp_path, undisturbed):
    disk = tmp_path / "disk"
    disk.mkdir()
    if not mount("--bind", str(disk), str(disk)):
        pytest.skip("needs to mount a directory on itself, which this user may not")
    try:
        world = train_while(
            corpus,
            tmp_path,
            disk,
            lambda: make_read_only(disk),
            lambda: subprocess.run(["mount", "-o", "remount,rw,bind", str(disk)], check=True),
        )
        assert "Read-only file system" in world.output()
        (tmp_path / "default" / "checkpoints").symlink_to(disk / "default")
        undisturbed.assert_equal(Reference.of(tmp_path / "default"))
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
    undisturbed.assert_equal(Reference.of(tmp_path / "default"))
