"""What a sweep runs: one point for every combination of values, each with its overrides and its number of steps.

The plan is stored in `sweep.json` of the sweep's directory. A later call with more values extends it.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from launch import check, runs
from launch.config import Launch
from launch.errors import LaunchError
from launch.settings import CONFIGS

BUDGETS = ("tokens", "flops", "steps")


@dataclass(frozen=True)
class Point:
    """One run of a sweep."""

    name: str
    values: dict[str, str]  # axis -> value, as written in an override
    overrides: list[str]  # the whole command line of `python -m train`
    steps: int


@dataclass(frozen=True)
class Sweep:
    """The content of `sweep.json`."""

    name: str
    budget: str
    given: list[str]  # overrides of the command line or the preset, axes included
    points: list[Point]


def presets() -> list[str]:
    """Names of the sweeps in configs/sweep."""
    return sorted(path.stem for path in (CONFIGS / "sweep").glob("*.yaml"))


def plan(name: str, budget: str | None, launch: Launch) -> tuple[Path, Sweep]:
    """The sweep's directory and its points, each composed and validated for the launch's number of ranks.

    Axes come from the command line, else from sweep.json, else from the preset `name`. `budget`: one of `BUDGETS`, or
    None for the stored or the preset's. Raises `LaunchError`.
    """
    axes, common = split_axes(launch.overrides)
    for override in common:
        if override.split("=")[0].lstrip("+") == "run.name":
            raise LaunchError(f"{override}: a sweep chooses the names of its runs; leave it out")
    base = check.compose(common)
    directory = launch.directory / check.run_settings(base)["root"] / name
    stored = read(directory)
    if stored is not None and not axes and not common and budget in (None, stored.budget):
        return directory, stored
    preset = _preset(name)
    budget = budget or (stored.budget if stored else preset.get("budget", "tokens"))
    if not axes:
        axes, more = split_axes(stored.given if stored else preset.get("overrides", []))
        overridden = {c.split("=")[0] for c in common}
        common = [*(m for m in more if m.split("=")[0] not in overridden), *common]
        base = check.compose(common)
    if not axes:
        raise LaunchError(
            f"sweep={name} has no values to vary: give KEY=A,B,C, or the name of a preset: {', '.join(presets())}"
        )
    _refuse_fixed_axes(name, axes, common)
    points = make_points(name, axes, common, base, budget, launch.world_size)
    given = [*(f"{key}={','.join(values)}" for key, values in axes.items()), *common]
    return directory, Sweep(name, budget, given, _merged(directory, stored, points))


def split_axes(overrides: Sequence[str]) -> tuple[dict[str, list[str]], list[str]]:
    """Split overrides into axes (key -> values) and those with a single value. Raises `LaunchError`."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    axes: dict[str, list[str]] = {}
    common: list[str] = []
    for override in overrides:
        try:
            parsed = OverridesParser.create().parse_override(override)
        except HydraException as error:
            raise LaunchError(f"{override!r}: {check.one_line(error)}") from error
        if parsed.is_sweep_override():
            values = _values(parsed)
            if parsed.get_key_element() in axes:
                raise LaunchError(
                    f"{override}: {parsed.get_key_element()} is varied twice; give all its values in one override"
                )
            if len(set(values)) != len(values):
                raise LaunchError(f"{override} lists a value twice")
            axes[parsed.get_key_element()] = values
        else:
            common.append(override)
    return axes, common


def _values(parsed: Any) -> list[str]:
    """The values of one axis, as an override spells them."""
    from hydra.errors import HydraException

    try:
        return list(parsed.sweep_string_iterator())
    except HydraException as error:  # interval() and glob() cannot be listed
        raise LaunchError(
            f"{parsed.input_line}: a sweep cannot list these values; write KEY=A,B,C or KEY=range(FROM,TO)"
        ) from error


def _refuse_fixed_axes(name: str, axes: dict[str, list[str]], common: list[str]) -> None:
    """Refuse a single value for a key that varies: one of the two would be ignored silently."""
    varied = {key.lstrip("+"): values for key, values in axes.items()}
    for override in common:
        key = override.split("=")[0].lstrip("+~")
        if key in varied:
            raise LaunchError(
                f"{override}: sweep={name} varies {key} over {','.join(varied[key])}; leave it out (sweep.only="
                f"POINT runs one value alone), or choose another sweep=NAME and give {key}=A,B there"
            )


