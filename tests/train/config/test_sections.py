"""The sections of a run's configuration: what they refuse, learning-rate schedules, the parallel layout."""

import pytest

from train.config.errors import ConfigError
from train.config.sections import (
    CheckpointConfig,
    LoggingConfig,
    OptimConfig,
    ParallelConfig,
    PerfConfig,
    RunConfig,
)


@pytest.mark.parametrize(
    "section, values, message",
    [
        (RunConfig, {"steps": 0}, "run.steps=0 must be at least 1"),
        (RunConfig, {"stop_at_step": 0}, "run.stop_at_step=0 must be at least 1, or null"),
        (RunConfig, {"max_minutes": 0.0}, "run.max_minutes=0.0 must be positive, or null"),
        (RunConfig, {"skip_samples": ((4, 3),)}, r"run.skip_samples=\[\[4, 3\]\] must be"),
        (RunConfig, {"spike_factor": 1.0}, "run.spike_factor=1.0 must be above 1, or null"),
        (RunConfig, {"eval_samples": -1}, "run.eval_samples=-1 must not be negative"),
        (RunConfig, {"precision": "fp16"}, "run.precision='fp16' is not one of fp32, bf16"),
        (RunConfig, {"name": "a/../../b"}, "run.name='a/../../b' must be a relative path"),
        (CheckpointConfig, {"keep_last": 0}, "checkpoint.keep_last=0 must be at least 1"),
        (CheckpointConfig, {"every_minutes": -1.0}, "checkpoint.every_minutes=-1.0 must be positive, or null"),
        (CheckpointConfig, {"on_damage": "skip"}, "checkpoint.on_damage='skip' is not one of fallback, fail"),
        (LoggingConfig, {"wandb": "on"}, "logging.wandb='on' is not one of online, offline, off"),
        (OptimConfig, {"schedule": "linear"}, "optim.schedule='linear' is not one of wsd, cosine, constant"),
        (OptimConfig, {"lr": 0.0}, "optim.lr=0.0 must be positive"),
        (OptimConfig, {"decay_steps": -1}, "optim.decay_steps=-1 must not be negative"),
        (OptimConfig, {"betas": (0.9, 1.0)}, "must each be at least 0 and below 1"),
        (ParallelConfig, {"tensor": 0}, "parallel.tensor=0 must be at least 1"),
        (ParallelConfig, {"zero": 4}, "parallel.zero=4 is not a ZeRO stage"),
        (ParallelConfig, {"offload": "weights"}, "parallel.offload='weights' is not one of none, optimizer"),
        (ParallelConfig, {"offload": "optimizer", "zero": 0}, "parallel.offload=optimizer needs parallel.zero"),
        (ParallelConfig, {"timeout_minutes": 0.0}, "parallel.timeout_minutes=0.0 must be positive"),
        (PerfConfig, {"precision": "int8"}, "perf.precision='int8' is not one of bf16, fp8"),
        (PerfConfig, {"profile_after": -1}, "perf.profile_after=-1 must be at least 0"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_a_wrong_value_is_named(section, values, message):
    with pytest.raises(ConfigError, match=message):
        section(**values)


def rates(steps, **settings):
    optim = OptimConfig(**{"lr": 1.0, "min_lr_ratio": 0.25, "warmup_steps": 4, "decay_steps": 3} | settings)
    return [round(optim.lr_at(step, steps), 6) for step in range(steps)]


def test_learning_rates_of_each_schedule():
    assert rates(10, schedule="constant") == [0.25, 0.5, 0.75] + [1.0] * 7
    assert rates(10, schedule="wsd") == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0, 0.75, 0.5, 0.25]
    assert rates(8, schedule="cosine") == [0.25, 0.5, 0.75, 1.0, 0.890165, 0.625, 0.359835, 0.25]


def test_learning_rates_beyond_the_end_stay_at_the_floor():
    for schedule, rate in (("constant", 1.0), ("wsd", 0.25), ("cosine", 0.25)):
        assert OptimConfig(lr=1.0, min_lr_ratio=0.25, schedule=schedule).lr_at(500, 300) == rate


def test_the_data_parallel_size_is_what_is_left():
    parallel = ParallelConfig(tensor=2, context=4)
    assert parallel.data(8) == 1 and parallel.data(24) == 3
    with pytest.raises(ConfigError, match=r"the world of 12 ranks is not a multiple of parallel.tensor=2 x"):
        parallel.data(12)


def test_zero_is_off_for_a_single_rank_in_fp32():
    assert ParallelConfig(zero=2).zero_in_use("fp32", 1) == 0
    assert ParallelConfig(zero=2).zero_in_use("bf16", 1) == 2
    assert ParallelConfig(zero=2).zero_in_use("fp32", 2) == 2
    assert ParallelConfig(zero=3).zero_in_use("fp32", 1) == 3
    assert ParallelConfig(zero=1, offload="optimizer").zero_in_use("fp32", 1) == 1
