"""Where a run starts, found without data, process groups or a model."""

import json

import pytest

from tests.train.runs import make_config
from train.config.errors import ConfigError
from train.hf import import_weights
from train.start import Fresh, Import, Inherit, Resume, find_start


def write_checkpoint(run, step):
    """What of a checkpoint is looked at here: nothing of it is verified."""
    directory = run / "checkpoints" / f"step-{step:08d}"
    directory.mkdir(parents=True)
    (directory / "manifest.json").write_text("{}")
    (directory / "state.json").write_text(json.dumps({"format": 2, "step": step, "config": {"model": {}}}))
    return directory


@pytest.fixture
def config(corpus, tmp_path):
    return lambda **changes: make_config(corpus, tmp_path, **changes)


def test_a_run_without_checkpoints_starts_afresh(config):
    assert find_start(config()) == Fresh()


def test_the_newest_checkpoint_is_resumed(config, tmp_path):
    write_checkpoint(tmp_path / "default", 5)
    newest = write_checkpoint(tmp_path / "default", 10)
    start = find_start(config(init_from="/no/longer/there"))  # where a resumed run once began may be gone
    assert isinstance(start, Resume) and str(start.checkpoint) == str(newest)
    assert find_start(config(resume="never")) == Fresh()


def test_another_runs_checkpoint_is_resumed_or_inherited(config, tmp_path):
    given = write_checkpoint(tmp_path / "other", 5)
    resumed, inherited = (find_start(config(**{key: str(tmp_path / "other")})) for key in ("resume", "init_from"))
    assert isinstance(resumed, Resume) and str(resumed.checkpoint) == str(given)
    assert isinstance(inherited, Inherit) and str(inherited.checkpoint) == str(given)


def test_a_hugging_face_directory_is_checked_and_imported(config, monkeypatch):
    checked = []
    monkeypatch.setattr(import_weights, "check", checked.append)
    asked = config(init_from="hf:somewhere")
    assert find_start(asked) == Import() and checked == [asked]


@pytest.mark.parametrize("key", ["resume", "init_from"])
def test_a_wrong_path_is_refused(config, key):
    with pytest.raises(ConfigError, match=f"{key}=nowhere: neither a checkpoint"):
        find_start(config(**{key: "nowhere"}))
