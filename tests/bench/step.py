"""A training step of the 1.9B model on one GPU: tokens/s, MFU, memory, and where the time goes.

    python -m tests.bench.step [out=DIR] [cases=8k,128k,...]     writes docs/results/step.json

MFU counts model FLOPs alone (no recomputation, the visible keys of the real documents, the summary stream's dense
work) against the data sheet's dense bf16 peak. All cases run in one call, each with hybrid, pure KSA and full attention
side by side where it says so.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import sys
from collections import Counter
from pathlib import Path

import torch

from ksa_model.config import ModelConfig
from tests.bench import workload
from train import dry_run, parallel
from train.config import RunConfig, TrainConfig
from train.metrics import peak_flops

ROOT = Path(__file__).resolve().parent.parent.parent
MODEL = ModelConfig(
    hidden_size=2048, num_layers=24, num_heads=16, num_kv_heads=16, head_dim=128, ffn_size=6144, vocab_size=151_936
)
CASES = {  # name: (seq_len, samples of a step, of these in a micro-batch, layers, recompute, patterns)
    "8k": (8_192, 8, 2, 24, False, ("KKKF",)),
    "8k-single": (8_192, 8, 1, 24, False, ("KKKF",)),
    "128k": (131_072, 1, 1, 12, True, ("KKKF", "K", "F")),
}
PARTS = {  # words in a kernel's name: the part it is counted to; the first that fits
    "_summary_": "summaries' attention",
    "_loss_": "loss",
    "sdpa": "attention, cuDNN",
    "_backward_keys": "attention, Triton",
    "_backward_queries": "attention, Triton",
    "_forward": "attention, Triton",
    "cudnn": "attention, cuDNN",
    "_rms_norm": "norms and rotation",
    "_norm_rotate": "norms and rotation",
    "_swiglu": "SwiGLU",
    "gemm": "matrix products",
    "nvjet": "matrix products",
    "cutlass": "matrix products",
    "adam": "optimizer",
    "multi_tensor": "optimizer",
    "softmax": "loss",
    "nccl": "communication",
    "Memcpy": "copies",
    "Memset": "copies",
    "cat": "joining tensors",
    "reduce": "reductions",
    "elementwise": "elementwise",
}


def run(name: str, pattern: str) -> dict:
    seq_len, samples, joined, layers, recompute, _ = CASES[name]
    model = dataclasses.replace(MODEL, layer_pattern=pattern, num_layers=layers)
    settings = RunConfig(
        samples_per_step=samples, samples_per_micro_batch=joined, precision="bf16", recompute=recompute
    )
    config = TrainConfig(model=model, seq_len=seq_len, run=settings)
    world = workload.start(config)
    bench = workload.Bench(config, world, [[0]])
    batches = bench.batches(0)
    torch.cuda.reset_peak_memory_stats()
    seconds = bench.seconds(2, 3)
    peak = torch.cuda.max_memory_allocated()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        bench.step(batches)
        torch.cuda.synchronize()
    loss = bench.sums.read()["loss"]
    flops = sum(batch.model_flops for batch in batches)
    parts, kernels = Counter(), []
    for event in profile.key_averages():
        ms = event.self_device_time_total / 1e3
        if ms:
            parts[next((part for word, part in PARTS.items() if word in event.key), "other")] += ms
            kernels.append((round(ms, 2), event.count, event.key[:90]))
    busy = sum(parts.values())
    result = {
        "case": name, "pattern": pattern, "seq_len": seq_len, "samples": samples, "samples_per_micro_batch": joined,
        "layers": layers, "recompute": recompute, "loss": loss, "seconds": seconds,
        "tokens_per_second": samples * seq_len / seconds,
        "mfu": flops / seconds / (peak_flops(world.device) or float("nan")), "peak_gib": peak / 2**30,
        "predicted_gib": dry_run.plan(config, 1).total / 2**30, "idle_share": max(0.0, 1 - busy / seconds / 1e3),
        "parts_ms": {part: round(ms, 2) for part, ms in parts.most_common()},
        "kernels": sorted(kernels, reverse=True)[:25],
    }  # fmt: skip
    del bench, batches
    parallel.shutdown()
    gc.collect()
    torch.cuda.empty_cache()
    return result


def main(arguments: dict[str, str]) -> None:
    results = []
    for name in arguments.get("cases", ",".join(CASES)).split(","):
        for pattern in CASES[name][5]:
            result = run(name, pattern)
            results.append(result)
            shown = {k: round(v, 4) if isinstance(v, float) else v for k, v in result.items() if k != "kernels"}
            print(json.dumps(shown), flush=True)
            if "kernels" in arguments:
                print(
                    "\n".join(f"  {ms:8.2f} ms {count:5d} x {key}" for ms, count, key in result["kernels"]), flush=True
                )
    out = Path(arguments.get("out", ROOT / "docs/results"))
    report = {"device": workload.device_name(), "torch": torch.__version__, "command": "python -m tests.bench.step"}
    (out / "step.json").write_text(json.dumps(report | {"results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main(dict(argument.split("=", 1) for argument in sys.argv[1:]))
