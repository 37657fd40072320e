"""How training scales over the GPUs of one host, as many as there are.

    python -m tests.bench.scaling [out=DIR] [layers=8]     writes docs/results/scaling.json and .png
    python -m tests.bench.scaling size=toy                 on four CPU ranks: proves the script, measures nothing

The 1.9B layer shape in bf16. `context`: one sample of 131,072 tokens over 1, 2, 4, 8 GPUs, alone and with TP=2.
`longer`: 131,072 tokens a GPU, one sample over all. `data`: one sample of 8,192 tokens a GPU and micro-batch, under
ZeRO-1 and ZeRO-3. Every number of GPUs is one start, the smaller ones side by side on GPUs of their own; losses of 20
steps of a small model must agree with one GPU's.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.bench import workload

SHAPES = {
    "full": dict(hidden_size=2048, num_heads=16, num_kv_heads=16, head_dim=128, ffn_size=6144, vocab_size=32_768),
    "toy": dict(hidden_size=64, num_heads=4, num_kv_heads=4, head_dim=16, ffn_size=128, vocab_size=512,
                window_chunks=4),
}  # fmt: skip
SMALL = dict(hidden_size=512, num_layers=4, num_heads=8, num_kv_heads=8, head_dim=64, ffn_size=1536, vocab_size=32_768)
LENGTHS = {"full": (131_072, 8_192, 16_384), "toy": (2_048, 512, 1_024)}  # a long sample, a short one, the losses'
STEPS = {"full": 20, "toy": 3}
# kind, parallel settings for n GPUs, and whether they exist for n
CASES = {
    "context": (lambda n: dict(context=n), lambda n: True),
    "context, TP=2": (lambda n: dict(tensor=2, sequence=True, context=n // 2), lambda n: n >= 2),
    "longer": (lambda n: dict(context=n), lambda n: n > 1),
    "data, ZeRO-1": (lambda n: dict(zero=1), lambda n: True),
    "data, ZeRO-3": (lambda n: dict(zero=3), lambda n: True),
}


def run(ranks: int, kind: str, size: str, layers: int) -> dict:
    """This rank's part of one case."""
    import torch

    from ksa_model.config import ModelConfig
    from ksa_model.memory import MemoryConfig
    from train import parallel
    from train.config import RunConfig, TrainConfig
    from train.metrics import peak_flops
    from train.parallel import ParallelConfig

    settings = ParallelConfig(**CASES[kind][0](ranks))
    long, short, for_losses = LENGTHS[size]
    is_data = kind.startswith("data")
    length = short if is_data else long * ranks if kind == "longer" else long
    precision = "bf16" if torch.cuda.is_available() else "fp32"

    def config(model: dict, seq_len: int, samples: int) -> TrainConfig:
        run = RunConfig(samples_per_step=samples, precision=precision)
        memory = MemoryConfig("none" if is_data else "full")
        return TrainConfig(model=ModelConfig(**model), seq_len=seq_len, parallel=settings, run=run, memory=memory)

    small = SMALL if size == "full" else SHAPES["toy"] | dict(num_layers=4)
    given = config(small, for_losses, 8)
    world = workload.start(given)
    bench = workload.Bench(given, world, [[0], [0, for_losses // 4 // 8 * 8]])
    losses = bench.losses(STEPS[size])
    del bench
    workload.forget()

    given = config(SHAPES[size] | dict(num_layers=layers), length, 4 * ranks if is_data else 1)
    bench = workload.Bench(given, world, [[0]])
    batches = bench.batches(0)
    seconds = bench.seconds(2, 3)
    context_bytes = dict(bench.engine.module.context.received_bytes) if settings.context > 1 else {}  # type: ignore
    found = {
        "kind": kind, "ranks": ranks, "seq_len": length, "seconds": seconds, "losses": losses,
        "tokens_per_second": given.run.samples_per_step * length / seconds,
        "received_bytes": context_bytes, "device": workload.device_name(), "torch": torch.__version__,
    }  # fmt: skip
    if torch.cuda.is_available():
        flops = sum(batch.model_flops for batch in batches) / settings.tensor
        found["mfu"] = flops / seconds / (peak_flops(bench.world.device) or float("nan"))
        found["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
        found["parts_ms"] = parts(bench, batches)
    del bench, batches
    parallel.shutdown()
    workload.forget()
    return found


def parts(bench: workload.Bench, batches: list) -> dict[str, float]:
    """Milliseconds of a step by part; `exchange exposed` is communication while nothing else runs."""
    import torch

    from tests.bench.step import PARTS

    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        bench.step(batches)
        torch.cuda.synchronize()
    spent: Counter[str] = Counter()
    work, sent = [], []
    for event in profile.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            part = next((part for word, part in PARTS.items() if word in event.name), "other")
            spent[part] += event.time_range.elapsed_us() / 1e3
            (sent if part == "communication" else work).append((event.time_range.start, event.time_range.end))
    spent["exchange exposed"] = uncovered(sent, work) / 1e3
    return {part: round(ms, 2) for part, ms in spent.most_common()}


def uncovered(spans: list[tuple[float, float]], by: list[tuple[float, float]]) -> float:
    """Length of `spans` outside of every span of `by`.

    Example: [(0, 10)] by [(2, 4), (3, 6), (9, 12)] leaves 0-2 and 6-9: 5.
    """
    merged: list[list[float]] = []
    for start, end in sorted(by):
        if merged and start <= merged[-1][1]:
            merged[-1][1] = max(merged[-1][1], end)
        else:
            merged.append([start, end])
    left = 0.0
    for start, end in spans:
        left += (end - start) - sum(max(0.0, min(end, e) - max(start, s)) for s, e in merged)
    return left


def efficiency(row: dict, rows: list[dict]) -> float | None:
    """Share of ideal: tokens/s a GPU against the fewest GPUs of the same kind (`longer`: model FLOPs, as MFU)."""
    first = next(r for r in rows if r["kind"] == ("context" if row["kind"] == "longer" else row["kind"]))
    if row["kind"] == "longer":
        return row["mfu"] / first["mfu"] if "mfu" in row else None
    return row["tokens_per_second"] / row["ranks"] / (first["tokens_per_second"] / first["ranks"])


def main(size: str, layers: int, out: Path) -> None:
    import torch

    most = 4 if size == "toy" else torch.cuda.device_count()
    numbers = [n for n in (1, 2, 4, 8) if n <= most]
    rows: list[dict] = []

    def start(ranks: int, first_gpu: int) -> None:
        devices = None if size == "toy" else range(first_gpu, first_gpu + ranks)
        threads = 1 if size == "toy" else None
        for row in workload.ranks_results(
            "tests.bench.scaling", ranks, size, str(layers), threads=threads, devices=devices
        ):
            print(f"{row['kind']:<15}{ranks} ranks {row['seconds']:8.3f} s", flush=True)
            rows.append(row)

    # One GPU takes place 0, two take 1 and 2, four take 3 to 6: all but the largest number fit side by side.
    *few, all_of_them = numbers
    with ThreadPoolExecutor() as at_once:
        list(at_once.map(start, few, [n - 1 for n in few]))
    start(all_of_them, 0)
    rows.sort(key=lambda row: (row["ranks"], list(CASES).index(row["kind"])))
    one = rows[0]["losses"]
    for row in rows:
        row["efficiency"] = efficiency(row, rows)
        row["worst_loss_difference"] = max(abs(a - b) / abs(b) for a, b in zip(row["losses"], one))
        shown = "" if row["efficiency"] is None else f"{row['efficiency']:7.1%} of ideal"
        rate, worst = row["tokens_per_second"], row["worst_loss_difference"]
        print(f"{row['kind']:<15}{row['ranks']} ranks {row['seconds']:8.3f} s {rate:12,.0f} tokens/s{shown}"
              f"   worst loss difference {worst:.1e}", flush=True)  # fmt: skip
    if size == "full":
        report = {"command": "python -m tests.bench.scaling", "layers": layers, "rows": rows}
        (out / "scaling.json").write_text(json.dumps(report, indent=1) + "\n")
        draw(rows, out / "scaling.png")


def draw(rows: list[dict], path: Path) -> None:
    """Share of ideal against the number of GPUs, one line for each kind."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.2), dpi=120)
    for kind in CASES:
        points = [(r["ranks"], r["efficiency"]) for r in rows if r["kind"] == kind and r["efficiency"] is not None]
        if points:
            axes.plot(*zip(*points), marker="o", label=kind)
    axes.set(xscale="log", xlabel="GPUs", ylabel="share of ideal", ylim=(0, 1.1))
    axes.set_xticks([1, 2, 4, 8], ["1", "2", "4", "8"])
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path)


if __name__ == "__main__":
    if len(sys.argv) == 4 and sys.argv[1].isdigit():
        ranks = int(sys.argv[1])
        for kind, (_, exists) in CASES.items():
            if exists(ranks):
                workload.result(run(ranks, kind, sys.argv[2], int(sys.argv[3])))
    else:
        given = dict(argument.split("=", 1) for argument in sys.argv[1:])
        size = given.get("size", "full")
        main(
            size,
            int(given.get("layers", 4 if size == "toy" else 8)),
            Path(given.get("out", workload.ROOT / "docs/results")),
        )
