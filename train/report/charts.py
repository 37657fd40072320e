"""The pictures of a report, drawn with matplotlib."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from train.report.recall import By, Probed, curve, keys_of, probed
from train.report.records import CONTEXT, Run, pareto, smoothed, widest_window


@dataclass(frozen=True)
class Picture:
    """One picture: its file name, its words on the page, and the function that draws it into a figure."""

    file: str
    title: str
    caption: str
    draw: Callable[[Any, Sequence[Run]], None]  # (figure, runs)
    size: tuple[float, float] = (9.0, 4.2)  # inches


def pictures(runs: Sequence[Run]) -> list[Picture]:
    """The pictures for which these runs have data."""
    chunk_sizes, windows = {r.model.chunk_size for r in runs}, {r.window for r in runs}
    chosen = [
        Picture(
            "loss.png",
            "Loss",
            "Thin lines: training loss at each log step. Thick lines: the same, smoothed. Circles: loss on "
            "held-out documents. Lower is better.",
            _draw_loss,
            (9.0, 4.6),
        )
    ]
    if len(chunk_sizes) > 1 or len(windows) > 1:
        chosen.append(
            Picture(
                "final_loss.png",
                "Final loss against compression and window",
                f"{_final_loss_is(runs)} Left: against k, the text tokens per summary token. Right: against the "
                "number of text tokens that a KSA layer attends to directly: W chunks and its own chunk. With W fixed, "
                "this grows with k.",
                _draw_final_loss,
            )
        )
    if len(chunk_sizes) > 1:
        chosen.append(
            Picture(
                "cost.png",
                "Cache and keys against k",
                f"Left: size of the keys and values that a decoder caches for one text of {CONTEXT:,} tokens, in bf16. "
                "Right: keys that a token attends to, averaged over the layers and over a training sample that is one "
                "document.",
                _draw_cost,
            )
        )
    chosen.append(
        Picture(
            "speed.png",
            "Speed",
            "Median training speed of all ranks together"
            + (
                ", and peak device memory."
                if any(r.peak_memory for r in runs)
                else ". These runs did not record device memory."
            ),
            _draw_speed,
            (9.0, 1.6 + 0.34 * len(runs)),
        )
    )
    if any(r.probes() for r in runs):
        chosen.append(
            Picture(
                "probes.png",
                "Recall by distance",
                "Share of correct answers to the probes, by the number of tokens between the fact and the question.",
                _draw_probes,
            )
        )
    chosen += _recall_pictures(runs)
    if len({r.cache_bytes for r in runs}) > 1:
        chosen.append(
            Picture(
                "pareto.png",
                "Loss against cache",
                f"{_final_loss_is(runs)} Against cache size at {CONTEXT:,} tokens. Lower left is better. The line "
                "connects the runs that no other run beats in both.",
                _draw_pareto,
                (9.0, 4.6),
            )
        )
    return chosen


def _final_loss_is(runs: Sequence[Run]) -> str:
    return (
        "Loss on held-out documents at the end."
        if all(r.has_held_out for r in runs)
        else "Held-out loss at the end; for runs without one, the mean training loss of the last tenth."
    )


def _colors(runs: Sequence[Run]) -> list[Any]:
    from matplotlib import colormaps

    if len(runs) <= 8:
        return [colormaps["Dark2"](i) for i in range(len(runs))]
    return [colormaps["viridis"](0.92 * i / (len(runs) - 1)) for i in range(len(runs))]


def _draw_loss(figure, runs: Sequence[Run]) -> None:
    from matplotlib import ticker

    axes = figure.add_subplot()
    lows, highs = [], []
    for run, color in zip(runs, _colors(runs)):
        tokens, losses = run.series("loss")
        soft = smoothed(losses)
        axes.plot(tokens, losses, color=color, alpha=0.25, linewidth=0.8)
        axes.plot(tokens, soft, color=color, linewidth=1.8, label=_short(run.name))
        axes.plot(
            *run.series("validation_loss"),
            color=color,
            marker="o",
            markersize=4.5,
            linestyle="none",
            markeredgecolor="white",
            markeredgewidth=0.6,
        )
        lows.append(min(soft + run.series("validation_loss")[1]))
        highs.append(soft[min(len(soft) - 1, len(soft) // 10)])
    if max(highs) > min(lows):  # leave out the steep first tenth
        margin = 0.25 * (max(highs) - min(lows))
        axes.set_ylim(min(lows) - 0.4 * margin, max(highs) + margin)
    _axes(axes, "tokens", "loss (nats per token)")
    axes.xaxis.set_major_formatter(ticker.EngFormatter(sep=""))
    _legend(axes, runs)


def _draw_final_loss(figure, runs: Sequence[Run]) -> None:
    left, right = figure.subplots(1, 2, sharey=True)
    _lines(left, runs, lambda r: r.model.chunk_size, lambda r: r.final_loss, by="W", group=lambda r: widest_window(r))
    _lines(right, runs, lambda r: r.window, lambda r: r.final_loss, by="k", group=lambda r: r.model.chunk_size)
    _axes(left, "k (text tokens per summary)", "final loss (nats per token)")
    _axes(right, "text a KSA layer attends to (tokens)", "")


def _draw_cost(figure, runs: Sequence[Run]) -> None:
    left, right = figure.subplots(1, 2)
    _lines(left, runs, lambda r: r.model.chunk_size, lambda r: r.cache_bytes / 2**20, by="", group=_shape)
    _lines(right, runs, lambda r: r.model.chunk_size, lambda r: r.visible_keys, by="", group=_shape)
    full = dataclasses.replace(runs[0].model, layer_pattern="F", window_chunks=0).cache_bytes(CONTEXT) / 2**20
    left.axhline(full, color="#999999", linestyle="--", linewidth=1)
    left.annotate(
        "all layers full attention",
        (0.02, full),
        xycoords=("axes fraction", "data"),
        color="#777777",
        textcoords="offset points",
        xytext=(0, -12),
        fontsize=8,
    )
    for axes, name in ((left, f"cache at {CONTEXT // 1024}k tokens (MiB)"), (right, "keys a token attends to (mean)")):
        _axes(axes, "k (text tokens per summary)", name)
        axes.set_ylim(bottom=0)
    left.set_ylim(top=1.12 * full)


def _draw_speed(figure, runs: Sequence[Run]) -> None:
    from matplotlib import ticker

    with_memory = any(r.peak_memory for r in runs)
    panels = figure.subplots(1, 2 if with_memory else 1, sharey=True, squeeze=False)[0]
    colors, rows = _colors(runs), range(len(runs))
    measures: list[tuple[str, list[float]]] = [("tokens per second", [r.tokens_per_second for r in runs])]
    if with_memory:
        measures.append(("peak device memory (GiB)", [(r.peak_memory or 0) / 2**30 for r in runs]))
    for axes, (name, values) in zip(panels, measures):
        axes.barh(rows, values, color=colors, height=0.6)
        for row, value in zip(rows, values):
            axes.annotate(
                f"{value:,.0f}" if value >= 100 else f"{value:,.1f}",
                (value, row),
                xytext=(4, 0),
                textcoords="offset points",
                va="center",
                fontsize=8,
            )
        axes.set_yticks(rows, [_short(r.name) for r in runs])
        axes.set_xlim(0, 1.15 * max(values))
        axes.xaxis.set_major_locator(ticker.MaxNLocator(5))
        axes.xaxis.set_major_formatter(ticker.StrMethodFormatter("{x:,g}"))
        _axes(axes, name, "")
    panels[0].invert_yaxis()


def _draw_probes(figure, runs: Sequence[Run]) -> None:
    tasks = sorted({p["task"] for r in runs for p in r.probes()})
    panels = figure.subplots(1, len(tasks), sharey=True, squeeze=False)[0]
    for axes, task in zip(panels, tasks):
        for run, color in zip(runs, _colors(runs)):
            found = sorted((p["distance"], p["accuracy"]) for p in run.probes() if p["task"] == task)
            if found:
                axes.plot(*zip(*found), color=color, marker="o", markersize=4, label=_short(run.name))
        axes.set_xscale("log", base=2)
        axes.set_ylim(-0.03, 1.03)
        axes.set_title(task, fontsize=9)
        _axes(axes, "distance (tokens)", "accuracy" if axes is panels[0] else "")
    _legend(panels[0], runs)


# -- recall during training --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Line:
    """One line of a small chart; legends are sorted by `order`."""

    name: str
    order: int
    color: Any
    points: tuple[list[float], list[float]]  # x, recall


@dataclass(frozen=True)
class _Panel:
    """One small chart."""

    task: str
    title: str
    lines: list[_Line]


@dataclass(frozen=True)
class _Measure:
    """What recall is drawn against."""

    name: str
    unit: str
    of: Callable[[Probed], float | None]
    caption: str


_MEASURES = (
    _Measure("tokens", "training tokens", lambda p: p.tokens, ""),
    _Measure(
        "seconds",
        "GPU seconds",
        lambda p: p.gpu_seconds,
        " GPU seconds: training time before the probes, times ranks, each of which has one GPU. Training time: mean "
        "time of a step (step_seconds in metrics.jsonl) times steps. It includes waiting for data, but no validation, "
        "checkpoint or probe. A step that ran again after a resume counts once.",
    ),
)


def _recall_pictures(runs: Sequence[Run]) -> list[Picture]:
    """Recall by length and by distance, against tokens and against GPU seconds; none for runs without probes."""
    found = [probed(r) for r in runs]
    lines = "one for each run" if len(runs) > 1 else "one for each length of the probes"
    words: dict[By, tuple[str, str]] = {
        "length": ("Recall", f"Lines: {lines}."),
        "distance": (
            "Recall by distance",
            "Lines: the tokens between an answer and the furthest fact that it needs, from the given number to below "
            "twice that; over all lengths of the probes.",
        ),
    }
    chosen = []
    for by, (title, caption) in words.items():
        for measure in _MEASURES:
            panels = _recall_panels(runs, found, by, measure)
            if panels:
                names, columns = _legend_names(panels)
                rows, legend_rows = -(-len(panels) // _panels_in_a_row(panels)), -(-len(names) // columns)
                chosen.append(
                    Picture(
                        f"recall_{by}_{measure.name}.png",
                        f"{title} during training against {measure.unit}",
                        f"Share of correct answer tokens of the probes during training. {caption}{measure.caption}",
                        functools.partial(_draw_panels, panels=panels, x=measure.unit),
                        (9.0, 0.7 + 2.5 * rows + 0.2 * legend_rows),
                    )
                )
    return chosen


def _recall_panels(runs: Sequence[Run], found: Sequence[Sequence[Probed]], by: By, measure: _Measure) -> list[_Panel]:
    """The small charts of one picture, without empty ones.

    By length: one for each task, or for each task and length where there are several runs to compare. By distance: one
    for each task and run with several distances.
    """
    keys = keys_of([p for one in found for p in one], by)
    panels: list[_Panel] = []
    if by == "length" and len(runs) > 1:
        colors = _colors(runs)
        for key in keys:
            lines = [
                _Line(run.name, i, colors[i], curve(one, by, key, measure.of))
                for i, (run, one) in enumerate(zip(runs, found))
            ]
            panels.append(_Panel(key[0], f"{key[0]}, {key[1]:,} tokens", lines))
    else:
        shades = dict(zip(numbers := sorted({n for _, n in keys}), _shades(len(numbers))))
        for task in dict.fromkeys(task for task, _ in keys):
            for run, one in zip(runs, found):
                mine = [n for t, n in keys_of(one, by) if t == task]
                if by == "length" or len(mine) > 1:
                    lines = [_Line(f"{n:,} tokens", n, shades[n], curve(one, by, (task, n), measure.of)) for n in mine]
                    title = f"{task}\n{_short(run.name, 30)}" if len(runs) > 1 else task
                    panels.append(_Panel(task, title, lines))
    panels = [dataclasses.replace(panel, lines=[x for x in panel.lines if x.points[0]]) for panel in panels]
    return [panel for panel in panels if panel.lines]


def _panels_in_a_row(panels: Sequence[_Panel]) -> int:
    """Three, or two where each task has two, so that a row has one task."""
    tasks = [panel.task for panel in panels]
    return 2 if tasks and all(tasks.count(task) == 2 for task in tasks) else 3


def _draw_panels(figure, runs: Sequence[Run], *, panels: Sequence[_Panel], x: str) -> None:
    from matplotlib import ticker

    in_a_row = min(_panels_in_a_row(panels), len(panels))
    places = list(figure.subplots(-(-len(panels) // in_a_row), in_a_row, squeeze=False).flat)
    right = max(max(line.points[0]) for panel in panels for line in panel.lines)
    handles: dict[str, Any] = {}
    for i, (axes, panel) in enumerate(zip(places, panels)):
        for line in panel.lines:
            (handles[line.name],) = axes.plot(*line.points, color=line.color, marker="o", markersize=3, linewidth=1.4)
        axes.set_title(panel.title, fontsize=9)
        axes.set_xlim(0, 1.04 * right or 1)
        axes.set_ylim(-0.03, 1.03)
        axes.xaxis.set_major_locator(ticker.MaxNLocator(4))
        axes.xaxis.set_major_formatter(ticker.EngFormatter(sep=""))
        _axes(axes, x if i + in_a_row >= len(panels) else "", "recall" if i % in_a_row == 0 else "")
    for axes in places[len(panels) :]:
        axes.remove()
    names, columns = _legend_names(panels)
    if names:
        figure.legend(
            [handles[name] for name in names],
            [_short(name, 100) for name in names],
            loc="outside lower center",
            frameon=False,
            fontsize=8,
            ncols=columns,
        )


def _legend_names(panels: Sequence[_Panel]) -> tuple[list[str], int]:
    """The names of all lines in their order, none if they are too many, and how many fit next to each other."""
    orders = {line.name: line.order for panel in panels for line in panel.lines}
    names = sorted(orders, key=orders.__getitem__) if len(orders) <= 16 else []
    longest = max((len(_short(name, 100)) for name in names), default=0)
    return names, max(1, min(len(names), 120 // (8 + longest)))


def _shades(number: int) -> list[Any]:
    from matplotlib import colormaps

    return [colormaps["viridis"](0.88 * i / max(1, number - 1)) for i in range(number)]


def _short(text: str, size: int = 48) -> str:
    """`text` with its middle left out where it is longer than `size`: the ends of names tell runs apart."""
    half = (size - 1) // 2
    return text if len(text) <= size else f"{text[:half]}…{text[-half:]}"


def _draw_pareto(figure, runs: Sequence[Run]) -> None:
    axes = figure.add_subplot()
    points = [(r.cache_bytes / 2**20, r.final_loss) for r in runs]
    front = pareto(points)
    axes.plot(*zip(*(points[i] for i in front)), color="#999999", linewidth=1.2, zorder=1)
    colors = _colors(runs)
    for number, i in enumerate(sorted(range(len(runs)), key=lambda i: points[i])):
        axes.scatter(*points[i], color=colors[i], s=46, zorder=2, edgecolor="white")
        # Alternate above and below, so that the names of close points do not overlap.
        offset = (6, 5) if number % 2 else (6, -12)
        axes.annotate(_short(runs[i].name), points[i], xytext=offset, textcoords="offset points", fontsize=8)
    axes.margins(x=0.14, y=0.14)
    _axes(axes, f"cache at {CONTEXT // 1024}k tokens (MiB)", "final loss (nats per token)")


def _lines(
    axes,
    runs: Sequence[Run],
    x: Callable[[Run], float],
    y: Callable[[Run], float],
    *,
    by: str,
    group: Callable[[Run], Any],
) -> None:
    """Draw `y` against `x`, one line per group of runs, with a logarithmic x axis whose ticks are the values of `x`.

    `by` names what `group` returns, for the labels.
    """
    groups: dict[Any, list[tuple[float, float]]] = {}
    for run in runs:
        groups.setdefault(group(run), []).append((x(run), y(run)))
    single = all(len(points) == 1 for points in groups.values())  # no lines to draw: label the points instead
    for i, (name, points) in enumerate(groups.items()):
        label = f"{by} = {name}" if by else str(name)
        axes.plot(*zip(*sorted(points)), marker="o", color="C0" if single else f"C{i}", label=label)
        if single and len(groups) > 1:
            axes.annotate(label, points[0], xytext=(0, 7), textcoords="offset points", fontsize=8, ha="center")
    axes.set_xscale("log", base=2)
    ticks: list[float] = []
    for value in sorted({x(run) for run in runs}):
        if not ticks or value >= 1.3 * ticks[-1]:  # labels that are closer would overlap
            ticks.append(value)
    axes.set_xticks(ticks, [f"{t:,}" for t in ticks])
    axes.minorticks_off()
    axes.margins(x=0.1, y=0.1)
    if 1 < len(groups) <= 6 and not single:
        axes.legend(frameon=False, fontsize=8)


def _shape(run: Run) -> str:
    return f"{run.model.layer_pattern}, W = {widest_window(run)}"


def _axes(axes, x: str, y: str) -> None:
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.25)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _legend(axes, runs: Sequence[Run]) -> None:
    if len(runs) <= 16:
        axes.legend(frameon=False, fontsize=8, ncols=1 + (len(runs) > 8))


def draw(chosen: Sequence[Picture], runs: Sequence[Run], output: Path) -> None:
    """Write every picture as a PNG in `output`."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    for picture in chosen:
        figure = pyplot.figure(figsize=picture.size, dpi=130, layout="constrained")
        picture.draw(figure, runs)
        figure.savefig(output / picture.file)
        pyplot.close(figure)
