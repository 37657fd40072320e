"""Running sweeps: which points run, what happens to failed ones, and how a sweep that was killed continues."""

import json
import os
import shlex
import signal

import pytest
import yaml

from launch import check, sweep
from launch.errors import LaunchError
from tests.launch.conftest import losses, python, start, wait_for
from train.distributed.signals import DIVERGED


def test_only_selects_points_of_two_axes():
    names = ["k=4,o=wsd", "k=4,o=cosine", "k=8,o=wsd", "k=4"]
    for only in (["k=8,o=wsd"], ["k=4,o=wsd", "k=8,o=wsd"], ["k=4"], ["k=4", "k=4,o=cosine"]):
        assert sweep.select_points(",".join(only), names) == only
    assert sweep.select_points("[k=4, k=8,o=wsd]", names) == ["k=4", "k=8,o=wsd"]
    assert sweep.select_points("", names) == names
    with pytest.raises(LaunchError, match=r"there is no point k=8,o=adam; the points are k=4,o=wsd  k=4,o=cosine"):
        sweep.select_points("k=4,k=8,o=adam", names)


def test_the_printed_command_runs_the_failed_points_again(tmp_path, monkeypatch, capsys):
    """With points of two axes, a target with settings, and a root whose characters both shells and Hydra interpret."""
    root = tmp_path / 'it\'s, a "root" $(touch pwned)'
    text = '"' + str(root).replace('"', '\\"') + '"'
    run_settings = ["run.samples_per_step=2", f"run.root={text}"]
    target = ["target=local", "ranks_per_node=2", "launch.restarts=0", "launch.env.NOTE=a b"]
    arguments = ["sweep=k", "sweep.report=false", "model.chunk_size=4,8", "optim=wsd,cosine", *run_settings, *target]
    called = []

    def command(launch, launch_arguments, point):
        called.append((launch_arguments, point.name, launch.world_size))
        return ["sh", "-c", f"exit {int('8' in point.name)}"]  # two of the four fail

    monkeypatch.setattr(sweep, "point_command", command)
    monkeypatch.setattr(sweep, "end_descendants", lambda: None)  # the children of this process serve other tests
    assert sweep.main(arguments) == 1
    line = shlex.split(capsys.readouterr().out.split("only these again: ")[1])
    assert line[:3] == ["python", "-m", "launch.sweep"]
    called.clear()
    assert sweep.main(line[3:]) == 1
    assert called == [(target, f"chunk_size=8,optim={o}", 2) for o in ("wsd", "cosine")]
    assert shlex.split(capsys.readouterr().out.split("only these again: ")[1]) == line


def test_a_point_that_diverged_is_reported_and_not_tried_again(tmp_path, monkeypatch, capsys):
    attempts = tmp_path / "attempts"
    shell = f"echo started >> {attempts}; echo 'error: the loss is not finite' >&2; exit {DIVERGED}"
    monkeypatch.setattr(sweep, "point_command", lambda *_: ["sh", "-c", shell])
    monkeypatch.setattr(sweep, "end_descendants", lambda: None)  # the children of this process serve other tests
    assert sweep.main(["sweep=k", "sweep.report=false", "model.chunk_size=4,8", f"run.root={tmp_path}"]) == 1
    assert attempts.read_text() == "started\n" * 2
    printed = capsys.readouterr().out
    assert printed.count(f"FAILED with exit code {DIVERGED} (error: the loss is not finite), see") == 2
    assert "2 of 2 points did not finish" in printed


@pytest.mark.slow
def test_killed_half_way_only_what_is_missing_runs_again(small, tmp_path):
    """The default model, k in {2, 4, 8, 16}, one point broken: kill -9 in the second, run again, repair, report."""
    small = [o for o in small if not o.startswith(("model.", "seq_len="))] + ["seq_len=512"]
    command = ["launch.sweep", "sweep=k", *small, "model.chunk_size=2,4,8,16", f"run.root={tmp_path}", "run.steps=5"]
    home, log = tmp_path / "k", tmp_path / "log"
    (home / "chunk_size=16").mkdir(parents=True)
    another = yaml.safe_dump(check.compose(["seq_len=96"]))  # another run's directory
    (home / "chunk_size=16/config.yaml").write_text(another)
    first = start(*command, log=log)
    wait_for(lambda: len(losses(home / "chunk_size=4")) >= 2, "the second point's second step")
    first.send_signal(signal.SIGKILL)
    first.wait()
    finished = (home / "chunk_size=2/metrics.jsonl").stat().st_mtime_ns
    assert max(losses(home / "chunk_size=2")) == 5

    again = python(*command)
    assert again.returncode == 1, again.stdout + again.stderr
    assert "1 finished, 3 to run" in again.stdout or "2 finished, 2 to run" in again.stdout
    assert "chunk_size=16: FAILED with exit code 2 (error:" in again.stdout and "another configuration" in again.stdout
    assert "sweep.only=chunk_size=16" in again.stdout
    assert (home / "chunk_size=2/metrics.jsonl").stat().st_mtime_ns == finished
    for k in (2, 4, 8):
        assert sorted(losses(home / f"chunk_size={k}")) == list(range(1, 6))
    page = (home / "report/report.html").read_text()
    assert "chunk_size=8" in page and "chunk_size=16 has" in page

    os.remove(home / "chunk_size=16/config.yaml")
    alone = python("launch.sweep", "sweep=k", "sweep.only=chunk_size=16", f"run.root={tmp_path}")
    assert alone.returncode == 0, alone.stdout + alone.stderr
    assert "0 finished, 1 to run" in alone.stdout and max(losses(home / "chunk_size=16")) == 5
    assert len(json.loads((home / "sweep.json").read_text())["points"]) == 4

    nothing = python("launch.sweep", "sweep=k", f"run.root={tmp_path}", "sweep.report=false")
    assert nothing.returncode == 0 and "4 finished, 0 to run" in nothing.stdout
    assert (home / "chunk_size=2/metrics.jsonl").stat().st_mtime_ns == finished
