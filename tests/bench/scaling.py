"""How training scales over the GPUs of one host.

    python -m tests.bench.scaling [out=DIR] [layers=8] [kinds=context,...]     writes docs/results/scaling.json and .png
    python -m tests.bench.scaling size=toy            on four CPU ranks: tries the script, measures nothing

The 1.9B layer shape in bf16. `context`: one sample of 131,072 tokens on 1, 2, 4, 8 GPUs, with and without TP=2.
`longer`: one sample over all GPUs, 131,072 tokens per GPU. `data`: steps of two micro-batches of four samples of 8,192
tokens per GPU, with ZeRO-1 and ZeRO-3. Each number of GPUs is one start of torchrun; the smaller ones run at the same
time on their own GPUs. The losses of 20 steps of a small model must agree with one GPU's in every parallel layout.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from ksa_model.config import MemoryConfig, ModelConfig
from tests.bench import workload
from tests.bench.step import PARTS, outside_torch
from train.config.schema import TrainConfig
from train.config.sections import ParallelConfig, RunConfig
from train.distributed import groups
from train.logs.step_sums import peak_flops

SHAPES = {
    "full": dict(hidden_size=2048, num_heads=16, num_kv_heads=16, head_dim=128, ffn_size=6144, vocab_size=32_768),
    "toy": dict(hidden_size=64, num_heads=4, num_kv_heads=4, head_dim=16, ffn_size=128, vocab_size=512,
                window_chunks=4),
}  # fmt: skip
SMALL = dict(hidden_size=512, num_layers=4, num_heads=8, num_kv_heads=8, head_dim=64, ffn_size=1536, vocab_size=32_768)
LENGTHS = {
    "full": (131_072, 8_192, 16_384),
    "toy": (2_048, 512, 1_024),
}  # tokens of a long sample, a short one, and one for the losses
STEPS = {"full": 20, "toy": 3}
MLP_ROWS = {"full": 65_536, "toy": 128}
# The kinds that a parallel layout measures, its settings for n GPUs, and its smallest number of GPUs.
LAYOUTS = (
    (("context", "longer"), lambda n: dict(context=n), 1),
    (("context TP=2",), lambda n: dict(tensor=2, sequence=True, context=n // 2), 2),
    (("data ZeRO-1",), lambda n: dict(zero=1), 1),
    (("data ZeRO-3",), lambda n: dict(zero=3), 1),
)
KINDS = [kind for kinds, _, _ in LAYOUTS for kind in kinds]


def run(ranks: int, kinds: tuple[str, ...], settings: ParallelConfig, size: str, layers: int) -> Iterator[dict]:
    """This rank's results for a parallel layout, one row per kind."""
    long, short, for_losses = LENGTHS[size]
    on_gpu = torch.cuda.is_available()
    memory = MemoryConfig() if kinds[0].startswith("data") else MemoryConfig("selective", mlp_rows=MLP_ROWS[size])

    def config(model: dict, seq_len: int, samples: int, joined: int = 1) -> TrainConfig:
        precision = "bf16" if on_gpu else "fp32"
        run = RunConfig(samples_per_step=samples, samples_per_micro_batch=joined, precision=precision)
        return TrainConfig(model=ModelConfig(**model), seq_len=seq_len, parallel=settings, run=run, memory=memory)

    given = config(SMALL if size == "full" else SHAPES["toy"] | dict(num_layers=4), for_losses, 8)
    world = workload.start(given)
    bench = workload.Bench(given, world, [[0], [0, for_losses // 4 // 8 * 8]])
    losses = bench.losses(STEPS[size])
    for kind in kinds:
        del bench
        workload.forget()
        workload.note(f"{kind}, {ranks} ranks")
        length = short if kind.startswith("data") else long * ranks if kind == "longer" else long
        samples, joined = (8 * ranks, 4) if kind.startswith("data") else (1, 1)
        given = config(SHAPES[size] | dict(num_layers=layers), length, samples, joined)
        bench = workload.Bench(given, world, [[0]])
        batches = bench.batches(0)
        seconds = bench.seconds(2, 3)
        sent = dict(bench.engine.module.context.received_bytes) if settings.context > 1 else {}  # type: ignore
        found = {
            "kind": kind, "ranks": ranks, "memory": memory.recompute, "seq_len": length, "samples": samples,
            "samples_per_micro_batch": joined, "seconds": seconds,
            "losses": losses, "tokens_per_second": samples * length / seconds, "received_bytes": sent,
            "device": workload.device_name(), "torch": torch.__version__,
        }  # fmt: skip
        if on_gpu:
            flops = sum(batch.model_flops for batch in batches) / settings.tensor
            found["mfu"] = flops / seconds / (peak_flops(world.device) or float("nan"))
            found["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
            found["outside_torch_gib"] = outside_torch()
            found["parts_ms"] = parts(bench, batches)
        yield found
    del bench, batches
    groups.shutdown()
    workload.forget()


def parts(bench: workload.Bench, batches: list) -> dict[str, float]:
    """Milliseconds of a step by category; `exchange exposed` is communication during which nothing else runs."""
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
    """Total length of `spans` outside every span of `by`.

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


def plain_kind(kind: str) -> str:
    """The baseline of `kind` on one GPU, where nothing is sharded."""
    return "data ZeRO-1" if kind.startswith("data") else "context"


def efficiency(row: dict, rows: list[dict]) -> float | None:
    """Tokens/s per GPU (`longer`: MFU) as a fraction of one GPU's; None without an MFU."""
    one = next(r for r in rows if r["kind"] == plain_kind(row["kind"]) and r["ranks"] == 1)
    if row["kind"] == "longer":
        return row["mfu"] / one["mfu"] if "mfu" in row else None
    return row["tokens_per_second"] / row["ranks"] / one["tokens_per_second"]


def main(size: str, layers: int, wanted: list[str], out: Path) -> None:
    if unknown := set(wanted) - set(KINDS):
        raise SystemExit(f"kinds={','.join(unknown)}: the kinds are {', '.join(KINDS)}")
    wanted = sorted({*wanted, *map(plain_kind, wanted)})
    available = 4 if size == "toy" else torch.cuda.device_count()
    numbers = [n for n in (1, 2, 4, 8) if n <= available]
    rows: list[dict] = []
    out.mkdir(parents=True, exist_ok=True)
    path = out / "scaling.json"
    earlier = json.loads(path.read_text())["rows"] if size == "full" and path.exists() else []
    earlier = [row for row in earlier if row["kind"] not in wanted]  # rows of other kinds stay

    def keep() -> None:
        report = {"command": "python -m tests.bench.scaling", "layers": layers, "rows": rows + earlier}
        path.write_text(json.dumps(report, indent=1) + "\n")

    def start(ranks: int, first_gpu: int) -> None:
        devices = None if size == "toy" else range(first_gpu, first_gpu + ranks)
        for row in workload.ranks_results(
            "tests.bench.scaling", ranks, size, str(layers), *wanted, threads=1, devices=devices
        ):
            print(f"{row['kind']:<15}{ranks} ranks {row['seconds']:8.3f} s", flush=True)
            rows.append(row)
            if size == "full":  # after every row, so that no result is lost
                keep()

    # One rank takes GPU 0, two take 1 and 2, four take 3 to 6: all but the largest number fit at the same time.
    *smaller, largest = numbers
    with ThreadPoolExecutor() as at_once:
        list(at_once.map(start, smaller, [n - 1 for n in smaller]))
    start(largest, 0)
    rows.sort(key=lambda row: (row["ranks"], KINDS.index(row["kind"])))
    one = rows[0]["losses"]
    for row in rows:
        row["efficiency"] = efficiency(row, rows)
        row["worst_loss_difference"] = max(abs(a - b) / abs(b) for a, b in zip(row["losses"], one))
        shown = "" if row["efficiency"] is None else f"{row['efficiency']:7.1%} of ideal"
        rate, worst = row["tokens_per_second"], row["worst_loss_difference"]
        print(f"{row['kind']:<15}{row['ranks']} ranks {row['seconds']:8.3f} s {rate:12,.0f} tokens/s{shown}"
              f"   worst loss difference {worst:.1e}", flush=True)  # fmt: skip
    if size == "full":
        keep()
        draw(rows + earlier, out / "scaling.png")


def draw(rows: list[dict], path: Path) -> None:
    """Plot efficiency against the number of GPUs, one line per kind."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.2), dpi=120)
    for kind in KINDS:
        points = [(r["ranks"], r["efficiency"]) for r in rows if r["kind"] == kind and r["efficiency"] is not None]
        if points:
            axes.plot(*zip(*points), marker="o", label=kind)
    axes.set(xscale="log", xlabel="GPUs", ylabel="share of ideal", ylim=(0, 1.1))
    axes.set_xticks([1, 2, 4, 8], ["1", "2", "4", "8"])
    axes.xaxis.set_minor_locator(pyplot.NullLocator())
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path)


if __name__ == "__main__":
    if sys.argv[1:] and sys.argv[1].isdigit():
        ranks, size, wanted = int(sys.argv[1]), sys.argv[2], sys.argv[4:]
        for kinds, settings, min_ranks in LAYOUTS:
            kinds = tuple(kind for kind in kinds if kind in wanted and (kind != "longer" or ranks > 1))
            if kinds and ranks >= min_ranks:
                for row in run(ranks, kinds, ParallelConfig(**settings(ranks)), size, int(sys.argv[3])):
                    workload.result(row)
    else:
        given = workload.arguments(sys.argv[1:], "size", "layers", "kinds", "out")
        size = given.get("size", "full")
        main(
            size,
            int(given.get("layers", 4 if size == "toy" else 8)),
            given["kinds"].split(",") if "kinds" in given else KINDS,
            Path(given.get("out", workload.ROOT / "docs/results")),
        )
