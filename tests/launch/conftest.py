"""Real runs of a few seconds for the launcher's tests, through the command line as a user would start them."""

from __future__ import annotations

import dataclasses
import os
import runpy
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from launch.config import Launch, parse
from tests.ranks import run_on_ranks
from tests.train.runs import write_corpus
from train.logs.metrics import read_records

ROOT = Path(__file__).resolve().parent.parent.parent
STEPS = 150  # enough that the run still trains when Slurm takes its nodes away
LOCAL_STEPS = 60
MODEL = (
    "seq_len=256 model.hidden_size=32 model.num_layers=4 model.num_heads=2 model.num_kv_heads=2 model.head_dim=16 "
    "model.ffn_size=64 model.chunk_size=4 model.window_chunks=4 data=jsonl data.vocab_size=400 "
    "data.validation_fraction=0.1 run.eval_samples=2 run.eval_every=1000 run.log_every=1 run.device=cpu "
    "logging.wandb=off logging.progress=false"
).split()


SLURM = ["target=slurm", "launch.partition=gpu"]
NASTY = 'it\'s; touch pwned $(touch pwned) `touch pwned` & "x" *'  # characters that shells interpret


def nasty_launch(target: list[str], directory: Path) -> Launch:
    """A launch whose environment and overrides contain `NASTY`."""
    return dataclasses.replace(
        parse([*target, f"launch.env.NOTE={NASTY}", "--", f"data.text_key={NASTY}"]), directory=directory
    )


def words_of(script: str, folder: Path, tail: str) -> list[str]:
    """Run `script` and then `tail` in bash; returns the NUL-separated words that it prints."""
    path = folder / "script"
    path.write_text(script + tail)
    done = subprocess.run(["bash", str(path)], capture_output=True, text=True, cwd=folder, env={"SLURM_JOB_ID": "7"})
    assert not list(folder.rglob("pwned")), done.stderr
    return done.stdout.split("\0")[:-1]


def put_on_path(folder: Path, monkeypatch: pytest.MonkeyPatch, **commands: str) -> None:
    """Write shell scripts to `folder` and put it first in PATH: they replace the real commands."""
    folder.mkdir(exist_ok=True)
    for name, text in commands.items():
        (folder / name).write_text(f"#!/bin/sh\n{text}\n")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=":")


@pytest.fixture(scope="session")
def small(tmp_path_factory) -> list[str]:
    """Overrides of a run that takes milliseconds per step; its data is prepared once per session."""
    home = tmp_path_factory.mktemp("launch-data")
    write_corpus(home / "corpus.jsonl")
    return [*MODEL, f"data.path={home / 'corpus.jsonl'}", f"data.cache_dir={home / 'cache'}"]


def two_ranks(small: list[str], steps: int) -> list[str]:
    """Overrides of a run on two ranks, which tests disturb in several ways."""
    return [*small, "run.samples_per_step=2", f"run.steps={steps}", "checkpoint.every_steps=20"]


def undisturbed(overrides: list[str], root: Path) -> Path:
    """Run the same on two ranks without disturbance; the disturbed runs must end with the same losses."""
    run_on_ranks(2, _train, [*overrides, f"run.root={root}", "run.name=quiet"])
    return root / "quiet"


def _train(overrides: list[str]) -> None:
    sys.argv = ["train", *overrides]
    runpy.run_module("train", run_name="__main__", alter_sys=True)


def python(*arguments: str, environment: dict[str, str] | None = None) -> subprocess.CompletedProcess:
    """Run `python -m ARGUMENTS` in the project and wait for it."""
    return subprocess.run([sys.executable, "-m", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=280,
                          env={**os.environ, **(environment or {})})  # fmt: skip


def start(*arguments: str, log: Path) -> subprocess.Popen:
    """Start `python -m ARGUMENTS` in the background, with its output in `log`."""
    with open(log, "w", encoding="utf-8") as out:
        return subprocess.Popen([sys.executable, "-m", *arguments], cwd=ROOT, stdout=out, stderr=out)


def losses(run: Path) -> dict[int, float]:
    """Step -> training loss, exactly as written."""
    return {r["step"]: r["loss"] for r in read_records(run / "metrics.jsonl") if "loss" in r}


def wait_for(condition: Callable[[], object], what: str, timeout: float = 240, every: float = 0.05) -> None:
    """Check the condition every `every` seconds; raise after `timeout` seconds."""
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, f"waited {timeout:.0f} s for {what}"
        time.sleep(every)
