"""Several stages in one command. Each is a run that begins with the checkpoint of the one before it.

    stages:
      - {name: 8k, tokens: 2.5e11, seq_len: 8192, optim.lr: 4.0e-4}
      - {name: 32k, stage: extend, run.steps: 1600, seq_len: 32768, optim.lr: 1.0e-5}

A stage keeps the settings of the one before it, except for `stage.*`, and sets new ones by dotted keys. It writes to
`{run.root}/{run.name}/{number}-{name}`. A chain that is started again skips finished stages and resumes the one that
is not finished.
"""

from __future__ import annotations

import dataclasses
import re
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from train import stages
from train.config.conversion import from_mapping, to_mapping
from train.config.errors import ConfigError
from train.config.schema import TrainConfig
from train.distributed.environment import environment_world

if TYPE_CHECKING:
    from train.trainer import RunResult

_NAME = re.compile(r"[\w.+=-]+")


def links(config: TrainConfig) -> list[TrainConfig]:
    """The configuration of every stage of `config.stages`, in order. Raises `ConfigError`."""
    if config.resume not in ("auto", "never"):
        raise ConfigError(
            f"resume={config.resume} does not tell which of the {len(config.stages)} stages it is for: leave it at "
            "auto, and give init_from for the first stage"
        )
    settings = to_mapping(config) | {"stages": []}
    fresh_stage = settings["stage"]
    found: list[TrainConfig] = []
    for number, changes in enumerate(config.stages):
        key = f"stages[{number}]"
        changes = dict(changes)
        # The model as the stage before leaves it. A vocabulary of None is filled in from the tokenizer later.
        before = {key: value for key, value in settings["model"].items() if key != "vocab_size" or value is not None}
        name = str(changes.pop("name", ""))
        if not _NAME.fullmatch(name):
            raise ConfigError(f"{key}: name={name!r} must be a word, because the stage's directory gets this name")
        if found:
            settings["init_from"] = f"{found[-1].checkpoint.dir or config.run.root}/{found[-1].run.name}"
        settings["stage"] = fresh_stage | ({"kind": changes.pop("stage")} if "stage" in changes else {})
        tokens = changes.pop("tokens", None)
        if (tokens is None) == ("run.steps" not in changes):
            raise ConfigError(f"{key} ({name}): give its length as either tokens or run.steps")
        for changed, value in changes.items():
            _set(settings, str(changed), value)
        if tokens is not None:
            settings["run"]["steps"] = _steps(tokens, settings, f"{key} ({name})")
        settings["run"]["name"] = f"{config.run.name}/{number}-{name}"
        link = from_mapping(TrainConfig, settings)
        if found:  # here, because at the start of the stage the ones before it may have trained for days
            stages.check_inherited(link.stage, link.model, f"the stage before {name}", before)
        found.append(link)
        # An annealed model has no summary projections any more.
        if link.stage.summary_projection_weight(link.run.steps, link.run.steps) == 0:
            settings["model"]["independent_qkv"] = False
    return found


def run(config: TrainConfig) -> RunResult:
    """Train all stages that are not finished yet; the result is that of the last one that ran."""
    from train.trainer import train  # takes seconds, which a refused configuration should not wait for

    began = time.monotonic()
    result = None
    for number, link in enumerate(links(config)):
        if config.run.max_minutes is not None:
            left = config.run.max_minutes - (time.monotonic() - began) / 60
            link = dataclasses.replace(link, run=dataclasses.replace(link.run, max_minutes=max(left, 1e-3)))
        if environment_world()[0] == 0:
            origin = f", begins with {link.init_from}" if link.init_from else ""
            print(
                f"stage {number + 1} of {len(config.stages)}: {link.run.name} ({link.stage.kind}){origin}", flush=True
            )
        result = train(link)
        if result.step < link.run.steps:  # asked to stop: the next stage needs this one to be finished
            break
    assert result is not None
    return result


def _set(settings: dict[str, Any], key: str, value: Any) -> None:
    """Set the dotted `key`. `from_mapping` refuses keys that do not exist."""
    *sections, last = key.split(".")
    for section in sections:
        settings = settings.setdefault(section, {})
        if not isinstance(settings, dict):
            raise ConfigError(f"stages: {key} is not a configuration key")
    if not sections and isinstance(value, Mapping) and isinstance(settings.get(key), dict):
        settings[key] = settings[key] | dict(value)  # some keys of a group; the others keep their values
    else:
        settings[last] = value


def _steps(tokens: Any, settings: Mapping[str, Any], stage: str) -> int:
    """The number of steps that `tokens` take, rounded up."""
    per_step = settings["seq_len"] * settings["run"]["samples_per_step"]
    try:
        steps = -(-float(tokens) // per_step)
    except (TypeError, ValueError):
        steps = 0.0
    if steps < 1:
        raise ConfigError(f"{stage}: tokens={tokens!r} must be a number of tokens, at least 1")
    return int(steps)
