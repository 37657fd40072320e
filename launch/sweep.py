"""`python -m launch.sweep sweep=NAME KEY=A,B,C ...`: one run for every combination of values, on any target.

The sweep's directory is `{run.root}/NAME`. It contains `sweep.json` and one run directory for each point. The same
command again runs the points that are not finished, that is, whose newest checkpoint is not at their last step.
"""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch import config, kubernetes, runs, slurm
from launch.config import Launch
from launch.errors import LaunchError
from launch.local import StopSignals
from launch.processes import SUPERVISOR, end_descendants
from launch.settings import PROJECT
from launch.sweep_plan import BUDGETS, Point, Sweep, plan, presets, write
from train.config import command
from train.config.conversion import from_text
from train.config.quoting import quoted
from train.config.sections import MAX_NAME_BYTES
from train.distributed.signals import BAD_INPUT, REQUEUE

USAGE = """Train one model for every combination of values, and compare the results.

  python -m launch.sweep sweep=NAME KEY=A,B,C [KEY=VALUE ...] [target=TARGET] [nodes=N] [launch.KEY=VALUE ...]

  sweep=NAME            directory below run.root and W&B group; without KEY=A,B,C also the preset: {presets}
  sweep.budget=tokens   tokens | flops | steps: every point gets as many as the base configuration
  sweep.only=POINT,...  run these points only
  sweep.parallel=1      target=local: number of points that run at the same time
  sweep.report=true     target=local and ssh: write the report at the end

Run the same command again to continue: finished points are skipped, failed ones run again.
"""


@dataclass(frozen=True)
class Options:
    """The values of `sweep=` and `sweep.KEY=`."""

    name: str
    budget: str | None = None
    only: str = ""  # labels of points; a label may contain commas, see `select_points`
    parallel: int = 1
    report: bool = True

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[\w.+-]+", self.name) or set(self.name) == {"."}:
            raise LaunchError(f"sweep={self.name!r} is not a directory name of letters, digits and _ . + - only")
        if len(self.name.encode()) > MAX_NAME_BYTES:
            raise LaunchError(f"sweep={self.name} has more than the {MAX_NAME_BYTES} bytes of a directory's name")
        if self.budget not in (None, *BUDGETS):
            raise LaunchError(f"sweep.budget={self.budget!r} is not one of {', '.join(BUDGETS)}")
        if self.parallel < 1:
            raise LaunchError(f"sweep.parallel={self.parallel} must be at least 1")


def main(arguments: list[str]) -> int:
    """Run the command; returns its exit code."""
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(USAGE.format(presets=", ".join(presets())))
        return 0 if arguments else BAD_INPUT
    return command.run(lambda: _command(arguments), arguments, (LaunchError,), takes_signals=False)


def _command(arguments: list[str]) -> int:
    options, launch_arguments, overrides = parse(arguments)
    launch = config.parse([*launch_arguments, "--", *overrides])
    directory, sweep = plan(options.name, options.budget, launch)
    return run(options, launch, launch_arguments, directory, sweep)


def parse(arguments: Sequence[str]) -> tuple[Options, list[str], list[str]]:
    """Split the command line into the sweep's options, the launcher's arguments and the training overrides."""
    before, after = config.split(arguments)
    options: dict[str, Any] = {}
    launch_arguments, overrides = [], []
    for argument in before:
        key, _, value = argument.partition("=")
        if key == "sweep":
            options["name"] = value
        elif key.startswith("sweep."):
            name = key.removeprefix("sweep.")
            types = {"budget": str, "only": str, "parallel": int, "report": bool}
            if name not in types:
                raise LaunchError(
                    f"{key} is not a key of sweeps; the keys are {', '.join(f'sweep.{k}' for k in types)}"
                )
            options[name] = from_text(types[name], value, key, LaunchError)
        elif key == "target" or key in config.SIZE_KEYS or key.startswith("launch."):
            launch_arguments.append(argument)
        else:
            overrides.append(argument)
    if "name" not in options:
        raise LaunchError(f"sweep=NAME is missing: choose a new name, or one of the presets {', '.join(presets())}")
    if not any(a.startswith("target=") for a in launch_arguments):
        launch_arguments.insert(0, "target=local")
    return Options(**options), launch_arguments, [*overrides, *after]


def run(options: Options, launch: Launch, launch_arguments: list[str], directory: Path, sweep: Sweep) -> int:
    """Start the points that are not finished, on the launch's target; returns the exit code."""
    only = select_points(options.only, [p.name for p in sweep.points])
    selected = [p for p in sweep.points if p.name in only]
    missing = [p for p in selected if not is_finished(directory, p)]
    print(
        f"sweep {sweep.name}: {len(sweep.points)} points, equal {sweep.budget}; "
        f"{len(selected) - len(missing)} finished, {len(missing)} to run"
    )
    for point in selected:
        print(f"  {'to run' if point in missing else 'finished'}  {point.name}  {point.steps} steps")
    if launch.settings.dry_run:
        if missing:
            print(f"# each point: {shlex.join(point_command(launch, launch_arguments, missing[0]))}")
        else:
            print("# nothing to run")
        return 0
    write(directory, sweep)
    if launch.target in ("kubernetes", "slurm"):
        return _submit(launch, launch_arguments, directory, [_as_run(sweep, directory, p) for p in missing])
    with runs.locked(directory, wait_seconds=5):
        code = _run_here(options, launch, launch_arguments, directory, missing)
    if options.report and code != REQUEUE:
        report = subprocess.run([sys.executable, "-m", "train.report", str(directory)], env=_environment())
        code = code or report.returncode
    return code


