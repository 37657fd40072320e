"""Where a run starts: it resumes a checkpoint, begins with the weights of another model, or begins afresh."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from train import stages
from train.checkpoint import locate
from train.checkpoint.storage import CheckpointError, CheckpointPath, finished, is_restorable
from train.config import differences
from train.config.conversion import flatten, to_mapping
from train.config.differences import Differences
from train.config.schema import TrainConfig
from train.distributed.ranks import Ranks
from train.hf import import_weights, tokenizers
from train.hf.tokenizers import Owned
from train.logs.saved import check_nothing_is_missing

State = dict[str, Any]  # what state.json of a checkpoint holds


@dataclass(frozen=True)
class Resume:
    """Go on from `checkpoint`: weights, optimizer, position in the data, random generators."""

    checkpoint: CheckpointPath
    state: State | None = field(default=None, repr=False)  # None: it cannot be read


@dataclass(frozen=True)
class Inherit:
    """Begin at step 0 with the weights of another run's `checkpoint` (`init_from=RUN`)."""

    checkpoint: CheckpointPath
    state: State = field(repr=False)


@dataclass(frozen=True)
class Import:
    """Begin at step 0 with the weights of a Hugging Face directory (`init_from=hf:DIR`)."""


@dataclass(frozen=True)
class Fresh:
    """Begin at step 0 with weights drawn from the seed."""


Start = Resume | Inherit | Import | Fresh


def checkpoint_directory(config: TrainConfig) -> CheckpointPath:
    """Where the run keeps its own checkpoints."""
    return locate.checkpoint_directory(config.run.directory, config.checkpoint.dir, config.run.name)


def choose_start(config: TrainConfig, ranks: Ranks) -> Start:
    """Where the run of `config` starts, as the main rank finds it. Collective; raises one of `USER_ERRORS`.

    Another run may save while this one starts, so ranks that each looked for the newest checkpoint could choose
    different ones.
    """
    start: Start = Fresh()
    with ranks.failing_together():
        if ranks.is_main:
            start = find_start(config)
    told = json.dumps([type(start).__name__, str(getattr(start, "checkpoint", ""))])
    kind, location = json.loads(ranks.from_main(told, "rank 0, which looks for the checkpoint to begin with"))
    if ranks.is_main:
        return start
    with ranks.failing_together():
        if kind == Import.__name__:
            import_weights.check(config)
            return Import()
        if kind == Fresh.__name__:
            return Fresh()
        checkpoint = CheckpointPath(location)
        if kind == Inherit.__name__:
            return Inherit(checkpoint, locate.read_state(checkpoint))
        return Resume(checkpoint, _readable(checkpoint))
    raise AssertionError("not reached")


def find_start(config: TrainConfig) -> Start:
    """Where the run of `config` starts, as this process finds it.

    Needs no process group and no data, so a wrong path is refused before those are prepared. Checkpoints are not
    verified here; `TrainState.verify` does that once all ranks are there. Raises one of `USER_ERRORS`.
    """
    own = checkpoint_directory(config)
    try:
        resumed = _find_resumed(config, own)
    except OSError as error:  # a name that is too long, no permission, a file system that does not answer
        raise CheckpointError(
            f"checkpoint.dir={config.checkpoint.dir} and resume={config.resume}: checkpoints cannot be read "
            f"({error.strerror or error}): name a directory that can be read and written"
        ) from error
    if resumed is not None:
        if resumed.state is not None:
            changes_of_resumed(config, resumed.checkpoint, resumed.state)
        return resumed
    if config.init_from is None:
        return Fresh()
    if config.init_from.startswith(import_weights.HF_PREFIX):
        import_weights.check(config)
        return Import()
    found = locate.find(config.init_from, "", key="init_from")
    assert found is not None
    state = locate.read_state(found)
    before = state.get("config", {}).get("model", {})
    stages.check_inherited(config.stage, config.model, str(found), before, state.get("own_share", 1.0))
    return Inherit(found, state)


def _find_resumed(config: TrainConfig, own: CheckpointPath) -> Resume | None:
    """The checkpoint that the run goes on from; None: it begins at step 0.

    Of the run's own checkpoints that is the newest that can be read: `TrainState.verify` quarantines the others. They
    are refused where another run wrote them, however this one begins: it would prune them.
    """
    checkpoints = finished(own)
    newest = _newest_readable(checkpoints)
    if newest is not None:
        assert newest.state is not None
        _refuse_another_run(config, newest.checkpoint, _differences(config, newest.state))
    elif not checkpoints and config.resume != "never" and not is_restorable(own):
        check_nothing_is_missing(config, own)
    if config.resume == "never":
        return None
    if config.resume != "auto" and not locate.began_with(checkpoints, config.resume):
        found = locate.find(config.resume, own)
        assert found is not None
        if not is_own(config, found):
            return Resume(found, locate.read_state(found))
        if (state := _readable(found)) is not None:
            return Resume(found, state)
        checkpoints = checkpoints or [found]
    return newest or (Resume(checkpoints[-1]) if checkpoints else None)


