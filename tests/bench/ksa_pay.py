"""At which length and budget does KSA pay? `python -m tests.bench.ksa_pay [key=value ...]`

Trains the models of `configs/evidence/pay/`, several at a time on each device, with probes in the training loop.
Evaluates each model at lengths up to 16 times its training length. Then times each model alone on a device, because
models that share a device say nothing about GPU time.

Results are merged into docs/results/does_ksa_pay.json by model and seed after every evaluation, so that the study grows
over many starts and finished work is never lost. Pictures and a Markdown table are made from that file.

    only=NAME,...      some of the models            seeds=0,1,2       seeds of the weights
    phases=train,evaluate,speed,report               steps=N           of each run
    parallel=3         processes at a time, a device minutes=7         a run stops after this time and counts as it is
    samples=8          probes of each kind           lengths=1024,...  lengths of the last evaluation
    root=runs/pay      out=docs/results              overrides='...'   further overrides, e.g. a smaller model on a CPU
"""

from __future__ import annotations

import datetime
import json
import platform
import shlex
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import yaml

from data_pipeline import open_data
from data_pipeline.store.files import atomic_write
from tests.bench import evidence, workload
from tests.bench.evidence import Job
from train.checkpoint import locate
from train.checkpoint.storage import finished
from train.logs.metrics import METRICS, read_records

ROOT = Path(__file__).resolve().parent.parent.parent
NAMES = [path.stem for path in sorted((ROOT / "configs/evidence/pay").glob("[a-z]*.yaml"))]
TASKS = ("needle", "multikey", "joint", "chain")
FILE = "does_ksa_pay.json"
THRESHOLDS = (0.5, 0.9)
CACHE_LENGTHS = ("8192", "32768", "131072")
SPEED_STEPS = 40
LONG_PROBES = "data.stages=[{seq_len: 16384, samples: 1000000, draws: [{corpus: long, weight: 1.0}]}]"
DEFAULTS: dict[str, Any] = dict(
    only=None, seeds="0", phases="train,evaluate,speed,report", steps=None, parallel=3, minutes=7, samples=8,
    lengths="1024,2048,4096,8192,16384,32768,131072", overrides="", root="runs/pay", out="docs/results",
)  # fmt: skip
Models = dict[str, Any]  # name -> {"seeds": {seed: run}, "alone": {"tokens_per_second": ...}}


def main() -> None:
    given = workload.arguments(sys.argv[1:], *DEFAULTS)
    options = DEFAULTS | {key: value if key == "overrides" else yaml.safe_load(value) for key, value in given.items()}
    names = NAMES if options["only"] is None else str(options["only"]).split(",")
    seeds, phases = str(options["seeds"]).strip("[]").replace(" ", "").split(","), options["phases"].split(",")
    if "train" in phases or "speed" in phases:
        config = workload.configured(["+evidence=pay/full", *shlex.split(options["overrides"])])
        open_data(config.data, progress=True)  # tokenize once, before many processes want the same
    evidence.run_all(list(jobs(names, seeds, phases, options)), options, lambda: merge(options))
    if "speed" in phases:
        speed = [Job(f"speed-{name}", speed_command(name, options)) for name in names]
        evidence.run_all(speed, options | {"parallel": 1}, lambda: None)
    models = merge(options)
    if "report" in phases:
        draw(models, ROOT / options["out"])
        print(markdown(models))


# -- runs -------------------------------------------------------------------------------------------------------------


def jobs(names: list[str], seeds: list[str], phases: list[str], options: dict[str, Any]) -> Iterator[Job]:
    """All training runs, then the evaluation of each."""
    for phase in ("train", "evaluate"):
        if phase in phases:
            for seed in seeds:
                for name in names:
                    yield (
                        train_job(name, seed, options)
                        if phase == "train"
                        else evaluate_job(name, seed, options, phases)
                    )


