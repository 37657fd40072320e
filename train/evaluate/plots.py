"""A table and pictures of the results of `train.evaluate`, for one run or for several next to each other."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

_COLOURS = ["#b3412e", "#2c6e9b", "#4b8b3b", "#8a5a9e", "#c78a1b", "#55606b", "#c05f8f", "#2f9a97", "#7b6a3a"]


def table(result: dict[str, Any]) -> str:
    """Token accuracy by task and length, losses, cache bytes."""
    lengths = [str(n) for n in result["lengths"]]
    rows = [["", *lengths]]
    for task, scores in result.get("tasks", {}).items():
        rows.append([task, *(f"{scores[n]['token_accuracy']:.3f}" for n in lengths)])
    if "perplexity" in result:
        rows.append(["held-out loss", *(f"{result['perplexity'][n]['loss']:.3f}" for n in lengths)])
    rows.append(["cache bytes", *(f"{result['cache_bytes'][n]:,}" for n in lengths)])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.rjust(w) if i else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, widths))) for row in rows
    )


def draw(result: dict[str, Any], directory: Path) -> list[Path]:
    """Draw the pictures of one run into `directory`; returns their paths."""
    made = []
    tasks = result.get("tasks", {})
    if "needle" in tasks:
        made.append(_needle_map(tasks["needle"], result["lengths"], directory / "needle.png"))
    if tasks:
        made.append(recall_by_distance({"": [result]}, directory / "distance.png"))
    if tasks and len(result["lengths"]) > 1:
        made.append(recall_by_cache({"": [result]}, directory / "cache.png"))
    if "insight" in result:
        made.append(_insight(result, directory / "summaries.png"))
    return made


def recall_by_distance(results: dict[str, list[dict[str, Any]]], path: Path) -> Path:
    """Draw token accuracy of all tasks together against the distance to the furthest fact.

    Each name has one line, the mean of its runs, in a band from the lowest run to the highest.
    """
    figure, axes = _axes("tokens between a fact and the answer", "share of correct answer tokens")
    for number, (name, runs) in enumerate(results.items()):
        _line(axes, number, name, [points_by_distance(run["tasks"].values()) for run in runs], markersize=3)
    axes.set_xscale("log", base=2)
    axes.set_ylim(-0.02, 1.02)
    return _save(figure, axes, path, legend=len(results) > 1)


def recall_by_cache(results: dict[str, list[dict[str, Any]]], path: Path) -> Path:
    """Draw mean token accuracy of tasks against cache bytes, a point per length; lines as in `recall_by_distance`."""
    figure, axes = _axes("bytes of the decoding cache", "share of correct answer tokens, mean of tasks")
    for number, (name, runs) in enumerate(results.items()):
        _line(axes, number, name, [_points_by_length(run) for run in runs], x_of=runs[0]["cache_bytes"].__getitem__)
    axes.set_xscale("log", base=2)
    axes.set_ylim(-0.02, 1.02)
    return _save(figure, axes, path, legend=len(results) > 1)


def points_by_distance(tasks: Iterable[dict[str, Any]]) -> dict[int, float]:
    """Share of correct answer tokens by the distance to the furthest fact, over all lengths in these tasks' scores."""
    sums: dict[int, list[float]] = {}
    for scores in tasks:
        for score in scores.values():
            for distance, accuracy, count in score["by_distance"]:
                total = sums.setdefault(max(1, distance), [0.0, 0.0])
                total[0] += accuracy * count
                total[1] += count
    return {distance: total[0] / total[1] for distance, total in sorted(sums.items())}


def _points_by_length(result: dict[str, Any]) -> dict[str, float]:
    """Keyed by length, not by bytes: the cache of a window has the same size at every length."""
    accuracies = {
        length: [scores[length]["token_accuracy"] for scores in result["tasks"].values()]
        for length in map(str, result["lengths"])
    }
    return {length: sum(found) / len(found) for length, found in accuracies.items()}


def _line(
    axes: Any, number: int, name: str, runs: list[dict[Any, float]], x_of: Callable = lambda key: key, **style: Any
) -> None:
    """Draw the mean of the runs over the keys that all of them have; `x_of` gives the x of a key."""
    shared = [key for key in runs[0] if all(key in run for run in runs)]
    xs, values = [x_of(key) for key in shared], [[run[key] for run in runs] for key in shared]
    colour, dashes = _COLOURS[number % len(_COLOURS)], "--" if number >= len(_COLOURS) else "-"
    axes.plot(xs, [sum(v) / len(v) for v in values], dashes, marker="o", color=colour, label=name, **style)
    if len(runs) > 1:
        axes.fill_between(xs, [min(v) for v in values], [max(v) for v in values], color=colour, alpha=0.15, lw=0)


def _needle_map(scores: dict[str, Any], lengths: list[int], path: Path) -> Path:
    figure, axes = _axes("tokens of the sample", "depth of the needle")
    depths = [depth for depth, _ in scores[str(lengths[0])]["by_depth"]]
    values = [[scores[str(n)]["by_depth"][i][1] for n in lengths] for i in range(len(depths))]
    image = axes.imshow(values, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
    axes.set_xticks(range(len(lengths)), [f"{n:,}" for n in lengths])
    axes.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths])
    axes.grid(False)
    for y, row in enumerate(values):
        for x, value in enumerate(row):
            axes.text(x, y, f"{value:.2f}", ha="center", va="center", fontsize=8)
    figure.colorbar(image, ax=axes, label="share of correct answer tokens")
    return _save(figure, axes, path, legend=False)


def _insight(result: dict[str, Any], path: Path) -> Path:
    figure, axes = _axes("tokens back to the chunk", "share of a text token's attention on summaries")
    longest = str(max(result["lengths"]))
    for number, (layer, points) in enumerate(result["insight"][longest].items()):
        axes.plot(
            *zip(*points), marker="o", markersize=3, color=_COLOURS[number % len(_COLOURS)], label=f"layer {layer}"
        )
    axes.set_xscale("log", base=2)
    return _save(figure, axes, path, legend=True)


def _axes(x: str, y: str) -> tuple[Any, Any]:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), dpi=120)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.3)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return figure, axes


def _save(figure: Any, axes: Any, path: Path, legend: bool) -> Path:
    from matplotlib import pyplot

    if legend:
        axes.legend(
            frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5)
        )  # lines may run anywhere inside
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)
    return path
