"""target=ssh: a hostfile for DeepSpeed's launcher, which reaches the hosts over ssh.

DeepSpeed pastes the working directory, the script's path and the script's arguments into a line for the remote shell.
So the line it gets here names one generated script and no argument; overrides and environment stand inside the script,
quoted. Where the paths themselves hold something a shell would read, the launch is refused.

The working directory and the run directory must be the same folders on every host. Ctrl-C ends the ranks without a
save (that is DeepSpeed's way); what the newest checkpoint holds is kept.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

from launch import local, runs
from launch.config import PROJECT, Launch, LaunchError

SAFE = re.compile(r"[A-Za-z0-9_./=,+@:-]+")


def hostfile(launch: Launch) -> str:
    return "".join(f"{host} slots={launch.ranks_per_node}\n" for host in launch.settings.hosts)


def rank_script(launch: Launch) -> str:
    """What DeepSpeed starts for every rank; RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT come from it."""
    environment = {**launch.environment, **({} if launch.gpus_per_node else {"DS_ACCELERATOR": "cpu"})}
    exports = "\n".join(f"export {name}={shlex.quote(value)}" for name, value in sorted(environment.items()))
    return (
        f"#!/bin/bash\n# Written by `python -m launch`: one rank.\n{exports}\n"
        f"export PYTHONPATH={shlex.quote(str(PROJECT))}${{PYTHONPATH:+:$PYTHONPATH}}\n"
        f"cd -- {shlex.quote(str(launch.directory))} || exit 1\n"
        f"exec {shlex.join([launch.python, '-m', 'train', *launch.overrides])}\n"
    )


def command(launch: Launch, run_directory: Path) -> list[str]:
    settings, place = launch.settings, runs.launch_directory(run_directory)
    for path in (launch.python, str(launch.directory), str(place)):
        if not SAFE.fullmatch(path):
            raise LaunchError(
                f"target=ssh: {path!r} passes through remote shells that DeepSpeed does not quote for; it may "
                "hold only letters, digits and _ . / = , + @ : -"
            )
    return [
        launch.python,
        "-m",
        "deepspeed.launcher.runner",
        f"--hostfile={place / 'hostfile'}",
        f"--launcher={settings.launcher}",
        "--force_multi",
        f"--master_addr={settings.hosts[0].rpartition('@')[2]}",
        f"--master_port={settings.master_port}",
        "--no_python",
        "--no_local_rank",
        str(place / "rank.sh"),
    ]


def describe(launch: Launch, run_directory: Path) -> str:
    place = runs.launch_directory(run_directory)
    return (
        f"{shlex.join(command(launch, run_directory))}\n\n# {place / 'hostfile'}\n{hostfile(launch)}\n"
        f"# {place / 'rank.sh'}\n{rank_script(launch)}"
    )


def run(launch: Launch, run_directory: Path) -> int:
    """Write both files and run DeepSpeed's launcher to the end, again after crashes."""
    if shutil.which("ssh") is None:
        raise LaunchError("target=ssh needs ssh on PATH")
    if launch.settings.launcher == "pdsh" and shutil.which("pdsh") is None:
        raise LaunchError("target=ssh needs pdsh on PATH, or launch.launcher=openmpi|mpich|mvapich")
    place = runs.launch_directory(run_directory)
    line = command(launch, run_directory)
    (place / "hostfile").write_text(hostfile(launch), encoding="utf-8")
    (place / "rank.sh").write_text(rank_script(launch), encoding="utf-8")
    (place / "rank.sh").chmod(0o755)
    # DeepSpeed exports these unquoted to the hosts; the script sets what is needed itself.
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("PYTHON", "NCCL", "UCX", "MV2", "MLFLOW"))
    }

    def start(_: int) -> list[subprocess.Popen]:
        return [subprocess.Popen(line, env=environment, cwd=launch.directory, start_new_session=True)]

    return local.supervise(start, restarts=launch.settings.restarts, grace_seconds=launch.settings.grace_seconds)
