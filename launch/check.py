"""Before anything is submitted: does the training configuration compose, hold together and fit the layout's ranks?"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.config import CONFIGS, Launch, LaunchError

if TYPE_CHECKING:
    from train.config import TrainConfig


@dataclass(frozen=True)
class Checked:
    """What is known of a training run before it starts."""

    name: str  # run.name
    run_directory: Path  # absolute
    steps: int
    memory: str  # for people; empty where the full check was turned off


def check(launch: Launch) -> Checked:
    """Compose `launch`'s overrides, and unless `launch.check=false` validate them for its world; or `LaunchError`."""
    values = compose(launch.overrides)
    memory = ""
    if launch.settings.check:
        memory = memory_estimate(validated(values, launch.world_size), launch)
    run = run_settings(values)
    for key in ("root", "name"):
        if any(ord(character) < 32 for character in run[key]):
            raise LaunchError(f"run.{key}={run[key]!r} holds a control character")
    return Checked(run["name"], launch.directory / run["root"] / run["name"], run["steps"], memory)


def run_settings(values: dict[str, Any]) -> dict[str, Any]:
    """The `run` group; root, name and steps, which the launcher reads itself, have their types in any case."""
    run = values.get("run")
    if not isinstance(run, dict):
        raise LaunchError(f"run={run!r} is not a group of settings; override its keys: run.name=NAME run.steps=N")
    for key, kind, said in (("root", str, "a text"), ("name", str, "a text"), ("steps", int, "an integer")):
        if not isinstance(run.get(key), kind) or isinstance(run.get(key), bool):
            raise LaunchError(f"run.{key}={run.get(key)!r} is not {said}")
    return run


def compose(overrides: Iterable[str]) -> dict[str, Any]:
    """The training configuration as plain values, as `python -m train OVERRIDES` would compose it."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    overrides = list(overrides)
    for override in overrides:
        if override.startswith("-") or "=" not in override.removeprefix("~"):
            raise LaunchError(f"{override!r} is not a training override KEY=VALUE")
    try:
        for parsed in OverridesParser.create().parse_overrides(overrides):
            if parsed.is_sweep_override():
                raise LaunchError(f"{parsed.input_line} has several values: those are for python -m launch.sweep")
        with initialize_config_dir(str(CONFIGS), version_base="1.3"):
            return OmegaConf.to_container(hydra_compose("config", overrides), resolve=True)  # type: ignore[return-value]
    except (HydraException, OmegaConfBaseException) as error:
        raise _named_key(error, overrides) from error


def _named_key(error: Exception, overrides: list[str]) -> LaunchError:
    """Hydra's message, or the trainer's own about a key that does not exist, which names the nearest one."""
    try:
        from train.__main__ import check_keys
        from train.config import USER_ERRORS
    except ImportError:
        return LaunchError(_one_line(error))
    try:
        check_keys(overrides)
    except USER_ERRORS as better:
        return LaunchError(str(better))
    except Exception:
        pass
    return LaunchError(_one_line(error))


def _one_line(error: Exception) -> str:
    return re.sub(r"\s*\n\s*", "; ", str(error).strip())


def validated(values: dict[str, Any], world_size: int) -> TrainConfig:
    """`values` as the trainer's own configuration, checked for `world_size` ranks."""
    from train.config import USER_ERRORS, validate

    config = typed(values)
    try:
        validate(config, world_size)
    except USER_ERRORS as error:
        raise LaunchError(str(error)) from error
    return config


def typed(values: dict[str, Any]) -> TrainConfig:
    """`values` as the trainer's own configuration: every one has its type, nothing more is checked."""
    from train.config import USER_ERRORS, TrainConfig, from_mapping

    try:
        return from_mapping(TrainConfig, values)
    except USER_ERRORS as error:
        raise LaunchError(str(error)) from error


def memory_estimate(config: TrainConfig, launch: Launch) -> str:
    """The trainer's own estimate: the whole plan where there are GPUs to fit into, a line for CPU ranks."""
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
        f"memory of a rank: about {plan.total / dry_run.GIB:,.2f} GiB ({parts})"
    )
