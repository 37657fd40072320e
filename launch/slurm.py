"""target=slurm: an sbatch script with one torchrun agent per node, and its jobs' status, logs and end.

How a job ends, and what follows (`launch.continuation`):

    ranks said           the script                       then
    0  finished          takes waiting links of its chain away, ends 0
    75 state saved       requeue: `scontrol requeue` of itself      the same job waits and runs again
                         chain: ends 75                             the next link starts
    2  bad input         ends 2, chain taken away         nothing
    anything else        starts the ranks again, `launch.restarts` times, then ends 1

A time limit near (`--signal=B:USR1@SECONDS`) or a preemption makes Slurm signal the script; it passes USR1 on to the
job's steps and never to srun itself, which would kill its tasks. A lost node makes Slurm requeue the job.
"""

from __future__ import annotations

import hashlib
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from launch import runs
from launch.config import PROJECT, Launch, LaunchError, SlurmSettings
from train.signals import BAD_INPUT, REQUEUE


@dataclass(frozen=True)
class Point:
    """One training run of a job: a sweep's array has several, everything else has one."""

    overrides: Sequence[str]
    run_directory: Path


def submit(launch: Launch, points: list[Point], home: Path, command: list[str]) -> int:
    """Write the script and its folders below `home`, hand it to sbatch, note the job ids. `home`: run or sweep."""
    for point in points:
        _check_path(point.run_directory)
    text, options = script(launch, points), sbatch_options(launch, points, home)
    if launch.settings.dry_run:
        print(f"# {shlex.join(['sbatch', *options])}\n{text}", end="")
        return 0
    if shutil.which("sbatch") is None:
        raise LaunchError("target=slurm needs sbatch on PATH: launch from a login node")
    record = runs.read_record(home)
    if record is not None and record.target == "slurm" and running_jobs(record):
        raise LaunchError(
            f"job {' '.join(record.jobs)} of {home} is still in the queue; wait, or "
            f"python -m launch cancel {shlex.quote(str(home))}"
        )
    if launch.settings.setup_script and not _setup_path(launch).is_file():
        raise LaunchError(f"launch.setup_script={launch.settings.setup_script} is not a file in {launch.directory}")
    for directory in (home, *(point.run_directory for point in points)):
        runs.make_directory(runs.launch_directory(directory) / "logs")
    path = runs.launch_directory(home) / "job.sbatch"
    path.write_text(text, encoding="utf-8")
    jobs: list[str] = []
    for _ in range(launch.settings.chain_jobs):
        done = subprocess.run(
            ["sbatch", "--parsable", *options, str(path)], capture_output=True, text=True, cwd=launch.directory
        )
        if done.returncode:
            if jobs:  # links of a chain that no record would know of
                subprocess.run(["scancel", *jobs], capture_output=True)
            raise LaunchError(f"sbatch refused the job: {_one_line(done.stderr)}")
        jobs.append(done.stdout.strip().partition(";")[0])
    for directory in {home, *(point.run_directory for point in points)}:
        runs.write_record(directory, runs.Record("slurm", command, jobs, runs.now()))
    print(f"submitted job {' '.join(jobs)}; python -m launch status|logs|cancel {shlex.quote(str(home))}")
    return 0


# -- the script -------------------------------------------------------------------------------------------------------


def sbatch_options(launch: Launch, points: Sequence[Point], home: Path) -> list[str]:
    """sbatch's options, each an argument of its own, so that no shell and no #SBATCH parser reads a path."""
    settings: SlurmSettings = launch.settings
    given = {
        "partition": settings.partition,
        "account": settings.account,
        "qos": settings.qos,
        "time": settings.time,
        "mem": settings.memory,
        "constraint": settings.constraint,
        "exclude": settings.exclude,
        "reservation": settings.reservation,
        "nodes": str(launch.nodes),
        "ntasks-per-node": "1",
        "cpus-per-task": str(settings.cpus_per_rank * launch.ranks_per_node),
        "gpus-per-node": str(launch.gpus_per_node) if launch.gpus_per_node else None,
        "signal": f"B:USR1@{settings.signal_seconds}",
        "job-name": job_name(home),
        "open-mode": "append",
        "chdir": str(runs.launch_directory(home)),
        "output": f"{_logs(home)}/{'%A_%a' if len(points) > 1 else '%j'}.log",
    }
    options = [f"--{name}={value}" for name, value in given.items() if value is not None]
    if len(points) > 1:
        options.append(f"--array=0-{len(points) - 1}%{settings.array_limit}")
    options.append("--requeue" if settings.continuation == "requeue" else "--no-requeue")
    if settings.chain_jobs > 1:
        options.append("--dependency=singleton")  # one job of this name at a time
    return [*options, *settings.sbatch_args]


