"""Ranks in real processes, which a test can watch, signal and kill."""

from __future__ import annotations

import faulthandler
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from tests.ranks import free_port, server
from tests.train.runs import make_config
from train.logs.metrics import read_records

LONGEST = 300.0  # seconds that a world may take
Harm = tuple[Any, ...]  # a function of `tests.faults.harms` and its arguments


class World:
    """`num_ranks` processes that train; each appends its output to `outputs/rank-N.txt`.

    They end with the exit codes of `python -m train`. Starting them is quicker than starting that command.
    """

    def __init__(
        self,
        num_ranks: int,
        corpus: Path,
        root: Path,
        changes: dict[str, Any],
        *,
        changes_of_ranks: Mapping[int, dict[str, Any]] | None = None,
        harms: Sequence[Harm] = (),
        environment: Mapping[str, str] | None = None,
        outputs: Path | None = None,
    ):
        """`changes_of_ranks`: what single ranks are configured with beside `changes`. `outputs`: `root` by default."""
        root.mkdir(parents=True, exist_ok=True)
        self.directory = root / changes.get("run__name", "default")
        self._outputs = outputs or root
        self._outputs.mkdir(exist_ok=True)
        self._earlier = [len(self._read_log(rank)) for rank in range(num_ranks)]
        context = server()
        port = free_port()
        self.processes = []
        for rank in range(num_ranks):
            own = changes | (changes_of_ranks or {}).get(rank, {})
            arguments = (rank, num_ranks, port, str(self._outputs), dict(environment or {}), tuple(harms))
            self.processes.append(
                context.Process(target=_rank_main, args=(*arguments, str(corpus), str(root), own), daemon=True)
            )
        for process in self.processes:
            process.start()

    @property
    def alive(self) -> bool:
        return any(process.is_alive() for process in self.processes)

    @property
    def step(self) -> int:
        """The last step in metrics.jsonl."""
        return max((r["step"] for r in read_records(self.directory / "metrics.jsonl")), default=0)

    def output(self, rank: int = 0) -> str:
        """The output of a rank since this world started."""
        return self._read_log(rank)[self._earlier[rank] :]

    def outputs(self) -> str:
        """The output of all ranks since this world started, for messages."""
        return "".join(f"--- rank {rank}\n{self.output(rank)}" for rank in range(len(self.processes)))

    @property
    def has_begun(self) -> bool:
        """Whether rank 0 has printed where it starts, which it does just before its first step."""
        return re.search(r"^(resumed from|starting) ", self.output(), re.MULTILINE) is not None

    @property
    def resumed_at(self) -> int:
        found = re.search(r"resumed from \S+ at step (\d+)", self.output())
        return int(found[1]) if found else 0

    def wait_until(self, happened: Callable[[], bool], seconds: float = 120, every: float = 0.002) -> bool:
        """Wait until `happened()`; False if all ranks end or `seconds` pass first."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if happened():
                return True
            if not self.alive:
                return happened()
            time.sleep(every)
        return False

    def signal(self, number: int, ranks: list[int] | None = None) -> None:
        for rank, process in enumerate(self.processes):
            if (ranks is None or rank in ranks) and process.is_alive():
                os.kill(process.pid, number)

    def end(self, patience: float = 60) -> list[int | None]:
        """Wait for the ranks; returns their exit codes.

        Like a launcher it kills the ranks that still run `patience` seconds after the first has ended. Where that is
        long, these first print what they are doing. After `LONGEST` seconds it kills all.
        """
        deadline, last = None, time.monotonic() + LONGEST
        while self.alive:
            if deadline is None and not all(process.is_alive() for process in self.processes):
                deadline = time.monotonic() + patience
            now = time.monotonic()
            if now > last or (deadline is not None and now > deadline):
                if patience > 5:
                    self.signal(signal.SIGUSR2)
                    time.sleep(0.5)
                self.signal(signal.SIGKILL)
            time.sleep(0.01)
        return [process.exitcode for process in self.processes]

    def _read_log(self, rank: int) -> str:
        path = self._outputs / f"rank-{rank}.txt"
        return path.read_text(errors="replace") if path.exists() else ""


def _rank_main(
    rank: int,
    size: int,
    port: int,
    outputs: str,
    environment: dict[str, str],
    harms: Sequence[Harm],
    corpus: str,
    root: str,
    changes: dict[str, Any],
) -> None:
    os.environ.update(
        environment,
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        OMP_NUM_THREADS="1",
    )
    torch.set_num_threads(1)
    out = os.open(f"{outputs}/rank-{rank}.txt", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(out, 1)
    os.dup2(out, 2)
    faulthandler.register(signal.SIGUSR2)
    from train import __main__ as command
    from train.distributed.signals import REQUEUE
    from train.trainer import train

    for harm, *arguments in harms:
        harm(*arguments)
    try:
        result = train(make_config(Path(corpus), Path(root), **changes))
    except command.FOREIGN_ERRORS as error:
        print(f"error: {command.one_line(error)}", file=sys.stderr, flush=True)
        sys.exit(command._code_of(error))
    sys.stderr.flush()
    if result.interrupted:
        sys.exit(REQUEUE)
