"""Training on a real Slurm (see slurm/cluster.py): preemption, a lost node, the time limit, cancellation, arrays."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.launch.conftest import ROOT, STEPS, losses, two_ranks, undisturbed, wait_for
from tests.launch.slurm.cluster import Cluster, install, missing

pytestmark = pytest.mark.slurm


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    why_not = missing()
    if why_not:
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(why_not)
    with Cluster(tmp_path_factory.mktemp("slurm"), nodes=3) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """The root of the runs, with a name that shells and Slurm's file patterns would interpret."""
    return tmp_path_factory.mktemp("runs") / "it's %j; touch pwned $(touch pwned) & x"


@pytest.fixture(scope="module")
def two_nodes(small, root) -> list[str]:
    """Training overrides of the two-node job that tests disturb."""
    return [*two_ranks(small, STEPS), f"run.root={hydra(root)}"]


@pytest.fixture(scope="module")
def undisturbed_run(small, tmp_path_factory) -> Path:
    return undisturbed(two_ranks(small, STEPS), tmp_path_factory.mktemp("undisturbed"))


def hydra(text: object) -> str:
    """A value quoted for Hydra's override grammar."""
    return '"' + str(text).replace('"', '\\"') + '"'


def slurm_settings() -> list[str]:
    keys = "partition=low time=30 cpus_per_rank=1 env.NCCL_SOCKET_IFNAME=null wait_seconds=20"
    return ["target=slurm", *(f"launch.{key}" for key in keys.split())]


UNCHECKED = "launch.check=false"  # only the first test runs the check, which takes seconds of imports


def launch(cluster: Cluster, *arguments: str, module: str = "launch"):
    target = [] if arguments[0] in ("status", "logs", "cancel") else slurm_settings()
    return cluster.run(sys.executable, "-m", module, *target, *arguments, cwd=ROOT)


def job_of(run: Path) -> str:
    return json.loads((run / "launch/launch.json").read_text())["jobs"][-1]


def state(cluster: Cluster, job: str) -> str:
    shown = cluster.run("scontrol", "show", "job", job).stdout
    return re.search(r"JobState=(\w+)", shown)[1]


def wait_for_end(cluster: Cluster, run: Path, timeout: float = 300) -> str:
    """The state in which the run's job has ended."""
    job, final = job_of(run), ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
    try:
        wait_for(lambda: state(cluster, job) in final, f"the end of job {job}", timeout, every=0.5)
    except AssertionError as error:
        raise AssertionError(f"{error}\n{everything_written(run)}") from None
    return state(cluster, job)


def wait_for_empty_queue(cluster: Cluster, timeout: float = 240) -> None:
    wait_for(lambda: not cluster.run("squeue", "-h").stdout, "the queue to empty", timeout, every=0.5)


def everything_written(run: Path) -> str:
    """All that a run has written about its jobs, for the message of a failing test."""
    files = [run / "launch/history.log", *sorted((run / "launch/logs").glob("*"))]
    return "\n".join(f"== {f.name}\n{f.read_text(errors='replace')[-2500:]}" for f in files if f.is_file())


def history(run: Path) -> str:
    return (run / "launch/history.log").read_text()


def test_preempted_requeued_and_resumed_bitwise(cluster, two_nodes, undisturbed_run, root):
    """A job of higher priority takes the nodes; the run saves, is requeued and ends with the same losses."""
    run = root / "preempted"
    # No periodic checkpoint, so that what is resumed can only come from the request to stop.
    launch(cluster, "nodes=2", "--", *two_nodes, "run.name=preempted", "checkpoint.every_steps=1000")
    wait_for(lambda: max(losses(run), default=0) >= 10, "10 steps")
    assert "RUNNING" in launch(cluster, "status", str(run)).stdout
    urgent = cluster.run(
        "sbatch", "--parsable", "-p", "high", "-N", "3", "-c", "2", "--output=/dev/null", "--wrap", "sleep 1"
    )
    assert wait_for_end(cluster, run) == "COMPLETED", everything_written(run)
    assert state(cluster, urgent.stdout.strip()) == "COMPLETED"
    notes = history(run)
    assert "asked to stop" in notes and "ended with 75" in notes and "start 1.0" in notes, notes
    saved = int(re.search(r"saved step (\d+)", launch(cluster, "logs", str(run)).stdout)[1])
    assert 10 <= saved < STEPS
    assert losses(run) == losses(undisturbed_run) and len(losses(run)) == STEPS
    assert {p.name.split("-")[-1] for p in (run / "launch/logs").glob("*-node*.log")} >= {"node1.log", "node2.log"}
    assert "finished of" in launch(cluster, "status", str(run)).stdout


