import pytest

from tests.train.checkpoint.plain import PlainEngine
from train.checkpoint.manager import Checkpoints
from train.checkpoint.storage import CheckpointPath
from train.config.sections import CheckpointConfig


@pytest.fixture
def open_run(world, tmp_path):
    """A function that opens the checkpoints of a run in `tmp_path`; what it says is in `.said`."""

    def open_(engine=None, where=tmp_path / "checkpoints", **config):
        said = []
        engine = engine or PlainEngine().train(3)
        opened = Checkpoints(CheckpointPath(where), engine, world, CheckpointConfig(**config), said.append)
        opened.engine, opened.said = engine, said
        return opened

    return open_
