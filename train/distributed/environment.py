"""The ranks of this job, read from environment variables. Imports nothing heavy.

torchrun and the launcher set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT. Slurm and MPI start several
tasks without them; each task would then be a job of one rank, and all would write to one run directory.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from train.config.errors import ConfigError

LAUNCH_COMMAND = "LAUNCH_COMMAND"  # set by the launcher: its own command, as a shell reads it, up to the overrides
_TORCHRUN = ("torchrun", "torch.distributed.run", "torch.distributed.launch")
# Who starts several tasks -> the variables with their number (the first that is set counts) and with a task's own.
_STARTERS = {
    "srun": (("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS"), "SLURM_PROCID"),
    "mpirun (Open MPI)": (("OMPI_COMM_WORLD_SIZE",), "OMPI_COMM_WORLD_RANK"),
    "mpirun (MPICH, Intel MPI)": (("PMI_SIZE",), "PMI_RANK"),
    "mpirun (MVAPICH)": (("MV2_COMM_WORLD_SIZE",), "MV2_COMM_WORLD_RANK"),
    "flux run": (("FLUX_JOB_SIZE",), "FLUX_TASK_RANK"),
}


def environment_world() -> tuple[int, int, int]:
    """(rank, number of ranks, local rank) from the variables that torchrun sets; without them (0, 1, 0).

    Raises `ConfigError` for one that is not a whole number.
    """
    return _whole("RANK", 0), _whole("WORLD_SIZE", 1), _whole("LOCAL_RANK", 0)


def is_first_of_host() -> bool:
    """Whether this rank speaks for its host, as far as its variables can be read."""
    return os.environ.get("LOCAL_RANK", "0").strip() in ("0", "")


def command_of_run(environment: Mapping[str, str] = os.environ, parent: Sequence[str] | None = None) -> list[str]:
    """The words with which the user started this run, up to the overrides: python, torchrun, or the launcher.

    `parent`: the command line of the process that started this one; None: Linux tells.
    """
    if given := environment.get(LAUNCH_COMMAND):
        return shlex.split(given)
    if "TORCHELASTIC_RUN_ID" not in environment:
        return ["python", "-m", "train"]
    parent = _command_line(os.getppid()) if parent is None else parent
    begins = [i + 1 for i, word in enumerate(parent) if word.rpartition("/")[2] in _TORCHRUN]
    ends = [i for i in range(len(parent) - 1) if tuple(parent[i : i + 2]) == ("-m", "train")]
    if begins and ends and begins[0] <= ends[0]:
        return ["torchrun", *parent[begins[0] : ends[0]], "-m", "train"]
    return ["torchrun", f"--nproc-per-node={environment.get('LOCAL_WORLD_SIZE', 1)}", "-m", "train"]


def _command_line(process: int) -> list[str]:
    try:
        return [os.fsdecode(word) for word in Path(f"/proc/{process}/cmdline").read_bytes().split(b"\0")[:-1]]
    except OSError:
        return []


def check(environment: Mapping[str, str] = os.environ) -> None:
    """Raise `ConfigError` unless the environment names this process's place in the job completely."""
    rank, size, _ = environment_world()
    given = [name for name in ("RANK", "WORLD_SIZE") if name in environment]
    if len(given) == 1:
        missing = "WORLD_SIZE" if given == ["RANK"] else "RANK"
        raise ConfigError(
            f"{given[0]}={environment[given[0]]} is set and {missing} is not: start the ranks with torchrun or "
            f"`python -m launch`, or unset {given[0]} to train in this process alone"
        )
    if not given:
        _check_starters(environment)
    if not 0 <= rank < size:
        raise ConfigError(f"RANK={rank} must be at least 0 and below WORLD_SIZE={size}")
    for name in ("MASTER_ADDR", "MASTER_PORT") if size > 1 else ():
        if name not in environment:
            raise ConfigError(
                f"WORLD_SIZE={size} needs {name}, the address at which the ranks meet: start the ranks with torchrun "
                "or `python -m launch`"
            )
    if size > 1 and not 0 < _whole("MASTER_PORT", 0) < 65536:
        raise ConfigError(f"MASTER_PORT={environment['MASTER_PORT']} must be a port, 1 to 65535")


def _check_starters(environment: Mapping[str, str]) -> None:
    """Refuse a task of several that do not know each other."""
    for starter, (sizes, own) in _STARTERS.items():
        name = next((name for name in sizes if name in environment), None)
        if name is None or own not in environment or not environment[name].strip().isdigit():
            continue
        if int(environment[name]) > 1:
            raise ConfigError(
                f"{starter} has started {environment[name]} tasks ({name}={environment[name]}, {own}="
                f"{environment[own]}), and without RANK and WORLD_SIZE each would train the whole run by itself in one "
                "directory: start one task on each node with torchrun (`srun --ntasks-per-node=1 torchrun ... -m "
                "train`), or use `python -m launch`; if this process is meant to train alone, set RANK=0 WORLD_SIZE=1"
            )


def _whole(name: str, default: int) -> int:
    text = os.environ.get(name, str(default))
    try:
        return int(text)
    except ValueError:
        raise ConfigError(f"{name}={text!r} in the environment must be a whole number") from None
