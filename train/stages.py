"""Stages of a training recipe: what each trains, adds to the loss, and takes from the run before.

    scratch  all weights, the language-model loss, from fresh weights (or others' weights, with `init_from`)
    distill  summary parameters against the same model without summaries (`ksa_model.distillation`)
    anneal   the summaries' own queries, keys and values give way to text's, and are then dropped
    extend   the same model at another length, RoPE base, RoPE scaling and data

What a stage is follows from its configuration and the step alone, so a run that is resumed in the middle of one goes
on as if it had never stopped. `train.chain` runs several in a row. Source of the recipe: arXiv 2604.24432.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ksa_model.config import ModelConfig

if TYPE_CHECKING:
    from ksa_model.distillation import Distillation

KINDS = ("scratch", "distill", "anneal", "extend")
OWN_PROJECTIONS = ("summary_query", "summary_key", "summary_value")
# What an extension may change of the model: where positions turn, and how attention is computed.
EXTENDABLE = ("rope_base", "rope_scaling", "attention_backend")


class StageError(ValueError):
    """A stage that does not fit the model, or the run that it goes on from."""


@dataclass(frozen=True)
class StageConfig:
    """One stage. The weights are those of `distill`, the steps those of `anneal`."""

    kind: str = "scratch"
    train: str = "auto"  # all | summary (their embedding and own q/k/v) | auto: summary in distill, else all
    lm_weight: float = 1.0
    kl_weight: float = 5.0
    attention_weight: float = 5.0
    anneal_from: int = 0  # the last step at which summaries are projected by their own weights alone
    anneal_to: int | None = None  # the first at which those have no part; null: when the stage ends

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise StageError(f"stage.kind={self.kind!r} is not one of {', '.join(KINDS)}")
        if self.train not in ("auto", "all", "summary"):
            raise StageError(f"stage.train={self.train!r} is not one of auto, all, summary")
        weights = (self.lm_weight, self.kl_weight, self.attention_weight)
        if min(weights) < 0 or not any(weights):
            raise StageError(
                f"stage.lm_weight={self.lm_weight}, stage.kl_weight={self.kl_weight} and stage.attention_weight="
                f"{self.attention_weight} must not be negative, nor all 0"
            )
        if self.anneal_from < 0 or (self.anneal_to is not None and self.anneal_to <= self.anneal_from):
            raise StageError(
                f"stage.anneal_from={self.anneal_from} must be at least 0 and below stage.anneal_to={self.anneal_to}"
            )

    def check(self, model: ModelConfig, steps: int, init_from: str | None) -> None:
        """Raise `StageError` unless the stage makes sense for `model` in a run of `steps` steps."""
        if self.kind != "scratch" and init_from is None:
            raise StageError(f"stage.kind={self.kind} goes on from an earlier run: give init_from=runs/NAME")
        if self.kind in ("distill", "anneal") or self.train == "summary":
            what = f"stage.train={self.train}" if self.train == "summary" else f"stage.kind={self.kind}"
            if not model.has_summaries:
                raise StageError(
                    f"{what} is about summaries, and model.layer_pattern={model.layer_pattern!r} has no K layer"
                )
            if init_from is None:
                raise StageError("stage.train=summary leaves the other weights as they are: give init_from=runs/NAME")
        if self.kind == "anneal" and not model.independent_qkv:
            raise StageError("stage.kind=anneal needs model.independent_qkv=true: there is nothing to anneal away")
        if self.kind == "anneal" and self.anneal_from >= (self.anneal_to or steps):
            raise StageError(f"stage.anneal_from={self.anneal_from} leaves no step of run.steps={steps} to anneal in")

    def trains(self, name: str) -> bool:
        """Whether the parameter `name` is trained."""
        alone = self.train == "summary" or (self.train == "auto" and self.kind == "distill")
        return not alone or "summary" in name

    def objective(self) -> Distillation | None:
        """What replaces the language-model loss, with sums of its own; None where nothing does."""
        if self.kind != "distill":
            return None
        # seconds of imports, which a refused configuration need not wait for
        from ksa_model.distillation import Distillation

        return Distillation(self.lm_weight, self.kl_weight, self.attention_weight)

    def own_share(self, step: int, steps: int) -> float:
        """Share of the summaries' own projections after `step` of `steps` steps: 1, then linearly to 0."""
        if self.kind != "anneal":
            return 1.0
        last = steps if self.anneal_to is None else self.anneal_to
        return min(1.0, max(0.0, (last - step) / (last - self.anneal_from)))

    @property
    def inherits_moments(self) -> bool:
        """Whether the optimizer goes on with what it had: the same weights under the same loss."""
        return self.kind == "extend"


def is_dropped(name: str, own_share: float) -> bool:
    """Whether a checkpoint leaves out the parameter `name`: annealed to nothing, it has no part in the model."""
    return own_share == 0 and any(f".{own}." in name for own in OWN_PROJECTIONS)


def check_inherited(stage: StageConfig, model: ModelConfig, place: str, before: Mapping[str, Any]) -> None:
    """Raise `StageError` unless `model` can take the weights of a checkpoint whose model settings were `before`."""
    settings = {name: getattr(model, name) for name in ModelConfig.__dataclass_fields__}
    if before.get("independent_qkv") and not model.independent_qkv and "K" in str(before.get("layer_pattern")):
        raise StageError(
            f"{place} has summary projections of its own and model.independent_qkv=false does not: anneal them first "
            "(stage.kind=anneal), or leave model.independent_qkv=true"
        )
    if stage.kind != "extend":
        return
    for name, value in settings.items():
        old = before.get(name, value)
        if name == "vocab_size" and value is None:  # the tokenizer decides, and that is checked where it is opened
            continue
        if name not in EXTENDABLE and old != (list(value) if isinstance(value, tuple) else value):
            raise StageError(
                f"stage.kind=extend leaves the model as it is, apart from {', '.join(EXTENDABLE)}: model.{name} was "
                f"{old} in {place} and is now {value}"
            )


def what_is_inherited(stage: StageConfig, place: str, state: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """One line: what a run takes over from a checkpoint with this state.json, and which settings are new.

    `now`: the run's configuration, flat.
    """
    chosen = ("seq_len", "model.", "data.", "optim.", "run.samples_per_step", "run.precision")
    changes = []
    for key in sorted(key for key in now if key.startswith(chosen)):
        before: Any = state.get("config", {})
        for part in key.split("."):
            if before is not None:  # a group that was null has had none of its keys
                before = before.get(part, now[key]) if isinstance(before, Mapping) else now[key]
        if before != now[key]:
            changes.append(f"{key} {before} -> {now[key]}")
    moments = "weights and moments" if stage.inherits_moments else "weights"
    return (
        f"stage {stage.kind}: {moments} of {place} (step {state['step']}, {state.get('tokens', 0):,} tokens); "
        f"{'changed: ' + ', '.join(changes) if changes else 'all else as there'}"
    )
