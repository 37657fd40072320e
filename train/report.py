"""`python -m train.report RUN... | SWEEP [output=DIRECTORY]`: what runs did and what they cost, as a page and its PNGs.

The page holds its pictures itself, so that the one file can be sent to someone who was not there.
"""

from __future__ import annotations

import base64
import dataclasses
import html
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from train.config import ConfigError, make_directory
from train.records import CONTEXT, Run, differences, find_runs, pareto, smoothed, widest_window
from train.signals import BAD_INPUT

# -- pictures ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Picture:
    file: str
    title: str
    caption: str
    draw: Callable[[Any, Sequence[Run]], None]  # (figure, runs)
    size: tuple[float, float] = (9.0, 4.2)


def pictures(runs: Sequence[Run]) -> list[Picture]:
    """Those that these runs can fill."""
    chunk_sizes, windows = {r.model.chunk_size for r in runs}, {r.window for r in runs}
    chosen = [
        Picture(
            "loss.png",
            "Loss",
            "Thin: training loss of each log step. Thick: the same, smoothed. Circles: loss on "
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
                f"{_final_loss_is(runs)} Left: against k, the text tokens behind one summary token. Right: against the "
                "text a KSA layer sees itself, its window of W chunks and its own; with W fixed it grows with k.",
                _draw_final_loss,
            )
        )
    if len(chunk_sizes) > 1:
        chosen.append(
            Picture(
                "cost.png",
                "What k buys",
                f"Left: keys and values a decoder holds for one text of {CONTEXT:,} tokens, in bf16. "
                "Right: keys a token sees, mean over a training sample taken as one document, and over the layers.",
                _draw_cost,
            )
        )
    chosen.append(
        Picture(
            "speed.png",
            "Speed",
            "Median training speed, all ranks together"
            + (
                ", and the most device memory."
                if any(r.peak_memory for r in runs)
                else ". Device memory is not in these runs' records."
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
                "Share of probes answered right, by how many tokens lie "
                "between what must be remembered and the question.",
                _draw_probes,
            )
        )
    if len({r.cache_bytes for r in runs}) > 1:
        chosen.append(
            Picture(
                "pareto.png",
                "Loss against cache",
                f"{_final_loss_is(runs)} Against cache size at {CONTEXT:,} tokens. The line "
                "joins the runs that no other beats in both; left and low is better.",
                _draw_pareto,
                (9.0, 4.6),
            )
        )
    return chosen


def _final_loss_is(runs: Sequence[Run]) -> str:
    return (
        "Loss on held-out documents at the end."
        if all(r.has_held_out for r in runs)
        else "Held-out loss at the end; mean training loss of the last tenth for runs without one."
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
        axes.plot(tokens, soft, color=color, linewidth=1.8, label=run.name)
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
    if max(highs) > min(lows):  # the first tenth would flatten the rest
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
    _axes(right, "text a KSA layer sees (tokens)", "")


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
    for axes, name in ((left, f"cache at {CONTEXT // 1024}k tokens (MiB)"), (right, "keys a token sees (mean)")):
        _axes(axes, "k (text tokens per summary)", name)
        axes.set_ylim(bottom=0)
    left.set_ylim(top=1.12 * full)


def _draw_speed(figure, runs: Sequence[Run]) -> None:
    from matplotlib import ticker

    with_memory = any(r.peak_memory for r in runs)
    panels = figure.subplots(1, 2 if with_memory else 1, sharey=True, squeeze=False)[0]
    colors, places = _colors(runs), range(len(runs))
    measures: list[tuple[str, list[float]]] = [("tokens per second", [r.tokens_per_second for r in runs])]
    if with_memory:
        measures.append(("peak device memory (GiB)", [(r.peak_memory or 0) / 2**30 for r in runs]))
    for axes, (name, values) in zip(panels, measures):
        axes.barh(places, values, color=colors, height=0.6)
        for place, value in zip(places, values):
            axes.annotate(
                f"{value:,.0f}" if value >= 100 else f"{value:,.1f}",
                (value, place),
                xytext=(4, 0),
                textcoords="offset points",
                va="center",
                fontsize=8,
            )
        axes.set_yticks(places, [r.name for r in runs])
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
                axes.plot(*zip(*found), color=color, marker="o", markersize=4, label=run.name)
        axes.set_xscale("log", base=2)
        axes.set_ylim(-0.03, 1.03)
        axes.set_title(task, fontsize=9)
        _axes(axes, "distance (tokens)", "accuracy" if axes is panels[0] else "")
    _legend(panels[0], runs)


def _draw_pareto(figure, runs: Sequence[Run]) -> None:
    axes = figure.add_subplot()
    points = [(r.cache_bytes / 2**20, r.final_loss) for r in runs]
    front = pareto(points)
    axes.plot(*zip(*(points[i] for i in front)), color="#999999", linewidth=1.2, zorder=1)
    colors = _colors(runs)
    for place, i in enumerate(sorted(range(len(runs)), key=lambda i: points[i])):
        axes.scatter(*points[i], color=colors[i], s=46, zorder=2, edgecolor="white")
        # Neighbours' names above and below their points in turn, so that close ones can be read.
        offset = (6, 5) if place % 2 else (6, -12)
        axes.annotate(runs[i].name, points[i], xytext=offset, textcoords="offset points", fontsize=8)
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
    """A line for each group of runs, its points in the order of `x`; a logarithmic axis with the values as ticks."""
    groups: dict[Any, list[tuple[float, float]]] = {}
    for run in runs:
        groups.setdefault(group(run), []).append((x(run), y(run)))
    alone = all(len(points) == 1 for points in groups.values())  # no lines to draw: name the points instead
    for i, (name, points) in enumerate(groups.items()):
        label = f"{by} = {name}" if by else str(name)
        axes.plot(*zip(*sorted(points)), marker="o", color="C0" if alone else f"C{i}", label=label)
        if alone and len(groups) > 1:
            axes.annotate(label, points[0], xytext=(0, 7), textcoords="offset points", fontsize=8, ha="center")
    axes.set_xscale("log", base=2)
    ticks: list[float] = []
    for value in sorted({x(run) for run in runs}):
        if not ticks or value >= 1.3 * ticks[-1]:  # closer ones would overlap
            ticks.append(value)
    axes.set_xticks(ticks, [f"{t:,}" for t in ticks])
    axes.minorticks_off()
    axes.margins(x=0.1, y=0.1)
    if 1 < len(groups) <= 6 and not alone:
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


def draw(pictures_: Sequence[Picture], runs: Sequence[Run], output: Path) -> None:
    """Write every picture as a PNG in `output`."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    for picture in pictures_:
        figure = pyplot.figure(figsize=picture.size, dpi=130, layout="constrained")
        picture.draw(figure, runs)
        figure.savefig(output / picture.file)
        pyplot.close(figure)


# -- the page ---------------------------------------------------------------------------------------------------------

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{title}</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 1080px; margin: 2rem auto; padding: 0 1rem }}
h1 {{ font-size: 1.5rem; margin-bottom: .2rem }} h2 {{ font-size: 1.15rem; margin: 2.2rem 0 .3rem }}
img {{ width: 100%; height: auto }} p {{ margin: .4rem 0; max-width: 46rem }} .quiet {{ color: #666 }}
.wide {{ overflow-x: auto }} table {{ border-collapse: collapse; font-size: 13px; margin: .6rem 0 }}
th, td {{ padding: .3rem .7rem; text-align: right; border-bottom: 1px solid #ddd; white-space: nowrap }}
th {{ vertical-align: bottom; white-space: normal }} th:first-child, td:first-child {{ text-align: left }}
.best {{ font-weight: 700 }}
</style></head><body>
<h1>{title}</h1>
<p class="quiet">{counts}</p>
{summary}
<p class="quiet">Kwai Summary Attention puts a summary token behind every k text tokens. Recent text is seen token by
token (the window), older text only through its summaries; so a larger k means a smaller cache and fewer keys, and less
detail of the far past. Losses are in nats per token: lower is better.</p>
{body}
</body></html>
"""


def page(title: str, runs: Sequence[Run], left_out: Sequence[str], drawn: Sequence[Picture], output: Path) -> str:
    """The report as one HTML text, its pictures inside."""
    parts = []
    for picture in drawn:
        data = base64.b64encode((output / picture.file).read_bytes()).decode()
        parts.append(
            f"<h2>{html.escape(picture.title)}</h2>\n<p>{html.escape(picture.caption)}</p>\n"
            f'<img alt="{html.escape(picture.title)}" src="data:image/png;base64,{data}">'
        )
    parts.append(f"<h2>All numbers</h2>\n{_numbers(runs)}")
    changed = differences(runs)
    if changed:
        rows = [[r.name, *(_plain(values[i]) for values in changed.values())] for i, r in enumerate(runs)]
        parts.append("<h2>What differs between the configurations</h2>\n" + _table(["run", *changed], rows))
    remarks = [f"{run.name}: {remark}" for run in runs for remark in run.remarks] + [
        f"left out: {line}" for line in left_out
    ]
    if remarks:
        parts.append("<h2>Remarks</h2>\n" + "\n".join(f"<p>{html.escape(r)}</p>" for r in remarks))
    counts = (
        f"{len(runs)} run{'s' if len(runs) > 1 else ''}, "
        f"{sum(max(r.series('loss')[0]) for r in runs):,.0f} tokens in all"
        + (f"; {len(left_out)} left out, see the remarks" if left_out else "")
    )
    return _PAGE.format(
        title=html.escape(title), counts=counts, summary=f"<p>{html.escape(_summary(runs))}</p>", body="\n".join(parts)
    )


def _summary(runs: Sequence[Run]) -> str:
    best = min(runs, key=lambda r: r.final_loss)
    if len(runs) == 1:
        return (
            f"Final loss {best.final_loss:.4f} at {best.tokens_per_second:,.0f} tokens/s; the cache of {CONTEXT:,} "
            f"tokens takes {_size(best.cache_bytes)}."
        )
    small = min(runs, key=lambda r: (r.cache_bytes, r.final_loss))
    said = (
        f"Lowest final loss: {best.name} with {best.final_loss:.4f}, a cache of {_size(best.cache_bytes)} at "
        f"{CONTEXT:,} tokens."
    )
    if small.cache_bytes < best.cache_bytes:
        times = best.cache_bytes / small.cache_bytes
        said += (
            f" Smallest cache: {small.name} with {_size(small.cache_bytes)}, {times:.1f} times less, at a loss "
            f"{small.final_loss - best.final_loss:+.4f} from the lowest."
        )
    return said


def _numbers(runs: Sequence[Run]) -> str:
    head = [
        "run",
        "k",
        "window (tokens)",
        "layers",
        "step",
        "tokens",
        "final loss",
        f"cache at {CONTEXT // 1024}k",
        "keys a token sees",
        "tokens/s",
    ]
    lowest = min(r.final_loss for r in runs)
    rows = [
        [
            r.name,
            str(r.model.chunk_size),
            f"{r.window:,}",
            f"{r.model.num_layers} x {r.model.layer_pattern}",
            f"{max(x['step'] for x in r.records):,}",
            f"{max(r.series('loss')[0]):,.0f}",
            f"{r.final_loss:.4f}" + ("" if r.has_held_out else " (training)"),
            _size(r.cache_bytes),
            f"{r.visible_keys:,.1f}",
            f"{r.tokens_per_second:,.0f}",
        ]
        for r in runs
    ]
    return _table(head, rows, best=[i for i, r in enumerate(runs) if r.final_loss == lowest])


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], best: Sequence[int] = ()) -> str:
    lines = ["<tr>" + "".join(f"<th>{html.escape(h)}</th>" for h in head) + "</tr>"]
    for i, row in enumerate(rows):
        kind = ' class="best"' if i in best else ""
        lines.append(f"<tr{kind}>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>")
    return '<div class="wide"><table>\n' + "\n".join(lines) + "\n</table></div>"


