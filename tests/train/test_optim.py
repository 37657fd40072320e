"""What the optimizer is given: learning rates over whole runs, and parameters by name."""

import math

import pytest

from tests.ksa_model.test_model import build, small_config
from train.config.sections import OptimConfig
from train.config.stage import StageConfig
from train.optim import parameter_groups


def schedule(steps, **settings):
    optim = OptimConfig(lr=1.0, min_lr_ratio=0.1, **settings)
    return [optim.lr_at(step, steps) for step in range(steps)]


def restated(steps, schedule, warmup_steps, decay_steps):
    """The rates of a whole run for lr=1 and min_lr_ratio=0.1, as lists laid over each other; warm-up is on top."""
    rates = [1.0] * steps
    if schedule == "wsd" and decay_steps:
        ramp = [0.1 + 0.9 * left / decay_steps for left in reversed(range(decay_steps))]  # ends at the floor
        rates = (rates + ramp)[-steps:] if decay_steps >= steps else rates[: steps - decay_steps] + ramp
    if schedule == "cosine":
        length = steps - warmup_steps
        # cos^2 of the half angle; (1 + cos) / 2 is the same.
        rates = [1.0] * warmup_steps + [
            0.1 + 0.9 * math.cos(math.pi / 2 * (i + 1) / length) ** 2 for i in range(max(0, length))
        ]
    rising = [(i + 1) / warmup_steps for i in range(warmup_steps)]
    return [*rising, *rates[warmup_steps:]][:steps]


@pytest.mark.parametrize("kind", ["wsd", "cosine", "constant"])
@pytest.mark.parametrize("steps", [1, 2, 7, 40])
@pytest.mark.parametrize("warmup_steps", [0, 1, 5, 60])
@pytest.mark.parametrize("decay_steps", [0, 1, 6, 38, 50])
def test_schedules_over_whole_runs(kind, steps, warmup_steps, decay_steps):
    got = schedule(steps, schedule=kind, warmup_steps=warmup_steps, decay_steps=decay_steps)
    assert got == pytest.approx(restated(steps, kind, warmup_steps, decay_steps), rel=1e-12)


@pytest.mark.parametrize(
    "settings, rates",
    [
        (dict(schedule="constant", warmup_steps=4), [0.25, 0.5, 0.75, 1, 1, 1, 1, 1]),
        (dict(schedule="wsd", warmup_steps=2, decay_steps=3), [0.5, 1, 1, 1, 1, 0.7, 0.4, 0.1]),
        (dict(schedule="wsd", warmup_steps=2, decay_steps=0), [0.5, 1, 1, 1, 1, 1, 1, 1]),
        # Decay overlaps warm-up: the rate rises as if there were none, then falls to where decay has come by then.
        (dict(schedule="wsd", warmup_steps=4, decay_steps=9), [0.25, 0.5, 0.75, 1, 0.4, 0.3, 0.2, 0.1]),
        # A warm-up that is longer than the run is cut off.
        (dict(schedule="wsd", warmup_steps=16, decay_steps=3), [n / 16 for n in range(1, 9)]),
        (dict(schedule="cosine", warmup_steps=16), [n / 16 for n in range(1, 9)]),
        (dict(schedule="cosine", warmup_steps=6), [n / 6 for n in range(1, 7)] + [0.55, 0.1]),
    ],
    ids=str,
)
def test_schedules_by_hand(settings, rates):
    assert schedule(8, **settings) == pytest.approx(rates)


@pytest.mark.parametrize("kind", ["wsd", "cosine", "constant"])
@pytest.mark.parametrize("steps", [1, 2, 7, 40])
@pytest.mark.parametrize("warmup_steps", [0, 1, 5, 60])
@pytest.mark.parametrize("decay_steps", [0, 1, 6, 38, 50])
def test_a_fitted_schedule_has_no_jump_and_reaches_its_rate(kind, steps, warmup_steps, decay_steps):
    optim = OptimConfig(lr=1.0, schedule=kind, warmup_steps=warmup_steps, decay_steps=decay_steps)
    fitted = optim.fitted(steps)
    rates = [fitted.lr_at(step, steps) for step in range(steps)]
    decay = decay_steps if kind == "wsd" else 0
    if warmup_steps + decay <= steps:
        assert fitted == optim
        return
    assert fitted.warmup_steps + (fitted.decay_steps if decay else 0) == steps
    if fitted.warmup_steps:
        assert rates[fitted.warmup_steps - 1] == 1.0
        assert rates[: fitted.warmup_steps] == sorted(rates[: fitted.warmup_steps])
    falling = rates[fitted.warmup_steps :]
    assert falling == sorted(falling, reverse=True)
    if falling:
        assert falling[-1] == pytest.approx(0.1)
        assert rates[0] - falling[0] <= 1 and (not fitted.warmup_steps or 1 - falling[0] <= 0.9 / len(falling) + 1e-9)


