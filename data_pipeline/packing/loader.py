"""Packed samples in a global order, for one data-parallel rank. The state is one integer and a fingerprint."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from queue import SimpleQueue
from typing import Any

from data_pipeline.errors import DataError
from data_pipeline.packing.samples import PackedSample, Samples, join

_STATE_VERSION = 1


class Loader:
    """The samples of every global step for one data-parallel rank, read ahead by one thread.

    After n consumed samples, the next global step has the indices n ... n + samples_per_step - 1 of the global order,
    of which this rank gets n + j * dp_size + dp_rank. The order does not depend on the ranks or on `samples_per_step`:
    a run may resume with others, and no sample is skipped or repeated. A new loader starts at index 0, so validation
    always reads the same samples.

    Args:
        plan: the samples to read.
        samples_per_step: samples of one global step, over all ranks; a multiple of `dp_size`.
        dp_rank: this rank, in `range(dp_size)`.
        dp_size: number of data-parallel ranks.
        prefetch: samples kept ready, at least 1.
        joined: consecutive samples of this rank that `join` makes one; divides the rank's samples of a step.
        transform: called in the thread on each (joined) sample; `next_step` returns its results.

    Attributes:
        wait_seconds: total time that `next_step` has waited for samples.
        on_sample: called in `next_step` after each (joined) sample that it waited for.

    Raises:
        DataError: the counts do not fit together.
    """

    def __init__(
        self,
        plan: Samples,
        *,
        samples_per_step: int,
        dp_rank: int,
        dp_size: int,
        prefetch: int = 4,
        joined: int = 1,
        transform: Callable[[PackedSample], Any] | None = None,
    ) -> None:
        if dp_size < 1 or not 0 <= dp_rank < dp_size:
            raise DataError(f"dp_rank={dp_rank} must be in range(dp_size={dp_size})")
        if samples_per_step < 1 or samples_per_step % dp_size:
            raise DataError(
                f"samples_per_step={samples_per_step} must be a positive multiple of dp_size={dp_size}, so that all "
                f"data-parallel ranks get the same number of samples"
            )
        if joined < 1 or samples_per_step // dp_size % joined:
            raise DataError(
                f"joined={joined} must be positive and divide the {samples_per_step // dp_size} samples that a "
                f"data-parallel rank has in a step"
            )
        if prefetch < 1:
            raise DataError(f"prefetch={prefetch} must be at least 1")
        self._plan = plan
        self._samples_per_step = samples_per_step
        self._dp_rank, self._dp_size = dp_rank, dp_size
        self._prefetch, self._joined = prefetch, joined
        self._transform = transform
        self._next_sample = 0
        self._reader: _ReadAhead | None = None
        self._closed = False
        self.wait_seconds = 0.0
        self.on_sample: Callable[[], None] = lambda: None

    def next_step(self) -> list[Any]:
        """This rank's `samples_per_step / dp_size / joined` (joined) samples of the next global step, in global order.

        Raises the errors of the reading thread and of `transform`. The loader then stays at the failed step.
        """
        if self._closed:
            raise RuntimeError("next_step() of a closed Loader")
        if self._reader is None:
            self._reader = _ReadAhead(self._make_fetch(self._next_sample), -(-self._prefetch // self._joined))
        started = time.perf_counter()
        samples = self._reader.take(self._samples_per_step // self._dp_size // self._joined, self.on_sample)
        self.wait_seconds += time.perf_counter() - started
        self._next_sample += self._samples_per_step
        return samples

    def state(self) -> dict[str, Any]:
        """The position in the global order, as JSON: samples that `next_step` has returned, not those read ahead.

        The same on all ranks.
        """
        # Every rank has read samples of the last step, so every rank knows the bookmark of that step's first sample.
        last_step = max(self._next_sample - self._samples_per_step, 0)
        return {
            "version": _STATE_VERSION,
            "fingerprint": self._plan.fingerprint,
            "next_sample": self._next_sample,
            "identity": self._plan.identity,
            **self._plan.bookmark(last_step),
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Continue from a `state()`, which may be of a run with another `dp_size` or `samples_per_step`.

        Raises:
            DataError: this is not a loader state; or it is of other data, and `data.accept_changes` is false. The
                message names what has changed (corpus, seq_len, ...).
        """
        version, next_sample = state.get("version"), state.get("next_sample")
        if version != _STATE_VERSION or not isinstance(next_sample, int) or next_sample < 0:
            raise DataError(f"{dict(state)!r} is not a loader state of version {_STATE_VERSION}")
        same = state.get("fingerprint") == self._plan.fingerprint
        if not same and not self._plan.accept_changes:
            raise DataError(
                f"the loader state belongs to the data plan {state.get('fingerprint')}, this run has "
                f"{self._plan.fingerprint}: {_changes(state.get('identity') or {}, self._plan.identity)}; set it back, "
                f"start a new run, or continue at the same sample number of the new data with data.accept_changes=true"
            )
        self._stop()
        if same:
            self._plan.restore(state)
        self._next_sample = next_sample

    def close(self) -> None:
        """Stop the reading thread. `state()` still works."""
        self._stop()
        self._closed = True

    def _stop(self) -> None:
        if self._reader is not None:
            self._reader.stop()
            self._reader = None

    def _make_fetch(self, first: int) -> Callable[[int], Any]:
        # Without `self`: its own thread must not keep a loader alive that nothing else refers to.
        plan, transform, prefetch = self._plan, self._transform, self._prefetch
        dp_rank, dp_size, joined = self._dp_rank, self._dp_size, self._joined

        def read(number: int) -> PackedSample:
            index = first + number * dp_size + dp_rank
            for ahead in range(1 if number == 0 else prefetch, prefetch + 1):
                plan.prefetch(index + ahead * dp_size)
            return plan.at(index)

        def fetch(number: int) -> Any:
            sample = join([read(number * joined + offset) for offset in range(joined)])
            return sample if transform is None else transform(sample)

        return fetch


