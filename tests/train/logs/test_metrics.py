"""Reading `metrics.jsonl`, damaged or not."""

import os
import subprocess
import sys

import pytest

from data_pipeline.store import files
from train.logs.metrics import SUPERSEDED, drop_records_after, read_records, read_with_torn

LINES = [b'{"step": 1, "loss": 3.0}', b'{"step": 2, "loss": 2.5}', b'{"step": 3, "loss": 2.0}']


@pytest.mark.parametrize("torn", [
    b'{"step": 2, "lo', b'"step": 2}', b"12", b"[1]", b"null", b'{"loss": 2.0}', b'{"step": "2"}', b'{"step": true}',
    b"\xff\xfe\x00", b'{"step": 2, "note": "\xc3',
])  # fmt: skip
@pytest.mark.parametrize("index", [0, 1, 2, 3])
def test_a_torn_line_is_counted_and_takes_no_other_away(torn, index, tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"\n".join([*LINES[:index], torn, *LINES[index:]]) + b"\n")
    records, count = read_with_torn(path)
    assert [record["step"] for record in records] == [1, 2, 3] and count == 1
    assert read_records(path) == records


def test_a_missing_or_empty_file_has_no_records(tmp_path):
    assert read_with_torn(tmp_path / "metrics.jsonl") == ([], 0)
    (tmp_path / "metrics.jsonl").write_bytes(b"\n \n")
    assert read_with_torn(tmp_path / "metrics.jsonl") == ([], 0)


def test_dropping_records_keeps_sound_lines_behind_a_torn_one(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"\n".join([LINES[0], b'{"step": 9, "lo', LINES[1], LINES[2], b'{"step": 4']))
    drop_records_after(path, 2)
    assert path.read_bytes() == LINES[0] + b"\n" + LINES[1] + b"\n"
    drop_records_after(tmp_path / "not there", 2)
    assert not (tmp_path / "not there").exists()


def test_what_is_dropped_is_kept_beside_it(tmp_path):
    path = tmp_path / "metrics.jsonl"
    torn = b'{"step": 4, "lo'
    path.write_bytes(b"\n".join([*LINES, torn]))
    drop_records_after(path, 2)
    assert (tmp_path / SUPERSEDED).read_bytes() == LINES[2] + b"\n" + torn + b"\n"
    drop_records_after(path, 1)
    assert (tmp_path / SUPERSEDED).read_bytes() == LINES[2] + b"\n" + torn + b"\n" + LINES[1] + b"\n"
    assert path.read_bytes() == LINES[0] + b"\n"


def test_a_file_with_nothing_to_drop_is_not_touched(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step":1}\n{"step":   2}\n')
    before = path.stat()
    drop_records_after(path, 2)
    assert path.read_bytes() == b'{"step":1}\n{"step":   2}\n' and path.stat().st_ino == before.st_ino
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("moment", ["open", "fsync", "replace"])
def test_a_kill_in_the_rewrite_takes_nothing(moment, tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    def kill(*_):
        raise Killed

    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"\n".join(LINES) + b"\n")
    monkeypatch.setattr(files, "open", kill, raising=False) if moment == "open" else monkeypatch.setattr(
        os, moment, kill
    )
    with pytest.raises(Killed):
        drop_records_after(path, 1)
    monkeypatch.undo()
    assert path.read_bytes() == b"\n".join(LINES) + b"\n"


def test_nan_of_earlier_versions_is_as_good_as_absent(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": NaN, "lr": 0.1}\n{"step": NaN}\n{"step": 2, "loss": Infinity}\n')
    assert read_with_torn(path) == ([{"step": 1, "lr": 0.1}, {"step": 2}], 1)


def test_it_imports_nothing_heavy():
    code = "import sys, train.logs.metrics; assert not {'torch', 'numpy', 'matplotlib', 'tqdm'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
