"""Real runs of a few seconds for the launcher's tests, through the command line as a user would start them."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.ranks import run_on_ranks
from tests.train.runs import write_corpus

ROOT = Path(__file__).resolve().parent.parent.parent
STEPS = 150  # enough that a run still trains when Slurm gets round to taking its nodes away
LOCAL_STEPS = 60
MODEL = (
    "seq_len=256 model.hidden_size=32 model.num_layers=4 model.num_heads=2 model.num_kv_heads=2 model.head_dim=16 "
    "model.ffn_size=64 model.chunk_size=4 model.window_chunks=4 data=jsonl data.vocab_size=400 "
    "data.validation_fraction=0.1 run.eval_samples=2 run.eval_every=1000 run.log_every=1 run.device=cpu "
    "logging.wandb=off logging.progress=false"
).split()


@pytest.fixture(scope="session")
def small(tmp_path_factory) -> list[str]:
    """Overrides of a run that takes milliseconds a step; its data is prepared once a session."""
    home = tmp_path_factory.mktemp("launch-data")
    write_corpus(home / "corpus.jsonl")
    return [*MODEL, f"data.path={home / 'corpus.jsonl'}", f"data.cache_dir={home / 'cache'}"]


def two_ranks(small: list[str], steps: int) -> list[str]:
    """The training of two ranks that tests disturb in several ways."""
    return [*small, "run.samples_per_step=2", f"run.steps={steps}", "checkpoint.every_steps=20"]


def undisturbed(overrides: list[str], root: Path) -> Path:
    """Run the same on two ranks that nobody disturbs; its losses are those that the others must end with."""
    run_on_ranks(2, _train, [*overrides, f"run.root={root}", "run.name=quiet"])
    return root / "quiet"


def _train(overrides: list[str]) -> None:
    sys.argv = ["train", *overrides]
    runpy.run_module("train", run_name="__main__", alter_sys=True)


def python(*arguments: str, environment: dict[str, str] | None = None) -> subprocess.CompletedProcess:
    """`python -m ARGUMENTS` in the project, to its end."""
    return subprocess.run([sys.executable, "-m", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=280,
                          env={**os.environ, **(environment or {})})  # fmt: skip


def start(*arguments: str, log: Path) -> subprocess.Popen:
    """The same, in the background."""
    with open(log, "w", encoding="utf-8") as out:
        return subprocess.Popen([sys.executable, "-m", *arguments], cwd=ROOT, stdout=out, stderr=out)


def losses(run: Path) -> dict[int, float]:
    """step -> training loss, exactly as written."""
    found = {}
    try:
        lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return {}
    for line in lines:
        try:
            record = json.loads(line)
        except json.JSONDecodeError:  # being written
            continue
        if "loss" in record:
            found[record["step"]] = record["loss"]
    return found


def wait_for(condition: Callable[[], object], what: str, timeout: float = 240, every: float = 0.05) -> None:
    """Look every `every` seconds; raise after `timeout` seconds."""
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, f"waited {timeout:.0f} s for {what}"
        time.sleep(every)
