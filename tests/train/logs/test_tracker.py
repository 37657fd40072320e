"""A W&B run that fails never stops training."""

import sys
import types

import pytest

from train.config.sections import LoggingConfig
from train.logs.tracker import RUN_ID, Tracker, forget_run


def test_a_start_in_the_same_directory_continues_the_run(tmp_path, monkeypatch):
    asked = []
    run = types.SimpleNamespace(finish=lambda: None)
    wandb = types.SimpleNamespace(init=lambda **k: asked.append((k["id"], k["resume"])) or run, Settings=lambda **_: 0)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.delenv("WANDB_RUN_ID", raising=False)

    def start(mode="online"):
        Tracker(LoggingConfig(wandb=mode), tmp_path, name="x", config={}).finish()
        return asked[-1]

    first = start()
    assert first == start() and first[1] == "allow" and len(first[0]) >= 8
    assert start("offline") == (first[0], None)  # W&B would warn that it cannot look for the run
    forget_run(tmp_path)
    assert start()[0] != first[0]
    monkeypatch.setenv("WANDB_RUN_ID", "given")
    assert start()[0] == "given"
    monkeypatch.delenv("WANDB_RUN_ID")
    assert start()[0] == "given"
    (tmp_path / RUN_ID).write_text("not an id: spaces\n")
    assert start()[0] != "given"


@pytest.mark.parametrize("failing", ["start", "log", "finish"])
def test_a_failure_is_reported_once(failing, tmp_path, monkeypatch, capsys):
    calls = []

    def step(name):
        calls.append(name)
        if name == failing:
            raise OSError("no route to host")

    run = types.SimpleNamespace(log=lambda numbers, step_=None, **_: step("log"), finish=lambda: step("finish"))

    def init(**_):
        step("start")
        return run

    wandb = types.SimpleNamespace(init=init, Settings=lambda **_: None)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    tracker = Tracker(LoggingConfig(wandb="online"), tmp_path, name="x", config={})
    tracker.log({"loss": 1.0}, step=1)
    tracker.log({"loss": 0.9}, step=2)
    tracker.finish()
    assert calls == {"start": ["start"], "log": ["start", "log"], "finish": ["start", "log", "log", "finish"]}[failing]
    assert capsys.readouterr().err.count(f"W&B could not {failing} (OSError: no route to host)") == 1
