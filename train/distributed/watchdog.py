"""Names the rank that makes a job stand still.

When a rank dies or hangs, the others wait inside a collective until a timeout that names nobody. So a thread of every
rank writes to the job's store, every few seconds, where the rank runs and what it is doing. When a rank fails, or makes
no progress for the configured time, it reads these notes and names the ranks that fell silent or behind.
"""

from __future__ import annotations

import faulthandler
import json
import os
import socket
import sys
import threading
import time
from typing import Any

import torch.distributed as dist

_ADVICE = "; raise it if a single micro-batch, held-out sample or update may take longer"
STALLED = 70  # exit code (EX_SOFTWARE): no progress for parallel.timeout_minutes
_NO_STORE = "the rank that hosts the job's store (rank 0) does not answer"
_ANSWER_SECONDS = 5.0  # how long a rank that fails waits for the job's store before it does without


class Watchdog:
    """Ends the process after `timeout_seconds` without progress; a context manager around the training loop.

    Work that may be long tells of its progress: a step and a validation with every sample, a save while it is waited
    for. So `timeout_seconds` limits the smallest piece of work, and does not grow with a step or a validation.

    `store` is shared by the ranks of the job.
    """

    def __init__(self, store: dist.Store, rank: int, size: int, timeout_seconds: float):
        self._store = dist.PrefixStore("watchdog", store)
        self._rank, self._size, self._timeout = rank, size, timeout_seconds
        self._note_every = min(5.0, timeout_seconds / 5)
        self._host = socket.gethostname()
        self._step, self._doing = 0, "starting"
        self._progressed = time.monotonic()
        self._stop = threading.Event()
        # The store answers late or never where the host of rank 0 stands still, so the limit has a thread of its own.
        self._threads = [
            threading.Thread(target=target, name=f"watchdog: {name}", daemon=True)
            for target, name in ((self._watch, "limit"), (self._tell, "notes"))
        ]

    def progress(self, step: int, doing: str) -> None:
        """Note that this rank made progress, and what it does next."""
        self._step, self._doing = step, doing
        self._progressed = time.monotonic()

    def beat(self) -> None:
        """Note that this rank made progress in what it is doing: a micro-batch, a held-out sample, a file."""
        self._progressed = time.monotonic()

    def __enter__(self) -> Watchdog:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, _: Any) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(timeout=1)
        if isinstance(error, Exception) and self._size > 1:
            print(
                self._message(f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"),
                file=sys.stderr,
            )

    def _tell(self) -> None:
        self._note()
        while not self._stop.wait(self._note_every):
            self._note()

    def _watch(self) -> None:
        while not self._stop.wait(self._note_every):
            if time.monotonic() - self._progressed > self._timeout:
                limit = f"no progress for {self._timeout:.0f} s, the limit that parallel.timeout_minutes sets"
                print(self._message(limit + _ADVICE), file=sys.stderr, flush=True)
                faulthandler.dump_traceback(all_threads=True)
                os._exit(STALLED)

    def _note(self) -> None:
        note = {"host": self._host, "step": self._step, "doing": self._doing, "time": time.time()}
        try:
            self._store.set(str(self._rank), json.dumps(note))
        except Exception:  # the store is gone: this rank will notice by itself
            pass

    def _message(self, what: str) -> str:
        own = f"rank {self._rank} on {self._host} failed at step {self._step} ({self._doing}): {what}"
        suspects = self._suspects_in_time()
        return own + (f"\nlikely cause: {'; '.join(suspects)}" if suspects else "")

    def _suspects_in_time(self) -> list[str]:
        """`_suspects`, or where the store does not answer, the rank that hosts it."""
        found: list[list[str]] = []
        asking = threading.Thread(target=lambda: found.append(self._suspects()), name="watchdog: suspects", daemon=True)
        asking.start()
        asking.join(_ANSWER_SECONDS)
        return found[0] if found else [_NO_STORE]

    def _suspects(self) -> list[str]:
        """Descriptions of the ranks whose notes stopped; if none did, of those behind this rank."""
        notes: dict[int, dict] = {}
        try:
            for rank in range(self._size):
                if rank != self._rank and self._store.check([str(rank)]):
                    notes[rank] = json.loads(self._store.get(str(rank)))
        except Exception:
            return [_NO_STORE]
        now, silent_after = time.time(), 3 * self._note_every
        silent = [
            f"rank {rank} on {note['host']} was last heard of {now - note['time']:.0f} s ago, at step {note['step']} "
            f"({note['doing']})"
            for rank, note in notes.items() if now - note["time"] > silent_after
        ]  # fmt: skip
        silent += [
            f"rank {rank} was never heard of" for rank in range(self._size) if rank not in notes and rank != self._rank
        ]
        behind = [
            f"rank {rank} on {note['host']} is at step {note['step']} ({note['doing']})"
            for rank, note in notes.items() if note["step"] < self._step or note["doing"] == "waiting for data"
        ]  # fmt: skip
        return (silent or behind)[:8]
