"""The cost of saving: `python -m tests.bench.checkpoint [out=FILE] [every=STEPS] [key=value ...]`

The other keys are those of `python -m train`. Trains some steps of the default run, or of any other, on any device and
also under torchrun. It saves a checkpoint every fourth step, or every `every` steps; a save waits until the previous
one is written. Reports the seconds that training stopped for a save, relative to the time between saves at the
configured `checkpoint.every_steps`. Steps that run while a checkpoint is being written are timed separately. For a
model of more than 500M parameters on a GPU:

    python -m tests.bench.checkpoint every=25 model=hybrid_1b9 model.num_layers=8 run.precision=bf16 seq_len=8192
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from tests.bench import workload
from train.config.run_directory import read_config
from train.config.schema import TrainConfig
from train.logs.metrics import read_records
from train.trainer import train

SAVES = 3


def measure(config: TrainConfig, root: str, every: int) -> dict[str, Any]:
    total = SAVES * every + 1
    interval = config.checkpoint.every_steps or 100
    run = dataclasses.replace(config.run, root=root, steps=total, log_every=1, eval_every=10 * total, eval_samples=0)
    saving = dataclasses.replace(config.checkpoint, every_steps=every)
    quiet = dataclasses.replace(config.logging, wandb="off", progress=False)
    result = train(dataclasses.replace(config, run=run, checkpoint=saving, logging=quiet, resume="never"))
    records = read_records(result.directory / "metrics.jsonl")
    steps = {r["step"]: r["step_seconds"] for r in records if "loss" in r}
    # Without the first save, which allocates the host copy, and the last, for which the end of the run waits.
    saves = {r["step"]: r["checkpoint_seconds"] for r in records if "checkpoint_seconds" in r}
    stalls = [seconds for step, seconds in saves.items() if every < step < total]
    beside = [seconds for step, seconds in steps.items() if step - 1 in saves]
    alone = [seconds for step, seconds in steps.items() if step > 2 and step - 1 not in saves]
    newest = result.directory / "checkpoints" / f"step-{total:08d}"
    manifest = json.loads((newest / "manifest.json").read_text())
    stall, step = statistics.median(stalls), statistics.median(alone)
    return {
        "stall_seconds": stall,
        "stall_seconds_worst": max(stalls),
        "first_save_seconds": saves[every],
        "step_seconds": step,
        "step_seconds_beside_a_save": statistics.median(beside),
        "checkpoint_every_steps": interval,
        "stall_share_percent": round(100 * stall / (interval * step), 4),
        "stall_share_percent_worst": round(100 * max(stalls) / (interval * step), 4),
        "saves_timed": len(stalls),
        "steps_between_saves": every,
        "parameters": read_config(result.directory).model.num_parameters()["total"],
        "write_seconds_last": manifest["write_seconds"],
        "checkpoint_megabytes": round(sum(file["bytes"] for file in manifest["files"].values()) / 1e6, 1),
        "ranks": int(os.environ.get("WORLD_SIZE", "1")),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {os.cpu_count()} cores",
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
    }


def main(arguments: list[str]) -> None:
    out = next((a.removeprefix("out=") for a in arguments if a.startswith("out=")), None)
    every = next((int(a.removeprefix("every=")) for a in arguments if a.startswith("every=")), 4)
    overrides = [a for a in arguments if not a.startswith(("out=", "every="))]
    shared = os.environ.get("BENCH_ROOT")  # several ranks share one directory
    with tempfile.TemporaryDirectory() as own:
        found = measure(workload.configured(overrides), shared or own, every) | {"overrides": overrides}
    if os.environ.get("RANK", "0") == "0":
        text = json.dumps(found, indent=1)
        print(text)
        if out:
            Path(out).write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