def select_points(only: str, names: list[str]) -> list[str]:
    """The points that `sweep.only` lists, or all. Commas separate labels, and also the axes within a label."""
    found, rest = [], only.strip().removeprefix("[").removesuffix("]").strip()
    while rest:
        # Longest label first: a label of one axis may be the beginning of a label of two axes.
        name = next((n for n in sorted(names, key=len, reverse=True) if f"{rest},".startswith(f"{n},")), None)
        if name is None:
            raise LaunchError(f"sweep.only={only}: there is no point {rest}; the points are {'  '.join(names)}")
        found.append(name)
        rest = rest[len(name) + 1 :].strip()
    return found or names


def is_finished(directory: Path, point: Point) -> bool:
    """Whether the point's newest checkpoint is at its last step."""
    return runs.progress(directory / point.name).step >= point.steps


def point_command(launch: Launch, launch_arguments: list[str], point: Point) -> list[str]:
    """The command that runs one point on this machine. Its configuration has been checked already."""
    kept = [a for a in launch_arguments if not a.startswith("launch.check=")]
    return [sys.executable, "-m", "launch", *kept, "launch.check=false", "--", *point.overrides]


def _as_run(sweep: Sweep, directory: Path, point: Point) -> runs.Run:
    return runs.Run(f"{sweep.name}/{point.name}", point.overrides, directory / point.name)


def _submit(launch: Launch, launch_arguments: list[str], directory: Path, missing: list[runs.Run]) -> int:
    """Submit the points: one job array on Slurm, one job each on Kubernetes."""
    if not missing:
        print("nothing to submit")
        return 0
    if launch.target == "kubernetes":
        return kubernetes.submit(launch, missing, directory, launch_arguments)
    if launch.settings.chain_jobs > 1:
        raise LaunchError("launch.chain_jobs: a sweep is one job array; use launch.continuation=requeue")
    return slurm.submit(launch, missing, directory, launch_arguments)


@dataclass(frozen=True)
class _RunningPoint:
    point: Point
    process: subprocess.Popen
    log: Path
    began: float


def _run_here(
    options: Options, launch: Launch, launch_arguments: list[str], directory: Path, missing: list[Point]
) -> int:
    """Run the points on this machine, `sweep.parallel` at a time, each by a launcher process; returns 0, 1 or 75."""
    waiting, failed = list(missing), []
    running: list[_RunningPoint] = []
    with StopSignals() as stop:
        try:
            forwarded = 0
            while running or (waiting and not stop.count):
                while waiting and len(running) < options.parallel and not stop.count:
                    point = waiting.pop(0)
                    running.append(_start(launch, launch_arguments, directory / point.name, point))
                if stop.count > forwarded:
                    forwarded = stop.count
                    for job in running:
                        job.process.send_signal(signal.SIGTERM)
                for job in [job for job in running if job.process.poll() is not None]:
                    running.remove(job)
                    seconds = time.monotonic() - job.began
                    print(f"  {job.point.name}: {_outcome(directory, job)}, {seconds:.0f} s", flush=True)
                    if job.process.returncode:
                        failed.append(job.point)
                time.sleep(0.1)
        finally:
            end_descendants()
    if stop.count:
        print("stopped; run the same command again to continue")
        return REQUEUE
    if failed:
        retry = ["python", "-m", "launch.sweep", *_retry_arguments(options, launch_arguments, directory, failed)]
        print(f"{len(failed)} of {len(missing)} points did not finish; to run only these again: {shlex.join(retry)}")
    return 1 if failed else 0


def _start(launch: Launch, launch_arguments: list[str], run_directory: Path, point: Point) -> _RunningPoint:
    log = runs.launch_directory(run_directory) / "logs" / "local.log"
    runs.make_directory(log.parent)
    with open(log, "a", encoding="utf-8") as out:
        process = subprocess.Popen(
            point_command(launch, launch_arguments, point),
            stdout=out,
            stderr=out,
            env=_environment(),
            cwd=launch.directory,
            start_new_session=True,
        )
    return _RunningPoint(point, process, log, time.monotonic())


def _retry_arguments(options: Options, launch_arguments: list[str], directory: Path, points: list[Point]) -> list[str]:
    """Arguments that run only these points, with the same settings; sweep.json has the axes and the overrides."""
    own = [f"sweep={directory.name}", f"sweep.only={','.join(p.name for p in points)}"]
    if options.parallel > 1:
        own.append(f"sweep.parallel={options.parallel}")
    if not options.report:
        own.append("sweep.report=false")
    return [*own, *launch_arguments, f"run.root={quoted(str(directory.parent))}"]


def _outcome(directory: Path, job: _RunningPoint) -> str:
    """How the point ended, with the last error line of its log."""
    code = job.process.returncode
    if code == 0:
        last = runs.progress(directory / job.point.name).last_line
        return "finished" + (f", loss {last['loss']:.4f}" if last else "")
    lines = [line.strip() for line in job.log.read_text(encoding="utf-8", errors="replace").splitlines()]
    is_error = re.compile(r"error:|(\[rank\d+\]: )?\w+Error\b").match
    error = next((f" ({line})" for line in reversed(lines) if is_error(line)), "")
    return f"FAILED with exit code {code}{error}, see {job.log}"


def _environment() -> dict[str, str]:
    path = os.pathsep.join(p for p in (str(PROJECT), os.environ.get("PYTHONPATH")) if p)
    return {**os.environ, "PYTHONPATH": path, SUPERVISOR: str(os.getpid())}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
