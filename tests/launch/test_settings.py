"""Settings of the targets: where they come from, their types, and the one-line message for every mistake."""

import dataclasses

import pytest
import yaml

from launch.config import parse
from launch.errors import LaunchError
from launch.settings import CONFIGS, TARGETS
from tests.launch.conftest import SLURM


def test_settings_come_from_default_then_target_then_command_line():
    launch = parse(
        [*SLURM, "nodes=2", "gpus_per_node=8", "launch.time=2-00:00:00", "launch.env.NCCL_IB_HCA=mlx5", "--", "a=b"]
    )
    assert (launch.world_size, launch.ranks_per_node, launch.overrides) == (16, 8, ("a=b",))
    assert launch.settings.restarts == yaml.safe_load((CONFIGS / "launch/default.yaml").read_text())["restarts"]
    assert launch.settings.cpus_per_rank == 8  # slurm.yaml's, over default.yaml's 1
    assert launch.settings.time == "2-00:00:00"
    assert launch.environment["NCCL_IB_HCA"] == "mlx5" and launch.environment["NCCL_DEBUG"] == "WARN"
    assert launch.environment["OMP_NUM_THREADS"] == "8"
    assert "NCCL_DEBUG" not in parse([*SLURM, "launch.env.NCCL_DEBUG=null"]).environment


@pytest.mark.parametrize("target", TARGETS)
def test_yaml_names_every_setting(target):
    """A setting missing from the files would have no default; one missing from the dataclass would do nothing."""
    named = set()
    for name in ("default", target):
        named |= set(yaml.safe_load((CONFIGS / f"launch/{name}.yaml").read_text()))
    assert named == {f.name for f in dataclasses.fields(TARGETS[target])}


def test_every_setting_is_read():
    code = "\n".join(p.read_text() for p in (CONFIGS.parent / "launch").glob("*.py"))
    for settings in TARGETS.values():
        for f in dataclasses.fields(settings):
            assert f"settings.{f.name}" in code or f"self.{f.name}" in code, f.name


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["target=slurm"], ["launch.partition", "slurm.yaml"]),
        (["target=kubernetes"], ["launch.image", "kubernetes.yaml"]),
        (["target=ssh", "launch.hosts=[a;reboot]"], ["a;reboot", "not a host name"]),
        (["target=local", "launch.partition=x"], ["launch.partition", "target=local"]),
        (["target=local", "launch.restart=1"], ["did you mean launch.restarts"]),
        (["target=local", "launch.restarts=many"], ["launch.restarts='many'", "a whole number"]),
        (["target=local", "launch.restarts=-1"], ["at least 0"]),
        (["target=local", "launch.grace_seconds=0"], ["at least 1"]),
        (["target=local", "launch.env.A-B=1"], ["'A-B'"]),
        ([*SLURM, "launch.time=soon"], ["launch.time='soon'"]),
        ([*SLURM, "launch.qos=a b"], ["launch.qos='a b'"]),
        ([*SLURM, "launch.continuation=maybe"], ["requeue, chain"]),
        ([*SLURM, "launch.chain_jobs=3"], ["launch.continuation=chain"]),
        ([*SLURM, "launch.sbatch_args=[--nodelist=n1,n2]"], ["'n2'", "launch.sbatch_args", '["--NAME=A,B"]']),
        ([*SLURM, "launch.sbatch_args=[--constraint=[a|b]]"], ["[--constraint=[a|b]]", "quote an entry"]),
        ([*SLURM, "launch.sbatch_args=[--a"], ["launch.sbatch_args='[--a'", "[A,B]"]),
        ([*SLURM, "launch.sbatch_args=[--a: b]"], ["launch.sbatch_args", "quote an entry"]),
        (["target=kubernetes", "launch.image=i", "launch.volumes.x=claim"], ["CLAIM:/MOUNT"]),
        (["target=kubernetes", "launch.image=i", "launch.secrets.TOKEN=abc"], ["SECRET/KEY"]),
        (["target=kubernetes", "launch.image=i", "launch.shm_size=much"], ["launch.shm_size='much'"]),
    ],
)
def test_bad_input_is_one_clear_line(arguments, words):
    with pytest.raises(LaunchError) as caught:
        parse(arguments)
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    "text, expected",
    [
        ("[]", ()),
        ("[--exclusive, -w n1]", ("--exclusive", "-w n1")),
        ('["--nodelist=n1,n2",--exclusive]', ("--nodelist=n1,n2", "--exclusive")),
        ("['--constraint=[a|b]']", ("--constraint=[a|b]",)),
        ("--a,--b", ("--a", "--b")),
    ],
)
def test_a_quoted_entry_of_a_list_may_contain_a_comma(text, expected):
    assert parse([*SLURM, f"launch.sbatch_args={text}"]).settings.sbatch_args == expected
    assert parse(["target=ssh", "launch.hosts=[10,true]"]).settings.hosts == (
        "10",
        "true",
    )  # strings, whatever they look like


def test_text_in_yaml_is_taken_as_it_is_spelled(tmp_path, monkeypatch):
    """YAML 1.1 reads 12:00:00 as 43200, 007 as 7, on as true; who follows "write it in quotes" would get minutes."""
    (tmp_path / "launch").mkdir()
    for path in (CONFIGS / "launch").glob("*.yaml"):
        (tmp_path / "launch" / path.name).write_text(path.read_text())
    slurm = tmp_path / "launch" / "slurm.yaml"
    lines = [
        line for line in slurm.read_text().splitlines() if not line.startswith(("time:", "account:", "partition:"))
    ]
    lines += ["time: 12:00:00", "account: 007", "partition: on"]
    at = lines.index(next(line for line in lines if line.startswith("env:")))
    lines[at + 1 : at + 1] = ["  ANSWER: 1_0", "  EMPTY: null", "  ON: yes"]
    slurm.write_text("\n".join(lines) + "\n")
    monkeypatch.setattr("launch.settings.CONFIGS", tmp_path)
    with pytest.raises(LaunchError, match=r"launch.env.EMPTY=None must be a string"):
        parse(["target=slurm", "nodes=1", "--", "a=b"])
    slurm.write_text(slurm.read_text().replace("  EMPTY: null\n", ""))
    settings = parse(["target=slurm", "nodes=1", "--", "a=b"]).settings
    assert (settings.time, settings.account, settings.partition) == ("12:00:00", "007", "on")
    assert (settings.env["ANSWER"], settings.env["ON"]) == ("1_0", "yes")
    assert settings.qos is None and settings.sbatch_args == ()