def job_name(home: Path) -> str:
    """Readable, free of anything a shell or Slurm reads, and the directory's own: equal names run one after another."""
    readable = re.sub(r"[^A-Za-z0-9._-]+", "-", home.name)[:40].strip("-")
    return f"ksa-{readable}-{hashlib.sha256(str(home).encode()).hexdigest()[:8]}"


def script(launch: Launch, points: Sequence[Point]) -> str:
    """The batch script. What comes from the user stands in it quoted, as data."""
    settings: SlurmSettings = launch.settings
    quote = shlex.quote
    cases = "\n".join(
        f"  {i})\n    run_directory={quote(str(point.run_directory))}\n"
        f"    log={quote(f'{_logs(point.run_directory)}/%j-%N.log')}\n"
        f"    overrides=({' '.join(quote(o) for o in point.overrides)}) ;;"
        for i, point in enumerate(points)
    )
    exports = "\n".join(f"export {name}={quote(value)}" for name, value in sorted(launch.environment.items()))
    setup = "# no launch.setup_script"
    if settings.setup_script:
        setup = _SETUP.format(path=quote(str(_setup_path(launch))), bad_input_code=BAD_INPUT)
    port = str(settings.rendezvous_port) if settings.rendezvous_port else "$((20000 + SLURM_JOB_ID % 10000))"
    return _SCRIPT.format(
        cases=cases,
        exports=exports,
        setup=setup,
        port=port,
        directory=quote(str(launch.directory)),
        project=quote(str(PROJECT)),
        python=quote(launch.python),
        nodes=launch.nodes,
        ranks=launch.ranks_per_node,
        cpus=settings.cpus_per_rank * launch.ranks_per_node,
        wait=settings.wait_seconds,
        restarts=settings.restarts,
        continuation=settings.continuation,
        max_requeues=settings.max_requeues,
        requeue_code=REQUEUE,
        bad_input_code=BAD_INPUT,
        repeat=max(1, settings.signal_seconds * 3 // 4),
        chained=int(settings.chain_jobs > 1),
        timeout=settings.rendezvous_timeout_seconds,
    )


def _setup_path(launch: Launch) -> Path:
    """Absolute: `source` looks a bare name up in PATH first."""
    return launch.directory / launch.settings.setup_script


# Sourced without -u, because conda's and modules' own hooks read variables that nobody set. What the setup does to the
# shell's options ends with it; a setup that leaves by itself (`exit`, `set -e`) is noted by the trap.
_SETUP = """\
setup_failed() {{ note "launch.setup_script="{path}" ended with $1, see the job's log"; leave {bad_input_code}; }}
trap 'setup_failed $?' EXIT
set +u
source {path}
code=$?
set +e -u
trap - EXIT
[ "$code" = 0 ] || setup_failed "$code\""""

_SCRIPT = """\
#!/bin/bash
# Written by `python -m launch`. Ranks end with {requeue_code} when they saved their state and want to run again.
set -u
case "${{SLURM_ARRAY_TASK_ID:-0}}" in
{cases}
  *) echo "no run number $SLURM_ARRAY_TASK_ID in this job" >&2; exit {bad_input_code} ;;
esac
# The first task of an array has the array's own number: only this form names the one task.
job=${{SLURM_ARRAY_JOB_ID:+${{SLURM_ARRAY_JOB_ID}}_$SLURM_ARRAY_TASK_ID}}
job=${{job:-$SLURM_JOB_ID}}
{exports}
export PYTHONPATH={project}${{PYTHONPATH:+:$PYTHONPATH}}
cd -- {directory} || exit {bad_input_code}

note() {{ echo "$(date -u +%FT%TZ) job $job: $*" | tee -a "$run_directory/launch/history.log"; }}
leave() {{  # a finished or refused run needs no further link of its chain
  if [ {chained} = 1 ]; then scancel --quiet --state=PENDING --user="$(id -un)" --name="$SLURM_JOB_NAME"; fi
  exit "$1"
}}
stop= again=
ask_to_save() {{
  stop=1
  note "asked to stop; the ranks save"
  scancel --quiet --signal=USR1 "$job"  # the steps alone; srun would kill its tasks
  # Ranks that were still starting have missed it; for ranks that hang the second one is the end.
  ( sleep {repeat}; scancel --quiet --signal=USR1 "$job" ) &
  again=$!
}}
trap ask_to_save USR1
trap 'stop=1' TERM  # preempted, cancelled or out of time: Slurm has signalled the steps itself

{setup}

head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
port={port}
for attempt in $(seq 0 {restarts}); do
  if [ -n "$stop" ]; then code={requeue_code}; break; fi
  note "start ${{SLURM_RESTART_COUNT:-0}}.$attempt on $SLURM_JOB_NODELIST"
  srun --nodes={nodes} --ntasks-per-node=1 --cpus-per-task={cpus} --kill-on-bad-exit=0 --wait={wait} \\
    --open-mode=append --output="$log" {python} -m launch.agent --signals=ignore \\
    --nnodes={nodes} --nproc-per-node={ranks} --rdzv-backend=c10d --rdzv-endpoint="$head:$port" \\
    --rdzv-id="$job.${{SLURM_RESTART_COUNT:-0}}.$attempt" --rdzv-conf="timeout={timeout},join_timeout={timeout}" \\
    -m train ${{overrides[@]+"${{overrides[@]}}"}} &
  step=$!
  while :; do  # a trapped signal ends `wait` early
    wait "$step"; code=$?
    kill -0 "$step" 2>/dev/null || break
  done
  note "ended with $code"
  case $code in
    0) leave 0 ;;
    {bad_input_code}) leave {bad_input_code} ;;
    {requeue_code}) break ;;
  esac
  if [ -n "$stop" ]; then code={requeue_code}; break; fi
  port=$((port + 1))
done
[ -z "$again" ] || kill "$again" 2>/dev/null
[ "$code" = {requeue_code} ] || exit 1
# A cancelled job is COMPLETING by now, a requeued one too: only one that still runs is this script's to requeue.
state=$(squeue --noheader --jobs="$job" --format=%T)
if [ {continuation} = requeue ] && [[ $state == RUNNING || $state == SIGNALING ]]; then
  if [ "${{SLURM_RESTART_COUNT:-0}}" -ge {max_requeues} ]; then
    note "requeued {max_requeues} times already: launch.max_requeues"; exit 1
  fi
  note "requeued to continue"
  if scontrol requeue "$job"; then sleep 120; exit {requeue_code}; fi  # Slurm ends this script meanwhile
fi
[ {continuation} = chain ] || note "left to Slurm: the job is ${{state:-gone}}"
exit {requeue_code}
"""


def _logs(directory: Path) -> str:
    """The folder of log files as Slurm's file patterns spell it: %% is a % of the path's own."""
    return str(runs.launch_directory(directory) / "logs").replace("%", "%%")


def _check_path(path: Path) -> None:
    if "\\" in str(path):
        raise LaunchError(f"{path}: Slurm reads a backslash in a log file's path as its own; choose another run.name")


# -- looking after jobs -----------------------------------------------------------------------------------------------


def status(record: runs.Record) -> str:
    """One line for each job: what the queue says, then what accounting says of jobs that have left it."""
    lines, queue = [], _queue(record)
    for job in record.jobs:
        queued = [said for numbers, said in queue if job in numbers]
        if queued:
            lines += [f"job {said}" for said in queued]
            continue
        ended = _output(
            ["sacct", "--noheader", "--allocations", "--parsable2", f"--jobs={job}", "--format=JobID,State,ExitCode"]
        )
        lines.append(f"job {ended.replace('|', ' ')}" if ended else f"job {job}: no longer in the queue")
    return "\n".join(lines)


def cancel(record: runs.Record) -> int:
    done = subprocess.run(["scancel", *record.jobs], capture_output=True, text=True)
    if done.returncode:
        raise LaunchError(f"scancel: {_one_line(done.stderr)}")
    print(f"cancelled job {' '.join(record.jobs)}")
    return 0


def _output(command: list[str]) -> str:
    """What the command prints, or nothing where it fails."""
    done = _ask(command)
    return done.stdout.strip() if done.returncode == 0 else ""


def _ask(command: list[str]) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            command, capture_output=True, text=True, env={**os.environ, "SLURM_TIME_FORMAT": "standard"}
        )
    except FileNotFoundError:
        raise LaunchError(f"{command[0]} is not on PATH: ask from a login node") from None


def _one_line(text: str) -> str:
    return "; ".join(line.strip() for line in text.splitlines() if line.strip()) or "no message"


def running_jobs(record: runs.Record) -> bool:
    """Whether any of the record's jobs is still in the queue. Raises `LaunchError` where Slurm does not say."""
    return any(not numbers.isdisjoint(record.jobs) for numbers, _ in _queue(record))


def _queue(record: runs.Record) -> list[tuple[set[str], str]]:
    """Of every job in the queue its number with its array's, and its line; `LaunchError` where Slurm does not say."""
    # All jobs: asked for one that is long gone, squeue fails as if it were not reached.
    done = _ask(["squeue", "--noheader", "--array", "--format=%A %F %i %T %r %N %M/%l"])
    if done.returncode:
        raise LaunchError(
            f"squeue exited with {done.returncode} ({_one_line(done.stderr)}), so nobody knows whether job "
            f"{', '.join(record.jobs)} of this run is still in the queue; try again when Slurm answers"
        )
    entries = [line.split(maxsplit=2) for line in done.stdout.splitlines() if line.strip()]
    return [(set(entry[:2]), entry[-1]) for entry in entries]
