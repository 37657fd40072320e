"""The typed settings of each target, read from configs/launch/default.yaml, TARGET.yaml and `launch.KEY=VALUE`.

An unknown key fails, and the message names the nearest known one.
"""

from __future__ import annotations

import dataclasses
import re
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from launch.errors import LaunchError
from train.config.conversion import convert, from_text, nearest

PROJECT = Path(__file__).resolve().parent.parent
CONFIGS = PROJECT / "configs"
# Integer settings that may be 0; every other integer is at least 1.
MAY_BE_ZERO = ("restarts", "max_requeues", "rendezvous_port")


@dataclass(frozen=True)
class Settings:
    """Settings of every target. configs/launch/default.yaml explains each of them."""

    dry_run: bool
    check: bool
    python: str | None
    cpus_per_rank: int
    restarts: int
    env: Mapping[str, str]

    def __post_init__(self) -> None:
        for name, value in dataclasses.asdict(self).items():
            minimum = 0 if name in MAY_BE_ZERO else 1
            if isinstance(value, int) and not isinstance(value, bool) and value < minimum:
                raise LaunchError(f"launch.{name}={value} must be at least {minimum}")
        for name in self.env:
            if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
                raise LaunchError(f"launch.env.{name}: {name!r} is not the name of an environment variable")


@dataclass(frozen=True)
class LocalSettings(Settings):
    """target=local; see configs/launch/local.yaml."""

    grace_seconds: int


@dataclass(frozen=True)
class SlurmSettings(Settings):
    """target=slurm; see configs/launch/slurm.yaml."""

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
                    f"launch.sbatch_args: {argument!r} is not an option --NAME=VALUE; quote an option whose value "
                    "contains a comma: 'launch.sbatch_args=[\"--NAME=A,B\"]'"
                )
        for name in ("partition", "account", "qos", "memory", "constraint", "exclude", "reservation"):
            value = getattr(self, name)
            if value is not None and not re.fullmatch(r"[\w.,:&|*\[\]()-]+", value):
                raise LaunchError(f"launch.{name}={value!r} contains a character that no Slurm {name} may contain")


@dataclass(frozen=True)
class KubernetesSettings(Settings):
    """target=kubernetes; see configs/launch/kubernetes.yaml."""

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
                    f"launch.secrets.{name}={text!r} must be SECRET/KEY, which names a secret in the cluster"
                )
        for key in ("shm_size", "memory"):
            if not re.fullmatch(r"\d+(\.\d+)?([EPTGMk]|[EPTGMK]i)?", getattr(self, key)):
                raise LaunchError(f"launch.{key}={getattr(self, key)!r} is not a Kubernetes quantity such as 64Gi")


@dataclass(frozen=True)
class SshSettings(Settings):
    """target=ssh; see configs/launch/ssh.yaml."""

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


def load_settings(target: str, changes: Mapping[str, str]) -> Settings:
    """Read default.yaml, then TARGET.yaml, then `changes` (strings from the command line); later values win."""
    cls = TARGETS[target]
    hints = typing.get_type_hints(cls)
    values: dict[str, Any] = {}
    for name in ("default", target):
        path = CONFIGS / "launch" / f"{name}.yaml"
        text = path.read_text(encoding="utf-8")
        written = yaml.load(text, yaml.BaseLoader)  # every scalar as it is spelled
        for key, value in (yaml.safe_load(text) or {}).items():
            if key not in hints:
                raise LaunchError(f"{path}: {key} is not a setting of target={target}{nearest(key, list(hints))}")
            value = convert(hints[key], _as_spelled(hints[key], value, written[key]), f"launch.{key}", LaunchError)
            values[key] = {**values.get(key, {}), **value} if isinstance(value, dict) else value
    for path_of_key, text in changes.items():
        key, dot, entry = path_of_key.partition(".")
        if key not in hints or (dot and not isinstance(values[key], dict)):
            raise LaunchError(
                f"launch.{path_of_key} is not a setting of target={target}"
                f"{nearest(path_of_key, list(hints), 'launch.')}"
            )
        if isinstance(values[key], dict):
            if not entry:
                raise LaunchError(f"launch.{key} is a mapping: set one entry, launch.{key}.NAME=VALUE")
            values[key] = {k: v for k, v in values[key].items() if k != entry}
            if text != "null":  # null removes the entry
                values[key][entry] = text
        else:
            values[key] = from_text(hints[key], text, f"launch.{key}", LaunchError)
    return cls(**values)


def _as_spelled(hint: Any, value: Any, written: Any) -> Any:
    """A value of a YAML file, with text as it is `written`: YAML reads `time: 12:00:00` as 43200 and `007` as 7."""
    kinds = typing.get_args(hint)
    if isinstance(value, Mapping) and kinds == (str, str):
        return {key: None if v is None else text for v, (key, text) in zip(value.values(), written.items())}
    if isinstance(value, list) and kinds == (str, ...):
        return written
    is_scalar = value is not None and not isinstance(value, (Mapping, list))
    return written if is_scalar and (hint is str or str in kinds) else value
