"""target=slurm: an sbatch script with one torchrun agent per node, and the jobs' status, logs and cancellation.

How a job ends depends on the exit code of its ranks and on `launch.continuation`:

    exit code of the ranks     the script                                    then
    0   finished               cancels the waiting jobs of its chain, 0
    75  state saved            requeue: `scontrol requeue` of its own job    the same job waits and runs again
                               chain: exits with 75                          the next job of the chain starts
    one of `agent.FINAL`       cancels the waiting jobs, exits with it       nothing
    any other                  starts the ranks again, `launch.restarts`     nothing
                               times, then exits with 1

Slurm signals the script shortly before the time limit (`--signal=B:USR1@SECONDS`) and at a preemption. The script
passes USR1 to the job's steps and never to srun itself, which would kill its tasks. After the loss of a node Slurm
requeues the job.
"""

from __future__ import annotations

import hashlib
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from launch import runs
from launch.agent import FINAL
from launch.config import Launch
from launch.errors import LaunchError
from launch.runs import Run
from launch.settings import PROJECT, SlurmSettings
from train.distributed.signals import BAD_INPUT, REQUEUE


def submit(launch: Launch, members: Sequence[Run], directory: Path, command: list[str]) -> int:
    """Submit one job, or one array job for several runs, and record its ids. Raises `LaunchError`.

    `directory`: of the run, or of the sweep that the runs belong to. `command`: the launcher's arguments, for the
    record.
    """
    for run in members:
        _check_path(run.directory)
    text, options = script(launch, members), sbatch_options(launch, members, directory)
    if launch.settings.dry_run:
        print(f"# {shlex.join(['sbatch', *options])}\n{text}", end="")
        return 0
    if shutil.which("sbatch") is None:
        raise LaunchError("target=slurm needs sbatch on PATH: launch from a login node")
    record = runs.read_record(directory)
    if record is not None and record.target == "slurm" and is_queued(record):
        raise LaunchError(
            f"job {' '.join(record.jobs)} of {directory} is still in the queue; wait for it, or run "
            f"python -m launch cancel {shlex.quote(str(directory))}"
        )
    if launch.settings.setup_script and not _setup_path(launch).is_file():
        raise LaunchError(f"launch.setup_script={launch.settings.setup_script} is not a file in {launch.directory}")
    directories = {directory, *(run.directory for run in members)}
    for each in directories:
        runs.make_directory(runs.launch_directory(each) / "logs")
    path = runs.launch_directory(directory) / "job.sbatch"
    path.write_text(text, encoding="utf-8")
    jobs: list[str] = []
    for _ in range(launch.settings.chain_jobs):
        done = subprocess.run(
            ["sbatch", "--parsable", *options, str(path)], capture_output=True, text=True, cwd=launch.directory
        )
        if done.returncode:
            if jobs:  # no record would name these jobs of the chain
                subprocess.run(["scancel", *jobs], capture_output=True)
            raise LaunchError(f"sbatch refused the job: {_one_line(done.stderr)}")
        jobs.append(done.stdout.strip().partition(";")[0])
    for each in directories:
        runs.write_record(each, runs.Record("slurm", command, jobs, runs.now()))
    print(f"submitted job {' '.join(jobs)}; python -m launch status|logs|cancel {shlex.quote(str(directory))}")
    return 0


# -- the script -------------------------------------------------------------------------------------------------------


def sbatch_options(launch: Launch, members: Sequence[Run], directory: Path) -> list[str]:
    """sbatch's options. Each is one argument, so that no shell and no #SBATCH parser interprets a path."""
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
        "job-name": job_name(directory),
        "open-mode": "append",
        "chdir": str(runs.launch_directory(directory)),
        "output": f"{_logs(directory)}/{'%A_%a' if len(members) > 1 else '%j'}.log",
    }
    options = [f"--{name}={value}" for name, value in given.items() if value is not None]
    if len(members) > 1:
        options.append(f"--array=0-{len(members) - 1}%{settings.array_limit}")
    options.append("--requeue" if settings.continuation == "requeue" else "--no-requeue")
    if settings.chain_jobs > 1:
        options.append("--dependency=singleton")  # one job of this name at a time
    return [*options, *settings.sbatch_args]


def job_name(directory: Path) -> str:
    """A readable name without special characters. It is unique to the directory: jobs of one name run in turn."""
    readable = re.sub(r"[^A-Za-z0-9._-]+", "-", directory.name)[:40].strip("-")
    return f"ksa-{readable}-{hashlib.sha256(str(directory).encode()).hexdigest()[:8]}"


def script(launch: Launch, members: Sequence[Run]) -> str:
    """The batch script. Everything that comes from the user is quoted in it."""
    settings: SlurmSettings = launch.settings
    quote = shlex.quote
    cases = "\n".join(
        f"  {i})\n    run_directory={quote(str(run.directory))}\n"
        f"    log={quote(f'{_logs(run.directory)}/%j-%N.log')}\n"
        f"    overrides=({' '.join(quote(o) for o in run.overrides)}) ;;"
        for i, run in enumerate(members)
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
        final_codes="|".join(map(str, FINAL)),
        repeat=max(1, settings.signal_seconds * 3 // 4),
        chained=int(settings.chain_jobs > 1),
        timeout=settings.rendezvous_timeout_seconds,
    )


def _setup_path(launch: Launch) -> Path:
    """Absolute, because `source` searches PATH for a bare name first."""
    return launch.directory / launch.settings.setup_script


# The setup script is sourced without -u, because the hooks of conda and modules read unset variables. The shell's
# options are restored afterwards. The trap notes a setup script that ends the shell itself (`exit`, `set -e`).
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
# Written by `python -m launch`. Ranks exit with {requeue_code} when they have saved their state and want to run again.
set -u
case "${{SLURM_ARRAY_TASK_ID:-0}}" in
{cases}
  *) echo "no run number $SLURM_ARRAY_TASK_ID in this job" >&2; exit {bad_input_code} ;;
