"""The section `stage`: what it trains, how it anneals, and what it needs of the model and the run."""

import pytest

from tests.ksa_model.test_model import small_config
from train.config.errors import ConfigError
from train.config.stage import StageConfig


@pytest.mark.parametrize(
    "values, message",
    [
        ({"kind": "tune"}, "stage.kind='tune' is not one of scratch, distill, anneal, extend"),
        ({"train": "some"}, "stage.train='some' is not one of auto, all, summary"),
        ({"kl_weight": -1.0}, "stage.kl_weight=-1.0 .* must not be negative, nor all 0"),
        ({"anneal_from": 5, "anneal_to": 5}, "stage.anneal_from=5 must be at least 0 and below stage.anneal_to=5"),
    ],
)
def test_a_wrong_value_is_named(values, message):
    with pytest.raises(ConfigError, match=message):
        StageConfig(**values)


@pytest.mark.parametrize(
    "values, model, init_from, message",
    [
        ({"kind": "extend"}, {}, None, "stage.kind=extend .* give init_from"),
        ({"train": "summary"}, {}, None, "stage.train=summary .* give init_from"),
        ({"kind": "distill"}, {"layer_pattern": "F"}, "runs/a", "has no K layer"),
        ({"kind": "anneal"}, {"independent_qkv": False}, "runs/a", "needs model.independent_qkv=true"),
        ({"kind": "anneal", "anneal_from": 9}, {}, "runs/a", "stage.anneal_from=9 leaves no step of run.steps=9"),
    ],
)
def test_what_a_stage_needs(values, model, init_from, message):
    with pytest.raises(ConfigError, match=message):
        StageConfig(**values).check(small_config(**model), 9, init_from)


def test_which_parameters_are_trained():
    names = ["embedding.weight", "summary_embedding", "blocks.0.attention.summary_key.weight"]
    for stage, trained in (
        (StageConfig(), [True, True, True]),
        (StageConfig(kind="distill"), [False, True, True]),
        (StageConfig(kind="distill", train="all"), [True, True, True]),
        (StageConfig(train="summary"), [False, True, True]),
    ):
        assert [stage.trains(name) for name in names] == trained


def test_annealing_is_linear_between_its_steps():
    stage = StageConfig(kind="anneal", anneal_from=2, anneal_to=6)
    weights = [stage.summary_projection_weight(step, 10) for step in range(9)]
    assert weights == [1, 1, 1, 0.75, 0.5, 0.25, 0, 0, 0]
    assert StageConfig(kind="anneal").summary_projection_weight(5, 10) == 0.5  # to the last step
    assert StageConfig(kind="extend").summary_projection_weight(5, 10) == 1
