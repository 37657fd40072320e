"""Speed of the default run on the CPU.

    python -m tests.bench.cpu_step [key=value ...]    tokens/s, and each operation's time from the torch profiler
    python -m tests.bench.cpu_step against=COMMIT     tokens/s of `python -m train` at a commit and in this tree

The second command alternates between the two, three times 60 steps each, and writes docs/results/cpu_step.json.
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function

import data_pipeline
from tests.bench import workload
from train import build, trainer
from train.distributed import groups
from train.distributed.consensus import RankConsensus
from train.logs.metrics import read_records
from train.logs.step_sums import StepSums

ROOT = Path(__file__).resolve().parent.parent.parent
WARM_UP, STEPS, TURNS = 3, 8, 3


def main() -> None:
    config = workload.configured(sys.argv[1:])
    data = data_pipeline.open_data(config.data)
    config = dataclasses.replace(config, model=build.with_vocabulary(config.model, data.vocab_size))
    world = groups.initialize(config.parallel, torch.device("cpu"))
    engine, loader = build.build_engine(config, world), build.make_loader(config, data, world)
    sums, consensus = StepSums(world), RankConsensus(world)
    seconds = []
    for _ in range(WARM_UP + STEPS):
        began = time.perf_counter()
        trainer.train_step(engine, loader.next_step(), world, sums, consensus, 1e-3)
        seconds.append(time.perf_counter() - began)
    step = statistics.median(seconds[WARM_UP:])
    waited = loader.wait_seconds
    with profile(activities=[ProfilerActivity.CPU]) as trace:
        for _ in range(2):
            with record_function("step"):
                trainer.train_step(engine, loader.next_step(), world, sums, consensus, 1e-3)
    print(trace.key_averages().table(sort_by="self_cpu_time_total", row_limit=25, max_name_column_width=60))
    result = {
        "command": "python -m tests.bench.cpu_step " + " ".join(sys.argv[1:]),
        "device": f"CPU, {torch.get_num_threads()} threads, {platform.processor() or platform.machine()}",
        "torch": torch.__version__,
        "step_seconds_median": round(step, 4),
        "step_seconds": [round(s, 4) for s in seconds[WARM_UP:]],
        "tokens_per_second": round(config.seq_len * config.run.samples_per_step / step, 1),
        "loader_wait_share": round(waited / sum(seconds), 5),
    }
    print(json.dumps(result, indent=1))


def against(commit: str) -> None:
    """Median tokens/s of a commit and of this tree, measured alternately, so that other load affects both."""
    speeds: dict[str, list[float]] = {commit: [], "this tree": []}
    with tempfile.TemporaryDirectory() as scratch:
        other = Path(scratch) / "commit"
        subprocess.run(["git", "worktree", "add", "--quiet", "--detach", str(other), commit], cwd=ROOT, check=True)
        try:
            for turn in range(TURNS):
                for name, tree in zip(speeds, (other, ROOT)):
                    speeds[name].append(tokens_per_second(tree, Path(scratch) / f"{tree.name}-{turn}"))
                    print(f"{name}: {speeds[name][-1]:,.0f} tokens/s", flush=True)
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", str(other)], cwd=ROOT, check=True)
    old, new = (statistics.median(found) for found in speeds.values())
    result = {
        "command": f"python -m tests.bench.cpu_step against={commit}",
        "device": f"CPU, {torch.get_num_threads()} threads, {platform.processor() or platform.machine()}",
        "torch": torch.__version__,
        "tokens_per_second": speeds,
        "speed_up": round(new / old, 3),
    }
    print(f"{new / old:.2f} times {commit}")
    (ROOT / "docs/results/cpu_step.json").write_text(json.dumps(result, indent=1) + "\n")


def tokens_per_second(tree: Path, root: Path) -> float:
    overrides = [f"run.root={root}", "run.steps=60", "run.eval_every=1000", "checkpoint.every_steps=null"]
    command = [sys.executable, "-m", "train", *overrides, "logging.progress=false"]
    # Importing `train` set these for this process; each tree sets its own.
    own = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "PYTORCH_CUDA_ALLOC_CONF")
    environment = {key: value for key, value in os.environ.items() if key not in own}
    subprocess.run(command, cwd=tree, env=environment, check=True, stdout=subprocess.DEVNULL)
    records = read_records(root / "default" / "metrics.jsonl")
    return statistics.median(r["tokens_per_second"] for r in records if "loss" in r and r["step"] > 10)


if __name__ == "__main__":
    if sys.argv[1:] and sys.argv[1].startswith("against="):
        against(sys.argv[1].removeprefix("against="))
    else:
        main()
