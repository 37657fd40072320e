"""Faults of processes: killed, told to end, stopped, started twice or with another configuration; wrong clocks."""

from __future__ import annotations

import contextlib
import os
import signal
import time

from tests.faults import harms
from tests.faults.victim import EVERY, RANKS, STEPS, Case, TooLate, Victim
from tests.faults.worlds import World
from train.distributed.signals import REQUEUE
from train.distributed.watchdog import STALLED


def is_saving(victim: Victim) -> bool:
    """Whether a checkpoint is being written."""
    with contextlib.suppress(FileNotFoundError):
        return any(name.endswith(".incomplete") for name in os.listdir(victim.place))
    return False


def kill_one(case: Case) -> None:
    time.sleep(case.draw.uniform(0, 0.1))
    case.victim.kill([case.draw.randrange(RANKS)])
    case.victim.start()


def kill_all(case: Case) -> None:
    time.sleep(case.draw.uniform(0, 0.1))
    case.victim.kill()
    case.victim.start()


def kill_while_saving(case: Case) -> None:
    victim = case.victim
    victim.world.wait_until(lambda: is_saving(victim), every=0.0005)
    time.sleep(case.draw.uniform(0, 0.02))
    victim.kill(case.draw.choice([None, [0], [1]]))
    victim.start()


def kill_between_file_operations(case: Case) -> None:
    """At the start, in a save or between: before one operation on a file of the run."""
    victim, rank = case.victim, case.draw.randrange(RANKS)
    number = case.draw.randrange(1, 70 if rank == 0 else 8)  # rank 0 writes most of the files
    victim.kill()
    world = victim.launch([(harms.die_before, rank, str(victim.directory), number)])
    codes = world.end(patience=2)
    assert codes[rank] == -signal.SIGKILL, f"exit codes {codes}:\n{world.outputs()}"
    victim.start()


def stop_while_saving(case: Case) -> None:
    victim = case.victim
    victim.world.wait_until(lambda: is_saving(victim), every=0.0005)
    victim.check_alive()
    victim.world.signal(signal.SIGTERM)
    codes = victim.world.end()
    assert set(codes) <= {REQUEUE, 0}, f"exit codes {codes}:\n{victim.world.outputs()}"
    victim.start()


def slow_rank(case: Case) -> None:
    """One rank does nothing for a while, and then goes on: so does the run."""
    world, rank = case.victim.world, case.draw.randrange(RANKS)
    world.signal(signal.SIGSTOP, [rank])
    time.sleep(case.draw.uniform(0.5, 3))
    world.signal(signal.SIGCONT, [rank])
    goes_on(case.victim)


def stopped_rank(case: Case) -> None:
    """One rank does nothing for longer than the limit: the other ends and says why."""
    victim, rank = case.victim, case.draw.randrange(RANKS)
    victim.kill()
    world = victim.start(parallel__timeout_minutes=0.12)
    victim.wait_for_step(world.resumed_at + case.draw.randrange(1, 3))
    world.signal(signal.SIGSTOP, [rank])
    codes = world.end(patience=1)
    other = world.output(1 - rank)
    assert codes[1 - rank] in (STALLED, 1), f"exit codes {codes}:\n{other}"
    assert f"rank {1 - rank} on" in other and "failed at step" in other, other
    assert "likely cause: rank" in other or "likely cause: the rank that hosts" in other, other
    victim.start()


def second_start(case: Case) -> None:
    """The same command again while the run lives: refused, and the run goes on."""
    victim = case.victim
    victim.check_alive()
    victim.world.signal(signal.SIGSTOP)  # it lives, and cannot come to its end first
    if victim.world.step == STEPS:  # it had come to its end before, and may have let go of its directory
        victim.world.signal(signal.SIGCONT)
        raise TooLate
    outputs = victim.root / "second"
    second = World(RANKS, victim.corpus, victim.root, victim.changes, environment=victim.environment, outputs=outputs)
    codes = second.end()
    victim.world.signal(signal.SIGCONT)
    assert codes == [2] * RANKS, f"exit codes {codes}:\n{second.outputs()}"
    line = victim.error_of(second)
    for word in (str(victim.directory), "is in use", f"process {victim.world.processes[0].pid}", "run.name="):
        assert word in line, line


def rank_of_another_configuration(case: Case) -> None:
    victim, rank = case.victim, case.draw.randrange(1, RANKS)
    key, value = case.draw.choice(
        [("optim.lr", 0.011), ("data.seed", 5), ("run.seed", 5), ("model.rope_base", 5000.0), ("run.log_every", 2)]
    )
    victim.kill()
    victim.refused(
        f"rank {rank} on", "differs from rank 0", f"{key} is {value}", of_ranks={rank: {key.replace(".", "__"): value}}
    )
    victim.start()


def clock_jumps(case: Case) -> None:
    """The wall clock of all ranks jumps by hours, and so do the time stamps of the run's files."""
    victim = case.victim
    hours = case.draw.choice([-1, 1]) * case.draw.uniform(1, 72)
    harms.set_clock(victim.clock, 3600 * hours)
    for path in victim.directory.rglob("*.*"):
        with contextlib.suppress(FileNotFoundError):
            os.utime(path, (time.time() + 3600 * hours,) * 2)
    goes_on(victim)


def goes_on(victim: Victim) -> None:
    """Fail unless the same start trains on, or has come to its end."""
    world, step = victim.world, victim.world.step
    world.wait_until(lambda: world.step >= min(step + EVERY, STEPS), seconds=60)
    assert world.step >= min(step + EVERY, STEPS), f"no step after {step}:\n{world.outputs()}"
