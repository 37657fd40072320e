"""At which length and budget does KSA pay? `python -m tests.bench.ksa_pay [key=value ...]`

Trains the models of `configs/evidence/pay/`, several at a time on each device, with probes in the training loop.
Evaluates each model at lengths up to 16 times its training length. Then times each model alone on a device, because
models that share a device say nothing about GPU time.

Results are merged into docs/results/does_ksa_pay.json by model and seed after every evaluation, so that the study grows
over many starts and finished work is never lost. Pictures and a Markdown table are made from that file.

    only=NAME,...      some of the models            seeds=0,1,2       seeds of the weights
    phases=train,evaluate,speed,decode,report        steps=N           of each run
    parallel=3         processes at a time, a device minutes=7         a run stops after this time and counts as it is
    samples=8          probes of each kind           lengths=1024,...  lengths of the last evaluation
    yarn=4,16          evaluate again with positions scaled by YaRN (none by default)
    root=runs/pay      out=docs/results              overrides='...'   further overrides, e.g. a smaller model on a CPU
"""

from __future__ import annotations

import dataclasses
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
from tests.bench import decode, evidence, ksa_pay_report, workload
from tests.bench.evidence import Job
from tests.bench.ksa_pay_report import CACHE_LENGTHS, TASKS, Models, final_recall
from train.checkpoint import locate
from train.checkpoint.storage import finished
from train.distributed import groups
from train.logs.metrics import METRICS, read_records

ROOT = Path(__file__).resolve().parent.parent.parent
NAMES = [path.stem for path in sorted((ROOT / "configs/evidence/pay").glob("[a-z]*.yaml"))]
FILE = "does_ksa_pay.json"
DECODE_REQUESTS = 8  # a single request to a model of this size waits for launches, not for memory
TRAINED_AT = 8192
SPEED_STEPS = 40
LONG_PROBES = "data.stages=[{seq_len: 16384, samples: 1000000, draws: [{corpus: long, weight: 1.0}]}]"
DEFAULTS: dict[str, Any] = dict(
    only=None, seeds="0", phases="train,evaluate,speed,decode,report", steps=None, parallel=3, minutes=7,
    samples=8, lengths="1024,2048,4096,8192,16384,32768,131072", yarn=None, overrides="", root="runs/pay",
    out="docs/results",
)  # fmt: skip


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
    if "decode" in phases:
        merge(options, {name: decode_times(name, options) for name in names})
    models = merge(options)
    if "report" in phases:
        ksa_pay_report.draw(models, ROOT / options["out"])
        print(ksa_pay_report.markdown(models))


# -- runs -------------------------------------------------------------------------------------------------------------


def jobs(names: list[str], seeds: list[str], phases: list[str], options: dict[str, Any]) -> Iterator[Job]:
    """All training runs, then the evaluation of each."""
    for phase in ("train", "evaluate"):
        if phase in phases:
            for seed in seeds:
                for name in names:
                    if phase == "train":
                        yield train_job(name, seed, options)
                    else:
                        yield from evaluate_jobs(name, seed, options, phases)


def train_job(name: str, seed: str, options: dict[str, Any]) -> Job:
    own = [f"run.root={options['root']}", f"run.name={name}-{seed}", f"run.seed={seed}"]
    own.append(f"run.max_minutes={options['minutes']}")
    if options["steps"] is not None:
        own.append(f"run.steps={options['steps']}")
    return Job(f"{name}-{seed}", ["train", f"+evidence=pay/{name}", *own, *shlex.split(options["overrides"])])


def evaluate_jobs(name: str, seed: str, options: dict[str, Any], phases: list[str]) -> Iterator[Job]:
    """The evaluation of a run, after those with YaRN: an evaluated run is complete."""
    directory, after = f"{options['root']}/{name}-{seed}", f"{name}-{seed}" if "train" in phases else None
    arguments = ["train.evaluate", directory, f"tasks={','.join(TASKS)}", f"samples={options['samples']}", "depths=3"]
    arguments += ["seed=977", f"lengths={options['lengths']}"]
    for factor in [] if options["yarn"] is None else str(options["yarn"]).split(","):
        scaling = f"{{kind: yarn, factor: {factor}, original_max_positions: {TRAINED_AT}}}"
        own = [f"rope_scaling={scaling}", f"out={directory}/yarn-{factor}"]
        yield Job(f"yarn-{factor}-{name}-{seed}", [*arguments, *own], after)
    yield Job(f"evaluate-{name}-{seed}", arguments, after)


