"""The section `stage`: what a run trains, with which loss, and what it takes over from an earlier run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ksa_model.config import ModelConfig
from train.config.errors import ConfigError

if TYPE_CHECKING:
    from ksa_model.objectives.distillation import Distillation

KINDS = ("scratch", "distill", "anneal", "extend")
SUMMARY_PROJECTIONS = ("summary_query", "summary_key", "summary_value")
# The model keys of RoPE. Weights keep their shapes when these change, and training adapts to the new positions.
ROTATION = ("rope_base", "rope_scaling", "rotate_far", "rotate_full_layers")
# The model keys that stage=extend may change.
EXTENDABLE = (*ROTATION, "attention_backend")


@dataclass(frozen=True)
class StageConfig:
    """One stage. `*_weight` are the loss weights of `distill`; `anneal_*` are steps of `anneal`."""

    kind: str = "scratch"  # scratch | distill | anneal | extend
    train: str = (
        "auto"  # all | summary (embedding and projections of summary tokens) | auto: summary in distill, else all
    )
    lm_weight: float = 1.0
    kl_weight: float = 5.0
    attention_weight: float = 5.0
    anneal_from: int = 0  # until this step, summary tokens use their own projections alone
    anneal_to: int | None = None  # from this step on, they use text's projections alone; null: the last step

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ConfigError(f"stage.kind={self.kind!r} is not one of {', '.join(KINDS)}")
        if self.train not in ("auto", "all", "summary"):
            raise ConfigError(f"stage.train={self.train!r} is not one of auto, all, summary")
        weights = (self.lm_weight, self.kl_weight, self.attention_weight)
        if min(weights) < 0 or not any(weights):
            raise ConfigError(
                f"stage.lm_weight={self.lm_weight}, stage.kl_weight={self.kl_weight} and stage.attention_weight="
                f"{self.attention_weight} must not be negative, nor all 0"
            )
        if self.anneal_from < 0 or (self.anneal_to is not None and self.anneal_to <= self.anneal_from):
            raise ConfigError(
                f"stage.anneal_from={self.anneal_from} must be at least 0 and below stage.anneal_to={self.anneal_to}"
            )

    def check(self, model: ModelConfig, steps: int, init_from: str | None) -> None:
        """Raise `ConfigError` unless the stage makes sense for `model` in a run of `steps` steps."""
        if self.kind != "scratch" and init_from is None:
            raise ConfigError(f"stage.kind={self.kind} continues an earlier run: give init_from=runs/NAME")
        if self.kind in ("distill", "anneal") or self.train == "summary":
            what = f"stage.train={self.train}" if self.train == "summary" else f"stage.kind={self.kind}"
            if not model.has_summaries:
                raise ConfigError(
                    f"{what} is about summaries, and model.layer_pattern={model.layer_pattern!r} has no K layer"
                )
            if init_from is None:
                raise ConfigError("stage.train=summary does not train the other weights: give init_from=runs/NAME")
        if self.kind == "anneal" and not model.independent_qkv:
            raise ConfigError("stage.kind=anneal needs model.independent_qkv=true: there is nothing to anneal away")
        if self.kind == "anneal" and self.anneal_from >= (self.anneal_to or steps):
            raise ConfigError(f"stage.anneal_from={self.anneal_from} leaves no step of run.steps={steps} to anneal in")

    def trains(self, name: str) -> bool:
        """Whether the parameter `name` is trained."""
        alone = self.train == "summary" or (self.train == "auto" and self.kind == "distill")
        return not alone or "summary" in name

    def objective(self) -> Distillation | None:
        """The objective that replaces the language-model loss, or None."""
        if self.kind != "distill":
            return None
        # imports that take seconds, which a refused configuration should not wait for
        from ksa_model.objectives.distillation import Distillation

        return Distillation(self.lm_weight, self.kl_weight, self.attention_weight)

    def summary_projection_weight(self, step: int, steps: int) -> float:
        """Share of the summaries' own projections after `step` of `steps` steps: 1, then linearly to 0."""
        if self.kind != "anneal":
            return 1.0
        last = steps if self.anneal_to is None else self.anneal_to
        return min(1.0, max(0.0, (last - step) / (last - self.anneal_from)))

    @property
    def inherits_moments(self) -> bool:
        """Whether the optimizer keeps its moments: the stage trains the same weights with the same loss."""
        return self.kind == "extend"
