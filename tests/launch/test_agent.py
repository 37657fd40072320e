"""The agent: torchrun that ends with the exit code of its ranks."""

import pytest

from launch.agent import FINAL, exit_code
from tests.launch.conftest import python


@pytest.mark.parametrize(
    "codes, stopped, expected",
    [
        ([75, 75], False, 75),
        ([75, -15], False, 75),  # torchrun ends the other ranks once one has ended
        ([2, -15], False, 2),
        ([1, 75], False, 75),  # a rank exits with 75 only after every rank has saved
        ([1], False, 1),
        ([-9], False, 1),
        ([-15, 143], True, 75),  # ended by the signal, before there was anything to save
        ([1], True, 1),
        *(([code, -15], False, code) for code in FINAL),
        ([FINAL[0], 1], True, FINAL[0]),
    ],
)
def test_agent_exit_code(codes, stopped, expected):
    assert exit_code(codes, stopped) == expected


@pytest.mark.slow
@pytest.mark.parametrize("code", FINAL)
def test_torchrun_ends_with_the_code_of_its_rank(code):
    """Of torchrun alone the exit code is 1."""
    rank = ["--nproc-per-node=1", "--no-python", "sh", "-c", f"exit {code}"]
    done = python("launch.agent", "--signals=forward", *rank)
    assert done.returncode == code, done.stderr
    assert f"agent: rank 0 ended with {code}; exit code {code}" in done.stderr