def test_after_a_node_crash_the_job_runs_on_the_other_nodes(cluster, two_nodes, undisturbed_run, root):
    run = root / "crashed"
    launch(cluster, UNCHECKED, "nodes=2", "--", *two_nodes, "run.name=crashed")
    wait_for(lambda: max(losses(run), default=0) >= 30, "30 steps")
    lost = re.search(r"start 0\.0 on node\[(\d)", history(run))[1]
    cluster.crash(f"node{lost}")
    try:
        assert wait_for_end(cluster, run) == "COMPLETED", everything_written(run)
    finally:
        cluster.boot(f"node{lost}")
    again = re.search(r"start 1\.0 on (\S+)", history(run))
    assert again and lost not in again[1], history(run)
    assert losses(run) == losses(undisturbed_run)
    cluster.wait_idle(3)


def test_at_the_time_limit_the_chain_continues(cluster, small, root):
    """Jobs of one minute, asked to save 30 s before their end (by Slurm up to a minute earlier)."""
    run = root / "long"
    chain = ["launch.continuation=chain", "launch.chain_jobs=4", "launch.time=1", "launch.signal_seconds=30"]
    launch(cluster, UNCHECKED, *chain, "--", *small, f"run.root={hydra(root)}", "run.name=long", "run.steps=1000000")
    log = run / "launch/history.log"
    wait_for(
        lambda: log.exists() and len(set(re.findall(r"job (\d+): start", log.read_text()))) == 3,
        "the third job of the chain",
    )
    launch(cluster, "cancel", str(run))
    jobs = json.loads((run / "launch/launch.json").read_text())["jobs"]
    assert len(jobs) == 4
    first, second = (re.findall(rf"job {job}: (.*)", history(run)) for job in jobs[:2])
    for notes in (first, second):
        assert [line.split(" on ")[0] for line in notes[:-1]] == ["start 0.0", "asked to stop; the ranks save"]
        # 138: SIGUSR1 came before Python ran, because Slurm may give a job only a few seconds.
        assert len(notes) == 3 and notes[-1] in ("ended with 75", "ended with 138")
    logs = launch(cluster, "logs", str(run)).stdout
    saved = [int(step) for step in re.findall(r"saved step (\d+)", logs)]
    resumed = [int(step) for step in re.findall(r"resumed from .* at step (\d+)", logs)]
    assert len(saved) >= 1 and saved == sorted(saved) and resumed[: len(saved)] == saved[: len(resumed)], (
        everything_written(run)
    )
    assert list(losses(run)) == list(range(1, len(losses(run)) + 1))
    wait_for_empty_queue(cluster, 90)
    assert {state(cluster, job) for job in jobs[2:]} == {"CANCELLED"}


def test_the_job_that_finishes_cancels_the_rest_of_its_chain(cluster, small, root):
    chain = ["launch.continuation=chain", "launch.chain_jobs=3"]
    launch(cluster, UNCHECKED, *chain, "--", *small, f"run.root={hydra(root)}", "run.name=short", "run.steps=3")
    wait_for_empty_queue(cluster)
    jobs = json.loads((root / "short/launch/launch.json").read_text())["jobs"]
    assert [state(cluster, job) for job in jobs] == ["COMPLETED", "CANCELLED", "CANCELLED"], everything_written(
        root / "short"
    )
    assert sorted(losses(root / "short")) == [1, 2, 3]


