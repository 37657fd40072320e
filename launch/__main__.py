"""`python -m launch target=... nodes=... gpus_per_node=... -- OVERRIDES`, and `status|logs|cancel RUN`."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

from launch import runs
from launch.check import CheckedRun, check
from launch.config import Launch, parse
from launch.errors import LaunchError
from launch.processes import end_with_supervisor
from launch.settings import TARGETS
from train.config import command
from train.distributed.signals import BAD_INPUT

USAGE = f"""Start a training run on one machine or many, and follow it.

  python -m launch target=TARGET [nodes=N] [gpus_per_node=N | ranks_per_node=N] [launch.KEY=VALUE ...] -- [KEY=VALUE ..]
  python -m launch status|logs|cancel RUN

TARGET is one of {", ".join(TARGETS)}; configs/launch/TARGET.yaml lists its settings. The arguments after `--` go to
`python -m train` unchanged. launch.dry_run=true prints the job and starts nothing. More: docs/launch.md.
"""
VERBS = ("status", "logs", "cancel")
LOG_LINES = 200  # printed from the end of each file


def main(arguments: list[str]) -> int:
    """Run the command; returns its exit code."""
    end_with_supervisor()
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(USAGE)
        return 0 if arguments else BAD_INPUT
    return command.run(lambda: _command(arguments), arguments, (LaunchError,), takes_signals=False)


def _command(arguments: list[str]) -> int:
    return manage(arguments[0], arguments[1:]) if arguments[0] in VERBS else start(arguments)


def start(arguments: list[str]) -> int:
    """Check the configuration, print the memory estimate, and start or submit the job."""
    launch = parse(arguments)
    checked = check(launch)
    if checked.memory:
        print(checked.memory, file=sys.stderr)
    if launch.target in ("kubernetes", "slurm"):
        from launch import kubernetes, slurm

        run = runs.Run(checked.name, launch.overrides, checked.run_directory)
        submit = kubernetes.submit if launch.target == "kubernetes" else slurm.submit
        return submit(launch, [run], checked.run_directory, arguments)
    return _run_here(launch, checked, arguments)


def _run_here(launch: Launch, checked: CheckedRun, arguments: list[str]) -> int:
    """Run a job that lives as long as the launcher: local and ssh."""
    from launch import local, ssh

    target = local if launch.target == "local" else ssh
    print(
        target.describe(launch, checked.run_directory), file=sys.stderr if not launch.settings.dry_run else sys.stdout
    )
    if launch.settings.dry_run:
        return 0
    with runs.locked(checked.run_directory, wait_seconds=launch.settings.grace_seconds) as lock:
        runs.write_record(checked.run_directory, runs.Record(launch.target, arguments, [], runs.now()))
        if target is ssh:
            return ssh.run(launch, checked.run_directory)
        return local.run(launch, lock)


def manage(verb: str, arguments: list[str]) -> int:
    """`status`, `logs` or `cancel` of one run, on the target where it was started."""
    if len(arguments) != 1:
        given = f", not {len(arguments)}: {' '.join(arguments)}" if arguments else ""
        raise LaunchError(f"python -m launch {verb} needs one run, its directory or its name below runs/{given}")
    run = runs.find(arguments[0])
    record = runs.read_record(run)
    from launch import kubernetes, slurm

    if verb == "status":
        _print_progress(run)
    if record is not None and record.target == "kubernetes":
        return kubernetes.manage(verb, record)
    if verb == "logs":
        return _logs(run)
    if verb == "cancel":
        if record is not None and record.target == "slurm":
            return slurm.cancel(record)
        return _stop_local(run)
    if record is not None and record.target == "slurm":
        print(slurm.status(record))
    elif runs.is_held(run):
        print(f"running on this machine, launcher process {runs.holder(run)}")
    else:
        print("not running")
    return 0


def _print_progress(run: Path) -> None:
    """Print a line for the run, or one for every point of the sweep."""
    if not (run / "sweep.json").is_file():
        print(_progress_line(run))
        return
    from launch import sweep_plan

    stored = sweep_plan.read(run)
    for point in stored.points if stored else []:
        print(_progress_line(run / point.name))


def _progress_line(run: Path) -> str:
    progress = runs.progress(run)
    last = progress.last_line
    loss = "" if last is None else f"; loss {last['loss']:.4f} at step {last['step']}"
    state = "finished" if progress.finished else f"checkpoint at step {progress.step}"
    return f"{run}: {state} of {progress.steps if progress.steps is not None else '?'} steps{loss}"


def _logs(run: Path) -> int:
    files = sorted((runs.launch_directory(run) / "logs").glob("*"), key=lambda p: p.stat().st_mtime)
    if not files:
        raise LaunchError(f"{run} has no log files in launch/logs; a local run writes to its terminal")
    for path in files:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        print(f"==> {path}" + (f", last {LOG_LINES} of {len(lines)} lines" if len(lines) > LOG_LINES else "") + " <==")
        print(*lines[-LOG_LINES:], sep="\n")
    return 0


def _stop_local(run: Path) -> int:
    pid = runs.holder(run) if runs.is_held(run) else None
    if pid is None:
        raise LaunchError(f"{run} is not running on this machine")
    if not is_launcher(pid):  # it was killed; its agents keep the lock until their ranks have saved
        raise LaunchError(f"{run} is stopping already: its launcher, process {pid}, has ended")
    os.kill(pid, signal.SIGTERM)
    print(f"asked process {pid} to save and stop")
    return 0


def is_launcher(pid: int) -> bool:
    """Whether `pid` is a launcher's process."""
    try:
        return b"launch" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
