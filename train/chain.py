"""Several stages in one command: each a run of its own, which begins with what the one before it left.

    stages:
      - {name: 8k, tokens: 2.5e11, seq_len: 8192, optim.lr: 4.0e-4}
      - {name: 32k, stage: extend, run.steps: 1600, seq_len: 32768, optim.lr: 1.0e-5}

A stage keeps the settings of the one before it, apart from `stage.*`, and names what is new by dotted keys. It writes
to `{run.root}/{run.name}/{number}-{name}`. Started again, the chain passes over stages that are finished and resumes
the one that is not.
"""

from __future__ import annotations

import dataclasses
import re
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from train import stages
from train.config import ConfigError, TrainConfig, from_mapping, to_mapping
from train.parallel import environment_world

if TYPE_CHECKING:
    from train.trainer import RunResult

_NAME = re.compile(r"[\w.+=-]+")


def links(config: TrainConfig) -> list[TrainConfig]:
    """The configuration of every stage of `config.stages`, in order. Raises `ConfigError`."""
    if config.resume not in ("auto", "never"):
        raise ConfigError(
            f"resume={config.resume} cannot say which of {len(config.stages)} stages it is for: leave it at auto and "
            "give init_from, with which the first begins"
        )
    settings = to_mapping(config) | {"stages": []}
    fresh_stage = settings["stage"]
    found: list[TrainConfig] = []
    for number, changes in enumerate(config.stages):
        place = f"stages[{number}]"
        changes = dict(changes)
        # The model as the stage before leaves it; its vocabulary may still be the tokenizer's to say.
        before = {key: value for key, value in settings["model"].items() if key != "vocab_size" or value is not None}
        name = str(changes.pop("name", ""))
        if not _NAME.fullmatch(name):
            raise ConfigError(f"{place}: name={name!r} must be a word: it names the directory of the stage")
        if found:
            settings["init_from"] = f"{found[-1].checkpoint.dir or config.run.root}/{found[-1].run.name}"
        settings["stage"] = fresh_stage | ({"kind": changes.pop("stage")} if "stage" in changes else {})
        tokens = changes.pop("tokens", None)
        if (tokens is None) == ("run.steps" not in changes):
            raise ConfigError(f"{place} ({name}): give its length as either tokens or run.steps")
        for key, value in changes.items():
            _set(settings, str(key), value)
        if tokens is not None:
            settings["run"]["steps"] = _steps(tokens, settings, f"{place} ({name})")
        settings["run"]["name"] = f"{config.run.name}/{number}-{name}"
        link = from_mapping(TrainConfig, settings)
        if found:  # now, and not when the stage before it has trained for days
            stages.check_inherited(link.stage, link.model, f"the stage before {name}", before)
        found.append(link)
        # What is left of an annealed model has no projections of its own any more.
        if link.stage.own_share(link.run.steps, link.run.steps) == 0:
            settings["model"]["independent_qkv"] = False
    return found


def run(config: TrainConfig) -> RunResult:
    """Train all stages that are not finished yet; the result is that of the last one that ran."""
    from train.trainer import train  # seconds of imports, which a refused configuration need not wait for

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
        if result.step < link.run.steps:  # asked to stop: what comes after needs all of it
            break
    assert result is not None
    return result


def _set(settings: dict[str, Any], key: str, value: Any) -> None:
    """Set the dotted `key`; one that does not exist is left for `from_mapping` to refuse."""
    *sections, last = key.split(".")
    for section in sections:
        settings = settings.setdefault(section, {})
        if not isinstance(settings, dict):
            raise ConfigError(f"stages: {key} is not a configuration key")
    if not sections and isinstance(value, Mapping) and isinstance(settings.get(key), dict):
        settings[key] = settings[key] | dict(value)  # some keys of a group; the others stay
    else:
        settings[last] = value


def _steps(tokens: Any, settings: Mapping[str, Any], place: str) -> int:
    per_step = settings["seq_len"] * settings["run"]["samples_per_step"]
    try:
        steps = -(-float(tokens) // per_step)
    except (TypeError, ValueError):
        steps = 0.0
    if steps < 1:
        raise ConfigError(f"{place}: tokens={tokens!r} must be a number of tokens, at least 1")
    return int(steps)
