"""target=local on real processes: restarts, requests to stop, exit codes, and no process left behind."""

import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from launch import local
from launch.agent import FINAL
from launch.config import parse
from launch.processes import descendants
from launch.settings import CONFIGS
from tests.launch.conftest import (
    LOCAL_STEPS,
    NASTY,
    ROOT,
    losses,
    nasty_launch,
    python,
    start,
    two_ranks,
    undisturbed,
    wait_for,
)
from train.distributed import environment
from train.distributed.environment import LAUNCH_COMMAND


def agents_of(launcher: int) -> list[int]:
    return [pid for pid in descendants(launcher) if b"launch.agent" in command_line(pid)]


def ranks_of(launcher: int) -> list[int]:
    return [
        pid
        for pid in descendants(launcher)
        if b"launch.agent" not in command_line(pid) and b"train" in command_line(pid)
    ]


def command_line(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


@pytest.mark.slow
def test_two_agents_one_is_killed_the_job_continues(small, tmp_path):
    """A node's agent dies by SIGKILL and leaves its rank behind; all is started again and ends as if undisturbed."""
    run, log = tmp_path / "disturbed", tmp_path / "log"
    training = two_ranks(small, LOCAL_STEPS)
    command = ["launch", "target=local", "nodes=2", "--", *training, f"run.root={tmp_path}", "run.name=disturbed"]
    launcher = start(*command, log=log)
    wait_for(lambda: max(losses(run), default=0) >= 25, "25 steps")
    agents, ranks = agents_of(launcher.pid), ranks_of(launcher.pid)
    assert (len(agents), len(ranks)) == (2, 2)
    os.kill(agents[1], signal.SIGKILL)
    assert launcher.wait(timeout=280) == 0, log.read_text()
    assert "attempt 1 of 4 failed; starting again" in log.read_text()
    assert "resumed from" in log.read_text()
    want = losses(undisturbed(training, tmp_path))
    assert losses(run) == want and len(want) == LOCAL_STEPS
    assert not [pid for pid in agents + ranks if b"launch" in command_line(pid) or b"train" in command_line(pid)]


@pytest.mark.slow
def test_asked_to_stop_it_saves_and_the_same_command_continues(small, tmp_path):
    target = ["launch", "target=local", "launch.check=false", "--"]
    command = [*target, *small, f"run.root={tmp_path}", "run.name=r", "run.steps=100000"]
    log = tmp_path / "log"
    launcher = start(*command, log=log)
    wait_for(lambda: max(losses(tmp_path / "r"), default=0) >= 5, "five steps")

    refused = python(*command[:2], "launch.grace_seconds=1", *command[2:])
    assert refused.returncode == 2 and "locked by another launch" in refused.stderr

    stopped = python("launch", "cancel", str(tmp_path / "r"))
    assert stopped.returncode == 0, stopped.stderr
    assert launcher.wait(timeout=60) == 75, log.read_text()
    saved = max(losses(tmp_path / "r"))
    assert f"saved step {saved}" in log.read_text()
    status = python("launch", "status", str(tmp_path / "r"))
    assert f"checkpoint at step {saved} of 100000" in status.stdout and "not running" in status.stdout

    again = python(*command, f"run.stop_at_step={saved + 3}")
    assert again.returncode == 0, again.stderr
    assert f"at step {saved}" in again.stderr and max(losses(tmp_path / "r")) == saved + 3


@pytest.mark.slow
def test_bad_input_found_late_is_not_tried_again(small, tmp_path):
    command = ["launch", "target=local", "launch.check=false", "--", *small]
    done = python(*command, f"data.path={tmp_path / 'none.jsonl'}", f"run.root={tmp_path}")
    assert done.returncode == 2
    assert "attempt" not in done.stderr and "none.jsonl" in done.stderr


@pytest.mark.slow
def test_metacharacters_in_the_run_name_are_a_name(small, tmp_path):
    name = "it's; touch pwned $(touch pwned) & x"
    hydra = '"' + name.replace('"', '\\"') + '"'
    command = ["launch", "target=local", "launch.check=false", "--", *small, "run.steps=2"]
    done = python(*command, f"run.root={tmp_path}", f"run.name={hydra}")
    assert done.returncode == 0, done.stderr
    assert sorted(losses(tmp_path / name)) == [1, 2]
    assert not list(tmp_path.rglob("pwned")) and not Path("pwned").exists()


def test_no_shell_interprets_the_command(tmp_path):
    launch = nasty_launch(["target=local", "nodes=2", "ranks_per_node=3"], tmp_path)
    first, second = local.commands(launch, 0, 29400)
    assert first == second and first[-1] == f"data.text_key={NASTY}" and "--nproc-per-node=3" in first
    assert shlex.split(local.describe(launch, tmp_path).splitlines()[0].split("   #")[0])[-1] == first[-1]


def test_the_python_path_of_the_launch_is_kept(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "/outer")
    path = local.child_environment(parse(["target=local", "launch.env.PYTHONPATH=/my/plugins"]))["PYTHONPATH"]
    assert path.split(":") == [str(CONFIGS.parent), "/my/plugins"]  # the same order as in the scripts of Slurm and ssh
    assert local.child_environment(parse(["target=local"]))["PYTHONPATH"].split(":") == [str(CONFIGS.parent), "/outer"]


SUPERVISE = """
import subprocess, sys
from launch.local import supervise
codes = {codes}
def start(attempt):
    print("attempt", attempt)
    return [subprocess.Popen(["sh", "-c", f"exit {{code}}"]) for code in codes[attempt]]
sys.exit(supervise(start, restarts=len(codes) - 1, grace_seconds=5))
"""


@pytest.mark.parametrize(
    "codes, expected, attempts",
    [([[1, 0], [0, 0]], 0, 2), ([[1], [1]], 1, 2), ([[75, 0], [0]], 75, 1), *(([[c, c], [0]], c, 1) for c in FINAL)],
)
def test_which_exit_codes_start_another_attempt(codes, expected, attempts):
    """`codes`: of the agents of each attempt."""
    line = [sys.executable, "-u", "-c", SUPERVISE.format(codes=codes)]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout.count("attempt")) == (expected, attempts), done.stderr


def test_an_ignored_signal_stays_ignored():
    """nohup ignores SIGHUP, so that a run outlives its terminal."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with local.StopSignals() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            os.kill(os.getpid(), signal.SIGTERM)
            assert stop.count == 1
    finally:
        signal.signal(signal.SIGHUP, before)


def test_ranks_know_the_command_that_started_them():
    """It is printed at the end of a run, so what may be secret is left out."""
    words = [
        "target=local",
        "ranks_per_node=2",
        "launch.env.TOKEN=abc def",
        "launch.python=/a b/python",
        "--",
        "run.steps=5",
    ]
    given = local.child_environment(parse(words))[LAUNCH_COMMAND]
    assert given == "python -m launch target=local ranks_per_node=2 launch.env.TOKEN=... 'launch.python=/a b/python' --"
    assert environment.command_of_run({LAUNCH_COMMAND: given})[-2:] == ["launch.python=/a b/python", "--"]
