"""Every configuration key is read by something other than its own check."""

import typing
from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest

from tests.train.config.reads import Program
from train.config.schema import TrainConfig

ROOT = Path(__file__).resolve().parents[3]


def unread(program, cls, prefix=""):
    """Dotted keys of dataclass `cls` whose field is never read."""
    hints, missing = typing.get_type_hints(cls), []
    for field in fields(cls):
        key = f"{prefix}{field.name}"
        if f"{cls.__module__}.{cls.__qualname__}.{field.name}" not in program.reads:
            missing.append(key)
        if is_dataclass(hints[field.name]):
            missing += unread(program, hints[field.name], f"{key}.")
    return missing


def test_every_key_is_read():
    assert unread(Program(ROOT, ("ksa_model", "data_pipeline", "train", "launch")), TrainConfig) == []


PLANTED = """
from dataclasses import dataclass, field, replace

@dataclass(frozen=True)
class Run:
    name: str = "a"
    group: str = "b"
    steps: int = 1
    seed: int = 0

    def __post_init__(self):
        if self.group == "":
            raise ValueError

@dataclass(frozen=True)
class Config:
    run: Run = field(default_factory=Run)
    logging: Run = field(default_factory=Run)

class Holder:
    def __init__(self, config: Config):
        self._config = config

    def steps(self, match):
        match.group(1), match.seed
        return replace(self._config, run=Run()).run.steps

def name(configs: list[Config]):
    return [config.run.name for config in configs]
"""


@pytest.mark.parametrize("planted", ["group", "seed"])
def test_a_planted_key_is_found(tmp_path, planted):
    """`run.group` is checked, and `match.group` is read, but nobody reads the key; nor `run.seed`."""
    (tmp_path / "planted").mkdir()
    (tmp_path / "planted/__init__.py").write_text(PLANTED)
    reads = Program(tmp_path, ["planted"]).reads
    assert f"planted.Run.{planted}" not in reads
    assert {"planted.Run.name", "planted.Run.steps", "planted.Config.run"} <= reads
