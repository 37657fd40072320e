"""Decoding on one GPU: hybrid KSA compared to full attention of the same shape, random weights, bf16.

    python -m tests.bench.decode [out=DIR]   the shape of Qwen3-4B on a GPU; writes docs/results/decode.json and .png
    python -m tests.bench.decode size=toy    a small shape on any device: tries the script, writes nothing

For each model and mode the training forward prefills the prompts, then tokens are decoded greedily. A step that closes
chunks costs more than others, so the timed unit is a window of k steps, which contains each chunk position once;
tokens/s are those of the median window. The floor is the time to read the weights and the visible cache rows once, at
the rate of a device-to-device copy measured here. The largest batch at the longest mode is computed from allocated
bytes and then allocated; one more request must fail.
"""

from __future__ import annotations

import gc
import json
import statistics
import sys
import time
from pathlib import Path
from unittest import mock

import torch

from ksa_model.config import ModelConfig
from ksa_model.decoding.cache import DecodingCache
from ksa_model.layers.tensor_parallel import TensorParallel
from ksa_model.model import Decoder
from tests.bench import workload
from train.distributed import groups

ROOT = Path(__file__).resolve().parent.parent.parent
SHAPES = {
    "4b": dict(hidden_size=2560, num_layers=36, num_heads=32, num_kv_heads=8, head_dim=128, ffn_size=9728,
               vocab_size=151936, tie_embeddings=True, rope_base=1e6, chunk_size=8, window_chunks=128),
    "toy": dict(hidden_size=64, num_layers=4, num_heads=4, num_kv_heads=2, head_dim=16, ffn_size=96, vocab_size=512,
                tie_embeddings=True, chunk_size=8, window_chunks=4),
}  # fmt: skip
MODES = {"4b": ((16384, 1), (16384, 8), (131072, 1)), "toy": ((128, 1), (128, 3), (512, 1))}  # prompt tokens, batch
BARS = {(16384, 1): 1.1, (16384, 8): 1.5, (131072, 1): 1.6}
MODELS = {"full": "F", "hybrid": "KKKF"}
WINDOWS = 16
WARM_UP_STEPS = 24  # both shapes of a step are run, recorded and replayed
SPARE_BYTES = 2 << 30  # activations of a step, logits, CUDA context and libraries


def build(config: ModelConfig, world) -> Decoder:
    """A model with random weights, drawn on the device: on the host four billion normal numbers take minutes."""
    dtype = torch.bfloat16 if world.device.type == "cuda" else torch.float32
    with mock.patch("torch.nn.init.normal_", lambda weight, **_: weight):
        model = Decoder(config, TensorParallel(world.tensor_group, dtype=dtype))
    model = model.to(world.device).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1:
                p.normal_(0, config.init_std)
    return model


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def copy_rate(device: torch.device) -> float:
    """Bytes per second that a copy on the device reads and writes."""
    source = torch.empty(1 << (30 if device.type == "cuda" else 24), dtype=torch.uint8, device=device)
    target, seconds = torch.empty_like(source), []
    for _ in range(10):
        synchronize(device)
        began = time.perf_counter()
        target.copy_(source)
        synchronize(device)
        seconds.append(time.perf_counter() - began)
    return 2 * source.numel() / statistics.median(seconds)


def read_bytes(model: Decoder, tokens: int, batch: int) -> tuple[float, float]:
    """Bytes of weights and of visible cache rows that an average step reads; summary weights count once per k steps."""
    config, weights = model.config, 0.0
    for name, p in model.named_parameters():
        if name == "embedding.weight" and not config.tie_embeddings:
            continue  # a step reads only the rows of its tokens
        weights += p.numel() * p.element_size() / (config.chunk_size if "summary" in name else 1)
    return weights, batch * config.cache_bytes(tokens, model.embedding.weight.element_size())


def time_mode(model: Decoder, tokens: int, batch: int, rate: float) -> dict:
    device, k = model.embedding.weight.device, model.config.chunk_size
    generator = torch.Generator().manual_seed(tokens + batch)
    prompts = [torch.randint(0, model.config.vocab_size, (tokens,), generator=generator).tolist() for _ in range(batch)]
    steps = WARM_UP_STEPS + WINDOWS * k
    cache = DecodingCache(model, batch, max_tokens=tokens + steps + 1)
    synchronize(device)
    began = time.perf_counter()
    logits = cache.prefill(prompts)
    synchronize(device)
    prefill = time.perf_counter() - began
    windows: list[float] = []
    for step in range(steps):
        if step >= WARM_UP_STEPS and (step - WARM_UP_STEPS) % k == 0:
            synchronize(device)
            began = time.perf_counter()
        logits = cache.step(logits.argmax(-1))
        if step >= WARM_UP_STEPS and (step - WARM_UP_STEPS) % k == k - 1:
            synchronize(device)
            windows.append((time.perf_counter() - began) / k)
    assert bool(torch.isfinite(logits).all())
    step_seconds = statistics.median(windows)
    weights, rows = read_bytes(model, tokens, batch)
    return {
        "prefill_seconds": round(prefill, 3),
        "step_ms": round(1e3 * step_seconds, 4),
        "step_ms_of_windows": [round(1e3 * s, 4) for s in windows],
        "tokens_per_second": round(batch / step_seconds, 2),
        "cache_bytes": cache.allocated_bytes,
        "floor_weight_bytes": round(weights),
        "floor_cache_bytes": round(rows),
        "floor_ms": round(1e3 * (weights + rows) / rate, 4),
        "floor_tokens_per_second": round(batch * rate / (weights + rows), 2),
    }


