"""KSA attention on one GPU, forward and backward, compared to full causal attention and one FlexAttention call.

    python -m tests.bench.attention                    the table; writes docs/results/attention.json and .png
    python -m tests.bench.attention out=DIR sizes=8192,32768

All times of a table come from one call. They are medians of several passes with 16 query and key heads of 128, k=8,
W=128, bf16, unless a row names other settings. `gpu_ms` is measured while the host runs ahead, `wall_ms` as launched.
Useful TFLOP/s count visible query-key pairs only.
"""

from __future__ import annotations

import itertools
import json
import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from ksa_model.layout.sequence import build_layout
from ksa_model.ops.attention import blocked, cuda, joint
from tests.bench import workload

ROOT = Path(__file__).resolve().parent.parent.parent
SIZES = (8_192, 32_768, 131_072, 1_048_576)
HEADS, HEAD_DIM, CHUNK, WINDOW = 16, 128, 8, 128
DEVICE = "cuda"


def main(arguments: dict[str, str]) -> None:
    sizes = [int(n) for n in arguments["sizes"].split(",")] if "sizes" in arguments else SIZES
    out = Path(arguments.get("out", ROOT / "docs/results"))
    rows: list[dict] = []

    def add(row: dict) -> None:
        rows.append(row)
        print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)

    matmul = matmul_rate()
    add({"what": "matrix product 8192^3, bf16", "tflops": round(matmul, 1)})
    for n in sizes:
        for row in same_length(n, matmul):
            add(row)
    if 131_072 in sizes:
        base = ksa_step(131_072)
        for what, changes in {
            "KSA, 32 query / 8 key heads": dict(heads=32, kv_heads=8),
            "KSA, head dimension 64, 32 heads": dict(heads=32, kv_heads=32, head_dim=64),
            "KSA, k=4": dict(k=4),
            "KSA, k=16": dict(k=16),
            "KSA, k=32": dict(k=32),
            "KSA, documents of 2k to 16k": dict(lengths=random_documents(131_072)),
            "KSA, documents of 10 tokens": dict(lengths=[10] * (131_072 // 16)),
        }.items():
            add(beside(base, what, ksa_step(131_072, **changes), matmul))
        del base
        add(text_row("full attention, documents of 2k to 16k", "F", random_documents(131_072), matmul))
        add(text_row("full attention, one document", "F", [131_072], matmul))
        add(text_row("sliding window of 1,024", "S", [131_072], matmul))
        for part in parts_of(131_072):
            add(part)
    add(error_row())
    import triton

    device = torch.cuda.get_device_name()
    versions = dict(torch=torch.__version__, triton=triton.__version__, cudnn=torch.backends.cudnn.version())
    out.mkdir(parents=True, exist_ok=True)
    report = {"device": device, **versions, "command": "python -m tests.bench.attention", "rows": rows}
    (out / "attention.json").write_text(json.dumps(report, indent=1) + "\n")
    draw(rows, out / "attention.png", device)


# -- measuring --------------------------------------------------------------------------------------------------------


def measure(step, passes: int) -> dict[str, float]:
    return in_turn([step], passes)[0]


def in_turn(steps: list, passes: int) -> list[dict[str, float]]:
    """Of each step the median milliseconds and the bytes at its peak above those before.

    For `gpu_ms`, which is what rows compare, the steps take turns, `passes` at a time, each time after some 30 ms in
    which the card waits and the host gets ahead: under load a card's clock falls by a tenth within seconds.
    """
    measured = []
    for step in steps:
        for _ in range(2):
            step()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        measured.append({"peak_bytes": torch.cuda.max_memory_allocated() - before, "gpu_ms": [], "wall_ms": []})
    for _ in range(3):
        for step, found in zip(steps, measured):
            events = [torch.cuda.Event(enable_timing=True) for _ in range(passes + 1)]
            torch.cuda._sleep(60_000_000)
            events[0].record()
            for event in events[1:]:
                step()
                event.record()
            torch.cuda.synchronize()
            found["gpu_ms"] += [a.elapsed_time(b) for a, b in itertools.pairwise(events)]
    for step, found in zip(steps, measured):
        for _ in range(3):
            began = time.perf_counter()
            for _ in range(passes):
                step()
            torch.cuda.synchronize()
            found["wall_ms"].append((time.perf_counter() - began) / passes * 1e3)
    return [
        {name: value if name == "peak_bytes" else round(statistics.median(value), 3) for name, value in found.items()}
        for found in measured
    ]


def matmul_rate() -> float:
    """TFLOP/s of a large GEMM of random matrices on this device."""
    a, b = (torch.randn(8192, 8192, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    return 2 * 8192**3 / measure(lambda: a @ b, 20)["gpu_ms"] / 1e9


def random_documents(n: int, seed: int = 1) -> list[int]:
    draw, lengths, left = random.Random(seed), [], n
    while left > 0:
        length = min(draw.randint(2048, 16_384), left)
        lengths.append(length)
        left -= -(-length // 64) * 64
    return lengths


def make_pack(lengths: list[int], n: int, k: int):
    padded = [-(-length // k) * k for length in lengths]
    return build_layout(np.cumsum([0, *padded[:-1]]), np.array(lengths), n, k, 1)


def draw_inputs(n: int, heads: int, kv_heads: int, head_dim: int, k: int | None, dtype=torch.bfloat16):
    shapes = [(n, heads), (n, kv_heads), (n, kv_heads)] + ([(n // k, kv_heads)] * 2 if k else [])
    return [torch.randn(*shape, head_dim, device=DEVICE, dtype=dtype).requires_grad_() for shape in shapes]


def forward_backward(attention, inputs):
    weights = torch.randn_like(inputs[0])

    def step():
        torch.autograd.grad(attention(*inputs), inputs, weights)

    return step


# -- rows -------------------------------------------------------------------------------------------------------------


class Case(NamedTuple):
    n: int
    step: Callable[[], None]
    inputs: list[torch.Tensor]
    visible: int


def ksa_step(n: int, *, heads=HEADS, kv_heads=HEADS, head_dim=HEAD_DIM, k=CHUNK, lengths=None) -> Case:
    """W is chosen so that the text window has the same length for every k."""
    window = WINDOW * CHUNK // k
    pack = make_pack(lengths or [n], n, k)
    inputs = draw_inputs(n, heads, kv_heads, head_dim, k)
    step = forward_backward(lambda *x: joint.ksa_attention(x, pack, window, cuda), inputs)
    return Case(n, step, inputs, pack.visible_keys("K", window, 0))


def same_length(n: int, matmul: float) -> list[dict]:
    """KSA over one document, and full causal attention and FlexAttention in turn with it where they end in time."""
    ksa = ksa_step(n)
    if n > 131_072:
        return [finish("KSA", n, measure(ksa.step, 1), ksa.visible, ksa.inputs, matmul)]
    full, flex = full_step(n), flex_step(n)
    of_ksa, of_full, of_flex = in_turn([ksa.step, full.step, flex.step], 3 if n > 32_768 else 10)
    torch._dynamo.reset()
    ratio = {"ksa_is_faster": round(of_full["gpu_ms"] / of_ksa["gpu_ms"], 2)}
    return [
        finish("KSA", n, of_ksa, ksa.visible, ksa.inputs, matmul),
        finish("cuDNN full causal", n, of_full, full.visible, full.inputs, matmul) | ratio,
        finish("one FlexAttention call", n, of_flex, flex.visible, flex.inputs, matmul),
    ]


def beside(base: Case, what: str, case: Case, matmul: float) -> dict:
    """A case in turn with the one document of 16 heads: its time over that one's, and the same for equal work, which is
    visible query-key pairs times heads times features."""
    of_base, found = in_turn([base.step, case.step], 3)
    ratio = found["gpu_ms"] / of_base["gpu_ms"]
    work, base_work = (x.visible * x.inputs[0].shape[1:].numel() for x in (case, base))
    return finish(what, case.n, found, case.visible, case.inputs, matmul) | {
        "one_document_ms": of_base["gpu_ms"],
        "times_one_document": round(ratio, 3),
        "for_equal_work": round(ratio * base_work / work, 3),
    }


def text_row(what, mixer, lengths, matmul) -> dict:
    n = 131_072
    pack = make_pack(lengths, n, CHUNK)
    inputs = draw_inputs(n, HEADS, HEADS, HEAD_DIM, None)
    step = forward_backward(
        lambda *x: joint.text_attention(x, pack, mixer, 1024 if mixer == "S" else WINDOW, cuda), inputs
    )
    return finish(what, n, measure(step, 3), pack.visible_keys(mixer, WINDOW, 1024), inputs, matmul)


def finish(what, n, measured, visible, inputs, matmul) -> dict:
    heads, head_dim = inputs[0].shape[1:]
    tflops = 3.5 * 4 * visible * heads * head_dim / measured["gpu_ms"] / 1e9
    # q, k, v and the output, each with its gradient. The inputs and the output's gradient were allocated before.
    operands = sum(x.numel() * x.element_size() for x in inputs) + inputs[0].numel() * inputs[0].element_size()
    return {
        "what": what, "n": n, "gpu_ms": measured["gpu_ms"], "wall_ms": measured["wall_ms"],
        "visible_keys": visible, "useful_tflops": round(tflops, 1), "of_matmul": round(tflops / matmul, 3),
        "workspace_of_operands": round(max(0, measured["peak_bytes"] - operands) / (2 * operands), 3),
        "peak_gb": round((measured["peak_bytes"] + operands) / 1e9, 2),
    }  # fmt: skip


def full_step(n: int) -> Case:
    """cuDNN's causal attention over all text."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    inputs = draw_inputs(n, HEADS, HEADS, HEAD_DIM, None)

    def attention(q, k, v):
        heads_first = (x.transpose(0, 1)[None] for x in (q, k, v))
        return torch.nn.functional.scaled_dot_product_attention(*heads_first, is_causal=True)[0].transpose(0, 1)

    plain = forward_backward(attention, inputs)

    def step():
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            plain()

    return Case(n, step, inputs, n * (n + 1) // 2)


def flex_step(n: int) -> Case:
    """One FlexAttention call over [summaries | text], with a block mask built from the tiles of the sequence layout."""
    from torch.nn.attention.flex_attention import BlockMask, flex_attention

    pack, chunks = make_pack([n], n, CHUNK), n // CHUNK
    near, far = pack.near_ranges(WINDOW), pack.far_ranges(WINDOW)
    (near_start, near_end), (_, far_end) = near.tensors(torch.device(DEVICE)), far.tensors(torch.device(DEVICE))

    def mask(b, h, q, kv):
        text = kv - chunks
        return (kv < far_end[q]) | ((text >= near_start[q]) & (text < near_end[q]))

    block = 128
    partial, full = [], []
    for far_tile, near_tile in zip(far.row_tiles(block), near.row_tiles(block)):
        some, whole = [], []
        for (lo, hi, full_lo, full_hi), shift in ((far_tile, 0), (near_tile, chunks)):
            for start in range((lo + shift) // block * block, hi + shift, block):
                inside = full_lo + shift <= start and start + block <= full_hi + shift
                (whole if inside else some).append(start // block)
        partial.append(sorted(set(some)))
        full.append(whole)

    def table(lists):
        count = torch.tensor([len(x) for x in lists], dtype=torch.int32, device=DEVICE)
        indices = np.zeros((len(lists), (n + chunks) // block), np.int32)
        for i, x in enumerate(lists):
            indices[i, : len(x)] = x
        return count[None, None], torch.from_numpy(indices).to(DEVICE)[None, None]

    blocks = BlockMask.from_kv_blocks(*table(partial), *table(full), BLOCK_SIZE=block, mask_mod=mask,
                                      seq_lengths=(n, n + chunks))  # fmt: skip
    compiled = torch.compile(flex_attention, dynamic=False)
    inputs = draw_inputs(n, HEADS, HEADS, HEAD_DIM, CHUNK)

    def attention(q, k_text, v_text, k_summary, v_summary):
        keys, values = (torch.cat(x).transpose(0, 1)[None] for x in ((k_summary, k_text), (v_summary, v_text)))
        return compiled(q.transpose(0, 1)[None], keys, values, block_mask=blocks)[0].transpose(0, 1)

    with torch.no_grad():
        got, want = attention(*inputs).float(), joint.ksa_attention(inputs, pack, WINDOW, cuda).float()
    assert (got - want).norm() / want.norm() < 1e-2, "FlexAttention and the fused kernels disagree"
    return Case(n, forward_backward(attention, inputs), inputs, pack.visible_keys("K", WINDOW, 0))


def parts_of(n: int) -> list[dict]:
    """The time of a pass by kernel."""
    step = ksa_step(n).step
    step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
        torch.cuda.synchronize()
    events = sorted(profile.key_averages(), key=lambda e: -e.self_device_time_total)
    return [
        {
            "what": "part: " + event.key[:60],
            "calls": event.count,
            "gpu_ms": round(event.self_device_time_total / 1e3, 3),
        }
        for event in events[:12]
    ]


def error_row() -> dict:
    """Error against the blocked backend in fp32, on new random inputs and documents of awkward lengths."""
    torch.manual_seed(random.randrange(2**31))
    lengths = [20_001, 1, 7, 9, 3001, 1025]
    n = sum(-(-length // CHUNK) * CHUNK for length in lengths)
    pack = make_pack(lengths, n, CHUNK)
    low = draw_inputs(n, 4, 2, HEAD_DIM, CHUNK)
    exact = [x.detach().float().requires_grad_() for x in low]
    real = torch.from_numpy(pack.text_is_real).to(DEVICE)[:, None, None]
    weights = torch.randn(low[0].shape, device=DEVICE) * real
    assert cuda.MIN_RUN_STEPS < n // CHUNK
    results = []
    for inputs, kernels in ((low, cuda), (exact, blocked)):
        out = joint.ksa_attention(inputs, pack, 64, kernels)
        results.append([out * real, *torch.autograd.grad(out, inputs, weights.to(out.dtype))])
    names = ("out", "q_text", "k_text", "v_text", "k_summary", "v_summary")
    return {"what": "relative error against fp32"} | {
        name: float(f"{(got.float() - want).norm() / want.norm():.2e}") for name, got, want in zip(names, *results)
    }


def draw(rows: list[dict], path: Path, device: str) -> None:
    """Plot time against length, one line per method."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.2), dpi=120)
    styles = {  # color, marker, and the offset of the numbers
        "KSA": ("#b3412e", "o", (4, -14)),
        "one FlexAttention call": ("#c9a227", "s", (-20, 3)),
        "cuDNN full causal": ("#4a6fa5", "^", (0, 7)),
    }
    for what, (color, marker, offset) in styles.items():
        points = [(row["n"], row["gpu_ms"]) for row in rows if row["what"] == what]
        axes.plot(*zip(*points), color=color, marker=marker, label=what)
        for n, ms in points:
            text = f"{ms:,.0f}" if ms > 100 else f"{ms:.3g}"
            axes.annotate(
                text, (n, ms), textcoords="offset points", xytext=offset, fontsize=8, color=color, ha="center"
            )
    axes.set(xscale="log", yscale="log", xlabel="tokens in one document", ylabel="forward + backward, ms")
    axes.set_title(f"One layer, 16 heads of 128, k=8, W=128, bf16, {device}", fontsize=10)
    axes.margins(0.09, 0.12)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path)


if __name__ == "__main__":
    main(workload.arguments(sys.argv[1:], "sizes", "out"))