def speed_command(name: str, options: dict[str, Any]) -> list[str]:
    """A short run on the longest probes, alone on its device."""
    own = [f"run.root={options['root']}/speed", f"run.name={name}", f"run.steps={SPEED_STEPS}", "run.log_every=10"]
    own += ["run.probe_every=null", "run.eval_samples=0", "resume=never", LONG_PROBES]
    return ["train", f"+evidence=pay/{name}", *own, *shlex.split(options["overrides"])]


def decode_times(name: str, options: dict[str, Any]) -> dict[str, Any]:
    """Milliseconds of a decoding step of `DECODE_REQUESTS` requests by length, with random weights."""
    config = workload.configured([f"+evidence=pay/{name}", *shlex.split(options["overrides"])])
    world = groups.initialize(groups.ParallelConfig(), groups.pick_device("auto"))
    model = decode.build(dataclasses.replace(config.model, vocab_size=config.data.vocab_size), world)
    rate, found = decode.copy_rate(world.device), {}
    for length in CACHE_LENGTHS:
        found[length] = decode.time_mode(model, int(length), DECODE_REQUESTS, rate)
        decode.release()
    groups.shutdown()
    return {"requests": DECODE_REQUESTS, "step_ms": {length: timed["step_ms"] for length, timed in found.items()}}


# -- results ----------------------------------------------------------------------------------------------------------


def merge(options: dict[str, Any], decoding: dict[str, Any] | None = None) -> Models:
    """Merge all results below `root`, and decoding times, into the file; returns its models."""
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
            seeds = found["models"].setdefault(name, {"seeds": {}})["seeds"]
            seeds[seed] = merged(seeds.get(seed), result(directory), facts)
    for directory in sorted((root / "speed").glob("*")):
        rates = [r["tokens_per_second"] for r in read_records(directory / METRICS) if "loss" in r]
        if len(rates) > 2 and directory.name in found["models"]:
            timed = facts | {"tokens_per_second": statistics.median(rates[1:])}
            alone = found["models"][directory.name].setdefault("alone", [])
            if timed["tokens_per_second"] not in [earlier["tokens_per_second"] for earlier in alone]:
                alone.append(timed)  # of each call: hosts differ
    for name, times in (decoding or {}).items():
        found["models"].setdefault(name, {"seeds": {}})["decode"] = facts | times
    with atomic_write(path) as file:
        file.write((json.dumps(found, separators=(",", ":")) + "\n").encode())
    return found["models"]


def merged(before: dict[str, Any] | None, now: dict[str, Any], facts: dict[str, Any]) -> dict[str, Any]:
    """A run's results with the facts of the call that trained it: a later call that finds the same run adds to it."""
    if before is None or any(before[key] != now[key] for key in ("step", "tokens", "curve")):
        return facts | now
    return before | now | {"yarn": before.get("yarn", {}) | now["yarn"]}


def result(directory: Path) -> dict[str, Any]:
    """What one run leaves: its curve of probes, [tokens, {task: {length: token accuracy}}], and its evaluation."""
    records = read_records(directory / METRICS)
    state = locate.read_state(finished(directory / "checkpoints")[-1])
    yarn = {path.parent.name.removeprefix("yarn-"): path for path in directory.glob("yarn-*/evaluation.json")}
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
        "yarn": {factor: _recall_by_length(json.loads(path.read_text())) for factor, path in sorted(yarn.items())},
    }


def _recall_by_length(evaluation: dict[str, Any]) -> dict[str, float]:
    return {str(length): round(final_recall(evaluation, str(length)), 4) for length in evaluation["lengths"]}


if __name__ == "__main__":
    main()