def fits(model: Decoder, batch: int, tokens: int) -> bool:
    """Whether `batch` requests can decode: allocates their caches and runs a step."""
    try:
        cache = DecodingCache(model, batch, max_tokens=tokens, graphs=False)
        logits = cache.prefill([[1]] * batch)
        for _ in range(2):
            logits = cache.step(logits.argmax(-1))
        synchronize(logits.device)
        return True
    except torch.cuda.OutOfMemoryError:
        return False
    finally:
        cache = logits = None  # type: ignore[assignment]
        release()


def release() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def largest_batch(model: Decoder, tokens: int) -> dict:
    """The largest batch, computed from the bytes of one request and then confirmed by allocation."""
    one = DecodingCache(model, 1, max_tokens=tokens).allocated_bytes
    release()
    held = sum(p.numel() * p.element_size() for p in model.parameters())
    total = torch.cuda.get_device_properties(0).total_memory
    computed = int((total - held - SPARE_BYTES) // one)
    found = computed
    while found and not fits(model, found, tokens):
        found -= 1
    while fits(model, found + 1, tokens):
        found += 1
    return {"bytes_of_a_request": one, "computed": computed, "allocated": found}


def main(size: str, out: Path) -> None:
    device = groups.pick_device("cuda" if size == "4b" else "auto")
    world = groups.initialize(groups.ParallelConfig(), device)
    rate = copy_rate(device)
    results: dict = {
        "command": f"python -m tests.bench.decode size={size}",
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "CPU",
        "torch": torch.__version__,
        "shape": SHAPES[size],
        "copy_bytes_per_second": round(rate),
        "modes": {},
        "largest_batch": {},
    }
    for name, pattern in MODELS.items():
        model = build(ModelConfig(**SHAPES[size], layer_pattern=pattern), world)  # type: ignore[arg-type]
        warm = DecodingCache(model, 1, max_tokens=64)
        warm.step(warm.prefill([[1] * 20]).argmax(-1))  # compiles the kernels
        for tokens, batch in MODES[size]:
            measured = time_mode(model, tokens, batch, rate)
            release()
            results["modes"].setdefault(f"{tokens} x {batch}", {})[name] = measured
            print(
                f"{name:<8}{tokens:>8} tokens x {batch}: prefill {measured['prefill_seconds']:7.2f} s, "
                f"{measured['tokens_per_second']:9.1f} tokens/s, floor {measured['floor_tokens_per_second']:9.1f}, "
                f"cache {measured['cache_bytes'] / 1e9:6.2f} GB",
                flush=True,
            )
        del warm
        if device.type == "cuda":
            longest = MODES[size][-1][0]
            results["largest_batch"][name] = {"tokens": longest, **largest_batch(model, longest)}
            print(f"{name:<8}largest batch at {longest}: {results['largest_batch'][name]}", flush=True)
        del model
        release()
    for (tokens, batch), mode in zip(MODES[size], results["modes"].values()):
        full, hybrid = mode["full"], mode["hybrid"]
        mode["speed_up"] = round(hybrid["tokens_per_second"] / full["tokens_per_second"], 3)
        mode["floor_speed_up"] = round(full["floor_ms"] / hybrid["floor_ms"], 3)
        mode["cache_ratio"] = round(full["cache_bytes"] / hybrid["cache_bytes"], 3)
        mode["bar"] = BARS.get((tokens, batch))
        print(f"{tokens} x {batch}: {mode['speed_up']} x full attention, the floor allows {mode['floor_speed_up']}")
    if size == "4b":
        path = out / "decode.json"
        path.write_text(json.dumps(results, indent=1) + "\n")
        draw(results, path.with_suffix(".png"))
        print(f"wrote {path} and its picture")
    groups.shutdown()


def draw(results: dict, path: Path) -> None:
    """Plot tokens/s of both models in every mode, with the bandwidth floor as a mark above each bar."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    modes = results["modes"]
    figure, axes = pyplot.subplots(1, len(modes), figsize=(3 * len(modes), 3.4), layout="constrained")
    for axis, (mode, both) in zip(axes, modes.items()):
        for x, (name, colour) in enumerate((("full", "#9aa5b1"), ("hybrid", "#2f6fab"))):
            axis.bar(x, both[name]["tokens_per_second"], color=colour, width=0.7)
            floor = both[name]["floor_tokens_per_second"]
            axis.hlines(floor, x - 0.35, x + 0.35, color="black", label="bandwidth floor" if not x else None)
        tokens, _, batch = mode.split()
        axis.set_title(f"{int(tokens):,} tokens, batch {batch}\n{both['speed_up']:.2f} x", fontsize=10)
        axis.set_xticks((0, 1), ("full attention", "hybrid KSA"))
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("decoded tokens/s")
    axes[0].set_ylim(top=1.25 * axes[0].get_ylim()[1])
    axes[0].legend(frameon=False, fontsize=8, loc="upper left")
    figure.suptitle(f"Decoding, 4B shape, bf16, {results['device']}", fontsize=11)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    given = workload.arguments(sys.argv[1:], "size", "out")
    main(given.get("size", "4b"), Path(given.get("out", ROOT / "docs/results")))
