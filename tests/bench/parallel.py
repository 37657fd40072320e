"""What splitting one sample costs: a training step under TP=2 + SP, CP=2 and DP=2 against one rank.

    python -m tests.bench.parallel                     on two GPUs: the 1.9B layer shape at 131,072 tokens, in bf16
    python -m tests.bench.parallel size=toy            on CPU ranks (gloo): proves the script, measures nothing

Runs every layout in the same call, one after the other, on the same samples: first 20 steps of a small model whose
losses must agree, then timed steps of a few layers of the large one. Prints a table, writes docs/results/parallel.json.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
LAYOUTS = {  # name: (ranks, parallel overrides, what its speed is compared with)
    "one rank": (1, {}),
    "TP=2 + SP": (2, {"tensor": 2, "sequence": True}),
    "CP=2": (2, {"context": 2}),
    "DP=2": (2, {}),
}
SIZES = {
    "full": {
        "equal": dict(hidden_size=512, num_layers=4, num_heads=8, num_kv_heads=4, head_dim=64, ffn_size=1536),
        "equal_seq_len": 16384,
        "timed": dict(hidden_size=2048, num_layers=4, num_heads=16, num_kv_heads=16, head_dim=128, ffn_size=6144),
        "timed_seq_len": 131_072,
        "precision": "bf16",
        "steps": 20,
    },
    "toy": {
        "equal": dict(hidden_size=64, num_layers=4, num_heads=4, num_kv_heads=2, head_dim=16, ffn_size=128),
        "equal_seq_len": 1024,
        "timed": dict(hidden_size=64, num_layers=4, num_heads=4, num_kv_heads=2, head_dim=16, ffn_size=128),
        "timed_seq_len": 4096,
        "precision": "fp32",
        "steps": 3,
    },
}
WARM_UP, TIMED = 2, 5


def run_layout(part: str, size: str, overrides: dict) -> None:
    """One rank's work: train on synthetic documents; the main rank prints its numbers as one JSON line."""
    import numpy as np
    import torch

    from data_pipeline import IGNORE_INDEX, PackedSample
    from ksa_model.config import ModelConfig
    from train import parallel, trainer
    from train.batches import batch_maker
    from train.config import RunConfig, TrainConfig
    from train.metrics import StepSums
    from train.parallel import ParallelConfig

    chosen = SIZES[size]
    device = parallel.pick_device("auto")
    window = 128 if size == "full" else 16
    model = ModelConfig(**chosen[part], vocab_size=32_768 if size == "full" else 512, window_chunks=window)
    config = TrainConfig(
        model=model,
        seq_len=chosen[f"{part}_seq_len"],
        parallel=ParallelConfig(**overrides),
        run=RunConfig(samples_per_step=2, precision=chosen["precision"], recompute=True),
    )
    world = parallel.initialize(config.parallel, device)
    engine, sums = trainer.build_engine(config, world), StepSums(world)
    make = batch_maker(model, world.context_group.rank(), world.context_group.size())

    def batches(step: int) -> list:
        """Both samples of a step, of which this data-parallel rank takes its share: one document, and several."""
        made = []
        for j in range(world.data_rank, 2, world.data_size):
            random = np.random.default_rng([step, j])
            tokens = random.zipf(1.3, config.seq_len).astype(np.int64) % model.vocab_size
            labels = np.append(tokens[1:], IGNORE_INDEX)
            cuts = [0] if j == 0 else [0, config.seq_len // 4 // 8 * 8, config.seq_len // 3 // 8 * 8]
            starts = np.array(cuts, np.int64)
            labels[starts[1:] - 1] = IGNORE_INDEX
            lengths = np.diff(np.append(starts, config.seq_len))
            sample = PackedSample(tokens, labels, starts, lengths, np.zeros(len(starts), bool), 2 * step + j)
            made.append(make(sample).to(device))
        return made

    losses, seconds = [], []
    for step in range(chosen["steps"] if part == "equal" else WARM_UP + TIMED):
        given = batches(step if part == "equal" else 0)
        if device.type == "cuda":
            torch.cuda.synchronize()
        began = time.perf_counter()
        trainer.train_step(engine, given, world, sums, 1e-3)
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
        losses.append(sums.read()["loss"])
    if world.is_main:
        peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else None
        name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
        timed = statistics.median(seconds[WARM_UP:])
        versions = {"device": name, "torch": torch.__version__}
        result = {"losses": losses, "seconds": timed, "peak_bytes": peak, **versions}
        print("RESULT " + json.dumps(result), flush=True)
    parallel.shutdown()


def launch(part: str, size: str, layout: str) -> dict:
    ranks, overrides = LAYOUTS[layout]
    torchrun = [
        "torch.distributed.run",
        f"--nproc-per-node={ranks}",
        "--rdzv-backend=c10d",
        "--rdzv-endpoint=localhost:0",
    ]
    command = [sys.executable, "-m", *torchrun, "-m", "tests.bench.parallel", part, size, json.dumps(overrides)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"} if size == "toy" else dict(os.environ)
    done = subprocess.run(command, cwd=ROOT, env=environment, text=True, capture_output=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if done.returncode or not lines:
        raise SystemExit(f"{layout}, {part}: exit code {done.returncode}\n{done.stderr[-3000:]}")
    return json.loads(lines[0].removeprefix("RESULT "))


def main(size: str) -> None:
    results: dict = {"command": f"python -m tests.bench.parallel size={size}", "size": SIZES[size], "layouts": {}}
    for layout in LAYOUTS:
        equal, timed = launch("equal", size, layout), launch("timed", size, layout)
        one = results["layouts"].get("one rank", {"losses": equal["losses"], "seconds": timed["seconds"]})
        worst = max(abs(a - b) / abs(b) for a, b in zip(equal["losses"], one["losses"]))
        results["layouts"][layout] = {
            "losses": equal["losses"], "worst_loss_difference": worst, "seconds": timed["seconds"],
            "speed_up": one["seconds"] / timed["seconds"], "peak_bytes": timed["peak_bytes"],
        }  # fmt: skip
        results |= {"device": timed["device"], "torch": timed["torch"]}
        print(f"{layout:<12}{timed['seconds']:9.3f} s a step of two samples{one['seconds'] / timed['seconds']:8.2f} x"
              f"   worst loss difference {worst:.1e}")  # fmt: skip
    if size == "full":
        path = ROOT / "docs/results/parallel.json"
        path.write_text(json.dumps(results, indent=1) + "\n")
        print(f"wrote {path.relative_to(ROOT)}")


if __name__ == "__main__":
    if len(sys.argv) == 4:
        run_layout(sys.argv[1], sys.argv[2], json.loads(sys.argv[3]))
    else:
        main(dict(argument.split("=", 1) for argument in sys.argv[1:]).get("size", "full"))