def _plain(value: Any) -> str:
    return "none" if value is None else str(value)


def _size(num_bytes: float) -> str:
    return f"{num_bytes / 2**30:,.2f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:,.2f} MiB"


def write_report(paths: Sequence[Path], output: Path | None = None) -> Path:
    """Write `report.html` and the PNGs; returns the page's path."""
    runs, left_out = find_runs(paths)
    output = output or (paths[0] if len(paths) == 1 else paths[0].parent) / "report"
    make_directory("output", output)
    drawn = pictures(runs)
    draw(drawn, runs, output)
    title = paths[0].resolve().name if len(paths) == 1 else " and ".join(sorted({p.resolve().name for p in paths}))
    (output / "report.html").write_text(page(title, runs, left_out, drawn, output), encoding="utf-8")
    return output / "report.html"


def main(arguments: Sequence[str]) -> int:
    outputs = [a.removeprefix("output=") for a in arguments if a.startswith("output=")]
    paths = [Path(a) for a in arguments if not a.startswith("output=")]
    if not paths or any(str(p) in ("-h", "--help", "help") for p in paths):
        print(__doc__)
        return 0 if paths else BAD_INPUT
    try:
        written = write_report(paths, Path(outputs[-1]) if outputs else None)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return BAD_INPUT
    print(f"{written} and {len(list(written.parent.glob('*.png')))} pictures beside it")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
