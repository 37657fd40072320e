"""`python -m launch.sweep sweep=NAME KEY=A,B,C ...`: one run for every combination of values, on any target.

The sweep lives in `{run.root}/NAME`, with `sweep.json` and one run directory for each point. Called again it runs what
is missing: a point whose newest checkpoint is at its last step is finished, any other continues. Without axes on the
command line they come from `sweep.json`, else from configs/sweep/NAME.yaml.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from launch import check, config, kubernetes, runs, slurm
from launch.config import CONFIGS, PROJECT, Launch, LaunchError
from launch.processes import SUPERVISOR, end_descendants
from train.signals import BAD_INPUT, REQUEUE

USAGE = """Train one model for every combination of values, and compare them.

  python -m launch.sweep sweep=NAME KEY=A,B,C [KEY=VALUE ...] [target=TARGET] [nodes=N] [launch.KEY=VALUE ...]

  sweep=NAME            the sweep's directory below run.root, W&B group, and preset: {presets}
  sweep.budget=tokens   tokens | flops | steps: what every point gets as much of as the base configuration would
  sweep.only=POINT,...  these points alone
  sweep.parallel=1      target=local: points at the same time
  sweep.report=true     target=local and ssh: write the report at the end

Run the same line again to continue: finished points are not run again, failed ones are.
"""
BUDGETS = ("tokens", "flops", "steps")


@dataclass(frozen=True)
class Options:
    """What `sweep=` and `sweep.KEY=` say."""

    name: str
    budget: str | None = None
    only: str = ""  # labels of points, which hold commas themselves: see `chosen`
    parallel: int = 1
    report: bool = True

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[\w.+-]+", self.name) or set(self.name) == {"."}:
            raise LaunchError(f"sweep={self.name!r} names a directory: letters, digits and _ . + - only")
        if self.budget not in (None, *BUDGETS):
            raise LaunchError(f"sweep.budget={self.budget!r} is not one of {', '.join(BUDGETS)}")
        if self.parallel < 1:
            raise LaunchError(f"sweep.parallel={self.parallel} must be at least 1")


@dataclass(frozen=True)
class Point:
    """One run of a sweep."""

    name: str
    values: dict[str, str]  # axis -> value, as written in an override
    overrides: list[str]  # all that `python -m train` gets
    steps: int


@dataclass(frozen=True)
class Sweep:
    """What `sweep.json` holds."""

    name: str
    budget: str
    given: list[str]  # overrides of the command line or the preset, axes included
    points: list[Point]


def main(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(USAGE.format(presets=", ".join(presets())))
        return 0 if arguments else BAD_INPUT
    try:
        options, launch_arguments, overrides = parse(arguments)
        launch = config.parse([*launch_arguments, "--", *overrides])
        home, sweep = plan(options, launch)
        return run(options, launch, launch_arguments, home, sweep)
    except LaunchError as error:
        print(f"error: {error}", file=sys.stderr)
        return BAD_INPUT


def parse(arguments: Sequence[str]) -> tuple[Options, list[str], list[str]]:
    """The command line -> the sweep's options, the launcher's arguments, the training overrides."""
    before, after = config.split(arguments)
    own: dict[str, Any] = {}
    launch_arguments, overrides = [], []
    for argument in before:
        key, _, value = argument.partition("=")
        if key == "sweep":
            own["name"] = value
        elif key.startswith("sweep."):
            name = key.removeprefix("sweep.")
            kinds = {"budget": str, "only": str, "parallel": int, "report": bool}
            if name not in kinds:
                raise LaunchError(f"{key} is not a key of sweeps; those are {', '.join(f'sweep.{k}' for k in kinds)}")
            own[name] = config._convert(kinds[name], value, key)
        elif key == "target" or key in config.SIZE_KEYS or key.startswith("launch."):
            launch_arguments.append(argument)
        else:
            overrides.append(argument)
    if "name" not in own:
        raise LaunchError(f"sweep=NAME is missing; a new name, or one of the presets {', '.join(presets())}")
    if not any(a.startswith("target=") for a in launch_arguments):
        launch_arguments.insert(0, "target=local")
    return Options(**own), launch_arguments, [*overrides, *after]


def presets() -> list[str]:
    return sorted(path.stem for path in (CONFIGS / "sweep").glob("*.yaml"))


# -- what to run ------------------------------------------------------------------------------------------------------


def plan(options: Options, launch: Launch) -> tuple[Path, Sweep]:
    """The sweep's directory and its points, every one composed and validated for the launch's ranks."""
    axes, common = split_axes(launch.overrides)
    for override in common:
        if override.split("=")[0].lstrip("+") == "run.name":
            raise LaunchError(f"{override}: a sweep names its runs itself")
    base = check.compose([*common])
    home = launch.directory / check.run_settings(base)["root"] / options.name
    stored = read(home)
    preset = _preset(options.name)
    budget = options.budget or (stored.budget if stored else preset.get("budget", "tokens"))
    if not axes and not common and stored is not None and options.budget in (None, stored.budget):
        return home, stored
    if not axes:
        source = stored.given if stored else preset.get("overrides", [])
        axes, more = split_axes(source)
        kept = {c.split("=")[0] for c in common}
        common = [*(m for m in more if m.split("=")[0] not in kept), *common]
        base = check.compose(common)
    if not axes:
        raise LaunchError(
            f"sweep={options.name} has nothing to vary: give KEY=A,B,C, or a preset's name: {', '.join(presets())}"
        )
    _one_place(options.name, axes, common)
    points = make_points(options.name, axes, common, base, budget, launch.world_size)
    return home, Sweep(
        options.name, budget, [*(f"{k}={','.join(v)}" for k, v in axes.items()), *common], _merged(home, stored, points)
    )


def split_axes(overrides: Sequence[str]) -> tuple[dict[str, list[str]], list[str]]:
    """Overrides with several values, and the others."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    axes: dict[str, list[str]] = {}
    common: list[str] = []
    for override in overrides:
        try:
            parsed = OverridesParser.create().parse_override(override)
        except HydraException as error:
            raise LaunchError(f"{override!r}: {check._one_line(error)}") from error
        if parsed.is_sweep_override():
            values = _values(parsed)
            if parsed.get_key_element() in axes:
                raise LaunchError(
                    f"{override}: {parsed.get_key_element()} varies already; give all values in one place"
                )
            if len(set(values)) != len(values):
                raise LaunchError(f"{override} names a value twice")
            axes[parsed.get_key_element()] = values
        else:
            common.append(override)
    return axes, common