# A small model with every kind of layer. Layer 1 is the last that projects summaries, so only layer 0 updates them.
LAYERS = "KKFSCG"
PROJECTIONS = ["query.weight", "key.weight", "value.weight", "output.weight"]
MLP = ["mlp.gate.weight", "mlp.up.weight", "mlp.down.weight"]
NORMS = ["attention_norm.weight", "attention.query_norm.weight", "attention.key_norm.weight", "mlp_norm.weight"]
SUMMARY_DECAYS = {
    "blocks.0.attention.summary_query.weight",
    "blocks.0.attention.summary_key.weight",
    "blocks.0.attention.summary_value.weight",
    "blocks.1.attention.summary_key.weight",
    "blocks.1.attention.summary_value.weight",
}
DECAYS = {
    *SUMMARY_DECAYS,
    *(f"blocks.{layer}.attention.{name}" for layer in range(6) for name in PROJECTIONS),
    *(f"blocks.{layer}.{name}" for layer in range(6) for name in MLP),
    "blocks.5.attention.gate.weight",
    "blocks.5.attention.beta.weight",
    "blocks.5.attention.decay.weight",
    "blocks.5.attention.convolution",
    "head.weight",
}
KEEPS = {
    "embedding.weight",
    "summary_embedding",
    "norm.weight",
    *(f"blocks.{layer}.{name}" for layer in range(5) for name in NORMS),
    "blocks.5.attention_norm.weight",
    "blocks.5.attention.output_norm.weight",
    "blocks.5.attention.decay_rate",
    "blocks.5.attention.step_bias",
    "blocks.5.mlp_norm.weight",
}


def groups_by_name(model, trains):
    """{(weight decay, frozen): names}."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = parameter_groups(model, 0.1, trains)
    found = {(g["weight_decay"], g["frozen"]): [names[id(p)] for p in g["params"]] for g in groups}
    assert len(found) == len(groups) and sum(map(len, found.values())) == len(names)
    return {key: set(group) for key, group in found.items()}


def test_parameter_groups_by_name(world):
    model = build(world, small_config(layer_pattern=LAYERS, num_layers=6, tie_embeddings=False))
    assert groups_by_name(model, StageConfig().trains) == {(0.1, False): DECAYS, (0.0, False): KEEPS}
    assert groups_by_name(model, StageConfig(train="summary").trains) == {
        (0.1, False): SUMMARY_DECAYS,
        (0.0, False): {"summary_embedding"},
        (0.1, True): DECAYS - SUMMARY_DECAYS,
        (0.0, True): KEEPS - {"summary_embedding"},
    }


def test_biases_do_not_decay(world):
    model = build(world, small_config(layer_pattern=LAYERS, num_layers=6, tie_embeddings=False, qkv_bias=True))
    groups = groups_by_name(model, StageConfig(train="summary").trains)
    biases = {name for group in groups.values() for name in group if name.endswith("bias") and "step" not in name}
    of_summaries = {name.replace(".weight", ".bias") for name in SUMMARY_DECAYS}
    assert groups[0.0, False] == {"summary_embedding"} | of_summaries
    assert groups[0.0, True] == KEEPS - {"summary_embedding"} | biases - of_summaries
    assert len(biases - of_summaries) == 5 * 3  # not of the gated delta net


def test_tied_embeddings_are_one_parameter_that_does_not_decay(world):
    model = build(world, small_config(layer_pattern="KF", num_layers=2, tie_embeddings=True))
    groups = groups_by_name(model, StageConfig().trains)
    assert "embedding.weight" in groups[0.0, False]
    assert not any("head" in name for group in groups.values() for name in group)
