"""The report as one HTML page. It contains its pictures, so the one file can be sent on."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from train.config.run_directory import make_directory
from train.report.charts import Picture, draw, pictures
from train.report.recall import Probed, cost, keys_of, probed, reached, remarks
from train.report.records import CONTEXT, Run, differences, find_runs

_THRESHOLDS = (0.5, 0.9)  # of recall

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
<p class="quiet">Kwai Summary Attention adds one summary token to each chunk of k text tokens. A token attends to
recent chunks (the window) token by token and to older chunks only through their summaries. So a larger k means a
smaller cache, fewer keys, and less detail about older text. Losses are in nats per token: lower is better.</p>
{body}
</body></html>
"""


def page(title: str, runs: Sequence[Run], left_out: Sequence[str], drawn: Sequence[Picture], output: Path) -> str:
    """The report as HTML. `drawn` are the pictures in `output`, `left_out` has a line for each run left out."""
    parts = []
    for picture in drawn:
        data = base64.b64encode((output / picture.file).read_bytes()).decode()
        parts.append(
            f"<h2>{html.escape(picture.title)}</h2>\n<p>{html.escape(picture.caption)}</p>\n"
            f'<img alt="{html.escape(picture.title)}" src="data:image/png;base64,{data}">'
        )
    parts += _recall(runs)
    parts.append(f"<h2>All numbers</h2>\n{_numbers(runs)}")
    changed = differences(runs)
    if changed:
        rows = [[r.name, *(_plain(values[i]) for values in changed.values())] for i, r in enumerate(runs)]
        parts.append("<h2>Differences between the configurations</h2>\n" + _table(["run", *changed], rows))
    notes = [f"{run.name}: {remark}" for run in runs for remark in (*run.remarks, *remarks(run))] + [
        f"left out: {line}" for line in left_out
    ]
    if notes:
        parts.append("<h2>Notes</h2>\n" + "\n".join(f"<p>{html.escape(note)}</p>" for note in notes))
    counts = (
        f"{len(runs)} run{'s' if len(runs) > 1 else ''}, "
        f"{sum(max(r.series('loss')[0]) for r in runs):,.0f} tokens in total"
        + (f"; {len(left_out)} left out, see the notes" if left_out else "")
    )
    return _PAGE.format(
        title=html.escape(title), counts=counts, summary=f"<p>{html.escape(_summary(runs))}</p>", body="\n".join(parts)
    )


def _summary(runs: Sequence[Run]) -> str:
    best = min(runs, key=lambda r: r.final_loss)
    if len(runs) == 1:
        return (
            f"Final loss {best.final_loss:.4f} at {best.tokens_per_second:,.0f} tokens/s. The cache takes "
            f"{_size(best.cache_bytes)} at {CONTEXT:,} tokens."
        )
    small = min(runs, key=lambda r: (r.cache_bytes, r.final_loss))
    text = (
        f"Lowest final loss: {best.name} with {best.final_loss:.4f}; its cache takes {_size(best.cache_bytes)} at "
        f"{CONTEXT:,} tokens."
    )
    if small.cache_bytes < best.cache_bytes:
        times = best.cache_bytes / small.cache_bytes
        text += (
            f" Smallest cache: {small.name} with {_size(small.cache_bytes)}, {times:.1f} times less; its loss "
            f"is {small.final_loss - best.final_loss:.4f} higher."
        )
    return text


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
        "keys per token",
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


def _recall(runs: Sequence[Run]) -> list[str]:
    """When recall stays at a threshold, and what the probes cost; nothing for runs without probes."""
    found = [probed(r) for r in runs]
    keys = keys_of([p for one in found for p in one], "length")
    parts = []
    if keys:
        head = ["run", "task", "length of the probes", "recall at the end"]
        head += [f"{unit} until {threshold:g}" for threshold in _THRESHOLDS for unit in ("tokens", "GPU seconds")]
        rows = [
            [run.name, key[0], f"{key[1]:,}", f"{recalls[-1]:.3f}", *_reached(one, key)]
            for key in keys
            for run, one in zip(runs, found)
            if (recalls := [p.scores["length"][key] for p in one if key in p.scores["length"]])
        ]
        parts.append(
            "<h2>When recall stays at a threshold</h2>\n<p>Training tokens and GPU seconds before the first probes "
            f"from which on recall stays at or above {' or '.join(map(str, _THRESHOLDS))}. It got there between these "
            "probes and those before them. A dash: recall of the last probes is below.</p>\n" + _table(head, rows)
        )
    costs = [(run.name, spent) for run in runs if (spent := cost(run)) is not None]
    if costs:
        head = ["run", "times probed", "probe seconds", "training seconds", "share of the probes"]
        rows = [
            [name, str(c.evaluations), _seconds(c.probe_seconds), _seconds(c.training_seconds), f"{c.share:.1%}"]
            for name, c in costs
        ]
        parts.append(
            "<h2>What the probes cost</h2>\n<p>Seconds of the clock, all ranks at once. The share is of the time of "
            "probes and training together, without validation and checkpoints.</p>\n" + _table(head, rows)
        )
    return parts


def _reached(found: Sequence[Probed], key: tuple[str, int]) -> list[str]:
    cells = []
    for threshold in _THRESHOLDS:
        first = reached(found, key, threshold)
        if first is None:
            cells += ["-", "-"]
        else:
            cells.append("unknown" if first.tokens is None else f"{first.tokens:,.0f}")
            cells.append("unknown" if first.gpu_seconds is None else _seconds(first.gpu_seconds))
    return cells


def _seconds(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:,.1f}"


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
