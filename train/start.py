"""Where a run starts: it resumes a checkpoint, begins with the weights of another model, or begins afresh."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from train import stages
from train.checkpoint import locate
from train.checkpoint.storage import CheckpointPath, finished, is_restorable
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
    if config.resume != "never" and not finished(own) and not is_restorable(own):
        check_nothing_is_missing(config.run.directory, config.resume, own)
    found = locate.find(config.resume, own)
    if found is not None:
        return Resume(found)
    if config.init_from is None:
        return Fresh()
    if config.init_from.startswith(import_weights.HF_PREFIX):
        import_weights.check(config)
        return Import()
    found = locate.find(config.init_from, "", key="init_from")
    assert found is not None
    before = locate.read_state(found).get("config", {}).get("model", {})
    stages.check_inherited(config.stage, config.model, str(found), before)
    return Inherit(found)


def tokenizer_of(config: TrainConfig, start: Start) -> Owned | None:
    """The tokenizer that the weights of `start` belong to; None for weights that no one has trained yet."""
    match start:
        case Import():
            assert config.init_from is not None
            return tokenizers.of_import(config.init_from.removeprefix(import_weights.HF_PREFIX))
        case Inherit(checkpoint):
            return tokenizers.of_checkpoint(checkpoint, Path(config.init_from or ""))
        case Resume(checkpoint):
            return tokenizers.of_checkpoint(checkpoint, config.run.directory, Path(config.resume))
    return None


def with_tokenizer(config: TrainConfig, owned: Owned | None) -> TrainConfig:
    """`config` with the tokenizer of the weights, where it names none. Raises `ConfigError` where they do not fit."""
    return config if owned is None else tokenizers.choose(config, owned)