def _changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """The parts of the data's identity that differ, in words."""
    changed = [key for key in now if before.get(key) != now[key]] + [key for key in before if key not in now]
    if not before or not changed:
        return "corpus, tokenizer, seq_len, alignment or seed have changed"

    def short(value: Any) -> str:
        return value[:12] if isinstance(value, str) and len(value) == 64 else str(value)

    return ", ".join(f"{key} was {short(before.get(key))} and is {short(now.get(key))}" for key in changed)


class _ReadAhead:
    """Calls `fetch(0), fetch(1), ...` in a thread and keeps at most `depth` results."""

    def __init__(self, fetch: Callable[[int], Any], depth: int) -> None:
        self._results: SimpleQueue[tuple[Any, BaseException | None]] = SimpleQueue()
        self._room = threading.Semaphore(depth)
        self._stopped = threading.Event()
        self._taken: deque[Any] = deque()
        self._error: BaseException | None = None
        arguments = (fetch, self._results, self._room, self._stopped)
        self._thread = threading.Thread(target=self._run, args=arguments, name="data-loader", daemon=True)
        self._thread.start()

    @staticmethod
    def _run(
        fetch: Callable[[int], Any],
        results: SimpleQueue[tuple[Any, BaseException | None]],
        room: threading.Semaphore,
        stopped: threading.Event,
    ) -> None:
        number = 0
        while True:
            room.acquire()
            if stopped.is_set():
                return
            try:
                results.put((fetch(number), None))
            except BaseException as error:  # `take` raises it in the thread that wants the result
                results.put((None, error))
                return
            number += 1

    def take(self, count: int, on_result: Callable[[], None]) -> list[Any]:
        """The next `count` results; `on_result` is called after each.

        Raises the error that ended the thread, after the results before it.
        """
        while len(self._taken) < count:
            if self._error is None:
                result, self._error = self._results.get()
            if self._error is not None:
                raise self._error
            self._taken.append(result)
            self._room.release()
            on_result()
        return [self._taken.popleft() for _ in range(count)]

    def stop(self) -> None:
        self._stopped.set()
        self._room.release()
        self._thread.join()

    def __del__(self) -> None:
        # Without this, the thread of a loader that was not closed would wait forever.
        self._stopped.set()
        self._room.release()
