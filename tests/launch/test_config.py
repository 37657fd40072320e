"""The launcher's command line: targets, sizes and overrides, and the one-line message for every mistake."""

import pytest

from launch.config import parse
from launch.errors import LaunchError
from tests.launch.conftest import SLURM


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["target=slrm"], ["'slrm'", "did you mean slurm", "kubernetes"]),
        ([], ["target=NAME is missing"]),
        (["target=ssh"], ["launch.hosts"]),
        (["target=ssh", "launch.hosts=[a,b]", "nodes=3"], ["nodes=3", "names 2"]),
        (["target=local", "node=2"], ["node", "did you mean nodes"]),
        (["target=local", "run.steps=3"], ["run.steps", "after `--`"]),
        (["target=local", "nodes=0"], ["nodes=0", "at least 1"]),
        (["target=local", "gpus_per_node=64"], ["gpus_per_node=64", "this machine has"]),
        ([*SLURM, "gpus_per_node=4", "ranks_per_node=2"], ["gpus_per_node=4", "ranks_per_node=2"]),
    ],
)
def test_bad_input_is_one_clear_line(arguments, words):
    with pytest.raises(LaunchError) as caught:
        parse(arguments)
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)
