"""`python -m launch.agent --signals=forward|ignore TORCHRUN_ARGUMENTS`: torchrun on one node, for schedulers.

torchrun ends with 1 whatever its ranks ended with, and passes a signal on before it dies of it. Here the agent

- ends with what the ranks said: 75 (state saved, run me again), 2 (bad input), 1 (a crash), so that a scheduler can
  tell "requeue" from "give up";
- `forward`s SIGTERM and SIGUSR1 to its ranks and waits for them to save (local, Kubernetes: only the agent is
  signalled), or `ignore`s them (Slurm signals every process of a step itself; twice would mean "at once").

Everything else is torch.distributed.run, unchanged.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterable
from types import FrameType

from launch.processes import descendants, end_with_supervisor
from train.signals import BAD_INPUT, REQUEUE

GRACE = "LAUNCH_GRACE_SECONDS"  # environment: how long ranks may take after a forwarded signal


def exit_code(rank_codes: Iterable[int], stop_requested: bool) -> int:
    """The agent's exit code for those of its ranks that failed (negative: a signal).

    One rank that says 75 is enough: a checkpoint is complete on every rank before any of them leaves.
    """
    codes = set(rank_codes)
    if REQUEUE in codes:
        return REQUEUE
    if BAD_INPUT in codes:
        return BAD_INPUT
    if stop_requested and all(code < 0 or code > 128 for code in codes):
        return REQUEUE  # ended by the signal before they could save: the newest checkpoint still holds
    return 1


class _Forwarder:
    """Passes signals on to the ranks; after `grace` seconds those that are left are killed."""

    def __init__(self, grace: int):
        self.requested = False
        self._grace = grace
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._forward)
        signal.signal(signal.SIGALRM, self._kill)

    def _forward(self, number: int, _: FrameType | None) -> None:
        ranks = descendants()
        if not ranks:  # nothing runs yet
            sys.exit(REQUEUE)
        if not self.requested:
            signal.alarm(self._grace)
        self.requested = True
        own = os.getpid()
        for pid in ranks:
            if _parent(pid) == own:  # their children are theirs to stop
                _send(pid, number)

    def _kill(self, number: int, _: FrameType | None) -> None:
        for pid in descendants():
            _send(pid, signal.SIGKILL)


def main(arguments: list[str]) -> int:
    mode = arguments[0].removeprefix("--signals=") if arguments else ""
    if mode not in ("forward", "ignore"):
        print("error: usage: python -m launch.agent --signals=forward|ignore TORCHRUN_ARGUMENTS", file=sys.stderr)
        return BAD_INPUT
    forwarder = None
    if mode == "ignore":  # inherited by the ranks until they handle it themselves
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    else:
        forwarder = _Forwarder(int(os.environ.get(GRACE, 120)))
    end_with_supervisor()
    os.environ["PET_SIGNALS_TO_HANDLE"] = "SIGINT,SIGHUP,SIGQUIT"  # torchrun's default for --signals-to-handle
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    try:
        run.main(arguments[1:])
    except ChildFailedError as error:
        code = exit_code((f.exitcode for f in error.failures.values()), bool(forwarder and forwarder.requested))
        print(f"agent: {_told(error)}; exit code {code}", file=sys.stderr)
        return code
    except SignalException as error:  # a torchrun that always handles SIGTERM itself, or Ctrl-C
        return REQUEUE if error.sigval == signal.SIGTERM else 128 + error.sigval
    return 0


def _told(error) -> str:
    ends = {}
    for rank, failure in sorted(error.failures.items()):
        ends.setdefault(failure.exitcode, []).append(rank)
    return ", ".join(f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))} ended with {code}"
                     for code, ranks in ends.items())


def _parent(pid: int) -> int:
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            return int(file.read().rpartition(")")[2].split()[1])
    except OSError:
        return 0


def _send(pid: int, number: int) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        pass


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
