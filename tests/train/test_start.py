"""Where a run starts, found without data, process groups or a model."""

import json

import pytest

from tests.train.runs import make_config
from train.checkpoint.storage import CheckpointPath
from train.config.errors import ConfigError
from train.hf import import_weights
from train.logs import saved
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


def saved_at_20(config, tmp_path, resume="auto"):
    """A run that keeps its checkpoints on a file system of their own, and is at step 20."""
    asked = config(checkpoint__dir=str(tmp_path / "disk"), resume=resume)
    own = write_checkpoint(tmp_path / "disk" / "x", 20).parents[2] / "default"
    (tmp_path / "disk/x/checkpoints").rename(own)
    run = tmp_path / "default"
    run.mkdir()
    lines = [{"step": step, "loss": 2.0} for step in range(1, 21)] + [{"step": 20, "checkpoint_seconds": 0.1}]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert isinstance(find_start(asked), Resume)
    return asked, own


@pytest.mark.parametrize("remembers", [True, False], ids=["note", "records of an earlier version"])
def test_a_run_whose_checkpoints_are_not_there_does_not_start_afresh(config, tmp_path, remembers):
    asked, own = saved_at_20(config, tmp_path)
    if remembers:
        saved.remember(tmp_path / "default", "auto", print)(CheckpointPath(own / "step-00000020"), 20)
    own.rename(tmp_path / "elsewhere")  # as if the disk were not mounted
    with pytest.raises(ConfigError, match=f"at step 20.*no checkpoint in {own}: mount.*checkpoint.dir.*resume=never"):
        find_start(asked)
    moved = config(checkpoint__dir=str(tmp_path / "new"))
    with pytest.raises(ConfigError, match="saved at step 20"):
        find_start(moved)
    assert find_start(config(resume="never")) == Fresh()
    assert isinstance(find_start(config(resume=str(tmp_path / "elsewhere"))), Resume)
    own.mkdir()  # what an earlier start of the unmounted run leaves behind
    if remembers:
        with pytest.raises(ConfigError, match="saved at step 20"):
            find_start(asked)
        (own / "step-00000020.replaced").mkdir()  # killed while it replaced the only one: the next start restores it
        assert find_start(asked) == Fresh()
    (tmp_path / "new").mkdir()
    (tmp_path / "elsewhere").rename(tmp_path / "new" / "default")
    assert isinstance(find_start(moved), Resume)


def test_a_first_save_that_was_cut_off_is_nothing_to_look_for(config, tmp_path):
    asked, own = saved_at_20(config, tmp_path)
    (own / "step-00000020").rename(own / "step-00000020.incomplete")
    assert find_start(asked) == Fresh()


def test_the_same_command_with_a_path_does_not_begin_there_again(config, tmp_path):
    given = write_checkpoint(tmp_path / "other", 5)
    asked, own = saved_at_20(config, tmp_path, resume=str(tmp_path / "other"))
    saved.remember(tmp_path / "default", str(tmp_path / "other"), print)(CheckpointPath(own / "step-00000020"), 20)
    own.rename(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match="saved at step 20"):
        find_start(asked)
    again = find_start(config(resume=str(given)))  # a decision of now
    assert isinstance(again, Resume) and str(again.checkpoint) == str(given)


@pytest.mark.parametrize("key", ["resume", "init_from"])
def test_a_wrong_path_is_refused(config, key):
    with pytest.raises(ConfigError, match=f"{key}=nowhere: neither a checkpoint"):
        find_start(config(**{key: "nowhere"}))
