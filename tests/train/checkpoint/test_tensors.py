"""Pieces of tensors, and what reading refuses."""

import contextlib
import io
import math
import os
import pickle
import random

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import BytesStorageMetadata

from tests.train.checkpoint.plain import PlainEngine, save
from train.checkpoint.storage import CheckpointError
from train.checkpoint.tensors import boxes


def test_boxes_worked_example():
    assert boxes((3, 4), 2, 9) == [((0, 2), (1, 2)), ((1, 0), (1, 4)), ((2, 0), (1, 1))]
    assert boxes((3, 4), 4, 12) == [((1, 0), (2, 4))]
    assert boxes((3, 4), 5, 7) == [((1, 1), (1, 2))]
    assert boxes((5,), 1, 1) == []


def test_boxes_cover_every_run_once_and_in_order():
    draw = random.Random(0)
    for _ in range(300):
        shape = [draw.randint(1, 5) for _ in range(draw.randint(1, 4))]
        start, stop = sorted(draw.randint(0, math.prod(shape)) for _ in range(2))
        numbers = np.arange(math.prod(shape)).reshape(shape)
        found = [
            numbers[tuple(slice(o, o + s) for o, s in zip(offsets, sizes))].ravel()
            for offsets, sizes in boxes(shape, start, stop)
        ]
        assert np.concatenate([*found, np.empty(0, int)]).tolist() == list(range(start, stop)), (shape, start, stop)


class Evil:
    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return os.mkdir, (str(self.trace),)


class TestStrangers:
    """A checkpoint from a stranger, whose manifest is right, cannot run code here."""

    @pytest.fixture
    def saved(self, open_run):
        return save(open_run(), 3)

    def reads(self, open_run, place):
        run = open_run(PlainEngine(seed=5))
        with pytest.raises(CheckpointError) as error:
            run.load(place)
        return str(error.value)

    def test_code_in_the_metadata(self, open_run, saved, tmp_path):
        (saved / ".metadata").write(pickle.dumps(Evil(tmp_path / "ran")))
        assert "names posix.mkdir, which does not belong there" in self.reads(open_run, saved)
        assert not (tmp_path / "ran").exists()
        with contextlib.suppress(Exception):  # what stock DCP does with the same file
            dcp.FileSystemReader(os.fspath(saved)).read_metadata()
        assert (tmp_path / "ran").exists()

    def test_attributes_of_a_known_class(self, open_run, saved):
        stream = b"\x80\x04ctorch.distributed.checkpoint.metadata\nMetadata.__init__.__globals__\n."
        (saved / ".metadata").write(stream)
        assert "does not belong there" in self.reads(open_run, saved)

    def test_an_entry_that_dcp_would_unpickle(self, open_run, saved):
        metadata = pickle.loads((saved / ".metadata").read())
        metadata.state_dict_metadata["exp_avg/0.weight"] = BytesStorageMetadata()
        (saved / ".metadata").write(pickle.dumps(metadata))
        assert "exp_avg/0.weight as something other than a tensor" in self.reads(open_run, saved)

    def test_code_in_a_tensor(self, open_run, saved, tmp_path):
        metadata = pickle.loads((saved / ".metadata").read())
        file = io.BytesIO()
        torch.save({"t": Evil(tmp_path / "ran")}, file)
        for info in metadata.storage_data.values():
            info.offset, info.length = 0, len(file.getvalue())
        (saved / "__0_0.distcp").write(file.getvalue())
        (saved / ".metadata").write(pickle.dumps(metadata))
        assert "cannot be read" in self.reads(open_run, saved)
        assert not (tmp_path / "ran").exists()

    def test_a_file_outside(self, open_run, saved):
        metadata = pickle.loads((saved / ".metadata").read())
        next(iter(metadata.storage_data.values())).relative_path = "../../secret"
        (saved / ".metadata").write(pickle.dumps(metadata))
        assert "names a file outside this checkpoint" in self.reads(open_run, saved)

    def test_missing_elements(self, open_run, saved):
        metadata = pickle.loads((saved / ".metadata").read())
        metadata.state_dict_metadata["exp_avg/0.weight"].chunks.clear()
        (saved / ".metadata").write(pickle.dumps(metadata))
        assert "does not hold every element of exp_avg/0.weight" in self.reads(open_run, saved)

    def test_stock_dcp_reads_what_is_written_here(self, open_run, saved):
        want = PlainEngine().train(3).everything()
        tensors = {"master/0.weight": torch.empty(7, 5)}
        dcp.load(tensors, checkpoint_id=os.fspath(saved), no_dist=True)
        assert torch.equal(tensors["master/0.weight"].flatten(), want["master/0.weight"])
