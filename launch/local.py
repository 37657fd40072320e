"""target=local: torchrun agents on this machine, watched by the launcher.

When one agent fails, the launcher stops the others, kills orphaned ranks and starts all agents again; they continue
from the newest checkpoint. Exit codes: 0 finished, `REQUEUE` stopped on request and ready to continue, one of
`agent.FINAL` not worth another attempt, 1 all attempts failed.
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

from launch.agent import FINAL, GRACE
from launch.config import Launch
from launch.processes import SUPERVISOR, adopt_orphans, end_descendants
from launch.settings import PROJECT
from train.distributed.signals import REQUEUE

SETTLE_SECONDS = 15.0  # within this time the agents of one job notice that another has ended


def commands(launch: Launch, attempt: int, port: int) -> list[list[str]]:
    """One agent's command line per node; all agents meet at `port` of this machine."""
    rendezvous = [
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
            *rendezvous,
            f"--nproc-per-node={launch.ranks_per_node}",
            "-m",
            "train",
            *launch.overrides,
        ]
        for _ in range(launch.nodes)
    ]


def environments(launch: Launch) -> list[dict[str, str]]:
    """The environment of each agent; several agents on one machine divide its GPUs in order."""
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
    """This process's environment plus the variables of the launch."""
    environment = {**os.environ, **launch.environment}
    path = os.pathsep.join(p for p in (str(PROJECT), environment.get("PYTHONPATH")) if p)
    return {
        **environment,
        "PYTHONPATH": path,
        SUPERVISOR: str(os.getpid()),
        GRACE: str(launch.settings.grace_seconds),
    }


def run(launch: Launch, lock: int) -> int:
    """Run to the end and restart after crashes; returns the exit code. The agents inherit the lock's descriptor."""

    def start(attempt: int) -> list[subprocess.Popen]:
        return [
            subprocess.Popen(command, env=env, cwd=launch.directory, pass_fds=(lock,), start_new_session=True)
            for command, env in zip(commands(launch, attempt, free_port()), environments(launch))
        ]

    return supervise(start, restarts=launch.settings.restarts, grace_seconds=launch.settings.grace_seconds)


def supervise(start: Callable[[int], list[subprocess.Popen]], *, restarts: int, grace_seconds: float) -> int:
    """Start attempt after attempt until one finishes, stops on request, or fails for good; returns the exit code.

    `start(attempt)` starts the agents of an attempt. SIGINT, SIGTERM and SIGHUP reach them as SIGTERM.
    """
    adopt_orphans()
    with StopSignals() as stop:
        for attempt in range(restarts + 1):
            agents = start(attempt)
            try:
                code = _watch(agents, stop, grace_seconds)
            finally:
                end_descendants()
            if code in (0, *FINAL):
                return code
            if code == REQUEUE or stop.count:
                print("stopped; run the same command again to continue from the newest checkpoint", file=sys.stderr)
                return REQUEUE
            print(
                f"attempt {attempt + 1} of {restarts + 1} failed"
                + ("; starting again from the newest checkpoint" if attempt < restarts else ""),
                file=sys.stderr,
            )
        return 1


class StopSignals:
    """A context manager that counts SIGINT, SIGTERM and SIGHUP, except those that are ignored (nohup)."""

    def __init__(self) -> None:
        self.count = 0

    def __enter__(self) -> StopSignals:
        numbers = [n for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP) if signal.getsignal(n) != signal.SIG_IGN]
        self._before = {n: signal.signal(n, self._receive) for n in numbers}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, _: FrameType | None) -> None:
        self.count += 1


def _watch(agents: list[subprocess.Popen], stop: StopSignals, grace_seconds: float) -> int:
    """Wait for the agents of one attempt; returns one exit code for all of them."""
    forwarded, deadline, crashed = 0, float("inf"), False
    while None in (codes := [agent.poll() for agent in agents]):
        now = time.monotonic()
        if stop.count > forwarded:
            forwarded = stop.count
            deadline = min(deadline, now + grace_seconds)
            _signal_all(agents, signal.SIGTERM if forwarded <= 2 else signal.SIGKILL)
        ended = {code for code in codes if code is not None}
        if ended - {0} and deadline == float("inf"):  # one failed; if it saved or gave up, the others do the same
            deadline = now + SETTLE_SECONDS
            if not {REQUEUE, *FINAL} & ended:
                crashed = True
                _signal_all(agents, signal.SIGTERM)
        if now > deadline:
            _signal_all(agents, signal.SIGKILL)
        time.sleep(0.05)
    if crashed and not stop.count:  # the others may exit with REQUEUE, but the user asked for no stop
        return 1
    return next((code for code in (REQUEUE, *FINAL) if code in codes), 1 if any(codes) else 0)


def _signal_all(agents: list[subprocess.Popen], number: int) -> None:
    for agent in agents:
        if agent.poll() is None:
            agent.send_signal(number)


def free_port() -> int:
    """A TCP port of the loopback interface that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def describe(launch: Launch, run_directory: Path) -> str:
    """The command that will run, quoted for a shell, and the run directory."""
    times = f"   # {launch.nodes} times, once per node" if launch.nodes > 1 else ""
    return f"{shlex.join(commands(launch, 0, 0)[0])}{times}\nrun directory: {run_directory}"
