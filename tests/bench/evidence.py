"""Does KSA recall as well with 1/k of the cache? `python -m tests.bench.evidence [key=value ...]`

Trains the small models of `configs/evidence/`, several at a time on each device, evaluates each of them, writes
docs/results/ksa_vs_full.json and figures, and prints a table. The file is rewritten after every evaluation, so an
interrupted driver loses none, and keeps the results of other runs and seeds. The same command continues.

    only=NAME,...      some of the runs              seeds=0,1,2       seeds of the weights
    phases=train,path,evaluate,report                steps=N           of each run except `path` and `scratch_extra`
    parallel=6         processes per device          minutes=5         a run stops after this time and is evaluated
    samples=16         probes of each kind           lengths=1024,2048,4096,8192
    root=runs/evidence out=docs/results
    overrides='...'    further training overrides, e.g. a smaller model to try the driver on a CPU
"""

from __future__ import annotations

import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

import data_pipeline
from data_pipeline.store.files import atomic_write
from tests.bench import workload
from train.checkpoint import locate, storage
from train.distributed.signals import REQUEUE
from train.evaluate import plots
from train.logs.metrics import read_records

ROOT = Path(__file__).resolve().parent.parent.parent
CONFIGS = ROOT / "configs" / "evidence"
NAMES = [path.stem for path in sorted(CONFIGS.glob("[a-z]*.yaml"))]
PATH_STAGES = ("0-distill", "1-anneal")
FIXED_STEPS = ("path", "scratch_extra")  # equally long whatever `steps` is
DEFAULTS: dict[str, Any] = dict(
    only=None, seeds="0", phases="train,path,evaluate,report", steps=None, parallel=6, minutes=5, samples=16,
    lengths="1024,2048,4096,8192", overrides="", root="runs/evidence", out="docs/results",
)  # fmt: skip
# Figures: runs that differ in one property only.
FIGURES = {
    "mixers": ["full", "hybrid_swa", "hybrid_sca", "hybrid_delta", "swa", "pure_ksa", "hybrid_ksa"],
    "k": ["full", "hybrid_ksa_k4", "hybrid_ksa", "hybrid_ksa_k16", "hybrid_ksa_k32", "pure_ksa_k4", "pure_ksa",
          "pure_ksa_k16", "pure_ksa_k16_m2", "pure_ksa_k32"],
}  # fmt: skip


def main() -> None:
    given = workload.arguments(sys.argv[1:], *DEFAULTS)
    options = DEFAULTS | {key: value if key == "overrides" else yaml.safe_load(value) for key, value in given.items()}
    names = NAMES if options["only"] is None else _list(options["only"])
    seeds, phases = _list(options["seeds"]), _list(options["phases"])
    if "train" in phases:
        prepare(options)
    reports = "report" in phases
    run_all(list(jobs(names, seeds, phases, options)), options, lambda: collect(options) if reports else None)
    if reports:
        report(options)


@dataclass(frozen=True)
class Job:
    """`python -m ARGUMENTS`, started when the job `after` has succeeded; never, if it has failed."""

    name: str
    arguments: list[str]
    after: str | None = None


def jobs(names: list[str], seeds: list[str], phases: list[str], options: dict[str, Any]) -> Iterator[Job]:
    """Training jobs, `full` first because `path` starts from it; then the evaluations."""
    names = sorted(names, key=lambda name: (name == "path", name != "full", name))
    training = [name for name in names if ("path" if name == "path" else "train") in phases]
    for seed in seeds:
        for name in training:
            first = f"full-{seed}" if name == "path" and "full" in training else None
            yield Job(f"{name}-{seed}", train_command(name, seed, options), first)
    if "evaluate" not in phases:
        return
    for seed in seeds:
        for name in names:
            for directory in run_directories(name, seed, options):
                after = f"{name}-{seed}" if name in training else None
                if after or storage.finished(directory / "checkpoints"):
                    yield Job(f"evaluate-{'-'.join(directory.parts[-2:])}", evaluate_command(directory, options), after)