def _values(parsed: Any) -> list[str]:
    """The values of one axis, each as an override spells it."""
    from hydra.errors import HydraException

    try:
        return list(parsed.sweep_string_iterator())
    except HydraException as error:  # interval(), glob(): nothing that can be counted out
        raise LaunchError(
            f"{parsed.input_line}: a sweep cannot list these values; write KEY=A,B,C or KEY=range(FROM,TO)"
        ) from error


def _one_place(name: str, axes: dict[str, list[str]], common: list[str]) -> None:
    """A key that varies has no single value beside it: one of the two would win in silence."""
    varied = {key.lstrip("+"): values for key, values in axes.items()}
    for override in common:
        key = override.split("=")[0].lstrip("+~")
        if key in varied:
            raise LaunchError(
                f"{override}: sweep={name} varies {key} over {','.join(varied[key])}; leave it out (sweep.only="
                f"POINT runs one value alone), or choose another sweep=NAME and give {key}=A,B there"
            )


def make_points(
    name: str, axes: dict[str, list[str]], common: list[str], base: dict[str, Any], budget: str, world_size: int
) -> list[Point]:
    short = {key: key.split(".")[-1] for key in axes}
    if len(set(short.values())) < len(short):
        short = {key: key for key in axes}
    points = []
    for values in itertools.product(*axes.values()):
        chosen = dict(zip(axes, values))
        label = ",".join(f"{short[key]}={re.sub(r'[^A-Za-z0-9_.+-]+', '_', value)}" for key, value in chosen.items())
        overrides = [*common, *(f"{key}={value}" for key, value in chosen.items()), f"run.name='{name}/{label}'"]
        if not any(c.startswith("logging.wandb_group=") for c in common):
            overrides.append(_wandb_group(name))
        try:
            composed = check.compose(overrides)
            check.typed(composed)  # before it is computed with
            steps = equal_steps(base, composed, budget, swept="run.steps" in axes)
            composed["run"]["steps"] = steps
            check.validated(composed, world_size)
        except LaunchError as error:
            raise LaunchError(f"{label}: {error}") from error
        points.append(
            Point(
                label, chosen, [*(o for o in overrides if not o.startswith("run.steps=")), f"run.steps={steps}"], steps
            )
        )
    if len({p.name for p in points}) < len(points):
        raise LaunchError(
            f"two points of sweep={name} would have the same directory: their values differ in punctuation only"
        )
    return points


