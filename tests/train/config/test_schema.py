"""What the sections of a configuration need of each other."""

import dataclasses

import pytest

from tests.ksa_model.test_model import small_config
from train.config.errors import ConfigError
from train.config.schema import USER_ERRORS, TrainConfig, validate
from train.config.sections import ParallelConfig, PerfConfig, RunConfig

CONFIG = TrainConfig(model=small_config(chunk_size=4), seq_len=64, run=RunConfig(samples_per_step=12))


def test_a_small_configuration_is_accepted():
    validate(CONFIG, 1)
    validate(CONFIG, 4)


@pytest.mark.parametrize(
    "ranks, changes, message",
    [
        (5, {}, r"run.samples_per_step=12 is not a multiple of the 5 data-parallel ranks"),
        (4, {"run": RunConfig(samples_per_step=12, samples_per_micro_batch=2)}, "does not divide the 3 samples"),
        (1, {"seq_len": 66}, r"seq_len=66 is not a multiple of 4 .* the nearest that fit are 64 and 68"),
        (1, {"seq_len": 2}, r"the nearest that fit are 4 and 4"),
        (1, {"document_alignment": 6}, "document_alignment=6 is not a multiple of model.chunk_size=4"),
        (1, {"parallel": ParallelConfig(sequence=True)}, "parallel.sequence=true .* needs parallel.tensor > 1"),
        (1, {"perf": PerfConfig(precision="fp8")}, "perf.precision=fp8 replaces 16-bit GEMMs"),
        (
            1,
            {"run": RunConfig(precision="bf16"), "parallel": ParallelConfig(zero=0)},
            "run.precision=bf16 .* needs parallel.zero=1 or more",
        ),
    ],
)
def test_what_does_not_fit_is_named(ranks, changes, message):
    with pytest.raises(USER_ERRORS, match=message):
        validate(dataclasses.replace(CONFIG, **changes), ranks)


def test_derived_values():
    assert CONFIG.alignment == 4 and dataclasses.replace(CONFIG, document_alignment=8).alignment == 8
    assert CONFIG.micro_batches(4) == 3
    with pytest.raises(ConfigError, match="dry_run_ranks=0 must be at least 1"):
        dataclasses.replace(CONFIG, dry_run_ranks=0)
