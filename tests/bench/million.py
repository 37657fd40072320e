"""Training steps with a million tokens in one sample, by the trainer itself, on real documents.

    python -m tests.bench.million [out=DIR] [steps=2] [gpus=2] [seconds=600] [key=value ...]
        writes docs/results/million.json, or million_GPUS.json if gpus is not 2
    python -m tests.bench.million size=toy      8,192 tokens on two CPU ranks: tries the script, measures nothing

Trains the preset `1b9_1m` with `key=value` on the sources of Python's standard library. The order of the samples is
chosen so that the first ones are full. The script keeps the records of the steps and kills the run before it saves,
because a checkpoint takes 23 GB.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

import data_pipeline
from tests.bench import workload
from tests.ranks import free_port
from train.logs.metrics import read_records

SEEDS = 8  # number of sample orders to try
PRESETS = {
    "full": ["+experiment=1b9_1m", "data=stdlib", "model.vocab_size=151936"],
    "toy": ["seq_len=8192", "parallel.context=2", "memory=offload", "run.device=cpu"],
}


def main(arguments: list[str]) -> None:
    given = dict(argument.partition("=")[::2] for argument in arguments)
    out, size = Path(given.pop("out", workload.ROOT / "docs/results")), given.pop("size", "full")
    steps, gpus, seconds = (int(given.pop(key, value)) for key, value in (("steps", 2), ("gpus", 2), ("seconds", 600)))
    overrides = [
        *PRESETS[size], f"dry_run_ranks={gpus}", f"run.steps={steps + 1}", "run.log_every=1", "run.eval_every=1000",
        "checkpoint.every_steps=null", "logging.progress=false", "logging.wandb=off",
        *(f"{key}={value}" for key, value in given.items()),
    ]  # fmt: skip
    workload.configured(overrides)  # refuses a key that does not exist
    seed, real_tokens = fullest_order(overrides, steps)
    print(f"data.seed={seed}: real tokens of the first samples {real_tokens}", flush=True)
    with tempfile.TemporaryDirectory() as root:
        command = ["-m", "train", *overrides, f"data.seed={seed}", f"run.root={root}"]
        records = first_steps(command, gpus, Path(root) / "default", steps, seconds)
    report = {
        "command": " ".join(["python -m tests.bench.million", *arguments]),
        "device": workload.device_name(),
        "torch": torch.__version__,
        "gpus": gpus,
        "overrides": overrides,
        "real_tokens_of_samples": real_tokens,
        "steps": records,
    }
    print(json.dumps(records, indent=1))
    if size == "full":
        (out / ("million.json" if gpus == 2 else f"million_{gpus}.json")).write_text(
            json.dumps(report, indent=1) + "\n"
        )


def fullest_order(overrides: list[str], steps: int) -> tuple[int, list[int]]:
    """The `data.seed` that maximizes the real tokens of the emptiest of the first `steps` samples, and those counts."""
    config, found = workload.configured(overrides), {}
    for seed in range(SEEDS):
        data = data_pipeline.open_data(dataclasses.replace(config.data, seed=seed))
        samples = data.samples("train", config.seq_len, config.alignment)
        found[seed] = [int(samples.at(i).doc_lengths.sum()) for i in range(steps)]
    return max(found.items(), key=lambda item: min(item[1]))


def first_steps(command: list[str], ranks: int, directory: Path, steps: int, seconds: float) -> list[dict]:
    """Start the ranks, wait for the records of `steps` steps, or those there are after `seconds`; kill the ranks."""
    began = time.monotonic()
    rendezvous = dict(
        WORLD_SIZE=str(ranks), LOCAL_WORLD_SIZE=str(ranks), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port())
    )
    # The optimizer runs on the CPU.
    threads = os.environ.get("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // ranks)))
    processes = []
    for rank in range(ranks):
        environment = os.environ | rendezvous | dict(RANK=str(rank), LOCAL_RANK=str(rank), OMP_NUM_THREADS=threads)
        processes.append(subprocess.Popen([sys.executable, *command], cwd=workload.ROOT, env=environment))
    try:
        while True:
            records = []
            if (directory / "metrics.jsonl").exists():
                records = [record for record in read_records(directory / "metrics.jsonl") if "loss" in record]
            if len(records) >= steps or (records and time.monotonic() - began > seconds):
                return records[:steps]
            if time.monotonic() - began > seconds:
                raise SystemExit(f"no step finished within seconds={seconds:.0f}")
            codes = [process.poll() for process in processes]
            if any(code is not None for code in codes):
                raise SystemExit(f"a rank ended after {len(records)} of {steps} steps; exit codes {codes}")
            time.sleep(0.5)
    finally:
        for process in processes:
            process.kill()
            process.wait()


if __name__ == "__main__":
    main(sys.argv[1:])