def equal_steps(base: dict[str, Any], point: dict[str, Any], budget: str, swept: bool) -> int:
    """Steps that give `point` as many tokens, or training FLOPs, as the base configuration takes in its own."""
    if budget == "steps" or swept:
        return int(point["run"]["steps"])
    cost = _tokens_per_step if budget == "tokens" else _flops_per_step
    return max(1, round(base["run"]["steps"] * cost(base) / max(cost(point), 1)))


def _tokens_per_step(values: dict[str, Any]) -> float:
    return values["seq_len"] * values["run"]["samples_per_step"]


def _flops_per_step(values: dict[str, Any]) -> float:
    """Forward and backward of samples that are one document each, in the trainer's own count."""
    from train.records import flops_per_sample

    trained = check.validated({**values, "run": {**values["run"], "samples_per_step": 1}, "parallel": {}}, 1)
    model = dataclasses.replace(trained.model, vocab_size=trained.model.vocab_size or trained.data.vocab_size)
    return float(flops_per_sample(model, trained.seq_len)) * values["run"]["samples_per_step"]


def _preset(name: str) -> dict[str, Any]:
    path = CONFIGS / "sweep" / f"{name}.yaml"
    return yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _wandb_group(name: str) -> str:
    return f"logging.wandb_group='{name}'"  # quoted: 20240501 and null are names too


def _follows(override: str, home: Path) -> bool:
    """Whether it says only where the sweep is: run.root in another spelling, the group as older sweeps wrote it."""
    return override.startswith("run.root=") or override.replace("'", "") == f"logging.wandb_group={home.name}"


def _merged(home: Path, stored: Sweep | None, points: list[Point]) -> list[Point]:
    """The points asked for, checked against those of an earlier call; its other points stay in the sweep."""
    before = {p.name: p for p in stored.points} if stored else {}
    for point in points:
        old = before.pop(point.name, None)
        changed = sorted(o for o in set(old.overrides) ^ set(point.overrides) if not _follows(o, home)) if old else []
        if changed:
            raise LaunchError(
                f"{home} was begun with other settings: {point.name} differs in {', '.join(changed)}; "
                "choose another sweep=NAME, or remove the directory"
            )
    return [*before.values(), *points]


def read(home: Path) -> Sweep | None:
    try:
        values = json.loads((home / "sweep.json").read_text(encoding="utf-8"))
        return Sweep(**{**values, "points": [Point(**p) for p in values["points"]]})
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise LaunchError(f"{home / 'sweep.json'} cannot be read: {error}") from error


def write(home: Path, sweep: Sweep) -> None:
    runs.make_directory(home)
    aside = home / "sweep.json.tmp"
    aside.write_text(json.dumps(asdict(sweep), indent=1) + "\n", encoding="utf-8")
    os.replace(aside, home / "sweep.json")


# -- running it -------------------------------------------------------------------------------------------------------


def run(options: Options, launch: Launch, launch_arguments: list[str], home: Path, sweep: Sweep) -> int:
    """Start what is missing, on the target."""
    only = chosen(options.only, [p.name for p in sweep.points])
    wanted = [p for p in sweep.points if p.name in only]
    missing = [p for p in wanted if not is_finished(home, p)]
    print(
        f"sweep {sweep.name}: {len(sweep.points)} points, equal {sweep.budget}; {len(wanted) - len(missing)} finished, "
        f"{len(missing)} to run"
    )
    for point in wanted:
        print(f"  {'to run' if point in missing else 'finished'}  {point.name}  {point.steps} steps")
    if launch.settings.dry_run:
        print(
            f"# each point: {shlex.join(_command(launch, launch_arguments, missing[0]))}"
            if missing
            else "# nothing to run"
        )
        return 0
    write(home, sweep)
    if launch.target == "kubernetes":
        points = [kubernetes.Point(f"{sweep.name}/{p.name}", tuple(p.overrides), home / p.name) for p in missing]
        return kubernetes.submit(launch, points, home, launch_arguments) if points else 0
    if launch.target == "slurm":
        return _submit_array(launch, launch_arguments, home, missing)
    with runs.locked(home, wait_seconds=5):
        code = _run_here(options, launch, launch_arguments, home, missing)
    if options.report and code != REQUEUE:
        report = subprocess.run([sys.executable, "-m", "train.report", str(home)], env=_environment())
        code = code or report.returncode
    return code


def chosen(only: str, names: list[str]) -> list[str]:
    """The points that `sweep.only` names, or all. Commas part labels, and the axes within a label."""
    found, rest = [], only.strip().removeprefix("[").removesuffix("]").strip()
    while rest:
        # Longest first: the label of an earlier, smaller sweep may begin that of a later one.
        name = next((n for n in sorted(names, key=len, reverse=True) if f"{rest},".startswith(f"{n},")), None)
        if name is None:
            raise LaunchError(f"sweep.only={only}: no point is {rest}; the points are {'  '.join(names)}")
        found.append(name)
        rest = rest[len(name) + 1 :].strip()
    return found or names


