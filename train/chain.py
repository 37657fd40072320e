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
from train.checkpoint import locate, storage
from train.checkpoint.storage import CheckpointError, CheckpointPath
from train.config.conversion import from_mapping, to_mapping
from train.config.errors import ConfigError, RunError
from train.config.schema import USER_ERRORS, TrainConfig
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
    own_share = 1.0
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
            stages.check_inherited(link.stage, link.model, f"the stage before {name}", before, own_share)
        found.append(link)
        own_share = link.stage.summary_projection_weight(link.run.steps, link.run.steps)
        if own_share == 0:  # an annealed model has no summary projections any more
            settings["model"]["independent_qkv"] = False
    return found


def run(config: TrainConfig) -> RunResult:
    """Train all stages that are not finished yet; the result is that of the last one that ran.

    Raises what `train` raises. A stage that cannot start is a `RunError` if one before it has trained in this call.
    """
    from train.trainer import train  # takes seconds, which a refused configuration should not wait for

    began = time.monotonic()
    result, has_trained = None, False
    runs = links(config)
    done = finished_before(runs)
    for number, link in enumerate(runs):
        if number in done:
            if environment_world()[0] == 0:
                print(
                    f"stage {number + 1} of {len(runs)}: {link.run.name} has no checkpoint any more; a later stage "
                    "began with it, so it is done",
                    flush=True,
                )
            continue
        if config.run.max_minutes is not None:
            left = config.run.max_minutes - (time.monotonic() - began) / 60
            link = dataclasses.replace(link, run=dataclasses.replace(link.run, max_minutes=max(left, 1e-3)))
        if environment_world()[0] == 0:
            origin = f", begins with {link.init_from}" if link.init_from else ""
            print(
                f"stage {number + 1} of {len(config.stages)}: {link.run.name} ({link.stage.kind}){origin}", flush=True
            )
        try:
            result = train(link)
        except USER_ERRORS as error:
            if not has_trained:
                raise
            raise RunError(
                f"stage {number + 1} of {len(runs)} ({link.run.name}) cannot start: {error}; the stages before it are "
                "done, and the same command goes on with this one"
            ) from error
        has_trained = has_trained or result.trained
        if result.step < link.run.steps:  # asked to stop: the next stage needs this one to be finished
            break
    assert result is not None
    return result


def finished_before(runs: list[TrainConfig]) -> set[int]:
    """The stages that are done although none of their checkpoints is left: a later stage has begun with one.

    Raises `ConfigError` where a stage would train, or is another one, and a later stage has begun already: that one
    would go on with weights that come from what the stage was before.
    """
    if runs[0].resume == "never":  # every stage begins again
        return set()
    newest = [_newest(link) for link in runs]
    begun = [number for number, checkpoint in enumerate(newest) if checkpoint is not None]
    for number in range(max(begun, default=0)):
        link, held, after = runs[number], newest[number], newest[number + 1]
        later = runs[next(n for n in begun if n > number)]
        if held is not None and held.step < link.run.steps:
            raise ConfigError(
                f"stage {number + 1} ({link.run.name}) is at step {held.step} of run.steps={link.run.steps}, and "
                f"{later.run.name} began with its end before it was made longer: set its length back, or choose "
                f"another run.name for the chain, or rename {later.run.directory} and the stages after it, which then "
                "train again"
            )
        origin = None if after is None else _began_with(after)
        if origin not in (None, link.run.name.rsplit("/", 1)[-1]):
            raise ConfigError(
                f"{runs[number + 1].run.name} began with {origin}, and its stage before is now {link.run.name}: set "
                "the names and the order of the stages back, or choose another run.name for the chain"
            )
    return {number for number in range(max(begun, default=0)) if newest[number] is None}


def _newest(link: TrainConfig) -> CheckpointPath | None:
    checkpoints = storage.finished(locate.checkpoint_directory(link.run.directory, link.checkpoint.dir, link.run.name))
    return checkpoints[-1] if checkpoints else None


def _began_with(checkpoint: CheckpointPath) -> str | None:
    """The last part of the `init_from` under which a stage's checkpoint was written, or None."""
    try:
        origin = locate.read_state(checkpoint).get("config", {}).get("init_from")
    except CheckpointError:
        return None  # damaged: the start of the stage reports it
    return None if origin is None else str(origin).rstrip("/").rsplit("/", 1)[-1]


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
