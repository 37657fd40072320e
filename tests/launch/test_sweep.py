"""Sweeps: what is planned, and bar 4: one killed half-way and started again runs only what is missing."""

import dataclasses
import json
import os
import shlex
import signal

import pytest
import yaml

from launch import check, config, sweep
from launch.config import LaunchError
from tests.launch.conftest import losses, python, start, wait_for


def planned(arguments, directory):
    options, launch_arguments, overrides = sweep.parse(arguments)
    launch = dataclasses.replace(config.parse([*launch_arguments, "--", *overrides]), directory=directory)
    return sweep.plan(options, launch)


def test_every_combination_is_a_point_of_its_own(tmp_path):
    home, plan = planned(["sweep=s", "model.chunk_size=4,8", "optim=wsd,cosine", "optim.lr=1e-3"], tmp_path)
    assert home == tmp_path / "runs/s"
    assert [p.name for p in plan.points] == [f"chunk_size={k},optim={o}" for k in (4, 8) for o in ("wsd", "cosine")]
    for point in plan.points:
        values = check.compose(point.overrides)
        assert values["run"]["name"] == f"s/{point.name}"
        assert values["logging"]["wandb_group"] == "s"
        assert values["optim"]["lr"] == 1e-3 and values["run"]["steps"] == point.steps
    assert planned(["sweep=s", "sweep.budget=steps", "run.seed=range(0,3)"], tmp_path)[1].points[2].name == "seed=2"


def test_budgets_give_every_point_as_much_as_the_base(tmp_path):
    base = check.compose([])
    tokens = base["run"]["steps"] * base["seq_len"]
    _, plan = planned(["sweep=s", "seq_len=1024,2048,8192"], tmp_path)
    assert [p.steps * length for p, length in zip(plan.points, (1024, 2048, 8192))] == [tokens] * 3
    _, plan = planned(["sweep=s", "sweep.budget=steps", "seq_len=1024,8192"], tmp_path)
    assert [p.steps for p in plan.points] == [base["run"]["steps"]] * 2
    _, plan = planned(
        ["sweep=s", "sweep.budget=flops", "seq_len=131072", "model.layer_pattern=S,F", "run.steps=1000"], tmp_path
    )
    narrow, full = (p.steps * sweep._flops_per_step(check.compose(p.overrides)) for p in plan.points)
    assert plan.points[0].steps > 2 * plan.points[1].steps  # full attention over 128k is dear
    assert narrow == pytest.approx(full, rel=0.01)


@pytest.mark.parametrize(
    "arguments, words",
    [
        ([], ["sweep=NAME"]),
        (["sweep=none"], ["nothing to vary", "k, pattern, window"]),
        (["sweep=s", "model.chunk_sise=2,4"], ["model.chunk_sise", "did you mean model.chunk_size"]),
        (["sweep=s", "model.chunk_size=3,4", "seq_len=4096"], ["chunk_size=3", "seq_len=4096"]),
        (["sweep=s", "model.chunk_size=4,4"], ["twice"]),
        (["sweep=s", "model.chunk_size=4,8", "run.name=x"], ["names its runs itself"]),
        (["sweep=../s", "model.chunk_size=4,8"], ["'../s'"]),
        (["sweep=s;ls", "model.chunk_size=4,8"], ["'s;ls'"]),
        (["sweep=s", "sweep.bugdet=flops"], ["sweep.bugdet", "sweep.budget"]),
        (["sweep=s", "sweep.budget=hours"], ["'hours'", "tokens"]),
        (["sweep=s", "data.text_key='a b','a;b'"], ["same directory"]),
        (["sweep=s", "model=glob(*)"], ["model=glob(*)", "KEY=A,B,C"]),
        (["sweep=s", "optim.lr=interval(0.1,1)"], ["optim.lr=interval(0.1,1)", "KEY=A,B,C"]),
        (["sweep=s", "run=null", "model.chunk_size=4,8"], ["run=None"]),
        (["sweep=s", "seq_len=abc", "model.chunk_size=4,8"], ["seq_len='abc'"]),
        (["sweep=s", "run.root=README.md", "model.chunk_size=4,8"], ["README.md"]),
        (["sweep=k", "model.chunk_size=4"], ["model.chunk_size=4", "4,8,16,32", "sweep.only"]),
        (["sweep=s", "model.chunk_size=4,8", "++model.chunk_size=4"], ["++model.chunk_size=4", "over 4,8"]),
        (["sweep=s", "model.chunk_size=4,8", "model.chunk_size=2,4"], ["model.chunk_size=2,4", "varies already"]),
    ],
)
def test_bad_input_is_one_clear_line(arguments, words, tmp_path):
    (tmp_path / "README.md").touch()
    with pytest.raises(LaunchError) as caught:
        planned(arguments, tmp_path)
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("name", sweep.presets())
def test_presets_plan(name, tmp_path):
    _, plan = planned([f"sweep={name}"], tmp_path)
    assert len(plan.points) >= 4


