"""Writing `metrics.jsonl`: on a full disk, with values that JSON does not have, and killed while it is rewritten."""

import errno
import json
import os

import pytest

from train.logs.metrics import SUPERSEDED, read_records
from train.logs.metrics_file import MetricsFile, as_line


@pytest.fixture
def disk(monkeypatch):
    """A disk with `room` bytes; `room` None: as much as one wants."""

    class Disk:
        room: int | None = None

    write = os.write

    def write_what_fits(descriptor, content):
        if Disk.room is None:
            return write(descriptor, content)
        if Disk.room == 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        written = write(descriptor, content[: Disk.room])
        Disk.room -= written
        return written

    monkeypatch.setattr(os, "write", write_what_fits)
    return Disk


@pytest.fixture
def opened(tmp_path):
    said = []
    file = MetricsFile(tmp_path / "metrics.jsonl", said.append)
    file.said = said
    return file


def steps(path):
    return [record["step"] for record in read_records(path)]


@pytest.mark.parametrize("room", [0, 1, 7, 20])
def test_a_full_disk_is_said_once_and_nothing_is_lost(room, disk, opened, tmp_path):
    path = tmp_path / "metrics.jsonl"
    opened.append({"step": 1, "loss": 3.0})
    disk.room = room
    for step in (2, 3, 4):
        opened.append({"step": step, "loss": 2.0})
        assert all(json.loads(line) for line in path.read_text().splitlines()) and path.read_text()[-1] == "\n"
    assert len(opened.said) == 1 and "No space left on device" in opened.said[0] and str(path) in opened.said[0]
    disk.room = None
    opened.append({"step": 5, "loss": 1.0})
    opened.close()
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3, 4, 5]
    assert len(opened.said) == 2 and "written again" in opened.said[1]


def test_part_of_a_line_that_cannot_be_taken_back_harms_no_other(disk, opened, tmp_path, monkeypatch):
    opened.append({"step": 1})
    disk.room = 5
    with monkeypatch.context() as patch:
        patch.setattr(os, "ftruncate", lambda *_: (_ for _ in ()).throw(OSError(errno.EIO, "Input/output error")))
        opened.append({"step": 2})
    disk.room = None
    opened.append({"step": 3})
    assert steps(tmp_path / "metrics.jsonl") == [1, 2, 3]


def test_a_rollback_on_a_full_disk_keeps_its_place_in_the_order(opened, tmp_path, monkeypatch):
    for step in (1, 2, 3):
        opened.append({"step": step})
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left on device")))
        opened.rewind(1)
        opened.append({"step": 2, "again": True})
    assert steps(tmp_path / "metrics.jsonl") == [1, 2, 3]
    opened.append({"step": 3, "again": True})
    opened.close()
    records = read_records(tmp_path / "metrics.jsonl")
    assert records == [{"step": 1}, {"step": 2, "again": True}, {"step": 3, "again": True}]
    assert set(steps(tmp_path / SUPERSEDED)) == {2, 3}


def test_what_was_never_written_is_counted_at_the_end(disk, opened):
    disk.room = 0
    opened.append({"step": 1})
    opened.append({"step": 2})
    opened.close()
    assert "2 records of" in opened.said[-1] and "are lost" in opened.said[-1]


def test_no_nan_in_a_line():
    line = as_line({"step": 1, "loss": float("nan"), "lr": 0.5, "validation_loss": float("-inf")})
    assert json.loads(line, parse_constant=pytest.fail) == {
        "step": 1, "lr": 0.5, "not_finite": ["loss", "validation_loss"],
    }  # fmt: skip
    assert as_line({"step": 1, "loss": 2.0}) == '{"step": 1, "loss": 2.0}\n'
