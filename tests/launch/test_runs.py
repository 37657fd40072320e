"""What a run directory says from outside, damaged or not, and which directories are runs."""

import json
from pathlib import Path

import pytest

from launch import kubernetes, runs
from launch.__main__ import main
from launch.config import PROJECT, LaunchError


@pytest.mark.parametrize("name", ["", " ", ".", "launch"])
def test_the_source_package_is_no_run(name, monkeypatch):
    monkeypatch.chdir(PROJECT)
    with pytest.raises(LaunchError, match=r"names no run|neither a run directory"):
        runs.find(name)


@pytest.mark.parametrize("mark", runs.MARKS)
def test_what_makes_a_run(mark, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "runs/a"
    (run / "launch").mkdir(parents=True)
    with pytest.raises(LaunchError):
        runs.find("a")
    (run / mark).touch()
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


def kubectl(folder: Path, text: str) -> None:
    (folder / "kubectl").write_text(f"#!/bin/sh\n{text}\n")
    (folder / "kubectl").chmod(0o755)


def test_a_kubernetes_run_is_found_again(tmp_path, monkeypatch, capsys):
    """The record names the job; the verbs call kubectl, or say what to call."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    kubectl(
        tmp_path, f'printf "%s\\n" "$*" >> {tmp_path}/called; [ "$1" = apply ] && cat > {tmp_path}/applied; echo said'
    )
    target = ["target=kubernetes", "launch.image=i", "launch.namespace=research", "launch.check=false"]
    assert main([*target, "--", "run.name=a"]) == 0
    record = json.loads((tmp_path / "runs/a/launch/launch.json").read_text())
    (job,) = record["jobs"]
    namespace, _, name = job.partition("/")
    assert record["target"] == "kubernetes" and namespace == "research"
    assert f"name: {name}" in (tmp_path / "applied").read_text()
    capsys.readouterr()
    for verb in ("status", "logs", "cancel"):
        assert main([verb, "a"]) == 0
        assert "said" in capsys.readouterr().out
    called = (tmp_path / "called").read_text().splitlines()
    assert called == [
        "apply -f -",
        f"-n research get trainjob {name}",
        f"-n research logs -l jobset.sigs.k8s.io/jobset-name={name} --prefix --tail=200",
        f"-n research delete trainjob,trainingruntime {name}",
    ]
    kubectl(tmp_path, 'echo "Error from server" >&2; exit 1')
    assert main(["cancel", "a"]) == 2
    assert "Error from server" in capsys.readouterr().err
    kubectl(tmp_path, 'case "$*" in *gone*) echo "not found" >&2; exit 1;; *) echo "deleted";; esac')
    both = runs.Record("kubernetes", [], ["research/gone", "research/other"], "")
    with pytest.raises(LaunchError, match="trainingruntime gone: not found"):
        kubernetes.look_after("cancel", both)
    assert capsys.readouterr().out == "deleted\n"
    monkeypatch.setenv("PATH", str(tmp_path / "runs"))
    assert main(["cancel", "a"]) == 2
    assert f"where it is: kubectl -n research delete trainjob,trainingruntime {name}" in capsys.readouterr().err


def test_a_kubernetes_run_whose_folder_is_in_the_pods_alone(tmp_path, monkeypatch, capsys):
    """The job is submitted: that its record cannot be kept here is said, and no failure."""
    (tmp_path / "file").touch()
    arguments = ["target=kubernetes", "launch.image=i", "launch.check=false", f"launch.output={tmp_path / 'job.yaml'}"]
    assert main([*arguments, "--", f"run.root={tmp_path / 'file'}"]) == 0
    assert "no record" in capsys.readouterr().err and (tmp_path / "job.yaml").is_file()
    assert main([*arguments, f"launch.output={tmp_path}", "--"]) == 2
    assert f"launch.output: {tmp_path} cannot be written" in capsys.readouterr().err
