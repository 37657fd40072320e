"""What Hydra composes from `configs/` and the dataclasses."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.golden import record_presets
from train.config.compose import CONFIGS, compose
from train.config.conversion import all_keys, defaults, flatten, from_mapping, to_mapping
from train.config.schema import TrainConfig

ROOT = Path(__file__).resolve().parents[3]
# Keys without a default, which config.yaml or a preset gives.
REQUIRED = {f"model.{key}" for key in "hidden_size num_layers num_heads num_kv_heads head_dim ffn_size".split()}
REQUIRED |= {"seq_len"}


def test_presets_compose_to_what_is_recorded():
    """A changed default or preset shows in the diff of tests/golden/presets.txt; record it when it is meant."""
    assert record_presets.composed() == record_presets.GOLDEN.read_text()


def test_every_key_has_a_default_or_is_required():
    sections = {"model", "data", "optim", "parallel", "memory", "run", "perf", "checkpoint", "logging", "stage"}
    assert flatten(defaults(TrainConfig)).keys() | REQUIRED | sections == set(all_keys(TrainConfig))


def test_defaults_are_those_of_the_dataclasses():
    values = compose([])
    config = from_mapping(TrainConfig, {"model": values["model"], "seq_len": 64})
    held = flatten(to_mapping(config))
    assert {key: held[key] for key in flatten(defaults(TrainConfig)) if not key.startswith("model.")} == {
        key: value for key, value in flatten(defaults(TrainConfig)).items() if not key.startswith("model.")
    }


@pytest.mark.parametrize("file", ["config", "optim/wsd", "memory/none", "logging/default", "stage/scratch"])
def test_no_default_stands_in_yaml_twice(file):
    """A file of the default run names nothing but what selects it."""
    selects = {"optim.schedule", "memory.recompute", "logging.wandb", "stage.kind", "seq_len"}
    values = yaml.safe_load((CONFIGS / f"{file}.yaml").read_text())
    values.pop("defaults", None)
    values.pop("hydra", None)
    section = "" if file == "config" else file.split("/")[0] + "."
    assert {f"{section}{key}" for key in flatten(values)} <= selects


def test_every_key_can_be_overridden_without_a_plus():
    values = flatten(compose([]))
    same = [f"{key}={_override(value)}" for key, value in values.items() if _override(value)]
    assert len(same) > 80 and flatten(compose(same)) == values


def _override(value):
    """A plain value in Hydra's grammar; nothing for lists, which no shell word gives back."""
    if isinstance(value, (list, dict)):
        return ""
    return {None: "null", True: "true", False: "false"}.get(value, value) if not isinstance(value, int) else value


@pytest.mark.parametrize("option", ["--cfg=job", "--help"])
def test_the_command_shows_every_key(option):
    done = subprocess.run([sys.executable, "-m", "train", option], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    shown = done.stdout if option == "--cfg=job" else done.stdout.split("override with key=value):")[1]
    for key in all_keys(TrainConfig):
        assert f"{key.rpartition('.')[2]}:" in shown, key