def test_a_sweep_begun_otherwise_is_refused_and_more_values_extend_it(tmp_path):
    home, first = planned(["sweep=s", "model.chunk_size=4,8"], tmp_path)
    sweep.write(home, first)
    assert planned(["sweep=s"], tmp_path) == (home, first)
    assert [p.name for p in planned(["sweep=s", "model.chunk_size=8,16"], tmp_path)[1].points] == [
        "chunk_size=4", "chunk_size=8", "chunk_size=16"]  # fmt: skip
    with pytest.raises(LaunchError, match=r"begun with other settings.*run.steps"):
        planned(["sweep=s", "sweep.budget=flops"], tmp_path)
    with pytest.raises(LaunchError, match=r"begun with other settings.*optim.lr"):
        planned(["sweep=s", "model.chunk_size=4,8", "optim.lr=1e-4"], tmp_path)
    (home / "sweep.json").write_text("{")
    with pytest.raises(LaunchError, match=r"sweep.json cannot be read"):
        planned(["sweep=s"], tmp_path)


@pytest.mark.parametrize("name", ["20240501", "null", "1e3", "true"])
def test_the_group_is_a_text_whatever_the_name(name, tmp_path):
    home, plan = planned([f"sweep={name}", "model.chunk_size=4,8"], tmp_path)
    assert check.compose(plan.points[0].overrides)["logging"]["wandb_group"] == name
    # A sweep that was begun when the group was not quoted goes on.
    older = [
        dataclasses.replace(p, overrides=[o.replace(f"group='{name}'", f"group={name}") for o in p.overrides])
        for p in plan.points
    ]
    sweep.write(home, dataclasses.replace(plan, points=older))
    assert planned([f"sweep={name}", "model.chunk_size=4,8"], tmp_path)[1].points == plan.points


def test_only_names_points_of_two_axes():
    names = ["k=4,o=wsd", "k=4,o=cosine", "k=8,o=wsd", "k=4"]
    for only in (["k=8,o=wsd"], ["k=4,o=wsd", "k=8,o=wsd"], ["k=4"], ["k=4", "k=4,o=cosine"]):
        assert sweep.chosen(",".join(only), names) == only
    assert sweep.chosen("[k=4, k=8,o=wsd]", names) == ["k=4", "k=8,o=wsd"]
    assert sweep.chosen("", names) == names
    with pytest.raises(LaunchError, match=r"no point is k=8,o=adam; the points are k=4,o=wsd  k=4,o=cosine"):
        sweep.chosen("k=4,k=8,o=adam", names)


def test_the_line_that_runs_failed_points_again_works_as_printed(tmp_path, monkeypatch, capsys):
    """With its points of two axes, its target and settings, and a root that shells and Hydra would both take apart."""
    root = tmp_path / 'it\'s, a "root" $(touch pwned)'
    text = '"' + str(root).replace('"', '\\"') + '"'
    run_settings = ["run.samples_per_step=2", f"run.root={text}"]
    target = ["target=local", "ranks_per_node=2", "launch.restarts=0", "launch.env.NOTE=a b"]
    arguments = ["sweep=k", "sweep.report=false", "model.chunk_size=4,8", "optim=wsd,cosine", *run_settings, *target]
    called = []

    def command(launch, launch_arguments, point):
        called.append((launch_arguments, point.name, launch.world_size))
        return ["sh", "-c", f"exit {int('8' in point.name)}"]  # two of the four fail

    monkeypatch.setattr(sweep, "_command", command)
    monkeypatch.setattr(sweep, "end_descendants", lambda: None)  # those of this process serve other tests
    assert sweep.main(arguments) == 1
    line = shlex.split(capsys.readouterr().out.split("alone again: ")[1])
    assert line[:3] == ["python", "-m", "launch.sweep"]
    called.clear()
    assert sweep.main(line[3:]) == 1
    assert called == [(target, f"chunk_size=8,optim={o}", 2) for o in ("wsd", "cosine")]
    assert shlex.split(capsys.readouterr().out.split("alone again: ")[1]) == line


@pytest.mark.slow
def test_killed_half_way_only_what_is_missing_runs_again(small, tmp_path):
    """The default model, k in {2, 4, 8, 16}, one point spoiled: kill -9 in the second, start again, mend, report."""
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
