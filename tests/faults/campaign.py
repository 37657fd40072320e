"""Injects faults into runs and counts what came of them."""

from __future__ import annotations

import random
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

from tests.faults.kinds import data, disks, files, processes
from tests.faults.victim import EVERY, STEPS, Case, Setting, TooLate, Victim

PREPARED, STREAM, SHARDS = "prepared", "stream", "shards"
REMOTE = (STREAM, SHARDS)
FAULTS_A_RUN = 4
LAST_STEP = STEPS - 3 * EVERY  # a fault at a later step would find too little of the run
ATTEMPTS = 5  # runs that an injection may find at their end
GOES_ON, RECOVERS, REFUSED, ENDS = (
    "goes on",  # the same start trains on
    "recovers",  # the next start continues
    "refused, then recovers",  # a start is refused with words that name the fault, and changes nothing
    "ends, then recovers",  # the run ends with words that name the fault
)


@dataclass(frozen=True)
class Kind:
    """A kind of fault: what it is, what must come of it, and where it can be injected."""

    inject: Callable[[Case], None]
    text: str
    outcome: str
    data: tuple[str, ...] = (PREPARED,)
    mounts: bool = False
    store: bool = False

    @property
    def name(self) -> str:
        return self.inject.__name__

    def obstacle(self, setting: Setting) -> str:
        """Why it cannot be injected here; empty where it can."""
        if self.mounts and not setting.may_mount:
            return "this user may not mount a file system"
        return "" if setting.has_store or not self.store else "s3fs, moto or flask is not installed"


KINDS = (
    Kind(processes.kill_one, "SIGKILL of one rank at any moment", RECOVERS),
    Kind(processes.kill_all, "SIGKILL of all ranks at any moment", RECOVERS),
    Kind(processes.kill_while_saving, "SIGKILL while a checkpoint is written", RECOVERS),
    Kind(processes.kill_between_file_operations, "SIGKILL before any file operation of a rank", RECOVERS),
    Kind(processes.stop_while_saving, "SIGTERM while a checkpoint is written", RECOVERS),
    Kind(processes.slow_rank, "a rank stands still for up to 3 s", GOES_ON),
    Kind(processes.stopped_rank, "a rank stands still for longer than the limit", ENDS),
    Kind(processes.second_start, "a second start of the run while it trains", REFUSED),
    Kind(processes.rank_of_another_configuration, "a rank with another configuration", REFUSED),
    Kind(processes.clock_jumps, "the wall clock jumps by up to three days", GOES_ON),
    Kind(files.flipped_checkpoint, "a flipped bit in the newest checkpoint", RECOVERS),
    Kind(files.truncated_checkpoint, "a truncated file in the newest checkpoint", RECOVERS),
    Kind(files.checkpoint_without_a_file, "a missing file in the newest checkpoint", RECOVERS),
    Kind(files.kill_in_the_rewrite_of_the_log, "SIGKILL while a resume rewrites metrics.jsonl", RECOVERS),
    Kind(files.torn_log, "a torn line or garbage in metrics.jsonl", RECOVERS),
    Kind(files.torn_config, "a torn config.yaml in the run directory", REFUSED),
    Kind(disks.full_disk_at_a_log_line, "a full disk at a line of metrics.jsonl", GOES_ON, mounts=True),
    Kind(disks.full_disk_at_a_save, "a full disk at a save, also at the last one", RECOVERS, mounts=True),
    Kind(disks.full_disk_in_the_data_cache, "a full disk while data are prepared", REFUSED, mounts=True),
    Kind(disks.read_only_checkpoints, "checkpoints that become read-only", RECOVERS, mounts=True),
    Kind(disks.unmounted_checkpoints, "checkpoints that are not mounted at a start", REFUSED, mounts=True),
    Kind(data.stop_while_preparing, "SIGTERM while data are prepared", RECOVERS),
    Kind(data.kill_while_preparing, "SIGKILL while data are prepared", RECOVERS),
    Kind(data.damaged_shard, "a flipped bit in a prepared shard", REFUSED),
    Kind(data.torn_file_in_the_data_cache, "a torn file in the data cache", REFUSED),
    Kind(data.nan_storm, "losses of a rank that are NaN for a while", ENDS),
    Kind(data.store_dies_while_preparing, "an object store that dies while data are prepared", REFUSED, store=True),
    Kind(data.store_dies_in_training, "an object store that dies in a read of training", ENDS, REMOTE, store=True),
    Kind(data.store_stutters, "an object store that fails one read in a few", GOES_ON, REMOTE, store=True),
    Kind(data.damaged_block, "damaged blocks in the cache of remote shards", GOES_ON, (SHARDS,), store=True),
)


@dataclass(frozen=True)
class Injection:
    """One injection, which the seed of its campaign and its number determine."""

    kind: Kind
    data: str
    seed: str


@dataclass
class Result:
    """What came of an injection; `lost` is the reason if its run did not reach the undisturbed end, else empty."""

    injection: Injection
    lost: str = ""
    seconds: float = 0.0  # of the injection alone


def plan(number: int, seed: int, kinds: Sequence[Kind] = KINDS) -> list[Injection]:
    """The injections of a campaign. The first `len(kinds)` are one of each kind, the rest is drawn."""
    draw = random.Random(seed)
    found: list[Injection] = []
    while len(found) < number:
        for kind in draw.sample(kinds, len(kinds)):
            found.append(Injection(kind, draw.choice(kind.data), f"{seed}/{len(found)}"))
    return found[:number]


def runs(injections: Sequence[Injection]) -> list[list[Injection]]:
    """The same injections, those of one run together."""
    found: list[list[Injection]] = []
    for data_kind in (PREPARED, STREAM, SHARDS):
        own = [injection for injection in injections if injection.data == data_kind]
        found += [own[at : at + FAULTS_A_RUN] for at in range(0, len(own), FAULTS_A_RUN)]
    return found


def suffer(setting: Setting, injections: Sequence[Injection], keep: bool = False) -> list[Result]:
    """Inject all into one run, or into several where one comes to its end first; returns what came of each.

    `keep`: keep the files of a run that was lost.
    """
    results: list[Result] = []
    waiting, late = list(injections), Counter[Injection]()
    while waiting:
        victim, own = setting.victim(waiting[0].data), list[Result]()
        try:
            victim.start()
            while waiting and victim.world.alive and victim.world.step < LAST_STEP:
                injection, began = waiting.pop(0), time.monotonic()
                try:
                    _inject(setting, victim, injection)
                    own.append(Result(injection, seconds=time.monotonic() - began))
                except TooLate:
                    late[injection] += 1
                    if late[injection] == ATTEMPTS:
                        own.append(Result(injection, f"its runs ended before it in {ATTEMPTS} attempts"))
                    else:
                        waiting.insert(0, injection)
                    break
                except Exception as error:
                    own.append(Result(injection, _traceback(error)))
                    with suppress(Exception):
                        victim.kill()
                        victim.start()
                    break
            try:
                victim.finish()
            except Exception as error:
                for result in own:
                    result.lost = result.lost or _traceback(error)
        finally:
            victim.close(keep and any(result.lost for result in own))
        results += own
    return results


def _inject(setting: Setting, victim: Victim, injection: Injection) -> None:
    draw = random.Random(injection.seed)
    victim.wait_for_step(victim.world.step + draw.randrange(EVERY + 1))
    victim.check_alive()
    injection.kind.inject(Case(victim, draw, setting))


def _traceback(error: BaseException) -> str:
    return "".join(traceback.format_exception(error))