def _list(value: Any) -> list[str]:
    return [str(item) for item in value] if isinstance(value, list) else str(value).split(",")


def prepare(options: dict[str, Any]) -> None:
    """Tokenize the corpus once, before many processes need it."""
    config = workload.configured(["+evidence=full", *shlex.split(options["overrides"])])
    data = data_pipeline.open_data(config.data, progress=True)
    data.samples("train", config.seq_len, config.alignment)
    print("\n".join(data.report()), flush=True)


def train_command(name: str, seed: str, options: dict[str, Any]) -> list[str]:
    own = [
        f"run.root={options['root']}",
        f"run.name={name}-{seed}",
        f"run.seed={seed}",
        f"run.max_minutes={options['minutes']}",
    ]
    if options["steps"] is not None and name not in FIXED_STEPS:
        own += [f"run.steps={options['steps']}"]
    if name == "path":
        own += [f"init_from={options['root']}/full-{seed}"]
    return ["train", f"+evidence={name}", *own, *shlex.split(options["overrides"])]


def evaluate_command(directory: Path, options: dict[str, Any]) -> list[str]:
    return [
        "train.evaluate",
        str(directory),
        f"lengths={options['lengths']}",
        f"samples={options['samples']}",
        "seed=977",
    ]


def run_all(waiting: list[Job], options: dict[str, Any], evaluated: Callable[[], object]) -> None:
    """Run the jobs, `parallel` at a time on each device. If one fails, the jobs that need it are skipped.

    `evaluated` is called after each evaluation.
    """
    logs = ROOT / options["root"] / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    devices = workload.visible_gpus() or [""]  # without GPUs: one device without a name
    running: dict[str, tuple[subprocess.Popen, str, float]] = {}
    while waiting or running:
        pending = {job.name for job in waiting} | running.keys()
        for job in [job for job in waiting if job.after not in pending]:
            busy = Counter(device for _, device, _ in running.values())
            device = min(devices, key=lambda name: busy[name])
            if busy[device] >= options["parallel"]:
                break
            environment = os.environ | {"OMP_NUM_THREADS": "1"} | ({"CUDA_VISIBLE_DEVICES": device} if device else {})
            with open(logs / f"{job.name}.log", "w") as log:
                process = subprocess.Popen(
                    [sys.executable, "-m", *job.arguments], cwd=ROOT, env=environment, stdout=log, stderr=log
                )
            running[job.name] = process, device, time.monotonic()
            waiting.remove(job)
        time.sleep(0.5)
        for name, (process, _, began) in list(running.items()):
            if process.poll() is None:
                continue
            del running[name]
            print(f"{name}: exit code {process.returncode} after {time.monotonic() - began:.0f} s", flush=True)
            if process.returncode == 0 and name.startswith("evaluate-"):
                evaluated()
            if process.returncode not in (0, REQUEUE):
                skipped = [job for job in waiting if job.after == name]
                waiting = [job for job in waiting if job.after != name]
                print("".join(f"{job.name}: skipped because it needs {name}\n" for job in skipped), end="", flush=True)


def run_directories(name: str, seed: str, options: dict[str, Any]) -> list[Path]:
    """The run directories of a name."""
    root = ROOT / options["root"]
    return [root / f"path-{seed}" / stage for stage in PATH_STAGES] if name == "path" else [root / f"{name}-{seed}"]


def report(options: dict[str, Any]) -> None:
    """Write figures of the evaluated runs and print a table in Markdown: mean and standard deviation over seeds."""
    runs, out = collect(options), ROOT / options["out"]
    if not runs:
        raise SystemExit(f"error: {options['root']} has no evaluation.json: run phases=train,evaluate first")
    for figure, members in FIGURES.items():
        chosen = {name: runs[name] for name in members if name in runs}
        if chosen:
            plots.recall_by_distance(chosen, out / f"ksa_vs_full_{figure}_distance.png")
            plots.recall_by_cache(chosen, out / f"ksa_vs_full_{figure}_cache.png")
    print(markdown(runs))


