"""The cost of splitting one sample: a training step with TP=2 + SP, CP=2 and DP=2, compared to one rank.

    python -m tests.bench.parallel [out=DIR] [without=DP,TP]   on two GPUs: the 1.9B layer shape at 131,072 tokens, bf16
    python -m tests.bench.parallel size=toy                    on CPU ranks (gloo): tries the script, measures nothing

Runs every parallel layout in one call, one after the other, on the same samples: first 20 steps of a small model, whose
losses must agree, then timed steps of four layers of the large one. Prints a table, writes docs/results/parallel.json.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from tests.bench import workload

ROOT = Path(__file__).resolve().parent.parent.parent
LAYOUTS = {  # name: (ranks, parallel overrides)
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
        "vocab_size": 32_768,
        "window_chunks": 128,
        "precision": "bf16",
        "steps": 20,
    },
    "toy": {
        "equal": dict(hidden_size=64, num_layers=4, num_heads=4, num_kv_heads=2, head_dim=16, ffn_size=128),
        "equal_seq_len": 1024,
        "timed": dict(hidden_size=64, num_layers=4, num_heads=4, num_kv_heads=2, head_dim=16, ffn_size=128),
        "timed_seq_len": 4096,
        "vocab_size": 512,
        "window_chunks": 16,
        "precision": "fp32",
        "steps": 3,
    },
}
WARM_UP, TIMED = 2, 3


def run_layout(layout: str, size: str) -> dict:
    """This rank's results for one parallel layout."""
    import torch

    from ksa_model.config import MemoryConfig, ModelConfig
    from train.config.schema import TrainConfig
    from train.config.sections import ParallelConfig, RunConfig
    from train.distributed import groups

    chosen, found, world = SIZES[size], {}, None
    for part in ("equal", "timed"):
        shape = dict(vocab_size=chosen["vocab_size"], window_chunks=chosen["window_chunks"])
        length = chosen[f"{part}_seq_len"]
        config = TrainConfig(
            model=ModelConfig(**chosen[part], **shape),
            seq_len=length,
            parallel=ParallelConfig(**LAYOUTS[layout][1]),
            run=RunConfig(samples_per_step=2, precision=chosen["precision"]),
            memory=MemoryConfig("full"),
        )
        workload.note(f"{layout}: {part} starts")
        # One document, and several whose boundaries are at no boundary of a rank.
        cuts = [[0], [0, length // 4 // 8 * 8, length // 3 // 8 * 8]]
        world = world or workload.start(config)
        bench = workload.Bench(config, world, cuts if part == "equal" else [[0]])
        if part == "equal":
            found["losses"] = bench.losses(chosen["steps"])
            workload.note(f"{layout}: {chosen['steps']} steps are done")
        else:
            found["seconds"] = bench.seconds(WARM_UP, TIMED)
            found["peak_bytes"] = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None
            workload.note(f"{layout}: timed steps are done")
        del bench
        workload.forget()
    groups.shutdown()
    workload.note(f"{layout}: groups are closed")
    return found | {"device": workload.device_name(), "torch": torch.__version__}


def main(size: str, out: Path, without: str) -> None:
    results: dict = {"command": f"python -m tests.bench.parallel size={size}", "size": SIZES[size], "layouts": {}}
    for ranks in sorted({ranks for ranks, _ in LAYOUTS.values()}):
        threads = 1 if size == "toy" else None
        for found in workload.ranks_results("tests.bench.parallel", ranks, size, without, threads=threads):
            layout = found.pop("layout")
            one = results["layouts"].get("one rank", found)
            worst = max(abs(a - b) / abs(b) for a, b in zip(found["losses"], one["losses"]))
            results |= {"device": found.pop("device"), "torch": found.pop("torch")}
            results["layouts"][layout] = found | {
                "worst_loss_difference": worst,
                "speed_up": one["seconds"] / found["seconds"],
            }
            speed_up = one["seconds"] / found["seconds"]
            print(f"{layout:<12}{found['seconds']:9.3f} s per step of two samples{speed_up:8.2f} x"
                  f"   worst loss difference {worst:.1e}", flush=True)  # fmt: skip
            if size == "full":  # after every layout, so that no result is lost
                (out / "parallel.json").write_text(json.dumps(results, indent=1) + "\n")
    if size == "full":
        print(f"wrote {out / 'parallel.json'}")


if __name__ == "__main__":
    if len(sys.argv) == 4 and sys.argv[1].isdigit():
        left_out = tuple(filter(None, sys.argv[3].split(",")))
        for name, (ranks, _) in LAYOUTS.items():
            if ranks == int(sys.argv[1]) and not name.startswith(left_out):
                workload.result(run_layout(name, sys.argv[2]) | {"layout": name})
    else:
        given = workload.arguments(sys.argv[1:], "size", "out", "without")
        out = Path(given.get("out", ROOT / "docs/results"))
        main(given.get("size", "full"), out, given.get("without", ""))
