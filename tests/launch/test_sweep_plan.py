"""What a sweep runs: its points, their budgets, the stored plan, and the one-line message for every mistake."""

import dataclasses

import pytest

from launch import check, config, sweep, sweep_plan
from launch.errors import LaunchError


def planned(arguments, directory):
    options, launch_arguments, overrides = sweep.parse(arguments)
    launch = dataclasses.replace(config.parse([*launch_arguments, "--", *overrides]), directory=directory)
    return sweep_plan.plan(options.name, options.budget, launch)


def test_every_combination_is_a_point(tmp_path):
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
    narrow, full = (p.steps * sweep_plan.flops_per_step(check.compose(p.overrides)) for p in plan.points)
    assert plan.points[0].steps > 2 * plan.points[1].steps  # full attention over 128k is expensive
    assert narrow == pytest.approx(full, rel=0.01)


@pytest.mark.parametrize(
    "arguments, words",
    [
        ([], ["sweep=NAME"]),
        (["sweep=none"], ["no values to vary", "k, pattern, window"]),
        (["sweep=s", "model.chunk_sise=2,4"], ["model.chunk_sise", "did you mean model.chunk_size"]),
        (["sweep=s", "model.chunk_size=3,4", "seq_len=4096"], ["chunk_size=3", "seq_len=4096"]),
        (["sweep=s", "model.chunk_size=4,4"], ["twice"]),
        (["sweep=s", "model.chunk_size=4,8", "run.name=x"], ["chooses the names of its runs"]),
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
        (["sweep=s", "model.chunk_size=4,8", "model.chunk_size=2,4"], ["model.chunk_size=2,4", "is varied twice"]),
    ],
)
def test_bad_input_is_one_clear_line(arguments, words, tmp_path):
    (tmp_path / "README.md").touch()
    with pytest.raises(LaunchError) as caught:
        planned(arguments, tmp_path)
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("name", sweep_plan.presets())
def test_presets_plan(name, tmp_path):
    _, plan = planned([f"sweep={name}"], tmp_path)
    assert len(plan.points) >= 4


def test_other_settings_are_refused_and_more_values_extend_the_sweep(tmp_path):
    home, first = planned(["sweep=s", "model.chunk_size=4,8"], tmp_path)
    sweep_plan.write(home, first)
    assert planned(["sweep=s"], tmp_path) == (home, first)
    assert [p.name for p in planned(["sweep=s", "model.chunk_size=8,16"], tmp_path)[1].points] == [
        "chunk_size=4", "chunk_size=8", "chunk_size=16"]  # fmt: skip
    with pytest.raises(LaunchError, match=r"started with other settings.*run.steps"):
        planned(["sweep=s", "sweep.budget=flops"], tmp_path)
    with pytest.raises(LaunchError, match=r"started with other settings.*optim.lr"):
        planned(["sweep=s", "model.chunk_size=4,8", "optim.lr=1e-4"], tmp_path)
    (home / "sweep.json").write_text("{")
    with pytest.raises(LaunchError, match=r"sweep.json cannot be read"):
        planned(["sweep=s"], tmp_path)


@pytest.mark.parametrize("name", ["20240501", "null", "1e3", "true"])
def test_the_group_is_a_string_whatever_the_name(name, tmp_path):
    home, plan = planned([f"sweep={name}", "model.chunk_size=4,8"], tmp_path)
    assert check.compose(plan.points[0].overrides)["logging"]["wandb_group"] == name
    # A sweep whose stored overrides do not quote the group continues.
    older = [
        dataclasses.replace(p, overrides=[o.replace(f"group='{name}'", f"group={name}") for o in p.overrides])
        for p in plan.points
    ]
    sweep_plan.write(home, dataclasses.replace(plan, points=older))
    assert planned([f"sweep={name}", "model.chunk_size=4,8"], tmp_path)[1].points == plan.points
