"""`python -m launch.agent --signals=forward|ignore TORCHRUN_ARGUMENTS`: torchrun on one node.

torchrun exits with 1 whatever its ranks exited with, and on a signal it stops the ranks within 30 seconds. The agent
runs torch.distributed.run unchanged and adds two things:

- It exits with the code of the ranks (see `exit_code`), so that a scheduler can tell "requeue" from "give up".
- `--signals=forward` passes SIGTERM and SIGUSR1 to the ranks and waits until they have saved (local, Kubernetes: only
  the agent receives the signal). `--signals=ignore` ignores both (Slurm signals every process of a step itself, and a
  second signal would mean "stop at once").
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterable
from typing import TYPE_CHECKING

from launch.processes import children, end_with_supervisor, kill_descendants
from train.config.command import fail
from train.distributed.signals import BAD_INPUT, DIVERGED, REQUEUE

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

FINAL = (BAD_INPUT, DIVERGED)  # exit codes after which another attempt would end the same way
_FORWARDED = (signal.SIGTERM, signal.SIGUSR1)
GRACE = "LAUNCH_GRACE_SECONDS"  # environment variable: how long ranks may run after a forwarded signal


def exit_code(rank_codes: Iterable[int], stop_requested: bool) -> int:
    """The agent's exit code, from the codes of the ranks that failed (negative: ended by a signal).

    One rank with `REQUEUE` is enough: a checkpoint is complete on every rank before any of them exits.
    """
    codes = set(rank_codes)
    for code in (REQUEUE, *FINAL):
        if code in codes:
            return code
    if stop_requested and all(code < 0 or code > 128 for code in codes):
        return REQUEUE  # the signal ended them before they could save: continue from the newest checkpoint
    return 1


class _Forwarder:
    """Forwards signals to the ranks, and kills the ranks that still run `grace` seconds later.

    It runs in a thread because Python calls no signal handler while the main thread waits inside torchrun's C++ store
    (up to five minutes, at the end of a run whose other agent is gone).
    """

    def __init__(self, grace: int):
        self.requested = False
        self._grace = grace
        self._signals, wakeup = os.pipe()
        os.set_blocking(wakeup, False)
        signal.set_wakeup_fd(wakeup, warn_on_full_buffer=False)
        for number in _FORWARDED:
            signal.signal(number, lambda *_: None)  # a handler makes Python write the number to the pipe
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        while True:
            for number in os.read(self._signals, 64):
                if number in _FORWARDED:
                    self._forward(number)

    def _forward(self, number: int) -> None:
        ranks = children(os.getpid())  # each rank stops its own children
        if not ranks:  # not started yet, or all ended
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
    """Run torchrun with `arguments[1:]`; returns the exit code."""
    mode = arguments[0].removeprefix("--signals=") if arguments else ""
    if mode not in ("forward", "ignore"):
        given = f"{arguments[0]!r} is not a mode; " if arguments else ""
        return fail(f"{given}usage: python -m launch.agent --signals=forward|ignore TORCHRUN_ARGUMENTS")
    forwarder = None
    if mode == "ignore":  # the ranks inherit this until they install their own handlers
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
        print(f"agent: {_describe_failures(error)}; exit code {code}", file=sys.stderr)
        return code
    except SignalException as error:  # Ctrl-C, or a torchrun version that always handles SIGTERM
        return REQUEUE if error.sigval == signal.SIGTERM else 128 + error.sigval
    return 0


def _describe_failures(error: ChildFailedError) -> str:
    ranks_by_code: dict[int, list[int]] = {}
    for rank, failure in sorted(error.failures.items()):
        ranks_by_code.setdefault(failure.exitcode, []).append(rank)
    return ", ".join(
        f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))} ended with {code}"
        for code, ranks in ranks_by_code.items()
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
