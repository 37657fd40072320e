"""Stages of a training recipe: what each one trains, which loss it has, and what it takes from the run before.

    scratch  trains all weights with the language-model loss, from fresh weights or those that `init_from` names
    distill  trains the summary parameters against the same model without summaries
             (`ksa_model.objectives.distillation`)
    anneal   replaces the summary tokens' query, key and value projections by those of text, step by step, and drops
             them
    extend   trains the same model at another length, RoPE base or RoPE scaling, and on other data

A stage depends on its configuration and the step alone, so a run that is resumed in the middle of one continues as if
it had never stopped. `train.chain` runs several in a row. Source of the recipe: arXiv 2604.24432.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ksa_model.config import ModelConfig
from train.config.differences import differences, in_arrows, under
from train.config.errors import ConfigError
from train.config.stage import EXTENDABLE, SUMMARY_PROJECTIONS, StageConfig


def is_dropped(name: str, summary_projection_weight: float) -> bool:
    """Whether a checkpoint leaves out the parameter `name`, because it was annealed to a weight of 0."""
    return summary_projection_weight == 0 and any(f".{projection}." in name for projection in SUMMARY_PROJECTIONS)


def check_inherited(
    stage: StageConfig, model: ModelConfig, source: str, before: Mapping[str, Any], own_share: float = 1.0
) -> None:
    """Raise `ConfigError` unless `model` can take the weights of a checkpoint whose model settings were `before`.

    `source` names the checkpoint in the message. `own_share`: its annealing weight.
    """
    check_teacher(stage, model, source, before)
    settings = {name: getattr(model, name) for name in ModelConfig.__dataclass_fields__}
    if before.get("independent_qkv") and not model.independent_qkv and "K" in str(before.get("layer_pattern")):
        raise ConfigError(
            f"{source} has summary projections and model.independent_qkv=false has none: anneal them away first "
            "(stage.kind=anneal), or leave model.independent_qkv=true"
        )
    # Without QK-norm the mixture is linear, so the run begins with projections that are mixed once; moments are not.
    mixes = before.get("independent_qkv") and model.independent_qkv and model.has_summaries and 0 < own_share < 1
    if mixes and (model.qk_norm or stage.inherits_moments):
        raise ConfigError(
            f"{source} is from the middle of annealing: its summaries compute with {own_share:.2f} of their own "
            f"projections and the rest of text's, which stage.kind={stage.kind} cannot begin with; let that run finish "
            "annealing, or begin with another checkpoint"
        )
    if stage.kind != "extend":
        return
    for name, value in settings.items():
        old = before.get(name, value)
        if name == "vocab_size" and value is None:  # the tokenizer decides, and that is checked where it is opened
            continue
        if name not in EXTENDABLE and old != (list(value) if isinstance(value, tuple) else value):
            raise ConfigError(
                f"stage.kind=extend keeps the model, except for {', '.join(EXTENDABLE)}: model.{name} was {old} in "
                f"{source} and is now {value}"
            )


def check_teacher(stage: StageConfig, model: ModelConfig, source: str, before: Mapping[str, Any]) -> None:
    """Raise `ConfigError` if the teacher of distillation has RoPE on text in other layers than its weights were trained
    with; see `check_inherited`.

    The teacher is `model` without summaries. Its weights are not trained, so they cannot adapt.
    """
    pattern, layers = before.get("layer_pattern"), before.get("num_layers")
    if stage.kind != "distill" or not pattern or layers != model.num_layers:
        return

    def rotated(pattern: str, full: bool) -> list[bool]:
        return [full or letter != "F" for letter in pattern * (model.num_layers // len(pattern))]

    full = model.rotate_full_layers
    there = rotated(pattern, before.get("rotate_full_layers", True))
    if rotated(model.layer_pattern, full) == there:
        return
    fits = rotated(model.layer_pattern, not full) == there
    way = f"set model.rotate_full_layers={str(not full).lower()}, or train" if fits else "train"
    raise ConfigError(
        f"stage.kind=distill with model.layer_pattern={model.layer_pattern} and model.rotate_full_layers="
        f"{str(full).lower()} gives the teacher RoPE in other layers than {source} has, and its weights are not "
        f"trained: {way} all weights first (stage=scratch)"
    )


def describe_initialization(stage: StageConfig, source: str, state: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """One line: what a run takes from a checkpoint, and which settings differ from those it was trained with.

    `source` names the checkpoint, `state` is its state.json, `now` the run's configuration with dotted keys.
    """
    chosen = ("seq_len", "model", "data", "optim", "run.samples_per_step", "run.precision")
    found = differences(state.get("config", {}), now)
    changed = in_arrows({key: pair for key, pair in found.items() if under(key, chosen)})
    moments = "weights and moments" if stage.inherits_moments else "weights"
    return (
        f"stage {stage.kind}: {moments} of {source} (step {state['step']}, {state.get('tokens', 0):,} tokens); "
        f"{'changed: ' + changed if changed else 'same settings'}"
    )
