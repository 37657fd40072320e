"""Pictures and tables of `tests.bench.ksa_pay`, made from docs/results/does_ksa_pay.json."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from tests.bench.evidence import _spread

TASKS = ("needle", "multikey", "joint", "chain")
THRESHOLDS = (0.5, 0.9)
CACHE_LENGTHS = ("8192", "32768", "131072")
Models = dict[str, Any]  # name -> {"seeds": {seed: run}, "alone": [{"tokens_per_second": ...}], "decode": {...}}

# Panels of the picture of recall against length: pairs of models that differ in RoPE alone, [everywhere, local].
LENGTH_PANELS = {
    "one full layer in four": [
        ("hybrid_ksa_k32", "hybrid_ksa_k32_local_rope"),
        ("hybrid_swa", "hybrid_swa_local_rope"),
        ("hybrid_pooled_k32", "hybrid_pooled_k32_local_rope"),
    ],
    "one full layer in eight": [
        ("hybrid7_ksa", "hybrid7_ksa_k32_local_rope"),
        ("hybrid7_swa", "hybrid7_swa_local_rope"),
    ],
    "no full layer, or nothing else": [
        ("pure_ksa", "pure_ksa_local_rope"),
        (None, "pure_ksa_k32_local_rope"),
        ("swa", None),
        ("full", None),
    ],
}
# Models of the learning curves.
CURVES = ("full", "hybrid_ksa_k32", "hybrid_ksa_k32_local_rope", "hybrid_swa", "hybrid_swa_local_rope",
          "hybrid_pooled_k32_local_rope", "pure_ksa", "pure_ksa_k32_local_rope", "swa")  # fmt: skip
# Models of recall against cache bytes.
FRONTIER = ("full", "hybrid_ksa_k32_local_rope", "hybrid_swa_local_rope", "hybrid_pooled_k32_local_rope",
            "hybrid7_ksa_k32_local_rope", "hybrid7_swa_local_rope", "pure_ksa_local_rope", "pure_ksa_k32_local_rope",
            "hybrid_swa_bytes", "swa")  # fmt: skip


def curve_lengths(models: Models) -> list[str]:
    """Lengths of the probes in the training loop."""
    curves = [run["curve"] for model in models.values() for run in model["seeds"].values() if run["curve"]]
    return list(next(iter(curves[0][-1][1].values()))) if curves else []


def tokens_to(curve: list, task: str, length: str, threshold: float) -> float | None:
    """Training tokens from which on a task stays at or above a threshold; None if it does not."""
    reached = None
    for tokens, scores in curve:
        if scores[task][length] < threshold:
            reached = None
        elif reached is None:
            reached = tokens
    return reached


def final_recall(evaluation: dict[str, Any], length: str) -> float:
    """Mean over `TASKS` of the answer tokens that are right."""
    return statistics.mean(evaluation["tasks"][task][length]["token_accuracy"] for task in TASKS)


# -- pictures ---------------------------------------------------------------------------------------------------------


def draw(models: Models, out: Path) -> None:
    """Recall against length, against cache bytes, and against training tokens and GPU seconds."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(LENGTH_PANELS), figsize=(15, 4.6), sharey=True)
    for axis, (title, pairs) in zip(axes, LENGTH_PANELS.items()):
        _draw_lengths(axis, models, pairs, plt.get_cmap("tab10"))
        axis.set_title(title)
    axes[0].set_ylabel("answer tokens right, mean of tasks")
    figure.tight_layout()
    figure.savefig(out / "does_ksa_pay_length.png", dpi=110)

    drawn = [name for name in FRONTIER if name in models]
    colours = {name: plt.get_cmap("tab10")(i) for i, name in enumerate(FRONTIER)}
    figure, axes = plt.subplots(1, len(CACHE_LENGTHS), figsize=(15, 5), sharey=True)
    for axis, length in zip(axes, CACHE_LENGTHS):
        _draw_frontier(axis, {name: models[name] for name in drawn}, length, colours)
    axes[0].set_ylabel("answer tokens right, mean of tasks")
    axes[0].set_ylim(-0.02, 1.02)
    _save(figure, axes[0], out / "does_ksa_pay_cache.png")

    drawn = [name for name in CURVES if name in models]
    colours = {name: plt.get_cmap("tab10")(i) for i, name in enumerate(CURVES)}
    for length in curve_lengths(models):
        figure, axes = plt.subplots(2, len(TASKS), figsize=(4 * len(TASKS), 7), sharey=True, squeeze=False)
        for column, task in enumerate(TASKS):
            for name in drawn:
                _draw_curve(axes[:, column], models[name], task, length, name, colours[name])
            axes[0][column].set_title(f"{task}, {int(length):,} tokens")
            axes[0][column].set_xlabel("training tokens, millions")
            axes[1][column].set_xlabel("training seconds on one GPU")
        for row in axes:
            row[0].set_ylabel("answer tokens right")
            row[0].set_ylim(-0.02, 1.02)
        _save(figure, axes[0][0], out / f"does_ksa_pay_curves_{length}.png")


