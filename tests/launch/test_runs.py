"""Run directories as the launcher reads them, damaged or not, and which directories count as runs."""

import pytest

from launch import runs
from launch.__main__ import main
from launch.errors import LaunchError
from launch.settings import PROJECT


@pytest.mark.parametrize("name", ["", " ", ".", "launch"])
def test_the_source_package_is_no_run(name, monkeypatch):
    monkeypatch.chdir(PROJECT)
    with pytest.raises(LaunchError, match=r"names no run|neither a run directory"):
        runs.find(name)


@pytest.mark.parametrize("marker", runs.MARKERS)
def test_what_makes_a_run(marker, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "runs/a"
    (run / "launch").mkdir(parents=True)
    with pytest.raises(LaunchError):
        runs.find("a")
    (run / marker).touch()
    assert runs.find("a") == runs.find("runs/a") == run


GOOD = b'{"step": 3, "loss": 1.5}\n'


@pytest.mark.parametrize(
    "metrics",
    [
        b'{"step": 4, "loss": null}\n',
        b"12\n",
        b'{"loss": 2.0}\n',
        b'{"step": 4, "loss": "low"}\n',
        b'{"note": "\xc3',
        b"\xff\xfe\x00\n",
    ],
)
def test_damaged_metrics(metrics, tmp_path, capsys):
    (tmp_path / "config.yaml").write_text("run: {steps: 9}\n")
    (tmp_path / "metrics.jsonl").write_bytes(GOOD + metrics)
    assert main(["status", str(tmp_path)]) == 0
    assert "checkpoint at step 0 of 9 steps; loss 1.5000 at step 3" in capsys.readouterr().out


@pytest.mark.parametrize(
    "config", [b"run: [1]\n", b"run: {steps: many}\n", b"checkpoint: 3\n", b"12\n", b"a: [\n", b"\xff\xfe"]
)
def test_damaged_configuration(config, tmp_path, capsys):
    (tmp_path / "config.yaml").write_bytes(config)
    assert main(["status", str(tmp_path)]) == 0
    assert "step 0 of ? steps" in capsys.readouterr().out


def test_checkpoints_that_cannot_be_listed(tmp_path, capsys):
    (tmp_path / "config.yaml").write_text("run: {steps: 9, name: r}\ncheckpoint: {dir: 'nowhere://bucket'}\n")
    assert main(["status", str(tmp_path)]) == 2
    assert "nowhere://bucket/r cannot be" in capsys.readouterr().err
