"""Whether a later start may continue in a run directory."""

import dataclasses

import pytest
import yaml

from tests.ksa_model.test_model import small_config
from train.config import differences, run_directory
from train.config.conversion import all_keys, to_mapping
from train.config.errors import ConfigError
from train.config.schema import TrainConfig
from train.config.sections import OptimConfig, RunConfig


@pytest.fixture
def config(tmp_path):
    """A configuration whose run directory holds it already."""
    made = TrainConfig(model=small_config(), seq_len=64, run=RunConfig(root=str(tmp_path), name="run"))
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.yaml").write_text(yaml.safe_dump(to_mapping(made)))
    return made


def test_what_was_written_is_read(config, tmp_path):
    assert run_directory.read_config(tmp_path / "run") == config
    with pytest.raises(ConfigError, match="is not the directory of a run"):
        run_directory.read_config(tmp_path)


def test_keys_that_may_change_exist():
    keys = set(all_keys(TrainConfig))
    assert set(differences.CHANGEABLE) <= keys


def test_only_what_computes_the_same_may_change(config, tmp_path):
    directory = tmp_path / "run"
    longer = dataclasses.replace(config, run=dataclasses.replace(config.run, steps=9, device="cpu"), resume="never")
    run_directory.check(directory, longer)
    other = dataclasses.replace(config, optim=OptimConfig(lr=0.5), seq_len=128)
    with pytest.raises(ConfigError, match=r"optim.lr was 0.001 and is now 0.5, seq_len was 64 and is now 128"):
        run_directory.check(directory, other)


def test_a_torn_file_is_named(config, tmp_path):
    (tmp_path / "run/config.yaml").write_text("run: {name: [")
    with pytest.raises(ConfigError, match=r"config.yaml does not hold the configuration of a run"):
        run_directory.check(tmp_path / "run", config)


def test_a_file_that_was_cut_is_not_called_another_run(config, tmp_path):
    """Wherever it ends, what is left is enough, or the message tells how to mend it."""
    path = tmp_path / "run/config.yaml"
    own = dataclasses.replace(config, optim=OptimConfig(lr=0.5), seq_len=128)
    text = yaml.safe_dump(to_mapping(own))
    refused = 0
    for end in range(0, len(text), 29):
        path.write_text(text[:end])
        try:
            run_directory.check(tmp_path / "run", own)
        except ConfigError as error:
            refused += 1
            assert str(path) in str(error) and "rename it, and the next start writes it again" in str(error)
    assert refused > len(text) / 29 / 3


def test_a_directory_that_cannot_be_written(config, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="is not a directory that can be written"):
        run_directory.check(tmp_path / "file/run", config)
    with pytest.raises(ConfigError, match=r"out=.*file/run cannot be created"):
        run_directory.make_directory("out", tmp_path / "file/run")


def test_a_link_to_nothing_is_named(config, tmp_path):
    """A run directory on a disk that is not mounted, reached through a link."""
    (tmp_path / "scratch").symlink_to(tmp_path / "disk" / "runs")
    for directory in (tmp_path / "scratch", tmp_path / "scratch" / "run"):
        with pytest.raises(ConfigError, match=r"scratch is a link to .*disk/runs, which is not there"):
            run_directory.check(directory, config)
