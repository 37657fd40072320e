"""The state of a run: what a checkpoint holds, and how a run begins with it, loads it and saves it."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from data_pipeline import Tokenizer, TrainingData
from train import stages
from train.build import build_engine, make_loader
from train.checkpoint import locate
from train.checkpoint.manager import Checkpoints, Progress
from train.checkpoint.storage import CheckpointError, CheckpointPath
from train.config.conversion import flatten, to_mapping
from train.config.quoting import override
from train.config.schema import TrainConfig
from train.distributed import same_start
from train.distributed.groups import World
from train.distributed.ranks import Ranks
from train.health import SpikeDetector
from train.hf import import_weights
from train.hf.tokenizers import VOCABULARY
from train.logs import saved
from train.start import Fresh, Import, Inherit, Resume, Start, changes_of_resumed, checkpoint_directory, is_own


class TrainState:
    """Weights and optimizer (`engine`), position in the data (`loader`), recent losses (`spikes`), and `checkpoints`.

    Collective: every rank makes the same calls in the same order.
    """

    def __init__(self, config: TrainConfig, world: World, data: TrainingData, log_line: Callable[[str], None]):
        """Fresh weights, and the loader at the first sample. `log_line` takes a line for the user."""
        self._config, self._world, self._log_line = config, world, log_line
        self._data_fingerprint = data.fingerprint
        self._vocabulary_sha256 = Tokenizer(data.tokenizer_path, config.data.end_token).vocabulary_sha256
        self._tokenizer_sha256 = hashlib.sha256(Path(data.tokenizer_path).read_bytes()).hexdigest()
        self.loader = make_loader(config, data, world)
        same_start.check_plan(Ranks(world.store, world.rank, world.size, "plan", log_line), self.loader.state())
        self.engine = build_engine(config, world)
        self.spikes = SpikeDetector(config.run.spike_factor)
        self.checkpoints = Checkpoints(
            checkpoint_directory(config), self.engine, world, config.checkpoint, log=log_line
        )
        self.checkpoints.on_saved = saved.remember(config.run.directory, config.resume, log_line)

    # -- beginning -----------------------------------------------------------------------------------------------------

    def verify(self, start: Start) -> Start:
        """`start`, with a verified checkpoint where the run resumes one.

        The run's own checkpoints come first, also one that no rank could find before: opening `checkpoints` has
        restored it if the process was killed while it replaced it. Raises `CheckpointError`.
        """
        known = start.checkpoint if isinstance(start, Resume) and start.state is not None else None
        found = self.checkpoints.choose(self._config.resume, known=known)
        if found is not None:
            if known is not None and str(known) == str(found):
                return start
            state = locate.read_state(found)  # it may be one that could not be found before
            changes_of_resumed(self._config, found, state)
            return Resume(found, state)
        match start:
            case Resume(checkpoint):
                raise CheckpointError(f"{checkpoint} was removed while the run was starting: start it again")
            case Inherit(checkpoint):
                found = self.checkpoints.find(self._config.init_from or "", "init_from", checkpoint)
                return start if str(found) == str(checkpoint) else Inherit(found, locate.read_state(found))
        return start

    def begin(self, start: Start) -> Progress:
        """Take over what `start` names; returns how far the run is. Raises `CheckpointError`."""
        match start:
            case Resume(checkpoint, state):
                return self.load(checkpoint, state)
            case Inherit(checkpoint, state):
                self._inherit(checkpoint, state)
            case Import():
                self._log_line(import_weights.initialise(self.engine, self._world, self._config))
            case Fresh():
                pass
        return Progress(step=0, tokens=0, loader=self.loader.state())

    def load(self, checkpoint: CheckpointPath, state: dict[str, Any] | None = None) -> Progress:
        """Go on from a verified checkpoint of this run, or of one that this run continues. `state`: its state.json."""
        state = locate.read_state(checkpoint) if state is None else state
        self._check_tokenizer(checkpoint, state)
        self._check_projections(checkpoint, state)
        progress, _ = self.checkpoints.load(checkpoint, self._config.run.seed, state)
        self.loader.load_state(progress.loader)
        self._check_held_out(checkpoint, state)
        self.spikes = SpikeDetector(self._config.run.spike_factor, progress.health.get("recent_losses", ()))
        return progress

    def _inherit(self, checkpoint: CheckpointPath, state: dict[str, Any]) -> None:
        """Begin with another run's weights; where the data are the same, with the samples it has not seen."""
        config = self._config
        # Again, because the size of the vocabulary is known now.
        before = state.get("config", {}).get("model", {})
        stages.check_inherited(config.stage, config.model, str(checkpoint), before, state.get("own_share", 1.0))
        self._check_tokenizer(checkpoint, state)
        if config.stage.inherits_moments:
            self.checkpoints.inherit(checkpoint, state)
        else:
            self.checkpoints.verify(checkpoint)
            self._log_line(import_weights.initialise(self.engine, self._world, config, (checkpoint, state)))
        self._log_line(
            stages.describe_initialization(config.stage, str(checkpoint), state, flatten(to_mapping(config)))
        )
        if state.get("loader", {}).get("fingerprint") == self.loader.state()["fingerprint"]:
            self.loader.load_state(state["loader"])
            self._log_line(f"the data are the same: continuing at sample {state['loader']['next_sample']}")

    def _check_tokenizer(self, checkpoint: CheckpointPath, state: dict[str, Any]) -> None:
        tokenizer = state.get("tokenizer_sha256")
        if tokenizer not in (None, self._tokenizer_sha256):
            raise CheckpointError(
                f"{checkpoint} was trained with the tokenizer of sha256 {tokenizer[:12]}, this run has "
                f"{self._tokenizer_sha256[:12]}: give the tokenizer.model of that run as data.tokenizer"
            )

    def _check_held_out(self, checkpoint: CheckpointPath, state: dict[str, Any]) -> None:
        """The loader compares the documents to train on; the run's own checkpoint also knows the held-out ones."""
        others = state.get("data_fingerprint") not in (None, self._data_fingerprint)
        if others and is_own(self._config, checkpoint) and not self._config.data.accept_changes:
            raise CheckpointError(
                f"data.validation_path={self._config.data.validation_path}: the held-out documents are not those that "
                f"{checkpoint} was validated with, so its losses could not be compared; set them back, or continue "
                "with data.accept_changes=true"
            )

    def _check_projections(self, checkpoint: CheckpointPath, state: dict[str, Any]) -> None:
        """Summary projections that were annealed away are in no checkpoint; a longer run would need them again."""
        steps, model = self._config.run.steps, self._config.model
        weight = self._config.stage.summary_projection_weight(state["step"], steps)
        if model.independent_qkv and model.has_summaries and weight > 0 and state.get("own_share", 1.0) == 0:
            raise CheckpointError(
                f"{checkpoint} has no summary projections any more: they were annealed away at step {state['step']}, "
                f"and with run.steps={steps} they would have a weight of {weight:.2f} again. Go on in another run with "
                f"stage=extend model.independent_qkv=false "
                f"{override('init_from', str(self._config.run.directory))}"
            )

    # -- saving --------------------------------------------------------------------------------------------------------

    def save(self, step: int, tokens: int, last: bool, health: dict[str, Any]) -> float:
        """Begin to save the state after `step`; returns the seconds that training stood still.

        `health`: see `train.checkpoint.retention`. `last`: wait until it is written; raises `SaveError` if that fails.
        """
        config = self._config
        weight = config.stage.summary_projection_weight(step, config.run.steps)
        independent = config.model.independent_qkv and weight > 0
        model = dataclasses.replace(config.model, independent_qkv=independent)
        facts = {
            "config": to_mapping(dataclasses.replace(config, model=model)),
            "own_share": weight,
            "data_fingerprint": self._data_fingerprint,
            "tokenizer_sha256": self._tokenizer_sha256,
            VOCABULARY: self._vocabulary_sha256,
        }
        progress = Progress(step, tokens, self.loader.state(), {"recent_losses": self.spikes.recent, **health})
        save = self.checkpoints.save_last if last else self.checkpoints.save
        return save(progress, facts, partial(stages.is_dropped, summary_projection_weight=weight))
