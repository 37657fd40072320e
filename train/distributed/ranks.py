"""The ranks of a job before and beside its process groups: they exchange values through the job's store.

Nothing here has a time limit of its own, so a rank may prepare data for hours while the others wait. A rank that fails
tells the others, and all end with its message.
"""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import torch.distributed as dist

from train.config.errors import ConfigError, StartError
from train.config.schema import USER_ERRORS

WAIT_LINE_SECONDS = 60.0  # seconds between two lines about ranks that are waited for
_FAILED = "failed"
_END_SECONDS = 5.0  # longer than the pause between two checks of a rank that waits


class Ranks:
    """The ranks of a job of `size`, of which this process is number `rank`.

    Collective: every rank makes the same calls in the same order. With one rank nothing is exchanged.
    """

    def __init__(
        self, store: dist.Store, rank: int, size: int, scope: str, log_line: Callable[[str], object] = lambda line: None
    ):
        """`scope`: a word that no other `Ranks` over this store has. `log_line` takes a line about ranks waited for."""
        self.rank, self.size, self.store = rank, size, store
        self._scoped_store, self._log_line, self._calls = dist.PrefixStore(scope, store), log_line, 0

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def name(self) -> str:
        """This rank as messages name it."""
        return f"rank {self.rank} on {socket.gethostname()}"

    @contextmanager
    def failing_together(self) -> Iterator[None]:
        """A user's mistake that only this rank meets inside is told to the others, which end with its message."""
        try:
            yield
        except USER_ERRORS as error:
            if self.size > 1:
                with suppress(dist.DistError):  # they have ended already
                    self._scoped_store.set(_FAILED, f"{self.name()}: {error}")
                self._end()
            raise

    def from_main(self, value: str, what: str) -> str:
        """The main rank's `value`, on all ranks. `what` names what they wait for."""
        if self.size == 1:
            return value
        topic = self._topic()
        if self.is_main:
            with _lost("the other ranks"):
                self._scoped_store.set(topic, value)
            return value
        return self._wait(topic, what)

    def judge(self, value: str, judge: Callable[[list[str]], str], what: str) -> None:
        """Every rank gives a value. The main rank's `judge` sees all; what it returns, if anything, all ranks raise.

        Raises `ConfigError` on every rank. `what` names what the ranks do, for the line about those waited for.
        """
        if self.size == 1:
            verdict = judge([value])
        else:
            topic = self._topic()
            with _lost("the main rank"):
                self._scoped_store.set(f"{topic}/{self.rank}", value)
            if self.is_main:
                values = [
                    self._wait(f"{topic}/{rank}", f"rank {rank} of {self.size}, {what}") for rank in range(self.size)
                ]
                verdict = judge(values)
                self._scoped_store.set(f"{topic}/verdict", verdict or " ")
            else:
                verdict = self._wait(f"{topic}/verdict", f"the ranks, {what}").strip()
        if verdict:
            self._end()
            raise ConfigError(verdict)

    def check_same(self, facts: Mapping[str, Any], what: str, advice: str) -> None:
        """Raise `ConfigError` on every rank unless `facts` (names -> plain values) are the same on all."""
        own = json.dumps([self.name(), dict(sorted(facts.items()))])
        self.judge(own, lambda values: difference(values, advice), what)

    def _end(self) -> None:
        """Leave the job. The main rank, whose store the others read, gives those that wait time to read it."""
        if self.size == 1:
            return
        with suppress(dist.DistError):
            ended, deadline = self._scoped_store.add("ended", 1), time.monotonic() + _END_SECONDS
            while self.is_main and ended < self.size and time.monotonic() < deadline:
                time.sleep(0.05)
                ended = self._scoped_store.add("ended", 0)

    def _topic(self) -> str:
        self._calls += 1
        return str(self._calls)

    def _wait(self, key: str, what: str) -> str:
        """The value of a key, once it is there. `what` completes "waiting for"."""
        pause, began, last_line = 0.005, time.monotonic(), 0.0
        while True:
            with _lost(what):
                if self._scoped_store.check([key]):
                    return self._scoped_store.get(key).decode()
                failed = self._scoped_store.check([_FAILED])
                message = self._scoped_store.get(_FAILED).decode() if failed else None
            if message is not None:
                self._end()
                raise ConfigError(message)
            time.sleep(pause)
            pause = min(1.0, 1.5 * pause)
            waited = time.monotonic() - began
            if waited - last_line >= WAIT_LINE_SECONDS:
                last_line = waited
                self._log_line(f"waiting for {what} ({waited / 60:.0f} min)")


def difference(values: list[str], advice: str) -> str:
    """What the first rank that differs from rank 0 has otherwise, or nothing. `values` are those of `check_same`."""
    (_, first), tails = json.loads(values[0]), [value.partition(",")[2] for value in values]
    for value, tail in zip(values, tails):
        if tail == tails[0]:
            continue
        name, facts = json.loads(value)
        keys = [key for key in sorted({*first, *facts}) if first.get(key) != facts.get(key)]
        if keys:
            shown = ", ".join(f"{key} is {facts.get(key)} there and {first.get(key)} on rank 0" for key in keys[:4])
            more = f" and {len(keys) - 4} more" if len(keys) > 4 else ""
            return f"{name} differs from rank 0: {shown}{more}; {advice}"
    return ""


@contextmanager
def _lost(what: str) -> Iterator[None]:
    """An error of the store is that of a job whose first rank, or whose agent, has ended."""
    try:
        yield
    except dist.DistError as error:
        raise StartError(
            f"the job has ended while this rank waited for {what}: rank 0 or its agent is gone; see the message of "
            f"the rank that failed first ({type(error).__name__})"
        ) from error
