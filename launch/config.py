"""What a launch is: its target, its size, the target's settings, and the training overrides it hands on untouched.

Settings come from `configs/launch/default.yaml`, then the target's own file, then `launch.KEY=VALUE`. Values are read
by the type that the dataclass declares and never evaluated; a key that does not exist fails with the nearest one.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import re
import sys
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

PROJECT = Path(__file__).resolve().parent.parent
CONFIGS = PROJECT / "configs"


class LaunchError(ValueError):
    """A launch that cannot start; one line that names what is wrong and what to write instead. Exit code 2."""


@dataclass(frozen=True)
class Settings:
    """What every target knows; see configs/launch/default.yaml."""

    dry_run: bool
    check: bool
    python: str | None
    cpus_per_rank: int
    restarts: int
    env: Mapping[str, str]

    def __post_init__(self) -> None:
        for name, value in dataclasses.asdict(self).items():
            if isinstance(value, int) and value < MINIMUM.get(name, 0):
                raise LaunchError(f"launch.{name}={value} must be at least {MINIMUM.get(name, 0)}")
        for name in self.env:
            if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
                raise LaunchError(f"launch.env.{name}: {name!r} is not the name of an environment variable")


MINIMUM = {
    "cpus_per_rank": 1,
    "grace_seconds": 1,
    "chain_jobs": 1,
    "array_limit": 1,
    "wait_seconds": 1,
    "rendezvous_timeout_seconds": 1,
    "signal_seconds": 1,
    "master_port": 1,
}


@dataclass(frozen=True)
class LocalSettings(Settings):
    grace_seconds: int


@dataclass(frozen=True)
class SlurmSettings(Settings):
    partition: str | None
    account: str | None
    qos: str | None
    time: str
    memory: str
    constraint: str | None
    exclude: str | None
    reservation: str | None
    sbatch_args: tuple[str, ...]
    setup_script: str | None
    signal_seconds: int
    continuation: str
    chain_jobs: int
    max_requeues: int
    wait_seconds: int
    rendezvous_port: int
    rendezvous_timeout_seconds: int
    array_limit: int

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.partition:
            raise LaunchError(
                "target=slurm needs launch.partition=NAME (`sinfo` lists them), or set it in configs/launch/slurm.yaml"
            )
        if not re.fullmatch(r"\d+(:\d\d){0,2}|\d+-\d+(:\d\d){0,2}", self.time):
            raise LaunchError(f"launch.time={self.time!r} is not a Slurm time: minutes, HH:MM:SS or D-HH:MM:SS")
        if self.continuation not in ("requeue", "chain"):
            raise LaunchError(f"launch.continuation={self.continuation!r} is not one of requeue, chain")
        if self.chain_jobs > 1 and self.continuation != "chain":
            raise LaunchError(f"launch.chain_jobs={self.chain_jobs} needs launch.continuation=chain")
        for argument in self.sbatch_args:
            if not argument.startswith("-"):  # sbatch would take it for the script
                raise LaunchError(
                    f"launch.sbatch_args: {argument!r} is not an option --NAME=VALUE; where a comma belongs to the "
                    "value, quote the option: 'launch.sbatch_args=[\"--NAME=A,B\"]'"
                )
        for name in ("partition", "account", "qos", "memory", "constraint", "exclude", "reservation"):
            value = getattr(self, name)
            if value is not None and not re.fullmatch(r"[\w.,:&|*\[\]()-]+", value):
                raise LaunchError(f"launch.{name}={value!r} holds a character that no Slurm {name} has")


@dataclass(frozen=True)
class KubernetesSettings(Settings):
    grace_seconds: int
    image: str | None
    namespace: str
    workdir: str
    output: str | None
    shm_size: str
    memory: str
    gpu_resource: str
    volumes: Mapping[str, str]
    secrets: Mapping[str, str]
    image_pull_secret: str | None
    service_account: str | None
    priority_class: str | None
    node_selector: Mapping[str, str]
    tolerations: tuple[str, ...]

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.image:
            raise LaunchError(
                "target=kubernetes needs launch.image=REGISTRY/NAME:TAG, or set it in configs/launch/kubernetes.yaml"
            )
        for name, text in self.volumes.items():
            if not re.fullmatch(r"[^:]+:/[^:]*(:ro)?", text):
                raise LaunchError(f"launch.volumes.{name}={text!r} must be CLAIM:/MOUNT or CLAIM:/MOUNT:ro")
        for name, text in self.secrets.items():
            if not re.fullmatch(r"[^/]+/[^/]+", text):
                raise LaunchError(
                    f"launch.secrets.{name}={text!r} must be SECRET/KEY: the value itself stays in the cluster"
                )
        for key in ("shm_size", "memory"):
            if not re.fullmatch(r"\d+(\.\d+)?([EPTGMk]|[EPTGMK]i)?", getattr(self, key)):
                raise LaunchError(f"launch.{key}={getattr(self, key)!r} is not a Kubernetes quantity such as 64Gi")


@dataclass(frozen=True)
class SshSettings(Settings):
    grace_seconds: int
    hosts: tuple[str, ...]
    launcher: str
    master_port: int

    def __post_init__(self) -> None:
        super().__post_init__()
        for host in self.hosts:
            if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.@-]*", host):
                raise LaunchError(f"launch.hosts: {host!r} is not a host name")
        if self.launcher not in ("pdsh", "openmpi", "mpich", "mvapich"):
            raise LaunchError(f"launch.launcher={self.launcher!r} is not one of pdsh, openmpi, mpich, mvapich")


TARGETS: dict[str, type[Settings]] = {
    "local": LocalSettings,
    "slurm": SlurmSettings,
    "kubernetes": KubernetesSettings,
    "ssh": SshSettings,
}
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
    directory: Path = field(default_factory=Path.cwd)  # where the command was given: relative paths start here

    @property
    def world_size(self) -> int:
        return self.nodes * self.ranks_per_node

    @property
    def python(self) -> str:
        return self.settings.python or sys.executable

    @property
    def environment(self) -> dict[str, str]:
        """What is exported to every rank, PYTHONPATH aside."""
        return {"OMP_NUM_THREADS": str(self.settings.cpus_per_rank), **self.settings.env}


def parse(arguments: Iterable[str], directory: Path | None = None) -> Launch:
    """The command line, `target=... nodes=... launch.KEY=... -- OVERRIDES`, as a checked `Launch`."""
    own, overrides = split(arguments)
    values: dict[str, str] = {}
    for argument in own:
        key, equals, value = argument.partition("=")
        if not equals:
            raise LaunchError(f"{argument!r} is not KEY=VALUE; training overrides go after `--`")
        if key != "target" and key not in SIZE_KEYS and not key.startswith("launch."):
            known = ["target", *SIZE_KEYS, "launch.dry_run"]
            raise LaunchError(
                f"{key} is not a key of the launcher{_nearest(key, known)}; training overrides go after `--`"
            )
        values[key] = value
    target = values.pop("target", None)
    if target not in TARGETS:
        said = "target=NAME is missing" if target is None else f"target={target!r} is unknown"
        raise LaunchError(f"{said}{_nearest(target or '', list(TARGETS))}; the targets are {', '.join(TARGETS)}")
    settings = load_settings(
        target, {k.removeprefix("launch."): v for k, v in values.items() if k.startswith("launch.")}
    )
    sizes = {key: _convert(int, values[key], key) for key in SIZE_KEYS if key in values}
    return _sized(Launch(target, 0, 0, 0, settings, tuple(overrides), directory or Path.cwd()), sizes)


def split(arguments: Iterable[str]) -> tuple[list[str], list[str]]:
    """What stands before `--` and what stands after it."""
    arguments = list(arguments)
    cut = arguments.index("--") if "--" in arguments else len(arguments)
    return arguments[:cut], arguments[cut + 1 :]


def load_settings(target: str, changes: Mapping[str, str]) -> Settings:
    """default.yaml, TARGET.yaml, then `changes` (texts of the command line) -> the target's settings."""
    cls = TARGETS[target]
    hints = typing.get_type_hints(cls)
    values: dict[str, Any] = {}
    for name in ("default", target):
        path = CONFIGS / "launch" / f"{name}.yaml"
        for key, value in (yaml.safe_load(path.read_text(encoding="utf-8")) or {}).items():
            if key not in hints:
                raise LaunchError(f"{path}: {key} is not a setting of target={target}{_nearest(key, list(hints))}")
            value = _convert(hints[key], value, f"launch.{key}")
            values[key] = {**values.get(key, {}), **value} if isinstance(value, dict) else value
    for place, text in changes.items():
        key, dot, entry = place.partition(".")
        if key not in hints or (dot and not isinstance(values[key], dict)):
            raise LaunchError(
                f"launch.{place} is not a setting of target={target}{_nearest(place, list(hints), 'launch.')}"
            )
        if isinstance(values[key], dict):
            if not entry:
                raise LaunchError(f"launch.{key} holds names: write launch.{key}.NAME=VALUE")
            values[key] = {k: v for k, v in values[key].items() if k != entry}
            if text != "null":  # null takes a name out
                values[key][entry] = text
        else:
            values[key] = _convert(hints[key], text, f"launch.{key}")
    return cls(**values)


