"""`python -m launch.agent --signals=forward|ignore TORCHRUN_ARGUMENTS`: torchrun on one node, for schedulers.

torchrun ends with 1 whatever its ranks ended with, and passes a signal on before it dies of it. Here the agent

- ends with what the ranks said: 75 (state saved, run me again), 2 (bad input), 1 (a crash), so that a scheduler can
  tell "requeue" from "give up";
- `forward`s SIGTERM and SIGUSR1 to its ranks and waits for them to save (local, Kubernetes: only the agent is
  signalled), or `ignore`s them (Slurm signals every process of a step itself; twice would mean "at once").

Everything else is torch.distributed.run, unchanged.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterable

from launch.processes import children, end_with_supervisor, kill_descendants
from train.signals import BAD_INPUT, REQUEUE

_FORWARDED = (signal.SIGTERM, signal.SIGUSR1)
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
    """Passes signals on to the ranks; after `grace` seconds those that are left are killed.

    A thread does it: while the main thread waits inside torchrun's C++ store (up to five minutes at the end of a run
    whose other agent is gone) no handler written in Python would be called there.
    """

    def __init__(self, grace: int):
        self.requested = False
        self._grace = grace
        self._signals, wakeup = os.pipe()
        os.set_blocking(wakeup, False)
        signal.set_wakeup_fd(wakeup, warn_on_full_buffer=False)
        for number in _FORWARDED:
            signal.signal(number, lambda *_: None)  # caught, so that its number is written to the pipe
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        while True:
            for number in os.read(self._signals, 64):
                if number in _FORWARDED:
                    self._forward(number)

    def _forward(self, number: int) -> None:
        ranks = children(os.getpid())  # theirs are theirs to stop
        if not ranks:  # not started yet, or ended already
            os._exit(REQUEUE)
        if not self.requested:
            self.requested = True
            timer = threading.Timer(self._grace, kill_descendants)
            timer.daemon = True
            timer.start()
        for pid in ranks:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)


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
    ends: dict[int, list[int]] = {}
    for rank, failure in sorted(error.failures.items()):
        ends.setdefault(failure.exitcode, []).append(rank)
    return ", ".join(
        f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))} ended with {code}"
        for code, ranks in ends.items()
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