esac
# The first task of an array has the array's own number, so only this form names a single task.
job=${{SLURM_ARRAY_JOB_ID:+${{SLURM_ARRAY_JOB_ID}}_$SLURM_ARRAY_TASK_ID}}
job=${{job:-$SLURM_JOB_ID}}
{exports}
export PYTHONPATH={project}${{PYTHONPATH:+:$PYTHONPATH}}
cd -- {directory} || exit {bad_input_code}

note() {{ echo "$(date -u +%FT%TZ) job $job: $*" | tee -a "$run_directory/launch/history.log"; }}
leave() {{  # exit for good: cancel the waiting jobs of the chain
  if [ {chained} = 1 ]; then scancel --quiet --state=PENDING --user="$(id -un)" --name="$SLURM_JOB_NAME"; fi
  exit "$1"
}}
stop= again=
ask_to_save() {{
  stop=1
  note "asked to stop; the ranks save"
  scancel --quiet --signal=USR1 "$job"  # signals the steps only; srun would kill its tasks
  # Ranks that were still starting missed the signal. Ranks that hang are ended by the second one.
  ( sleep {repeat}; scancel --quiet --signal=USR1 "$job" ) &
  again=$!
}}
trap ask_to_save USR1
trap 'stop=1' TERM  # preempted, cancelled or out of time: Slurm has already signalled the steps

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
    {final_codes}) leave "$code" ;;
    {requeue_code}) break ;;
  esac
  if [ -n "$stop" ]; then code={requeue_code}; break; fi
  port=$((port + 1))
done
[ -z "$again" ] || kill "$again" 2>/dev/null
[ "$code" = {requeue_code} ] || exit 1
# A job that was cancelled or requeued is COMPLETING by now: requeue only a job that still runs.
state=$(squeue --noheader --jobs="$job" --format=%T)
if [ {continuation} = requeue ] && [[ $state == RUNNING || $state == SIGNALING ]]; then
  if [ "${{SLURM_RESTART_COUNT:-0}}" -ge {max_requeues} ]; then
    note "not requeued: launch.max_requeues={max_requeues} is reached"; exit 1
  fi
  note "requeued to continue"
  if scontrol requeue "$job"; then sleep 120; exit {requeue_code}; fi  # Slurm ends this script during the sleep
fi
[ {continuation} = chain ] || note "this script starts no new attempt: the job is ${{state:-gone}}"
exit {requeue_code}
"""


def _logs(directory: Path) -> str:
    """The directory of log files, escaped for Slurm's file patterns, which read %% as %."""
    return str(runs.launch_directory(directory) / "logs").replace("%", "%%")


def _check_path(path: Path) -> None:
    if "\\" in str(path):
        raise LaunchError(f"{path}: Slurm interprets a backslash in the path of a log file; choose another run.name")


# -- submitted jobs ---------------------------------------------------------------------------------------------------


def status(record: runs.Record) -> str:
    """One line for each job: its entry in the queue or, once it has left the queue, in the accounting database.

    Raises `LaunchError` if the queue cannot be read.
    """
    lines, queue = [], _queue(record)
    for job in record.jobs:
        queued = [f"job {line}" for numbers, line in queue if job in numbers]
        lines += queued or [_accounting(job) or f"job {job}: no longer in the queue"]
    return "\n".join(lines)


def cancel(record: runs.Record) -> int:
    """Cancel the record's jobs. Raises `LaunchError` if scancel fails."""
    done = subprocess.run(["scancel", *record.jobs], capture_output=True, text=True)
    if done.returncode:
        raise LaunchError(f"scancel: {_one_line(done.stderr)}")
    print(f"cancelled job {' '.join(record.jobs)}")
    return 0


def _accounting(job: str) -> str:
    """The job's line from sacct; empty if there is no accounting."""
    done = _run(
        ["sacct", "--noheader", "--allocations", "--parsable2", f"--jobs={job}", "--format=JobID,State,ExitCode"]
    )
    ended = done.stdout.strip().replace("|", " ") if done.returncode == 0 else ""
    return ended and f"job {ended}"


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            command, capture_output=True, text=True, env={**os.environ, "SLURM_TIME_FORMAT": "standard"}
        )
    except FileNotFoundError:
        raise LaunchError(f"{command[0]} is not on PATH: run this command on a login node") from None


def _one_line(text: str) -> str:
    return "; ".join(line.strip() for line in text.splitlines() if line.strip()) or "no message"


def is_queued(record: runs.Record) -> bool:
    """Whether any of the record's jobs waits or runs. Raises `LaunchError` if the queue cannot be read."""
    return any(not numbers.isdisjoint(record.jobs) for numbers, _ in _queue(record))


def _queue(record: runs.Record) -> list[tuple[set[str], str]]:
    """For every job in the queue: its number and its array's number, and its line to print."""
    # The whole queue: asked for a job that ended long ago, squeue fails as if Slurm did not answer.
    done = _run(["squeue", "--noheader", "--array", "--format=%A %F %i %T %r %N %M/%l"])
    if done.returncode:
        raise LaunchError(
            f"squeue exited with {done.returncode} ({_one_line(done.stderr)}), so it is unknown whether job "
            f"{', '.join(record.jobs)} is still in the queue; try again when Slurm answers"
        )
    entries = [line.split(maxsplit=2) for line in done.stdout.splitlines() if line.strip()]
    return [(set(entry[:2]), entry[-1]) for entry in entries]
