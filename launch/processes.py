"""Process trees on Linux: end with the parent, adopt orphans, leave no process behind. Imports nothing heavy."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import time
from pathlib import Path

SUPERVISOR = "LAUNCH_SUPERVISOR_PID"  # environment variable: the process that its reader must not outlive
_SET_PARENT_DEATH_SIGNAL, _SET_CHILD_SUBREAPER = 1, 36  # linux/prctl.h


def end_with_supervisor() -> None:
    """Ask Linux for a SIGTERM when the parent ends, if the environment names it as the supervisor."""
    supervisor = os.environ.pop(SUPERVISOR, None)
    if supervisor is None:
        return
    _prctl(_SET_PARENT_DEATH_SIGNAL, signal.SIGTERM)
    if os.getppid() != int(supervisor):  # it ended before the line above
        os.kill(os.getpid(), signal.SIGTERM)


def adopt_orphans() -> None:
    """Become the parent of descendants whose own parent dies, so that `end_descendants` finds them."""
    _prctl(_SET_CHILD_SUBREAPER, 1)


def descendants(pid: int | None = None) -> list[int]:
    """Children of `pid` (default: this process), their children, and so on."""
    by_parent = _children_by_parent()
    found, queue = [], [pid or os.getpid()]
    while queue:
        below = by_parent.get(queue.pop(), [])
        found += below
        queue += below
    return found


def children(pid: int) -> list[int]:
    """Direct children of `pid`."""
    return _children_by_parent().get(pid, [])


def _children_by_parent() -> dict[int, list[int]]:
    """Parent -> children, for every process that is not a zombie."""
    by_parent: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                stat = (entry / "stat").read_text(encoding="utf-8", errors="replace")
            except OSError:
                continue
            state, parent = stat.rpartition(")")[2].split()[:2]
            if state != "Z":
                by_parent.setdefault(int(parent), []).append(int(entry.name))
    return by_parent


def kill_descendants() -> None:
    """Send SIGKILL to every descendant of this process."""
    for pid in descendants():
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def end_descendants(timeout: float = 10.0) -> None:
    """Kill and reap every descendant. The exit codes of children that were not waited for are lost."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        kill_descendants()
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return
        time.sleep(0.02)


def _prctl(option: int, value: int) -> None:
    if ctypes.CDLL(None, use_errno=True).prctl(option, int(value), 0, 0, 0):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