@pytest.mark.parametrize("when", ["starting", "training"])
def test_cancelled_jobs_are_not_requeued(when, cluster, two_nodes, root):
    """Cancelling signals the ranks too; their exit code 75 must not requeue the job."""
    run = root / f"cancelled-{when}"
    launch(cluster, UNCHECKED, "nodes=2", "--", *two_nodes, "run.steps=100000", f"run.name=cancelled-{when}")
    again = cluster.run(sys.executable, "-m", "launch", *slurm_settings(), UNCHECKED, "--", *two_nodes,
                        f"run.name=cancelled-{when}", cwd=ROOT, check=False)  # fmt: skip
    assert again.returncode == 2 and "still in the queue" in again.stderr
    if when == "training":
        wait_for(lambda: max(losses(run), default=0) >= 3, "three steps")
    else:
        wait_for(lambda: state(cluster, job_of(run)) == "RUNNING", "the job to run", 60)
    assert "cancelled job" in launch(cluster, "cancel", str(run)).stdout
    wait_for_empty_queue(cluster, 90)
    assert state(cluster, job_of(run)) == "CANCELLED", everything_written(run)
    assert "requeued" not in (history(run) if (run / "launch/history.log").exists() else "")
    assert "start 1.0" not in (history(run) if (run / "launch/history.log").exists() else "")
    cluster.wait_idle(3)


def test_sweep_as_an_array(cluster, small, root):
    """One job array. A point that cannot run ends with 2 and is not tried again; the others finish."""
    home = root / "a"
    spoiled = home / "chunk_size=8"
    spoiled.mkdir(parents=True)
    (spoiled / "config.yaml").write_text("seq_len: 99\n")  # another run's directory
    command = ["sweep=a", f"run.root={hydra(root)}", *[o for o in small if "chunk_size" not in o], "run.steps=4"]
    cluster.run(
        "scontrol", "update", "PartitionName=low", "State=DOWN"
    )  # the array waits until it has been submitted twice
    launch(cluster, *command, "model.chunk_size=4,8", module="launch.sweep")
    job = job_of(home)
    refused = cluster.run(sys.executable, "-m", "launch.sweep", *command, "model.chunk_size=4,8", "target=slurm",
                          "launch.partition=low", cwd=ROOT, check=False)  # fmt: skip
    assert refused.returncode == 2 and "still in the queue" in refused.stderr
    cluster.run("scontrol", "update", "PartitionName=low", "State=UP")
    wait_for_empty_queue(cluster)
    assert sorted(losses(home / "chunk_size=4")) == [1, 2, 3, 4], everything_written(home / "chunk_size=4")
    assert "ended with 2" in history(spoiled) and "start 0.1" not in history(spoiled)
    assert (state(cluster, f"{job}_0"), state(cluster, f"{job}_1")) == ("COMPLETED", "FAILED")
    status = launch(cluster, "status", str(home)).stdout
    assert "chunk_size=4: finished" in status and "chunk_size=8: checkpoint at step 0" in status


def test_nothing_in_a_name_was_executed(root):
    """The run directories of all tests above have a name that contains commands."""
    assert root.is_dir()
    assert not (ROOT / "pwned").exists() and not list(root.parent.rglob("pwned"))


def test_ssh_target_over_pdsh(cluster, small, tmp_path):
    """DeepSpeed's launcher starts ranks on two nodes; `ssh` is a script that enters the node's namespaces."""
    if shutil.which("pdsh") is None:
        install(["pdsh"])
    if shutil.which("pdsh") is None:
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)("no pdsh, and it cannot be installed here")
    (tmp_path / "bin").mkdir()
    cases = "".join(f'  {n}) set -- {cluster.pid(n)} "$@" ;;\n' for n in ("node1", "node2"))
    shim = tmp_path / "bin/ssh"
    shim.write_text(
        '#!/bin/bash\nwhile [[ $1 == -* ]]; do case $1 in -o|-l|-p) shift 2;; *) shift;; esac; done\n'
        'host=${1#*@}; shift\ncase $host in\n' + cases + '  *) exit 255 ;;\nesac\npid=$1; shift\n'
        'exec nsenter --target="$pid" --net --uts --mount --pid -- bash -c "$*"\n')  # fmt: skip
    shim.chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
    target = ["target=ssh", "launch.hosts=[node1,node2]", "launch.restarts=0", UNCHECKED]
    training = [*small, f"run.root={tmp_path}", "run.name=r", "run.samples_per_step=2", "run.steps=4"]
    command = [sys.executable, "-m", "launch", *target, "--", *training]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    assert sorted(losses(tmp_path / "r")) == [1, 2, 3, 4]
    assert "node1 slots=1\nnode2 slots=1" in (tmp_path / "r/launch/hostfile").read_text()
