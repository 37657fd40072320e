"""target=ssh: DeepSpeed's launcher, which reaches the hosts of a hostfile over ssh.

DeepSpeed inserts the working directory, the script's path and the script's arguments unquoted into a command for the
remote shell. The launcher therefore passes it one generated script and no arguments; the script contains the overrides
and the environment, quoted. A path that a shell would interpret is refused.

The working directory and the run directory must be the same folders on every host. On Ctrl-C DeepSpeed ends the ranks
before they can save; the run keeps its newest checkpoint.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

from launch import local, runs
from launch.config import Launch
from launch.errors import LaunchError
from launch.settings import PROJECT

SAFE_PATH = re.compile(r"[A-Za-z0-9_./=,+@:-]+")


def hostfile(launch: Launch) -> str:
    """DeepSpeed's hostfile: each host and its number of ranks."""
    return "".join(f"{host} slots={launch.ranks_per_node}\n" for host in launch.settings.hosts)


def rank_script(launch: Launch) -> str:
    """The script that DeepSpeed starts for every rank.

    DeepSpeed sets RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT.
    """
    environment = {**launch.environment, **({} if launch.gpus_per_node else {"DS_ACCELERATOR": "cpu"})}
    exports = "\n".join(f"export {name}={shlex.quote(value)}" for name, value in sorted(environment.items()))
    return (
        f"#!/bin/bash\n# Written by `python -m launch`: one rank.\n{exports}\n"
        f"export PYTHONPATH={shlex.quote(str(PROJECT))}${{PYTHONPATH:+:$PYTHONPATH}}\n"
        f"cd -- {shlex.quote(str(launch.directory))} || exit 1\n"
        f"exec {shlex.join([launch.python, '-m', 'train', *launch.overrides])}\n"
    )


def command(launch: Launch, run_directory: Path) -> list[str]:
    """The command line of DeepSpeed's launcher. Raises `LaunchError` for a path that a remote shell would interpret."""
    settings, files = launch.settings, runs.launch_directory(run_directory)
    for path in (launch.python, str(launch.directory), str(files)):
        if not SAFE_PATH.fullmatch(path):
            raise LaunchError(
                f"target=ssh: DeepSpeed passes {path!r} unquoted to remote shells; use a path of letters, digits and "
                "_ . / = , + @ : - only"
            )
    return [
        launch.python,
        "-m",
        "deepspeed.launcher.runner",
        f"--hostfile={files / 'hostfile'}",
        f"--launcher={settings.launcher}",
        "--force_multi",
        f"--master_addr={settings.hosts[0].rpartition('@')[2]}",
        f"--master_port={settings.master_port}",
        "--no_python",
        "--no_local_rank",
        str(files / "rank.sh"),
    ]


def describe(launch: Launch, run_directory: Path) -> str:
    """The command that will run, and the two files it reads."""
    files = runs.launch_directory(run_directory)
    return (
        f"{shlex.join(command(launch, run_directory))}\n\n# {files / 'hostfile'}\n{hostfile(launch)}\n"
        f"# {files / 'rank.sh'}\n{rank_script(launch)}"
    )


def run(launch: Launch, run_directory: Path) -> int:
    """Write the hostfile and the script, run DeepSpeed's launcher, restart after crashes; returns the exit code."""
    if shutil.which("ssh") is None:
        raise LaunchError("target=ssh needs ssh on PATH")
    if launch.settings.launcher == "pdsh" and shutil.which("pdsh") is None:
        raise LaunchError("target=ssh needs pdsh on PATH, or launch.launcher=openmpi|mpich|mvapich")
    files = runs.launch_directory(run_directory)
    line = command(launch, run_directory)
    (files / "hostfile").write_text(hostfile(launch), encoding="utf-8")
    (files / "rank.sh").write_text(rank_script(launch), encoding="utf-8")
    (files / "rank.sh").chmod(0o755)
    # DeepSpeed would export these to the hosts, unquoted; the script sets what the ranks need.
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("PYTHON", "NCCL", "UCX", "MV2", "MLFLOW"))
    }

    def start(_: int) -> list[subprocess.Popen]:
        return [subprocess.Popen(line, env=environment, cwd=launch.directory, start_new_session=True)]

    return local.supervise(start, restarts=launch.settings.restarts, grace_seconds=launch.settings.grace_seconds)
