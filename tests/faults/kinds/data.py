"""Faults of data: preparation that is ended, damaged shards and caches, object stores that die; losses that are NaN."""

from __future__ import annotations

import os
import re
import shutil
import signal
import time
from pathlib import Path

from tests.faults import harms
from tests.faults.kinds.files import flip_a_bit, truncate
from tests.faults.kinds.processes import goes_on
from tests.faults.victim import RANKS, Case, TooLate, are_whole
from tests.faults.worlds import World
from train.checkpoint.storage import CheckpointPath
from train.distributed.signals import BAD_INPUT, DIVERGED, FAILED, REQUEUE


def _prepare_again(case: Case) -> World:
    """Start the run with an empty data cache; returns while the data are prepared."""
    victim = case.victim
    victim.kill()
    cache = victim.root / f"cache-{case.draw.randrange(10**9)}"
    victim.changes["data__cache_dir"] = str(cache)
    world = victim.launch()
    assert world.wait_until(cache.exists)
    time.sleep(case.draw.uniform(0, 0.4))
    return world


def stop_while_preparing(case: Case) -> None:
    world = _prepare_again(case)
    world.signal(signal.SIGTERM)
    codes = world.end()
    assert set(codes) == {REQUEUE}, f"exit codes {codes}:\n{world.outputs()}"
    assert "asked to stop (SIGTERM)" in world.output() and "Traceback" not in world.output(), world.outputs()
    case.victim.start()


def kill_while_preparing(case: Case) -> None:
    world = _prepare_again(case)
    case.victim.kill(case.draw.choice([None, [0], [1]]))
    assert -signal.SIGKILL in world.end()
    case.victim.start()


def _own_cache(case: Case) -> Path:
    """Give the run, which is killed, a copy of the data cache; returns its prepared corpus."""
    victim = case.victim
    victim.kill()
    cache = victim.root / f"cache-{case.draw.randrange(10**9)}"
    shutil.copytree(victim.corpus.parent / "cache", cache)
    victim.changes["data__cache_dir"] = str(cache)
    (corpus,) = (path.parent for path in cache.glob("corpus*/manifest.json"))
    return corpus


def damaged_shard(case: Case) -> None:
    """A bit of a prepared shard is flipped, with a new time stamp, or without one as by a failing disk."""
    prepared = _own_cache(case)
    shard = case.draw.choice(sorted(prepared.glob("*.bin")) + sorted(prepared.glob("*.idx")))
    stamps = os.stat(shard)
    flip_a_bit(shard, case.draw)
    if keeps_its_stamp := case.draw.random() < 0.5:
        os.utime(shard, ns=(stamps.st_atime_ns, stamps.st_mtime_ns))
    line = case.victim.refused(str(shard), "its content has changed", data__verify=keeps_its_stamp)
    assert f"delete {prepared} to build it again" in line
    shutil.rmtree(prepared)
    case.victim.start()


def torn_file_in_the_data_cache(case: Case) -> None:
    """A file of the data cache is cut: built again, or refused with its name and what to do, which is then done."""
    prepared = _own_cache(case)
    cache = prepared.parent
    files = [path for path in sorted(cache.rglob("*")) if path.is_file() and path.stat().st_size > 0]
    torn = case.draw.choice(files)
    truncate(torn, case.draw)
    line = case.victim.refusal()
    if not line:
        return
    assert str(torn.parent) in line, f"{torn} was torn: {line}"
    assert "delete" in line and "build it again" in line, line
    shutil.rmtree(torn.parent)
    case.victim.start()


def store_dies_while_preparing(case: Case) -> None:
    """The corpus is in an object store, which dies after some reads and comes back."""
    victim, store = case.victim, case.setting.store
    victim.kill()
    cache = victim.root / f"cache-{case.draw.randrange(10**9)}"
    victim.environment |= store.environment
    victim.changes |= dict(data__path=store.corpus, data__cache_dir=str(cache), data__retries=1)
    store.server.reads_left = case.draw.randrange(8)
    try:
        victim.refused(store.corpus, "cannot be read after 2 attempts")
    finally:
        store.server.reads_left = None
    victim.start()


def store_dies_in_training(case: Case) -> None:
    """The object store dies while the next slab or block is read; the run ends, and goes on once it is back."""
    victim, store, world = case.victim, case.setting.store, case.victim.world
    store.server.reads_left = case.draw.randrange(4) if "data__tokenizer" in victim.changes else 0
    for block in Path(victim.changes["data__cache_dir"]).glob("remote/*.block"):
        block.unlink(missing_ok=True)  # the bound of the cache was reached
    try:
        codes = world.end(patience=2)
    finally:
        store.server.reads_left = None
    if codes == [0] * RANKS:  # it needed nothing more
        raise TooLate
    assert FAILED in codes and not {0, BAD_INPUT} & set(codes), f"exit codes {codes}:\n{world.outputs()}"
    lines = [line for rank in range(RANKS) for line in world.output(rank).splitlines() if line.startswith("error: ")]
    assert any("s3://" in line and "cannot be read after 2 attempts" in line for line in lines), world.outputs()
    victim.start()


def store_stutters(case: Case) -> None:
    """One request in a few fails or is cut short; the run goes on."""
    server = case.setting.store.server
    server.fail_every, server.num_failures = case.draw.randrange(3, 6), 0  # the next read fails
    try:
        for block in Path(case.victim.changes["data__cache_dir"]).glob("remote/*.block"):
            block.unlink(missing_ok=True)
        case.victim.world.wait_until(lambda: server.num_failures > 0)
        case.victim.check_alive()
        goes_on(case.victim)
    finally:
        server.fail_every = 0


def damaged_block(case: Case) -> None:
    """Blocks of the cache of remote shards are flipped, cut or gone, while they are in use; they are fetched again."""
    blocks = sorted(Path(case.victim.changes["data__cache_dir"]).glob("remote/*.block"))
    assert blocks
    for block in blocks:
        harm = case.draw.choice([flip_a_bit, truncate, lambda path, _: path.unlink()])
        harm(block, case.draw)
    if case.draw.random() < 0.5:
        case.victim.kill()
        case.victim.start()
    else:
        goes_on(case.victim)


def nan_storm(case: Case) -> None:
    """Losses of a rank are NaN until the run gives up. The checkpoint that it names goes on to the undisturbed end."""
    victim, rank = case.victim, case.draw.randrange(RANKS)
    victim.wait_for_checkpoints(1)
    victim.kill()
    storm = victim.root / f"storm-{victim.directory.name}"
    world = victim.start([(harms.nan_storm, rank, str(storm))], run__max_bad_steps=case.draw.randrange(3, 6))
    victim.wait_for_step(world.resumed_at + 1)
    storm.touch()
    codes = world.end()
    assert codes == [DIVERGED] * RANKS, f"exit codes {codes}:\n{world.outputs()}"
    line = victim.error_of(world)
    named = re.search(r"known to be healthy: resume=(\S+) run.name=NEW", line)
    assert named, line
    healthy = CheckpointPath(named[1])
    assert are_whole([healthy])
    victim.go_on_as(f"after-{victim.directory.name}", healthy)
    victim.start()