def make_points(
    name: str, axes: dict[str, list[str]], common: list[str], base: dict[str, Any], budget: str, world_size: int
) -> list[Point]:
    """One point for every combination of the axes' values, validated for `world_size` ranks. Raises `LaunchError`."""
    short = {key: key.split(".")[-1] for key in axes}
    if len(set(short.values())) < len(short):
        short = {key: key for key in axes}
    points = []
    for values in itertools.product(*axes.values()):
        chosen = dict(zip(axes, values))
        label = ",".join(f"{short[key]}={re.sub(r'[^A-Za-z0-9_.+-]+', '_', value)}" for key, value in chosen.items())
        overrides = [*common, *(f"{key}={value}" for key, value in chosen.items()), f"run.name='{name}/{label}'"]
        if not any(c.startswith("logging.wandb_group=") for c in common):
            overrides.append(f"logging.wandb_group='{name}'")  # quoted, because 20240501 and null are names too
        try:
            composed = check.compose(overrides)
            check.typed(composed)  # before the computations below
            steps = equal_steps(base, composed, budget, swept="run.steps" in axes)
            composed["run"]["steps"] = steps
            check.validated(composed, world_size)
        except LaunchError as error:
            raise LaunchError(f"{label}: {error}") from error
        overrides = [*(o for o in overrides if not o.startswith("run.steps=")), f"run.steps={steps}"]
        points.append(Point(label, chosen, overrides, steps))
    if len({p.name for p in points}) < len(points):
        raise LaunchError(
            f"two points of sweep={name} would have the same directory: their values differ in punctuation only"
        )
    return points


def equal_steps(base: dict[str, Any], point: dict[str, Any], budget: str, swept: bool) -> int:
    """Steps that give `point` as many tokens, or training FLOPs, as the base configuration has.

    `base`, `point`: composed configurations. `swept`: run.steps is an axis, so the point keeps its own.
    """
    if budget == "steps" or swept:
        return int(point["run"]["steps"])
    cost = _tokens_per_step if budget == "tokens" else flops_per_step
    return max(1, round(base["run"]["steps"] * cost(base) / max(cost(point), 1)))


def _tokens_per_step(values: dict[str, Any]) -> float:
    return values["seq_len"] * values["run"]["samples_per_step"]


def flops_per_step(values: dict[str, Any]) -> float:
    """FLOPs of a step's forward and backward, as the trainer counts them, with one document in each sample."""
    from train.report.records import flops_per_sample

    trained = check.validated({**values, "run": {**values["run"], "samples_per_step": 1}, "parallel": {}}, 1)
    model = dataclasses.replace(trained.model, vocab_size=trained.model.vocab_size or trained.data.vocab_size)
    return float(flops_per_sample(model, trained.seq_len)) * values["run"]["samples_per_step"]


def _preset(name: str) -> dict[str, Any]:
    path = CONFIGS / "sweep" / f"{name}.yaml"
    return yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _merged(directory: Path, stored: Sweep | None, points: list[Point]) -> list[Point]:
    """`points` and the other stored points. Raises `LaunchError` if a stored point has other settings now."""
    before = {p.name: p for p in stored.points} if stored else {}
    for point in points:
        old = before.pop(point.name, None)
        changed = old and sorted(o for o in set(old.overrides) ^ set(point.overrides) if not _is_location(o, directory))
        if changed:
            raise LaunchError(
                f"{directory} was started with other settings: {point.name} differs in {', '.join(changed)}; "
                "choose another sweep=NAME, or remove the directory"
            )
    return [*before.values(), *points]


def _is_location(override: str, directory: Path) -> bool:
    """Whether the override only locates the sweep: run.root, which has several spellings, or an unquoted W&B group."""
    return override.startswith("run.root=") or override.replace("'", "") == f"logging.wandb_group={directory.name}"


def read(directory: Path) -> Sweep | None:
    """The stored plan; None if there is none. Raises `LaunchError` for a damaged file."""
    try:
        values = json.loads((directory / "sweep.json").read_text(encoding="utf-8"))
        return Sweep(**{**values, "points": [Point(**p) for p in values["points"]]})
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise LaunchError(f"{directory / 'sweep.json'} cannot be read: {error}") from error


def write(directory: Path, sweep: Sweep) -> None:
    """Store the plan. Raises `LaunchError` if the directory cannot be created."""
    runs.make_directory(directory)
    temporary = directory / "sweep.json.tmp"
    temporary.write_text(json.dumps(asdict(sweep), indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, directory / "sweep.json")