def train_job(name: str, seed: str, options: dict[str, Any]) -> Job:
    own = [f"run.root={options['root']}", f"run.name={name}-{seed}", f"run.seed={seed}"]
    own.append(f"run.max_minutes={options['minutes']}")
    if options["steps"] is not None:
        own.append(f"run.steps={options['steps']}")
    return Job(f"{name}-{seed}", ["train", f"+evidence=pay/{name}", *own, *shlex.split(options["overrides"])])


def evaluate_job(name: str, seed: str, options: dict[str, Any], phases: list[str]) -> Job:
    arguments = ["train.evaluate", f"{options['root']}/{name}-{seed}", f"tasks={','.join(TASKS)}"]
    arguments += [f"lengths={options['lengths']}", f"samples={options['samples']}", "depths=3", "seed=977"]
    return Job(f"evaluate-{name}-{seed}", arguments, f"{name}-{seed}" if "train" in phases else None)


def speed_command(name: str, options: dict[str, Any]) -> list[str]:
    """A short run on the longest probes, alone on its device."""
    own = [f"run.root={options['root']}/speed", f"run.name={name}", f"run.steps={SPEED_STEPS}", "run.log_every=10"]
    own += ["run.probe_every=null", "run.eval_samples=0", "resume=never", LONG_PROBES]
    return ["train", f"+evidence=pay/{name}", *own, *shlex.split(options["overrides"])]


# -- results ----------------------------------------------------------------------------------------------------------


def merge(options: dict[str, Any]) -> Models:
    """Merge all results below `root` into the file; returns its models."""
    root, path = ROOT / options["root"], ROOT / options["out"] / FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    found = json.loads(path.read_text()) if path.exists() else {"models": {}}
    shown = [argument for argument in sys.argv[1:] if not argument.startswith(("out=", "root="))]
    facts = {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {platform.machine()}",
        "torch": torch.__version__,
        "date": datetime.date.today().isoformat(),
        "command": shlex.join(["python", "-m", "tests.bench.ksa_pay", *shown]),
    }
    for directory in sorted(root.glob("*-[0-9]*")):
        name, _, seed = directory.name.rpartition("-")
        if (directory / "evaluation.json").exists():
            found["models"].setdefault(name, {"seeds": {}})["seeds"][seed] = facts | result(directory)
    for directory in sorted((root / "speed").glob("*")):
        rates = [r["tokens_per_second"] for r in read_records(directory / METRICS) if "loss" in r]
        if len(rates) > 2 and directory.name in found["models"]:
            found["models"][directory.name]["alone"] = facts | {"tokens_per_second": statistics.median(rates[1:])}
    with atomic_write(path) as file:
        file.write((json.dumps(found, separators=(",", ":")) + "\n").encode())
    return found["models"]


def result(directory: Path) -> dict[str, Any]:
    """What one run leaves: its curve of probes, [tokens, {task: {length: token accuracy}}], and its evaluation."""
    records = read_records(directory / METRICS)
    state = locate.read_state(finished(directory / "checkpoints")[-1])
    curve = [
        [r["tokens"], {t: {n: s["token_accuracy"] for n, s in by.items()} for t, by in r["probes"].items()}]
        for r in records
        if "probes" in r
    ]
    return {
        "step": state["step"],
        "of_steps": state["config"]["run"]["steps"],
        "tokens": state["tokens"],
        "curve": curve,
        "probe_seconds": round(sum(r.get("probe_seconds", 0) for r in records), 2),
        "evaluation": json.loads((directory / "evaluation.json").read_text()),
    }


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


# -- pictures and tables ----------------------------------------------------------------------------------------------