def _newest_readable(checkpoints: list[CheckpointPath]) -> Resume | None:
    states = ((checkpoint, _readable(checkpoint)) for checkpoint in reversed(checkpoints))
    return next((Resume(checkpoint, state) for checkpoint, state in states if state is not None), None)


def _readable(checkpoint: CheckpointPath) -> State | None:
    try:
        return locate.read_state(checkpoint)
    except CheckpointError:
        return None


def tokenizer_of(config: TrainConfig, start: Start) -> Owned | None:
    """The tokenizer that the weights of `start` belong to; None for weights that no one has trained yet."""
    match start:
        case Import():
            assert config.init_from is not None
            return tokenizers.of_import(config.init_from.removeprefix(import_weights.HF_PREFIX))
        case Inherit(checkpoint, state):
            return tokenizers.of_checkpoint(checkpoint, state, Path(config.init_from or ""))
        case Resume(checkpoint, state) if state is not None:
            return tokenizers.of_checkpoint(checkpoint, state, config.run.directory, Path(config.resume))
    return None


def with_tokenizer(config: TrainConfig, owned: Owned | None) -> TrainConfig:
    """`config` with the tokenizer of the weights, where it names none. Raises `ConfigError` where they do not fit."""
    return config if owned is None else tokenizers.choose(config, owned)


def changes_of_resumed(config: TrainConfig, checkpoint: CheckpointPath, state: State) -> str:
    """The settings that differ from those `checkpoint` was written with, in words; empty where none does.

    `state`: its state.json.

    Raises `CheckpointError` where the run of `config` cannot go on from it: a checkpoint in the run's own directory
    that another run wrote, one of another model, or an import from the middle of annealing.
    """
    found = _differences(config, state)
    if is_own(config, checkpoint):
        _refuse_another_run(config, checkpoint, found)
    model = {key: pair for key, pair in found.items() if _is_of_model(key)}
    if model:
        raise CheckpointError(
            f"{checkpoint} is of another model or stage: {differences.in_words(model)}; set them back, or give "
            f"init_from={checkpoint} in place of resume to begin a new run with its weights"
        )
    own_share = state.get("own_share", 1.0)
    if 0 < own_share < 1 and config.stage.kind != "anneal":  # imported: a run's own checkpoint has its own stage
        raise CheckpointError(
            f"{checkpoint} was imported from the middle of annealing (mix_coeff={own_share:g}), which stage.kind="
            f"{config.stage.kind} does not continue; sample, evaluate or export it, and train from a checkpoint whose "
            "annealing is finished"
        )
    return differences.in_arrows(
        {key: pair for key, pair in found.items() if not differences.under(key, differences.UNREPORTED)}
    )


def _differences(config: TrainConfig, state: State) -> Differences:
    """What differs between the configuration in a checkpoint, whose state.json is `state`, and that of now."""
    found = differences.differences(state.get("config", {}), flatten(to_mapping(config)))
    found.pop("model.vocab_size", None)  # filled in from the tokenizer, whose hash and shape are compared later
    if state.get("own_share", 1.0) == 0:  # the summary projections were annealed away
        found.pop("model.independent_qkv", None)
    return found


def _refuse_another_run(config: TrainConfig, checkpoint: CheckpointPath, found: Differences) -> None:
    changed = differences.of_another_run(found)
    if changed:
        place = "" if config.checkpoint.dir is None else f"checkpoint.dir={config.checkpoint.dir}: "
        raise CheckpointError(
            f"{place}{checkpoint} was written by another run: {differences.in_words(changed)}; choose another run.name "
            "for a new run, or set them back to go on with that one"
        )


def is_own(config: TrainConfig, checkpoint: CheckpointPath) -> bool:
    """Whether a checkpoint lies where the run of `config` keeps its own."""
    return str(checkpoint).startswith(f"{checkpoint_directory(config)}/")


def _is_of_model(key: str) -> bool:
    return differences.under(key, differences.SAME_MODEL) and not differences.under(key, differences.CHANGEABLE)
