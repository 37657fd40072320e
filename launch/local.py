"""target=local: torchrun agents on this machine, watched by the launcher.

An attempt is all or nothing: when an agent ends badly the others are stopped, orphaned ranks are killed, and the next
attempt starts all of them anew; they continue from the newest checkpoint. Exit codes: 0 finished, 75 stopped on request
and ready to continue, 2 bad input, 1 out of attempts.
"""

from __future__ import annotations

import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType

from launch.agent import GRACE
from launch.config import PROJECT, Launch
from launch.processes import SUPERVISOR, adopt_orphans, end_descendants
from train.signals import BAD_INPUT, REQUEUE

SETTLE_SECONDS = 15.0  # agents of one job notice each other's end within this


def commands(launch: Launch, attempt: int, port: int) -> list[list[str]]:
    """One torchrun agent for each node; a single node picks its own port."""
    where = [
        f"--nnodes={launch.nodes}",
        "--rdzv-backend=c10d",
        f"--rdzv-endpoint=127.0.0.1:{port}",
        f"--rdzv-id=local-{os.getpid()}-{attempt}",
        "--local-addr=127.0.0.1",
    ]
    return [
        [
            launch.python,
            "-m",
            "launch.agent",
            "--signals=forward",
            *where,
            f"--nproc-per-node={launch.ranks_per_node}",
            "-m",
            "train",
            *launch.overrides,
        ]
        for _ in range(launch.nodes)
    ]


def environments(launch: Launch) -> list[dict[str, str]]:
    """The environment of each agent; several on one host share its GPUs out in order."""
    common = child_environment(launch)
    if not launch.gpus_per_node:
        return [common] * launch.nodes
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    devices = visible.split(",") if visible else [str(i) for i in range(launch.nodes * launch.gpus_per_node)]
    return [
        {**common, "CUDA_VISIBLE_DEVICES": ",".join(devices[i * launch.gpus_per_node : (i + 1) * launch.gpus_per_node])}
        for i in range(launch.nodes)
    ]


def child_environment(launch: Launch) -> dict[str, str]:
    """This process's environment, with what the launch adds."""
    environment = {**os.environ, **launch.environment}
    path = os.pathsep.join(p for p in (str(PROJECT), environment.get("PYTHONPATH")) if p)
    return {
        **environment,
        "PYTHONPATH": path,
        SUPERVISOR: str(os.getpid()),
        GRACE: str(launch.settings.grace_seconds),
    }


def run(launch: Launch, lock: int) -> int:
    """Run to the end, restarting after crashes; returns the exit code. `lock` is held by the agents as well."""

    def start(attempt: int) -> list[subprocess.Popen]:
        return [
            subprocess.Popen(command, env=env, cwd=launch.directory, pass_fds=(lock,), start_new_session=True)
            for command, env in zip(commands(launch, attempt, free_port()), environments(launch))
        ]

    return supervise(start, restarts=launch.settings.restarts, grace_seconds=launch.settings.grace_seconds)


def supervise(start: Callable[[int], list[subprocess.Popen]], *, restarts: int, grace_seconds: float) -> int:
    """Start attempt after attempt until one ends for good. Signals that ask this process to stop go to its children."""
    adopt_orphans()
    with _Stop() as stop:
        for attempt in range(restarts + 1):
            agents = start(attempt)
            try:
                code = _watch(agents, stop, grace_seconds)
            finally:
                end_descendants()
            if code == REQUEUE or (stop.count and code):
                print("stopped; the same command continues from the newest checkpoint", file=sys.stderr)
                return REQUEUE
            if code in (0, BAD_INPUT):
                return code
            print(
                f"attempt {attempt + 1} of {restarts + 1} failed"
                + ("; starting again from the newest checkpoint" if attempt < restarts else ""),
                file=sys.stderr,
            )
        return 1


class _Stop:
    """Counts requests to stop: SIGINT, SIGTERM, SIGHUP."""

    def __init__(self) -> None:
        self.count = 0

    def __enter__(self) -> _Stop:
        self._before = {n: signal.signal(n, self._receive) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, _: FrameType | None) -> None:
        self.count += 1


def _watch(agents: list[subprocess.Popen], stop: _Stop, grace_seconds: float) -> int:
    """Wait for the agents of one attempt and say with one code how it ended."""
    passed_on, deadline, crashed = 0, float("inf"), False
    while None in (codes := [agent.poll() for agent in agents]):
        now = time.monotonic()
        if stop.count > passed_on:
            passed_on = stop.count
            deadline = min(deadline, now + grace_seconds)
            _signal_all(agents, signal.SIGTERM if passed_on <= 2 else signal.SIGKILL)
        ended = {code for code in codes if code is not None}
        if ended - {0} and deadline == float("inf"):  # one ended badly; saving or refusing, the others do the same
            deadline = now + SETTLE_SECONDS
            if not {REQUEUE, BAD_INPUT} & ended:
                crashed = True
                _signal_all(agents, signal.SIGTERM)
        if now > deadline:
            _signal_all(agents, signal.SIGKILL)
        time.sleep(0.05)
    if crashed and not stop.count:  # the others may have saved when they were stopped; nobody asked the job to end
        return 1
    return next((code for code in (REQUEUE, BAD_INPUT) if code in codes), 1 if any(codes) else 0)


def _signal_all(agents: list[subprocess.Popen], number: int) -> None:
    for agent in agents:
        if agent.poll() is None:
            agent.send_signal(number)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def describe(launch: Launch, run_directory: Path) -> str:
    """What will run, as a shell would read it."""
    times = f"   # {launch.nodes} of them, each a node" if launch.nodes > 1 else ""
    return f"{shlex.join(commands(launch, 0, 0)[0])}{times}\nruns in {run_directory}"
