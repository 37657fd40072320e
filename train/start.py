"""Where a run starts: it resumes a checkpoint, begins with the weights of another model, or begins afresh."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from train import stages
from train.checkpoint import locate
from train.checkpoint.storage import CheckpointError, CheckpointPath, finished, is_restorable
from train.config import differences, run_directory
from train.config.conversion import flatten, to_mapping
from train.config.differences import Differences
from train.config.schema import TrainConfig
from train.hf import import_weights, tokenizers
from train.hf.tokenizers import Owned
from train.logs.saved import check_nothing_is_missing


@dataclass(frozen=True)
class Resume:
    """Go on from `checkpoint`: weights, optimizer, position in the data, random generators."""

    checkpoint: CheckpointPath


@dataclass(frozen=True)
class Inherit:
    """Begin at step 0 with the weights of another run's `checkpoint` (`init_from=RUN`)."""

    checkpoint: CheckpointPath


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


def find_start(config: TrainConfig) -> Start:
    """Where the run of `config` starts.

    Needs no process group and no data, so a wrong path is refused before those are prepared. Checkpoints are not
    verified here; `TrainState.verify` does that once all ranks are there. Raises one of `USER_ERRORS`.
    """
    own = checkpoint_directory(config)
    try:
        _check_own_checkpoints(config, own)
        if config.resume != "never" and not finished(own) and not is_restorable(own):
            check_nothing_is_missing(config.run.directory, config.resume, own)
        found = locate.find(config.resume, own)
    except OSError as error:  # a name that is too long, no permission, a file system that does not answer
        raise CheckpointError(
            f"checkpoint.dir={config.checkpoint.dir} and resume={config.resume}: checkpoints cannot be read "
            f"({error.strerror or error}): name a directory that can be read and written"
        ) from error
    if found is not None:
        if is_own(config, found) and not _is_readable(found):
            # `TrainState.verify` quarantines it. Until then the newest one that can be read stands for it.
            readable = (checkpoint for checkpoint in reversed(finished(own)) if _is_readable(checkpoint))
            if (intact := next(readable, None)) is None:
                return Resume(found)
            found = intact
        changes_of_resumed(config, found)
        return Resume(found)
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
    return Inherit(found)


def tokenizer_of(config: TrainConfig, start: Start) -> Owned | None:
    """The tokenizer that the weights of `start` belong to; None for weights that no one has trained yet."""
    match start:
        case Import():
            assert config.init_from is not None
            return tokenizers.of_import(config.init_from.removeprefix(import_weights.HF_PREFIX))
        case Inherit(checkpoint):
            return tokenizers.of_checkpoint(checkpoint, Path(config.init_from or ""))
        case Resume(checkpoint) if _is_readable(checkpoint):
            return tokenizers.of_checkpoint(checkpoint, config.run.directory, Path(config.resume))
    return None


def with_tokenizer(config: TrainConfig, owned: Owned | None) -> TrainConfig:
    """`config` with the tokenizer of the weights, where it names none. Raises `ConfigError` where they do not fit."""
    return config if owned is None else tokenizers.choose(config, owned)


def changes_of_resumed(config: TrainConfig, checkpoint: CheckpointPath) -> str:
    """The settings that differ from those `checkpoint` was written with, in words; empty where none does.

    Raises `CheckpointError` where the run of `config` cannot go on from it: a checkpoint in the run's own directory
    that another run wrote, one of another model, or an import from the middle of
    annealing.
    """
    found = _differences(config, checkpoint)
    if is_own(config, checkpoint):
        _refuse_another_run(config, checkpoint, found)
    model = {key: pair for key, pair in found.items() if _is_of_model(key)}
    if model:
        raise CheckpointError(
            f"{checkpoint} is of another model or stage: {differences.in_words(model)}; set them back, or give "
            f"init_from={checkpoint} in place of resume to begin a new run with its weights"
        )
    own_share = locate.read_state(checkpoint).get("own_share", 1.0)
    if 0 < own_share < 1 and config.stage.kind != "anneal":  # imported: a run's own checkpoint has its own stage
        raise CheckpointError(
            f"{checkpoint} was imported from the middle of annealing (mix_coeff={own_share:g}), which stage.kind="
            f"{config.stage.kind} does not continue; sample, evaluate or export it, and train from a checkpoint whose "
            "annealing is finished"
        )
    return differences.in_arrows(
        {key: pair for key, pair in found.items() if not differences.under(key, differences.UNREPORTED)}
    )


def _is_readable(checkpoint: CheckpointPath) -> bool:
    try:
        locate.read_state(checkpoint)
    except CheckpointError:
        return False
    return True


def _check_own_checkpoints(config: TrainConfig, own: CheckpointPath) -> None:
    """Refuse a directory of checkpoints that another run writes to, however the run begins: it would prune them."""
    checkpoints = finished(own)
    for checkpoint in reversed(checkpoints):
        try:
            found = _differences(config, checkpoint)
        except CheckpointError:
            continue  # damaged: choosing one reports it
        _refuse_another_run(config, checkpoint, found)
        return
    if not checkpoints and config.resume == "auto":
        _check_left_behind(config, own)


def _check_left_behind(config: TrainConfig, own: CheckpointPath) -> None:
    """Refuse to begin again where the run's checkpoints are in another directory, by its config.yaml."""
    directory = config.run.directory
    if not (directory / run_directory.CONFIG).is_file():
        return
    before = run_directory.read_config(directory)
    place = locate.checkpoint_directory(directory, before.checkpoint.dir, before.run.name)
    if str(place) == str(own):
        return
    if checkpoints := finished(place):
        raise CheckpointError(
            f"checkpoint.dir={config.checkpoint.dir} and run.name={config.run.name} name {own}, which holds no "
            f"checkpoint, but {directory} has its checkpoints in {place} (the newest is {checkpoints[-1].name}): move "
            f"them there, or give resume={place} to go on from them, or resume=never to start from scratch"
        )


def _differences(config: TrainConfig, checkpoint: CheckpointPath) -> Differences:
    """What differs between the configuration in a checkpoint and that of now."""
    state, now = locate.read_state(checkpoint), flatten(to_mapping(config))
    found = differences.differences(state.get("config", {}), now)
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
