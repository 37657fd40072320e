"""Which environments name a rank's place completely, and which would start many runs of one rank."""

import shlex

import pytest

from train.config.errors import ConfigError
from train.distributed import environment

RANKS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
TASKS = ("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS", "SLURM_PROCID", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "PMI_RANK")
MEETING = dict(MASTER_ADDR="here", MASTER_PORT="29500")


def check(monkeypatch, **variables):
    for name in (*RANKS, *TASKS):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    environment.check()


@pytest.mark.parametrize(
    "variables",
    [
        {},
        dict(RANK="0", WORLD_SIZE="1"),
        dict(RANK="1", WORLD_SIZE="2", **MEETING),
        dict(RANK="1", WORLD_SIZE="2", SLURM_NTASKS="2", SLURM_PROCID="1", **MEETING),  # torchrun or launch below srun
        dict(RANK="0", WORLD_SIZE="1", SLURM_NTASKS="2", SLURM_PROCID="1"),  # on purpose
        dict(SLURM_NTASKS="1", SLURM_PROCID="0"),
        dict(SLURM_NTASKS="8", SLURM_STEP_NUM_TASKS="1", SLURM_PROCID="0"),  # the shell of an allocation
        dict(SLURM_NTASKS="8"),  # salloc, on the login node
        dict(OMPI_COMM_WORLD_SIZE="1", OMPI_COMM_WORLD_RANK="0"),
        MEETING,
    ],
    ids=str,
)
def test_complete_environments(monkeypatch, variables):
    check(monkeypatch, **variables)


@pytest.mark.parametrize(
    "variables, message",
    [
        (dict(SLURM_NTASKS="2", SLURM_PROCID="1"), r"srun has started 2 tasks .*torchrun.*python -m launch"),
        (dict(SLURM_STEP_NUM_TASKS="4", SLURM_NTASKS="4", SLURM_PROCID="0"), "srun has started 4 tasks"),
        (dict(OMPI_COMM_WORLD_SIZE="2", OMPI_COMM_WORLD_RANK="0"), r"mpirun \(Open MPI\) has started 2 tasks"),
        (dict(PMI_SIZE="2", PMI_RANK="1"), r"mpirun \(MPICH, Intel MPI\) has started 2 tasks"),
        (dict(WORLD_SIZE="2"), "WORLD_SIZE=2 is set and RANK is not"),
        (dict(RANK="3"), "RANK=3 is set and WORLD_SIZE is not"),
        (dict(RANK="2", WORLD_SIZE="2", **MEETING), "RANK=2 must be at least 0 and below WORLD_SIZE=2"),
        (dict(RANK="0", WORLD_SIZE="2"), "WORLD_SIZE=2 needs MASTER_ADDR"),
        (dict(RANK="0", WORLD_SIZE="2", MASTER_ADDR="here", MASTER_PORT="70000"), "MASTER_PORT=70000 must be a port"),
        (dict(RANK="one", WORLD_SIZE="2"), "RANK='one' in the environment must be a whole number"),
    ],
    ids=str,
)
def test_incomplete_environments(monkeypatch, variables, message):
    with pytest.raises(ConfigError, match=message):
        check(monkeypatch, **variables)


TORCHRUN = [
    "/venv/bin/python",
    "/venv/bin/torchrun",
    "--nproc-per-node=2",
    "--nnodes",
    "2",
    "-m",
    "train",
    "run.steps=5",
]


@pytest.mark.parametrize(
    "variables, parent, words",
    [
        ({}, ["/bin/bash"], "python -m train"),
        (dict(TORCHELASTIC_RUN_ID="x"), TORCHRUN, "torchrun --nproc-per-node=2 --nnodes 2 -m train"),
        (
            dict(TORCHELASTIC_RUN_ID="x"),
            ["python", "-m", "torch.distributed.run", "--standalone", "-m", "train", "a=b"],
            "torchrun --standalone -m train",
        ),
        (dict(TORCHELASTIC_RUN_ID="x", LOCAL_WORLD_SIZE="4"), [], "torchrun --nproc-per-node=4 -m train"),
        (
            dict(TORCHELASTIC_RUN_ID="x", LAUNCH_COMMAND="python -m launch target=local 'launch.python=a b' --"),
            ["python", "-m", "launch.agent", "--signals=forward", "-m", "train"],
            "python -m launch target=local 'launch.python=a b' --",
        ),
    ],
)
def test_the_command_of_a_run_is_that_of_its_user(variables, parent, words):
    assert shlex.join(environment.command_of_run(variables, parent)) == words