def _sized(launch: Launch, given: Mapping[str, int]) -> Launch:
    """Fill in the size: nodes from the hosts, GPUs from this machine where it is the one that runs."""
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
        here = local_gpus()
        if not given.keys() & {"gpus_per_node", "ranks_per_node"}:
            gpus = here // nodes
        if gpus * nodes > here:
            raise LaunchError(
                f"gpus_per_node={gpus} x nodes={nodes}, but this machine shows {here} GPUs; for CPU ranks use "
                "ranks_per_node=N without gpus_per_node"
            )
    ranks = given.get("ranks_per_node", gpus or 1)
    if gpus and ranks != gpus:
        raise LaunchError(
            f"gpus_per_node={gpus}, ranks_per_node={ranks}: every rank has one GPU; leave ranks_per_node out"
        )
    return dataclasses.replace(launch, nodes=nodes, gpus_per_node=gpus, ranks_per_node=ranks)


def local_gpus() -> int:
    """CUDA devices of this machine that CUDA_VISIBLE_DEVICES lets through, found without importing torch."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([d for d in visible.split(",") if d.strip() and d.strip() != "-1"])
    return len([p for p in Path("/dev").glob("nvidia*") if re.fullmatch(r"nvidia\d+", p.name)])


def _convert(hint: Any, value: Any, key: str) -> Any:
    """`value`, from YAML or as a text of the command line -> the declared type, or `LaunchError`."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if type(None) in arguments:
        return None if value is None or value == "null" else _convert(arguments[0], value, key)
    if origin is tuple:
        if isinstance(value, str):
            value = _list(value, key)
        if isinstance(value, list) and all(isinstance(v, str) for v in value):
            return tuple(value)
    elif hint is bool:
        if isinstance(value, bool) or value in ("true", "false"):
            return value in (True, "true")
    elif hint is int:
        if isinstance(value, int) and not isinstance(value, bool):
            return value
        if isinstance(value, str) and re.fullmatch(r"[+-]?\d+", value):
            return int(value)
    elif hint is str:
        if isinstance(value, str):
            return value
    elif isinstance(value, dict) and all(isinstance(v, str) for v in value.values()):
        return dict(value)
    kind = {int: "an integer", bool: "true or false", str: "a text (quote it in YAML)"}.get(hint)
    raise LaunchError(
        f"{key}={value!r} is not {kind or ('a list of texts' if origin is tuple else 'NAME: TEXT pairs')}"
    )


def _list(text: str, key: str) -> list[str]:
    """`A,B`, or `[A,"B,C"]` as YAML reads it: in brackets an entry may be quoted, and hold a comma."""
    if not text.startswith("["):
        return [v.strip() for v in text.split(",") if v.strip()]
    try:
        read = yaml.load(text, yaml.BaseLoader)  # every scalar is a text
    except yaml.YAMLError:
        read = None
    if not isinstance(read, list) or not all(isinstance(v, str) for v in read):
        raise LaunchError(
            f'{key}={text!r} is not a list [A,B]; quote an entry that holds one of , : [ ] {{ }} # as in [A,"B,C"]'
        )
    return read


def _nearest(name: str, known: list[str], prefix: str = "") -> str:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean {prefix}{near[0]}?" if near else ""
