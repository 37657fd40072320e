"""A directory is held by one process, and no longer than that process lives."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from train.config import one_start
from train.config.errors import ConfigError
from train.config.one_start import LOCK, only_one

ROOT = Path(__file__).resolve().parents[3]
HOLD = """
import os, sys, time
from pathlib import Path
from train.config.one_start import only_one
with only_one(Path(sys.argv[1]), "run.name=x", print):
    if os.fork() == 0:  # a child that outlives it must not hold the lock for it
        time.sleep(60)
        os._exit(0)
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds tmp_path/run."""
    command = [sys.executable, "-c", HOLD, str(tmp_path / "run")]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert process.stdout.readline() == "held\n"
    yield process
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def test_a_second_one_is_refused_until_the_first_is_killed(holder, tmp_path, monkeypatch):
    monkeypatch.setattr(one_start, "_PATIENCE", 0.2)
    lines = []
    words = rf"run.name=y: .*run is in use: process {holder.pid} on {socket.gethostname()} has trained there since 20"
    with pytest.raises(ConfigError, match=words), only_one(tmp_path / "run", "run.name=y", lines.append):
        raise AssertionError("two at a time")
    holder.kill()  # its child lives on
    holder.wait()
    with only_one(tmp_path / "run", "run.name=y", lines.append):
        assert json.loads((tmp_path / "run" / LOCK).read_bytes())["process"] == os.getpid()
    assert lines == []


def test_the_lock_of_another_host_is_waited_for(holder, tmp_path, monkeypatch):
    """The server of a network file system frees it some time after that host has crashed."""
    monkeypatch.setattr(one_start, "_PATIENCE", 0.0)
    monkeypatch.setattr(socket, "gethostname", lambda: "elsewhere")
    lines = []

    def say(line):
        lines.append(line)
        holder.kill()

    with only_one(tmp_path / "run", "run.name=y", say):
        assert len(lines) == 1 and "waiting up to 120 s" in lines[0]


def test_a_refused_start_leaves_nothing_behind(tmp_path):
    with pytest.raises(ConfigError, match="refused"), only_one(tmp_path / "a" / "b", "run.name=y", print):
        raise ConfigError("refused")
    assert list(tmp_path.iterdir()) == []
    with only_one(tmp_path / "a" / "b", "run.name=y", print):
        (tmp_path / "a" / "b" / "config.yaml").touch()
    assert {path.name for path in (tmp_path / "a" / "b").iterdir()} == {LOCK, "config.yaml"}


def test_a_file_that_its_holder_removed_is_not_locked(tmp_path, monkeypatch):
    """A start that is refused removes it while another one waits, which would then hold what nobody else can see."""
    lock, calls = one_start._lock, []

    def removed_meanwhile(descriptor, directory, *others):
        lock(descriptor, directory, *others)
        calls.append(descriptor)
        if len(calls) == 1:
            (directory / LOCK).unlink()
            directory.rmdir()

    monkeypatch.setattr(one_start, "_lock", removed_meanwhile)
    with only_one(tmp_path / "run", "run.name=y", print):
        assert len(calls) == 2 and json.loads((tmp_path / "run" / LOCK).read_bytes())["process"] == os.getpid()


def test_a_file_system_without_locks_is_used_all_the_same(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(one_start.fcntl, "lockf", refuse)
    lines = []
    with only_one(tmp_path / "run", "run.name=y", lines.append):
        assert "cannot be locked (Function not implemented)" in lines[0]


def test_a_directory_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"run.name=y: cannot write below .*file/run \(Not a directory\)"):
        with only_one(tmp_path / "file" / "run", "run.name=y", print):
            pass
