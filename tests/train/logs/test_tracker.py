"""A W&B run that fails never stops training."""

import sys
import types

import pytest

from train.config.sections import LoggingConfig
from train.logs.tracker import Tracker


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