def is_finished(home: Path, point: Point) -> bool:
    return runs.progress(home / point.name).step >= point.steps


def _command(launch: Launch, launch_arguments: list[str], point: Point) -> list[str]:
    kept = [a for a in launch_arguments if not a.startswith("launch.check=")]
    return [sys.executable, "-m", "launch", *kept, "launch.check=false", "--", *point.overrides]


def _submit_array(launch: Launch, launch_arguments: list[str], home: Path, missing: list[Point]) -> int:
    if not missing:
        print("nothing to submit")
        return 0
    if launch.settings.chain_jobs > 1:
        raise LaunchError("a sweep is one job array: use launch.continuation=requeue instead of a chain")
    return slurm.submit(launch, [slurm.Point(p.overrides, home / p.name) for p in missing], home, launch_arguments)


def _run_here(options: Options, launch: Launch, launch_arguments: list[str], home: Path, missing: list[Point]) -> int:
    """Points one after another, or a few at a time, each a launcher of its own; 0, 1 or 75."""
    waiting, failed = list(missing), []
    running: dict[subprocess.Popen, tuple[Point, Path, float]] = {}
    stop: list[int] = []
    before = {n: signal.signal(n, lambda number, _: stop.append(number)) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        passed_on = 0
        while running or (waiting and not stop):
            while waiting and len(running) < options.parallel and not stop:
                point = waiting.pop(0)
                log = runs.launch_directory(home / point.name) / "logs" / "local.log"
                runs.make_directory(log.parent)
                with open(log, "a", encoding="utf-8") as out:
                    process = subprocess.Popen(
                        _command(launch, launch_arguments, point),
                        stdout=out,
                        stderr=out,
                        env=_environment(),
                        cwd=launch.directory,
                        start_new_session=True,
                    )
                running[process] = (point, log, time.monotonic())
            if len(stop) > passed_on:
                passed_on = len(stop)
                for process in running:
                    process.send_signal(signal.SIGTERM)
            for process in [p for p in running if p.poll() is not None]:
                point, log, began = running.pop(process)
                code = process.returncode
                print(f"  {point.name}: {_ended(home, point, code, log)}, {time.monotonic() - began:.0f} s", flush=True)
                if code != 0:
                    failed.append(point)
            time.sleep(0.1)
    finally:
        end_descendants()
        for number, handler in before.items():
            signal.signal(number, handler)
    if stop:
        print("stopped; the same command continues")
        return REQUEUE
    if failed:
        again = shlex.join(["python", "-m", "launch.sweep", *_again(options, launch_arguments, home, failed)])
        print(f"{len(failed)} of {len(missing)} points did not finish; alone again: {again}")
    return 1 if failed else 0


def _again(options: Options, launch_arguments: list[str], home: Path, points: list[Point]) -> list[str]:
    """Arguments that run these points alone, as they ran now; axes and training overrides come from sweep.json."""
    own = [f"sweep={home.name}", f"sweep.only={','.join(p.name for p in points)}"]
    if options.parallel > 1:
        own.append(f"sweep.parallel={options.parallel}")
    if not options.report:
        own.append("sweep.report=false")
    return [*own, *launch_arguments, f"run.root={_hydra_text(str(home.parent))}"]


def _hydra_text(text: str) -> str:
    """`text` as a value of Hydra's override grammar."""
    if re.fullmatch(r"[\w./+-]+", text):
        return text
    # Within quotes only a quote is escaped, and the backslashes before one.
    return '"' + re.sub(r'(\\*)("|$)', lambda m: m[1] * 2 + ('\\"' if m[2] else ""), text) + '"'


def _ended(home: Path, point: Point, code: int, log: Path) -> str:
    if code == 0:
        last = runs.progress(home / point.name).last_line
        return "finished" + (f", loss {last['loss']:.4f}" if last else "")
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines()]
    said = next(
        (
            line
            for line in reversed(lines)
            if line.startswith("error:") or re.match(r"(\[rank\d+\]: )?\w+Error\b", line)
        ),
        "",
    )
    return f"FAILED with exit code {code}{f' ({said})' if said else ''}, see {log}"


def _environment() -> dict[str, str]:
    path = os.pathsep.join(p for p in (str(PROJECT), os.environ.get("PYTHONPATH")) if p)
    return {**os.environ, "PYTHONPATH": path, SUPERVISOR: str(os.getpid())}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
