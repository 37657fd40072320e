"""A training step of the 1.9B model on one or two GPUs: tokens/s, MFU, memory, and where the time goes.

    python -m tests.bench.step [out=DIR] [cases=8k,128k,...] [kernels=]     writes docs/results/step.json
    python -m tests.bench.step size=toy          on the CPU: tries the script, measures nothing

MFU counts model FLOPs only (no recomputation, the visible keys of the real documents, the dense work of the summary
tokens) against the data sheet's dense bf16 peak. Peak memory is reported next to the prediction of `dry_run=true`,
without the CUDA context. Every case runs in its own process, so that one that runs out of memory does not end the
others. Some cases compare hybrid, pure KSA and full attention. Samples longer than 131,072 tokens contain documents of
131,072 tokens; they are timed once and not profiled.

"memory" trains one model on samples of 131,072 to 1,048,576 tokens and fits a line to the peaks. "reference" compares
the first loss of a model with fused kernels and all memory savings to that of the same model with plain attention.
"fp8 loss" compares the losses of 60 steps with perf.precision=fp8 to those with bf16 from the same weights. Without
`cases`, every case that fits the number of GPUs runs. Results of other cases and devices stay in step.json.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import torch

from ksa_model.config import MemoryConfig, ModelConfig
from ksa_model.memory import GIB, HostPool
from tests.bench import workload
from train import dry_run
from train.config.schema import TrainConfig
from train.config.sections import ParallelConfig, PerfConfig, RunConfig
from train.distributed import groups as parallel
from train.logs.step_sums import peak_flops

ROOT = Path(__file__).resolve().parent.parent.parent
SHAPES = {
    "full": dict(hidden_size=2048, num_heads=16, num_kv_heads=16, head_dim=128, ffn_size=6144, vocab_size=151_936),
    "toy": dict(hidden_size=64, num_heads=4, num_kv_heads=4, head_dim=16, ffn_size=128, vocab_size=512,
                window_chunks=4),
    "small": dict(hidden_size=512, num_heads=8, num_kv_heads=8, head_dim=64, ffn_size=1536, vocab_size=32_000),
}  # fmt: skip
MEMORY = {
    "none": MemoryConfig(),
    "full": MemoryConfig("full"),
    "selective": MemoryConfig("selective", mlp_rows=65_536),
    "offload": MemoryConfig("selective", offload=True, mlp_rows=65_536),
    "offload inputs": MemoryConfig("full", offload=True, mlp_rows=65_536),
}
DOCUMENT = 131_072  # tokens per document in the longest samples
LOSS_STEPS = 60  # steps of "fp8 loss"
ONE = ParallelConfig()
TWO = ParallelConfig(context=2, zero=2, offload="optimizer")
ON_HOST = ParallelConfig(zero=2, offload="optimizer")


@dataclasses.dataclass(frozen=True)
class Case:
    seq_len: int
    memory: str
    layers: int = 24
    samples: int = 1  # per step
    joined: int = 1  # samples per micro-batch
    patterns: tuple[str, ...] = ("KKKF",)
    parallel: ParallelConfig = ONE
    backend: str = "auto"  # attention backend
    precision: str = "bf16"  # of the GEMMs inside blocks
    shape: str = "full"

    @property
    def is_long(self) -> bool:
        return self.seq_len > DOCUMENT

    @property
    def ranks(self) -> int:
        return self.parallel.context


CASES = {
    "8k": Case(8_192, "none", samples=8, joined=2),
    "8k single": Case(8_192, "none", samples=8),
    "8k fp8": Case(8_192, "none", samples=8, joined=2, precision="fp8"),
    "32k": Case(32_768, "selective", samples=2),
    "128k": Case(131_072, "full", layers=12, patterns=("KKKF", "K", "F")),
    "128k full": Case(131_072, "full"),
    "128k selective": Case(131_072, "selective"),
    "128k offload": Case(131_072, "offload"),
    "256k offload": Case(262_144, "offload"),
    "512k offload": Case(524_288, "offload", parallel=ON_HOST),
    "memory": Case(1_048_576, "offload inputs", layers=16, parallel=ON_HOST),
    "1M context": Case(1_048_576, "offload inputs", parallel=TWO),
    "reference": Case(8_192, "offload"),
    "fp8 loss": Case(8_192, "none", layers=8, samples=4, joined=2, precision="fp8", shape="small"),
}
TOY_SHARE = 512  # the toy size divides the tokens and the MLP slices of a case by this
PARTS = {  # part of a kernel's name -> the category of its time; the first match counts
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
    "_quantize_rows": "quantization",
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


def configuration(case: Case, pattern: str, size: str) -> TrainConfig:
    toy = size == "toy"
    memory, layers = MEMORY[case.memory], 4 if toy else case.layers
    if toy and memory.mlp_rows:
        memory = dataclasses.replace(memory, mlp_rows=memory.mlp_rows // TOY_SHARE)
    return TrainConfig(
        model=ModelConfig(
            **SHAPES["toy" if toy else case.shape],
            layer_pattern=pattern,
            num_layers=layers,
            attention_backend=case.backend,
        ),
        seq_len=max(64, case.seq_len // TOY_SHARE) if toy else case.seq_len,
        run=RunConfig(samples_per_step=case.samples, samples_per_micro_batch=case.joined, precision="bf16"),
        parallel=case.parallel,
        memory=memory,
        perf=PerfConfig(precision=case.precision),
    )


def losses(case: Case, pattern: str, size: str, steps: int) -> list[float]:
    config = configuration(case, pattern, size)
    bench = workload.Bench(config, workload.start(config), [[0, config.seq_len // 3 // 8 * 8]])
    found = bench.losses(steps)
    del bench
    parallel.shutdown()
    workload.forget()
    return found


def against_reference(name: str, pattern: str, size: str) -> dict:
    case = CASES[name]
    plain = dataclasses.replace(case, memory="full", backend="reference")
    (loss,), (reference,) = losses(case, pattern, size, 1), losses(plain, pattern, size, 1)
    return {
        "case": name, "pattern": pattern, "seq_len": configuration(case, pattern, size).seq_len, "loss": loss,
        "loss_of_plain_attention": reference, "relative_difference": abs(loss / reference - 1),
        "device": workload.device_name(), "torch": torch.__version__,
    }  # fmt: skip


def against_bf16(name: str, pattern: str, size: str) -> dict:
    case = CASES[name]
    config = configuration(case, pattern, size)
    found = losses(case, pattern, size, LOSS_STEPS)
    wanted = losses(dataclasses.replace(case, precision="bf16"), pattern, size, LOSS_STEPS)
    return {
        "case": name, "pattern": pattern, "seq_len": config.seq_len, "samples": case.samples,
        "layers": config.model.num_layers, "hidden_size": config.model.hidden_size, "steps": LOSS_STEPS,
        "first_loss": found[0], "last_loss": found[-1], "last_loss_of_bf16": wanted[-1],
        "largest_relative_difference": max(abs(a / b - 1) for a, b in zip(found, wanted)),
        "device": workload.device_name(), "torch": torch.__version__,
    }  # fmt: skip


def memory_by_length(name: str, pattern: str, size: str) -> dict:
    """One step at each length, with documents of `DOCUMENT` tokens, and a line fitted to the peaks."""
    case = CASES[name]
    config = configuration(case, pattern, size)
    bench = workload.Bench(config, workload.start(config), [])
    found = []
    for share in (8, 4, 2, 1):
        bench.config = dataclasses.replace(config, seq_len=config.seq_len // share)
        tokens = bench.config.seq_len
        documents = max(1, case.seq_len // share // DOCUMENT)
        bench.cuts = [[i * tokens // documents for i in range(documents)]]
        bench.engine.module.host_pool = HostPool(
            config.memory.host_gib * GIB
        )  # or buffers of the previous length would stay
        workload.forget()
        seconds = bench.seconds(0, 1)
        peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else float("nan")
        found.append({
            "seq_len": tokens, "seconds": seconds, "loss": bench.sums.read()["loss"], "peak_gib": peak / GIB,
            "predicted_gib": dry_run.plan(bench.config, 1).total / GIB,
            "pinned_host_gib": bench.engine.module.host_pool.held_bytes / GIB, "outside_torch_gib": outside_torch(),
        })  # fmt: skip
        workload.note(str(found[-1]))
    del bench
    parallel.shutdown()
    workload.forget()
    tokens, peaks = ([row[key] for row in found] for key in ("seq_len", "peak_gib"))
    slope, constant = np.polyfit(tokens, peaks, 1)
    return {
        "case": name, "pattern": pattern, "layers": config.model.num_layers, "lengths": found,
        "gib_per_million_tokens": slope * 1e6, "constant_gib": constant,
        "worst_of_fit": max(abs(slope * n + constant - peak) / peak for n, peak in zip(tokens, peaks)),
        "device": workload.device_name(), "torch": torch.__version__,
    }  # fmt: skip


def run(name: str, pattern: str, size: str) -> dict:
    """This rank's numbers for one case."""
    case = CASES[name]
    if name == "reference":
        return against_reference(name, pattern, size)
    if name == "fp8 loss":
        return against_bf16(name, pattern, size)
    if name == "memory":
        return memory_by_length(name, pattern, size)
    config = configuration(case, pattern, size)
    world = workload.start(config)
    documents = case.seq_len // DOCUMENT if case.is_long else 1
    bench = workload.Bench(config, world, [[i * config.seq_len // documents for i in range(documents)]])
    batches = bench.batches(0)
    on_gpu = world.device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    seconds = bench.seconds(1, 1) if case.is_long else bench.seconds(2, 3)
    peak = torch.cuda.max_memory_allocated() if on_gpu else None
    loss = bench.sums.read()["loss"]
    flops = sum(batch.model_flops for batch in batches)  # of this rank's share
    tokens, planned = case.samples * config.seq_len, dry_run.plan(config, case.ranks)
    result = {
        "case": name, "pattern": pattern, "seq_len": config.seq_len, "samples": case.samples,
        "samples_per_micro_batch": case.joined, "documents_of_a_sample": documents, "layers": config.model.num_layers,
        "memory": dataclasses.asdict(config.memory), "optimizer_on_host": case.parallel.offload == "optimizer",
        "products": case.precision,
        "gpus": case.ranks, "loss": loss, "seconds": seconds, "tokens_per_second": tokens / seconds,
        "mfu": flops / seconds / (peak_flops(world.device) or float("nan")),
        "peak_gib": None if peak is None else peak / GIB, "predicted_gib": planned.total / GIB,
        "pinned_host_gib": bench.engine.module.host_pool.held_bytes / GIB,
        "predicted_host_gib": dry_run.offloaded_bytes(config)[0] / GIB, "outside_torch_gib": outside_torch(),
    }  # fmt: skip
    if not case.is_long:
        result |= profiled(bench, batches, seconds)
    del bench, batches
    parallel.shutdown()
    workload.forget()
    return result | {"device": workload.device_name(), "torch": torch.__version__}


def outside_torch() -> float | None:
    """GiB in use on the GPU outside torch's allocator: contexts, libraries, communicators, other processes."""
    if not torch.cuda.is_available():
        return None
    free, total = torch.cuda.mem_get_info()
    return (total - free - torch.cuda.memory_reserved()) / GIB


def profiled(bench: workload.Bench, batches: list, seconds: float) -> dict:
    """Profile one more step: milliseconds by category, and the 25 longest kernels."""
    device = bench.world.device
    on_gpu = device.type == "cuda"
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA] if on_gpu else None) as profile:
        bench.step(batches)
        workload.synchronize(device)
    parts, kernels = Counter(), []
    for event in profile.key_averages():
        ms = (event.self_device_time_total if on_gpu else event.self_cpu_time_total) / 1e3
        if ms:
            parts[next((part for word, part in PARTS.items() if word in event.key), "other")] += ms
            kernels.append((round(ms, 2), event.count, event.key[:90]))
    return {
        "idle_share": max(0.0, 1 - sum(parts.values()) / seconds / 1e3),
        "parts_ms": {part: round(ms, 2) for part, ms in parts.most_common()},
        "kernels": sorted(kernels, reverse=True)[:25],
    }


def main(arguments: dict[str, str]) -> None:
    size = arguments.get("size", "full")
    gpus = torch.cuda.device_count()
    names = [name for name, case in CASES.items() if size == "toy" or case.ranks <= gpus]
    if "cases" in arguments:
        names = arguments["cases"].split(",")
        if unknown := [name for name in names if name not in CASES]:
            raise SystemExit(f"cases={','.join(unknown)}: the cases are {', '.join(CASES)}")
    path, failed = Path(arguments.get("out", ROOT / "docs/results")) / "step.json", []
    results = json.loads(path.read_text())["results"] if size == "full" and path.exists() else []
    for name in names:
        for pattern in CASES[name].patterns:
            try:
                (result,) = workload.ranks_results(
                    "tests.bench.step", CASES[name].ranks, name, pattern, size, threads=1 if size == "toy" else None
                )
            except SystemExit as error:  # the other cases may fit
                failed.append(f"{name} {pattern}")
                print(f"{name} {pattern} failed:\n{error}", file=sys.stderr, flush=True)
                continue
            same = name, pattern, result["device"]
            results = [old for old in results if (old["case"], old["pattern"], old["device"]) != same] + [result]
            shown = {k: round(v, 4) if isinstance(v, float) else v for k, v in result.items() if k != "kernels"}
            print(json.dumps(shown), flush=True)
            if "kernels" in arguments and "kernels" in result:
                print(
                    "\n".join(f"  {ms:8.2f} ms {count:5d} x {key}" for ms, count, key in result["kernels"]), flush=True
                )
            if size == "full":  # after every case, so that no result is lost
                report = {"command": "python -m tests.bench.step", "results": results}
                path.write_text(json.dumps(report, indent=1) + "\n")
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    if len(sys.argv) == 5 and sys.argv[1].isdigit():
        workload.result(run(*sys.argv[2:]))
    else:
        main(workload.arguments(sys.argv[1:], "size", "cases", "out"))