def draw(models: Models, out: Path) -> None:
    """Recall against training tokens and GPU seconds, one picture a length, and final recall against cache bytes."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    colours = {name: plt.get_cmap("tab10")(i % 10) for i, name in enumerate(sorted(models))}
    for length in curve_lengths(models):
        figure, axes = plt.subplots(2, len(TASKS), figsize=(4 * len(TASKS), 7), sharey=True, squeeze=False)
        for column, task in enumerate(TASKS):
            for name, model in sorted(models.items()):
                _draw_curve(axes[:, column], model, task, length, name, colours[name])
            axes[0][column].set_title(f"{task}, {int(length):,} tokens")
            axes[0][column].set_xlabel("training tokens, millions")
            axes[1][column].set_xlabel("training seconds on one GPU")
        for row in axes:
            row[0].set_ylabel("answer tokens right")
            row[0].set_ylim(-0.02, 1.02)
        _save(figure, axes[0][0], out / f"does_ksa_pay_curves_{length}.png")
    figure, axes = plt.subplots(1, len(CACHE_LENGTHS), figsize=(14, 4.5), sharey=True)
    for axis, length in zip(axes, CACHE_LENGTHS):
        _draw_frontier(axis, models, length, colours)
    axes[0].set_ylabel("answer tokens right, mean of tasks")
    axes[0].set_ylim(-0.02, 1.02)
    _save(figure, axes[0], out / "does_ksa_pay_cache.png")


def _save(figure: Any, labelled: Any, path: Path) -> None:
    """Save a picture with one legend below all its panels, for the lines of `labelled`."""
    handles, labels = labelled.get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncol=len(labels), fontsize=8, frameon=False)
    figure.tight_layout(rect=(0, 0.05, 1, 1))
    figure.savefig(path, dpi=110)
    figure.clear()


def _draw_curve(axes: Any, model: dict[str, Any], task: str, length: str, name: str, colour: Any) -> None:
    """The mean over seeds and the band from the lowest to the highest, against tokens and against seconds."""
    points = list(zip(*(run["curve"] for run in model["seeds"].values() if run["curve"])))
    if not points:
        return
    tokens = [statistics.mean(tokens for tokens, _ in point) for point in points]
    values = [[scores[task][length] for _, scores in point] for point in points]
    rate = model.get("alone", {}).get("tokens_per_second")
    for axis, x in ((axes[0], [t / 1e6 for t in tokens]), (axes[1], [t / rate for t in tokens] if rate else None)):
        if x is not None:
            axis.plot(x, [statistics.mean(v) for v in values], color=colour, label=name)
            axis.fill_between(x, [min(v) for v in values], [max(v) for v in values], color=colour, alpha=0.15)


def _draw_frontier(axis: Any, models: Models, length: str, colours: dict[str, Any]) -> None:
    for name, model in sorted(models.items()):
        runs = [run["evaluation"] for run in model["seeds"].values() if length in run["evaluation"]["cache_bytes"]]
        if runs:
            scores = [final_recall(run, length) for run in runs]
            mebibytes, score = runs[0]["cache_bytes"][length] / 2**20, statistics.mean(scores)
            axis.plot([mebibytes, mebibytes], [min(scores), max(scores)], color=colours[name], linewidth=1)
            axis.scatter(mebibytes, score, color=colours[name], label=name)
    axis.set_xscale("log", base=2)
    axis.set_xlabel(f"cache at {int(length):,} tokens, MiB")


def markdown(models: Models) -> str:
    """Final recall by length, and training tokens until each task stays at a threshold."""
    lengths = [str(n) for n in next(iter(next(iter(models.values()))["seeds"].values()))["evaluation"]["lengths"]]
    head = ["model", "seeds", "tokens", "tokens/s alone", *(f"{int(n):,}" for n in lengths), "cache at 8,192, MiB"]
    rows = [head]
    for name, model in sorted(models.items()):
        runs = list(model["seeds"].values())
        rate, cache = model.get("alone", {}).get("tokens_per_second"), runs[0]["evaluation"]["cache_bytes"].get("8192")
        recall = [evidence._spread([final_recall(run["evaluation"], n) for run in runs], 2) for n in lengths]
        speed, size = f"{rate:,.0f}" if rate else "", f"{cache / 2**20:.1f}" if cache else ""
        rows.append([name, str(len(runs)), f"{runs[0]['tokens'] / 1e6:.0f}M", speed, *recall, size])
    parts = [_table(rows)]
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


def _table(rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|---" * len(rows[0]) + "|", *lines[1:]])


if __name__ == "__main__":
    main()
