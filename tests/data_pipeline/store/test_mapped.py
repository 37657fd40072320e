"""Memory-mapped files, of which few are open at a time."""

import os

import numpy as np
import pytest

from data_pipeline import DataError
from data_pipeline.store import mapped
from data_pipeline.store.mapped import MappedArray, MappedFile


@pytest.fixture
def two_open(monkeypatch):
    monkeypatch.setattr(mapped, "_OPEN", mapped._OpenFiles(limit=2))


def num_open():
    return len(os.listdir("/proc/self/fd"))


def test_arrays_come_back_and_few_stay_open(tmp_path, two_open):
    arrays = [np.arange(number, number + 5, dtype=np.int64) for number in range(20)]
    for number, array in enumerate(arrays):
        np.save(tmp_path / f"{number}.npy", array)
    before = num_open()
    opened = [MappedArray.open(tmp_path / f"{number}.npy") for number in range(20)]
    for number in (*range(20), 0, 19, 3):
        assert opened[number].values.tolist() == arrays[number].tolist()
    assert num_open() <= before + 2
    kept = opened[5].values  # still readable after others have taken its turn
    assert [one.values[0] for one in opened] == list(range(20)) and kept.tolist() == arrays[5].tolist()


def test_records_and_empty_arrays(tmp_path):
    records = np.array([(1, 2), (3, 4)], dtype=[("a", "<i4"), ("b", "<i8")])
    np.save(tmp_path / "records.npy", records)
    np.save(tmp_path / "none.npy", np.zeros(0))
    assert (MappedArray.open(tmp_path / "records.npy").values == records).all()
    assert MappedArray.open(tmp_path / "none.npy").values.size == 0


@pytest.mark.parametrize("content", [b"", b"half", b"\x93NUMPY\x09\x00"])
def test_other_files_are_errors(tmp_path, content):
    (tmp_path / "a.npy").write_bytes(content)
    with pytest.raises(ValueError):
        MappedArray.open(tmp_path / "a.npy")


def test_an_array_that_was_cut_short_is_an_error(tmp_path):
    np.save(tmp_path / "a.npy", np.arange(100))
    with open(tmp_path / "a.npy", "r+b") as file:
        file.truncate(400)
    with pytest.raises(ValueError, match="has 400 bytes"):
        MappedArray.open(tmp_path / "a.npy")


def test_a_file_that_changed_or_went_away_is_named(tmp_path, two_open):
    path = tmp_path / "file"
    path.write_bytes(b"before")
    file = MappedFile.open(path)
    path.unlink()
    with pytest.raises(DataError, match=r"file: cannot be read \(No such file"):
        _ = file.content
    path.write_bytes(b"another")
    with pytest.raises(DataError, match="file: has changed since it was opened"):
        _ = file.content