def _save(figure: Any, labelled: Any, path: Path) -> None:
    """Save a picture with one legend below all its panels, for the lines of `labelled`."""
    handles, labels = labelled.get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncol=5, fontsize=9, frameon=False)
    figure.tight_layout(rect=(0, 0.03 + 0.04 * -(-len(labels) // 5), 1, 1))
    figure.savefig(path, dpi=110)
    figure.clear()


def _draw_lengths(axis: Any, models: Models, pairs: list[tuple[str | None, str | None]], colour_of: Any) -> None:
    """Recall against the probe's length: dashed with RoPE everywhere, solid with local RoPE, dotted with YaRN."""
    for i, pair in enumerate(pairs):
        for name, style in zip(pair, ("--", "-")):
            if name not in models:
                continue
            runs = [run["evaluation"] for run in models[name]["seeds"].values()]
            lengths = [str(n) for n in runs[0]["lengths"]]
            values = [[final_recall(run, n) for run in runs] for n in lengths]
            x = [int(n) for n in lengths]
            label = f"{name} ({len(runs)})"
            axis.plot(x, [statistics.mean(v) for v in values], style, color=colour_of(i), marker=".", label=label)
            axis.fill_between(x, [min(v) for v in values], [max(v) for v in values], color=colour_of(i), alpha=0.12)
            for run in models[name]["seeds"].values():
                if "16" in run.get("yarn", {}):
                    scaled = run["yarn"]["16"]
                    axis.plot(list(map(int, scaled)), list(scaled.values()), ":", color=colour_of(i),
                              label=f"{name}, YaRN 16 at evaluation")  # fmt: skip
    axis.axvline(8192, color="grey", linewidth=0.8)
    axis.set_xscale("log", base=2)
    axis.set_xlabel("tokens of the probe (line: longest in training)")
    axis.set_ylim(-0.02, 1.02)
    axis.legend(fontsize=7, loc="lower left", frameon=False, handlelength=3.5)


def _draw_curve(axes: Any, model: dict[str, Any], task: str, length: str, name: str, colour: Any) -> None:
    """The mean over seeds and the band from the lowest to the highest, against tokens and against seconds."""
    points = list(zip(*(run["curve"] for run in model["seeds"].values() if run["curve"])))
    if not points:
        return
    tokens = [statistics.mean(tokens for tokens, _ in point) for point in points]
    values = [[scores[task][length] for _, scores in point] for point in points]
    rate = statistics.mean(_speeds(model)) if _speeds(model) else None
    for axis, x in ((axes[0], [t / 1e6 for t in tokens]), (axes[1], [t / rate for t in tokens] if rate else None)):
        if x is not None:
            axis.plot(x, [statistics.mean(v) for v in values], color=colour, label=name)
            axis.fill_between(x, [min(v) for v in values], [max(v) for v in values], color=colour, alpha=0.15)


def _draw_frontier(axis: Any, models: Models, length: str, colours: dict[str, Any]) -> None:
    for name, model in models.items():
        runs = [run["evaluation"] for run in model["seeds"].values() if length in run["evaluation"]["cache_bytes"]]
        if runs:
            scores = [final_recall(run, length) for run in runs]
            mebibytes, score = runs[0]["cache_bytes"][length] / 2**20, statistics.mean(scores)
            axis.plot([mebibytes, mebibytes], [min(scores), max(scores)], color=colours[name], linewidth=1)
            marker = "s" if name.startswith("pure") else "o"
            axis.scatter(mebibytes, score, color=colours[name], label=name, marker=marker)
    axis.set_xscale("log", base=2)
    axis.set_xlabel(f"cache at {int(length):,} tokens, MiB")


# -- tables -----------------------------------------------------------------------------------------------------------


def markdown(models: Models) -> str:
    """Final recall by length; with YaRN; by task; and training tokens until each task stays at a threshold."""
    lengths = [str(n) for n in next(iter(next(iter(models.values()))["seeds"].values()))["evaluation"]["lengths"]]
    head = ["model", "seeds", *(f"{int(n):,}" for n in lengths), "cache at 8,192, MiB", "at 131,072", "tokens/s alone"]
    rows, scaled = [head], [["model, YaRN factor", *(f"{int(n):,}" for n in lengths)]]
    for name, model in sorted(models.items()):
        runs = list(model["seeds"].values())
        cache = runs[0]["evaluation"]["cache_bytes"]
        recall = [_spread([final_recall(run["evaluation"], n) for run in runs], 2) for n in lengths]
        sizes = [f"{cache[n] / 2**20:.1f}" if n in cache else "" for n in ("8192", "131072")]
        rows.append([name, str(len(runs)), *recall, *sizes, ", ".join(f"{rate:,.0f}" for rate in _speeds(model))])
        for run in runs:
            for factor, by_length in run.get("yarn", {}).items():
                scaled.append([f"{name}, {factor}", *(f"{by_length[n]:.2f}" for n in lengths)])
    parts = [_table(rows)] + ([_table(scaled)] if len(scaled) > 1 else []) + [_table(_by_task(models))]
    for task in TASKS:
        rows = [["model", *(f"{t} at {int(n):,}" for n in curve_lengths(models) for t in THRESHOLDS)]]
        for name, model in sorted(models.items()):
            curves = [run["curve"] for run in model["seeds"].values()]
            reached = [[tokens_to(c, task, n, t) for c in curves] for n in curve_lengths(models) for t in THRESHOLDS]
            rows.append(
                [name, *(", ".join("-" if r is None else f"{r / 1e6:.0f}" for r in seeds) for seeds in reached)]
            )
        parts.append(
            f"Training tokens (millions) until `{task}` stays at a threshold, by seed; `-`: never.\n\n{_table(rows)}"
        )
    return "\n\n".join(parts)


def _by_task(models: Models) -> list[list[str]]:
    """Recall of each task at the longest training length and 16 times that: rows of a table."""
    at = [(task, length) for length in (CACHE_LENGTHS[0], CACHE_LENGTHS[-1]) for task in TASKS]
    rows = [["model", *(f"{task} at {int(length):,}" for task, length in at)]]
    for name, model in sorted(models.items()):
        tasks = [run["evaluation"]["tasks"] for run in model["seeds"].values()]
        rows.append([name, *(_spread([by[task][n]["token_accuracy"] for by in tasks], 2) for task, n in at)])
    return rows


def _speeds(model: dict[str, Any]) -> list[float]:
    """Tokens/s of training alone on a GPU, one number for each call that measured it."""
    return [timed["tokens_per_second"] for timed in model.get("alone", [])]


def _table(rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|---" * len(rows[0]) + "|", *lines[1:]])
