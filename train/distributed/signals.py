"""Ending early on request: the contract between the trainer and whatever starts it. Imports nothing heavy.

SIGTERM, SIGUSR1 (a scheduler's preemption, a time limit near) or SIGHUP (the terminal has gone) asks the run to finish
its step, save a checkpoint and exit with `REQUEUE`; a second signal ends it at once. A launcher starts a run that ended
with `REQUEUE` again: it finds its run directory and continues.

A terminal that closes sends SIGHUP several times: the kernel, the shell and torchrun do. So SIGHUP never counts as the
second signal. Under nohup it is ignored.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from types import FrameType

from data_pipeline import commands
from train.distributed.environment import is_first_of_host

REQUEUE = 75  # EX_TEMPFAIL of sysexits.h: the run saved its state and wants to be started again
BAD_INPUT = commands.BAD_INPUT  # the configuration or the data cannot be used; nothing was started
FAILED = 1  # something went wrong outside the configuration; starting it again may help
# EX_IOERR: the last checkpoint could not be written; started again, the run continues from the one before
NOT_SAVED = 74
DIVERGED = 65  # EX_DATAERR: the run trained and cannot go on as configured; starting it again would end the same way

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
_AT_ONCE = 5.0  # seconds that the main thread has to end by itself where it should end at once


class StopRequest:
    """Whether this process was asked to stop, by a signal or by its own time limit. A context manager around a run.

    Until `begin_steps` there is nothing to save: a signal ends the process at once, with `REQUEUE`. `max_minutes`
    counts from there; None means no limit. Python calls no handler while the main thread waits in a library for ranks
    that have ended already. A thread ends the process then, some seconds later.
    """

    def __init__(self, max_minutes: float | None = None) -> None:
        self.reason: str | None = None
        self._max_minutes = max_minutes
        self._deadline: float | None = None
        self._stepping = self._told = self._signalled = False
        self._left = threading.Event()
        self._wakeup, self._wakeup_before = -1, -1
        self._previous: dict[signal.Signals, object] = {}

    def begin_steps(self) -> None:
        """From here on a signal asks the loop to stop instead of stopping the process."""
        self._stepping = True
        if self._max_minutes is not None:
            self._deadline = time.monotonic() + 60 * self._max_minutes

    @property
    def is_due(self) -> bool:
        if self.reason is None and self._deadline is not None and time.monotonic() >= self._deadline:
            self.reason = "run.max_minutes"
        return self.reason is not None

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():  # Python takes signals nowhere else
            for number in _SIGNALS:
                if number == signal.SIGHUP and signal.getsignal(number) is signal.SIG_IGN:
                    continue
                self._previous[number] = signal.signal(number, self._receive)
            arriving, self._wakeup = os.pipe()
            os.set_blocking(self._wakeup, False)
            self._wakeup_before = signal.set_wakeup_fd(self._wakeup, warn_on_full_buffer=False)
            threading.Thread(target=self._listen, args=(arriving,), name="signals", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._left.set()
        if self._wakeup >= 0:
            signal.set_wakeup_fd(self._wakeup_before)
            os.close(self._wakeup)  # ends the thread
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _receive(self, number: int, _: FrameType | None) -> None:
        if not self._stepping:
            self._tell(number)
            raise SystemExit(REQUEUE)
        if number == signal.SIGHUP:  # however many tell that the terminal has closed, it is one request
            self.reason = self.reason or signal.SIGHUP.name
            return
        if self._signalled:
            os._exit(128 + number)
        self._signalled, self.reason = True, signal.Signals(number).name

    def _listen(self, arriving: int) -> None:
        """End the process where a signal should end it at once and the main thread does not."""
        requests = 0
        with os.fdopen(arriving, "rb", buffering=0) as numbers:
            while number := numbers.read(1):
                if number[0] not in _SIGNALS or (self._stepping and number[0] == signal.SIGHUP):
                    continue  # a terminal that closes asks once, however many tell it
                requests += self._stepping
                if requests == 1 or self._left.wait(_AT_ONCE):
                    continue
                if requests:
                    os._exit(128 + number[0])
                self._tell(number[0])
                os._exit(REQUEUE)

    def _tell(self, number: int) -> None:
        if is_first_of_host() and not self._told:
            self._told = True
            name = signal.Signals(number).name
            # not print: a handler may interrupt one
            with contextlib.suppress(OSError):  # a terminal that has gone
                os.write(2, f"asked to stop ({name}) before the first step: nothing to save; start again\n".encode())
