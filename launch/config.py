"""The command line of a launch: its target and size, the target's settings, and the training overrides.

The overrides are passed to `python -m train` unchanged.
"""

from __future__ import annotations

import dataclasses
import os
import re
import shlex
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launch.errors import LaunchError
from launch.settings import TARGETS, SshSettings, load_settings
from train.config.conversion import from_text, nearest
from train.distributed.environment import LAUNCH_COMMAND

SIZE_KEYS = ("nodes", "gpus_per_node", "ranks_per_node")


@dataclass(frozen=True)
class Launch:
    """One job to start: `nodes` x `ranks_per_node` ranks of `python -m train OVERRIDES`."""

    target: str
    nodes: int
    gpus_per_node: int  # 0: CPU ranks
    ranks_per_node: int
    settings: Any  # the dataclass of TARGETS[target]
    overrides: tuple[str, ...] = ()
    directory: Path = field(default_factory=Path.cwd)  # the caller's working directory, where relative paths start
    words: tuple[str, ...] = ()  # the launcher's own arguments, those before `--`

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.nodes * self.ranks_per_node

    @property
    def python(self) -> str:
        """The interpreter that the nodes run."""
        return self.settings.python or sys.executable

    @property
    def environment(self) -> dict[str, str]:
        """Variables exported to every rank, except PYTHONPATH."""
        known = {LAUNCH_COMMAND: self.command} if self.words else {}
        return {"OMP_NUM_THREADS": str(self.settings.cpus_per_rank), **known, **self.settings.env}

    @property
    def command(self) -> str:
        """The launcher's command up to the overrides. The values of `launch.env`, which may be secret, are left out."""
        shown = [
            f"{word.partition('=')[0]}=..." if word.startswith("launch.env") else shlex.quote(word)
            for word in self.words
        ]
        return " ".join(["python -m launch", *shown, "--"])


def parse(arguments: Iterable[str], directory: Path | None = None) -> Launch:
    """Parse and check `target=... nodes=... launch.KEY=... -- OVERRIDES`. Raises `LaunchError`."""
    launcher_arguments, overrides = split(arguments)
    values: dict[str, str] = {}
    for argument in launcher_arguments:
        key, equals, value = argument.partition("=")
        if not equals:
            raise LaunchError(f"{argument!r} is not KEY=VALUE; put training overrides after `--`")
        if key != "target" and key not in SIZE_KEYS and not key.startswith("launch."):
            known = ["target", *SIZE_KEYS, "launch.dry_run"]
            raise LaunchError(
                f"{key} is not a key of the launcher{nearest(key, known)}; put training overrides after `--`"
            )
        values[key] = value
    target = values.pop("target", None)
    if target not in TARGETS:
        problem = "target=NAME is missing" if target is None else f"target={target!r} is unknown"
        raise LaunchError(f"{problem}{nearest(target or '', list(TARGETS))}; the targets are {', '.join(TARGETS)}")
    settings = load_settings(
        target, {k.removeprefix("launch."): v for k, v in values.items() if k.startswith("launch.")}
    )
    sizes = {key: from_text(int, values[key], key, LaunchError) for key in SIZE_KEYS if key in values}
    launch = Launch(
        target, 0, 0, 0, settings, tuple(overrides), directory or Path.cwd(), words=tuple(launcher_arguments)
    )
    return _sized(launch, sizes)


def split(arguments: Iterable[str]) -> tuple[list[str], list[str]]:
    """The arguments before `--` and those after it."""
    arguments = list(arguments)
    cut = arguments.index("--") if "--" in arguments else len(arguments)
    return arguments[:cut], arguments[cut + 1 :]


def _sized(launch: Launch, given: Mapping[str, int]) -> Launch:
    """Fill in the size. ssh counts its hosts; target=local counts this machine's GPUs."""
    hosts = len(launch.settings.hosts) if isinstance(launch.settings, SshSettings) else 0
    if launch.target == "ssh" and not hosts:
        raise LaunchError("target=ssh needs launch.hosts=[HOST,HOST,...], or set them in configs/launch/ssh.yaml")
    nodes = given.get("nodes", hosts or 1)
    for key, value in given.items():
        if value < (0 if key == "gpus_per_node" else 1):
            raise LaunchError(f"{key}={value} must be at least {0 if key == 'gpus_per_node' else 1}")
    if hosts and nodes != hosts:
        raise LaunchError(f"nodes={nodes}, but launch.hosts names {hosts}: {', '.join(launch.settings.hosts)}")
    gpus = given.get("gpus_per_node", 0)
    if launch.target == "local":
        available = local_gpus()
        if not given.keys() & {"gpus_per_node", "ranks_per_node"}:
            gpus = available // nodes
        if gpus * nodes > available:
            raise LaunchError(
                f"gpus_per_node={gpus} x nodes={nodes}, but this machine has {available} visible GPUs; for CPU ranks "
                "use ranks_per_node=N without gpus_per_node"
            )
    ranks = given.get("ranks_per_node", gpus or 1)
    if gpus and ranks != gpus:
        raise LaunchError(
            f"gpus_per_node={gpus}, ranks_per_node={ranks}: every rank has one GPU; leave ranks_per_node out"
        )
    return dataclasses.replace(launch, nodes=nodes, gpus_per_node=gpus, ranks_per_node=ranks)


def local_gpus() -> int:
    """Count this machine's CUDA devices that CUDA_VISIBLE_DEVICES lets through, without importing torch."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([d for d in visible.split(",") if d.strip() and d.strip() != "-1"])
    return len([p for p in Path("/dev").glob("nvidia*") if re.fullmatch(r"nvidia\d+", p.name)])
