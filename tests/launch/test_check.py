"""What is checked before anything starts: the training configuration, for the launch's number of ranks."""

import re

import pytest

from launch import check
from launch.config import parse
from launch.errors import LaunchError
from tests.launch.conftest import SLURM


@pytest.mark.parametrize(
    "overrides, words",
    [
        (["run.steps=abc"], ["run.steps='abc'", "a whole number"]),
        (["run=null"], ["run=None", "run.name=NAME"]),
        (["run.name=null"], ["run.name=None", "a string"]),
    ],
)
def test_types_that_the_launcher_relies_on_are_checked_even_without_the_check(overrides, words):
    with pytest.raises(LaunchError) as caught:
        check.check(parse(["target=local", "launch.check=false", "--", *overrides]))
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    "size, overrides, words",
    [
        (["ranks_per_node=3"], ["parallel.tensor=2"], ["3 ranks", "parallel.tensor=2"]),
        (["ranks_per_node=2"], [], ["run.samples_per_step=1", "2 data-parallel"]),
        ([], ["model.chunk_sise=4"], ["model.chunk_sise", "did you mean model.chunk_size"]),
        ([], ["model.chunk_size=4,8"], ["launch.sweep"]),
        ([], ["--multirun"], ["--multirun", "KEY=VALUE"]),
        ([], ["seq_len=1001"], ["seq_len=1001"]),
        ([], ["run.name='a\nb'"], ["control character"]),
    ],
)
def test_the_training_configuration_is_checked_for_the_number_of_ranks(size, overrides, words):
    with pytest.raises(LaunchError) as caught:
        check.check(parse(["target=local", *size, "--", *overrides]))
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


def test_memory_is_estimated_for_the_number_of_ranks():
    """The trainer's estimate, for the launch's ranks: ZeRO shards the optimizer; too large a model is reported."""
    big = [
        "model=hybrid_1b9",
        "model.vocab_size=151936",
        "run.samples_per_step=8",
        "seq_len=8192",
        "run.precision=bf16",
    ]
    memory = {}
    for nodes in (1, 8):
        launch = parse([*SLURM, f"nodes={nodes}", "gpus_per_node=1", "--", *big])
        memory[nodes] = check.check(launch).memory
        assert f"{nodes} ranks" in memory[nodes] and "total" in memory[nodes]
    optimizer = {n: float(re.search(r"optimizer +([\d.]+) GiB", text)[1]) for n, text in memory.items()}
    assert optimizer[1] == pytest.approx(8 * optimizer[8], rel=0.01)
    longer = check.check(parse([*SLURM, "gpus_per_node=1", "--", *big, "seq_len=1048576"])).memory
    assert "does NOT fit" in longer
    assert "memory per rank: about" in check.check(parse(["target=local"])).memory
