"""Checks before anything is submitted: the training configuration composes, is valid and fits the number of ranks."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.config import Launch
from launch.errors import LaunchError
from train.config.conversion import expand_home, how_to_quote

if TYPE_CHECKING:
    from train.config.schema import TrainConfig


@dataclass(frozen=True)
class CheckedRun:
    """What is known about a training run before it starts."""

    name: str  # run.name
    run_directory: Path  # absolute
    steps: int
    memory: str  # the estimate as text; empty with launch.check=false


def check(launch: Launch) -> CheckedRun:
    """Compose the overrides and, unless `launch.check=false`, validate them for the launch's number of ranks.

    Raises `LaunchError`.
    """
    values = compose(launch.overrides)
    memory = ""
    if launch.settings.check:
        memory = memory_estimate(validated(values, launch.world_size), launch)
    run = run_settings(values)
    for key in ("root", "name"):
        if any(ord(character) < 32 for character in run[key]):
            raise LaunchError(f"run.{key}={run[key]!r} contains a control character")
    return CheckedRun(run["name"], launch.directory / run["root"] / run["name"], run["steps"], memory)


def run_settings(values: dict[str, Any]) -> dict[str, Any]:
    """The `run` section. Checks the types of root, name and steps, which the launcher itself reads."""
    run = values.get("run")
    if not isinstance(run, dict):
        raise LaunchError(f"run={run!r} is not a section; override its keys: run.name=NAME run.steps=N")
    for key, kind, expected in (("root", str, "a string"), ("name", str, "a string"), ("steps", int, "a whole number")):
        if not isinstance(run.get(key), kind) or isinstance(run.get(key), bool):
            advice = how_to_quote(f"run.{key}", run.get(key)) if kind is str else ""
            raise LaunchError(f"run.{key}={run.get(key)!r} must be {expected}{advice}")
    return {**run, "root": expand_home(run["root"])}


def compose(overrides: Iterable[str]) -> dict[str, Any]:
    """The training configuration as plain values, as `python -m train OVERRIDES` would compose it."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    from train.config.compose import compose as compose_training

    overrides = list(overrides)
    for override in overrides:
        if override.startswith("-") or "=" not in override.removeprefix("~"):
            raise LaunchError(f"{override!r} is not a training override KEY=VALUE")
    try:
        for parsed in OverridesParser.create().parse_overrides(overrides):
            if parsed.is_sweep_override():
                raise LaunchError(f"{parsed.input_line} lists several values; use python -m launch.sweep for them")
        return compose_training(overrides)
    except (HydraException, OmegaConfBaseException) as error:
        raise _named_key(error, overrides) from error


def _named_key(error: Exception, overrides: list[str]) -> LaunchError:
    """The error for Hydra's `error`. For an unknown key, the trainer's own message, which names the nearest key."""
    try:
        from train.__main__ import check_keys
        from train.config.schema import USER_ERRORS
    except ImportError:
        return LaunchError(one_line(error))
    try:
        check_keys(overrides)
    except USER_ERRORS as better:
        return LaunchError(str(better))
    except Exception:
        pass
    return LaunchError(one_line(error))


def one_line(error: Exception) -> str:
    """The error's message without line breaks."""
    return re.sub(r"\s*\n\s*", "; ", str(error).strip())


def validated(values: dict[str, Any], world_size: int) -> TrainConfig:
    """Convert composed `values` to the trainer's configuration and validate it for `world_size` ranks."""
    from train.config.schema import USER_ERRORS, validate

    config = typed(values)
    try:
        validate(config, world_size)
    except USER_ERRORS as error:
        raise LaunchError(str(error)) from error
    return config


def typed(values: dict[str, Any]) -> TrainConfig:
    """Convert composed `values` to the trainer's configuration. Checks types, nothing more."""
    from train.config.conversion import from_mapping
    from train.config.schema import USER_ERRORS, TrainConfig

    try:
        return from_mapping(TrainConfig, values)
    except USER_ERRORS as error:
        raise LaunchError(str(error)) from error


def memory_estimate(config: TrainConfig, launch: Launch) -> str:
    """The trainer's memory estimate: the full dry run for GPUs, one line for CPU ranks."""
    from train import dry_run

    config = dataclasses.replace(
        config, model=dataclasses.replace(config.model, vocab_size=config.model.vocab_size or config.data.vocab_size)
    )
    try:
        if launch.gpus_per_node:
            return dry_run.describe(config, launch.world_size, config.dry_run_gpu)
        plan = dry_run.plan(config, launch.world_size)
    except ValueError as error:
        raise LaunchError(str(error)) from error
    parts = ", ".join(f"{name} {size / dry_run.GIB:,.2f}" for name, size in plan.memory.items())
    return (
        f"{plan.parameters / 1e6:,.1f}M parameters on {plan.world_size} ranks, {plan.data_size} of them data-parallel; "
        f"memory per rank: about {plan.total / dry_run.GIB:,.2f} GiB ({parts})"
    )