def collect(options: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """The results of every evaluated run by name, merged into the file, which keeps those of other runs."""
    root, out = ROOT / options["root"], ROOT / options["out"]
    runs: dict[str, list[dict[str, Any]]] = {}
    for path in sorted(root.rglob("evaluation.json")):
        directory = path.parent
        name, _, seed = directory.relative_to(root).parts[0].rpartition("-")
        name += f"/{directory.name[2:]}" if directory.parent != root else ""
        state = locate.read_state(storage.finished(directory / "checkpoints")[-1])
        speed = [r["tokens_per_second"] for r in read_records(directory / "metrics.jsonl") if "loss" in r]
        facts = {
            "seed": int(seed),
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {platform.machine()}",
            "torch": torch.__version__,
            "step": state["step"],
            "of_steps": state["config"]["run"]["steps"],
            "tokens": state["tokens"],
            "tokens_per_second_median": statistics.median(speed) if speed else None,
        }
        runs.setdefault(name, []).append(facts | json.loads(path.read_text()))
    if not runs:
        return runs
    out.mkdir(parents=True, exist_ok=True)
    path, lengths = out / "ksa_vs_full.json", next(iter(runs.values()))[0]["lengths"]
    for name, earlier in (json.loads(path.read_text())["runs"] if path.exists() else {}).items():
        if earlier[0]["lengths"] != lengths:
            raise SystemExit(
                f"error: {path} has runs evaluated at lengths={earlier[0]['lengths']}, but these are at {lengths}: "
                "choose another out="
            )
        fresh = {run["seed"] for run in runs.get(name, [])}
        found = [run for run in earlier if run["seed"] not in fresh] + runs.get(name, [])
        runs[name] = sorted(found, key=lambda run: run["seed"])
    runs = dict(sorted(runs.items()))
    write(path, "python -m tests.bench.evidence " + " ".join(sys.argv[1:]), runs)
    return runs


def write(path: Path, command: str, runs: dict[str, list[dict[str, Any]]]) -> None:
    """Write JSON with one run per line, atomically."""
    found = ",\n".join(
        f"{json.dumps(name)}: [\n" + ",\n".join(json.dumps(run) for run in several) + "\n]"
        for name, several in runs.items()
    )
    with atomic_write(path) as file:
        file.write(f'{{"command": {json.dumps(command)},\n"runs": {{\n{found}\n}}}}\n'.encode())


def markdown(runs: dict[str, list[dict[str, Any]]]) -> str:
    """One row per run: tokens, held-out loss, recall by length, and cache bytes at the longest length."""
    lengths = [str(n) for n in next(iter(runs.values()))[0]["lengths"]]
    trained_at = lengths[min(1, len(lengths) - 1)]
    lines = [
        f"| run | seeds | tokens | loss at {trained_at} | "
        + " | ".join(f"recall at {n}" for n in lengths)
        + f" | cache bytes at {lengths[-1]} |",
        "|---|---|---|---|" + "---|" * (len(lengths) + 1),
    ]
    for name, found in runs.items():
        loss = _spread([run["perplexity"][trained_at]["loss"] for run in found], 3)
        recall = [
            _spread([statistics.mean(s[n]["token_accuracy"] for s in run["tasks"].values()) for run in found], 3)
            for n in lengths
        ]
        tokens = f"{found[0]['tokens']:,}" + (
            "" if found[0]["step"] == found[0]["of_steps"] else " (stopped by the clock)"
        )
        cells = [name, len(found), tokens, loss, *recall, f"{found[0]['cache_bytes'][lengths[-1]]:,}"]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def _spread(values: list[float], digits: int) -> str:
    mean = f"{statistics.mean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


if __name__ == "__main__":
    main()
