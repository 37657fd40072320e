"""What a run log writes, where it goes on, and on which rank."""

import io
import json
import os
import sys
import threading

from train.config.sections import LoggingConfig
from train.logs import run_log
from train.logs.run_log import RunLog, line_printer
from train.logs.tracker import Tracker


def open_log(directory, first_step=0, is_main=True, progress=False):
    tracker = Tracker(LoggingConfig(wandb="off"), directory, name="x", config={}) if is_main else None
    return RunLog(directory, tracker=tracker, total_steps=9, first_step=first_step, progress=progress)


def steps(directory):
    return [json.loads(line)["step"] for line in (directory / "metrics.jsonl").read_text().splitlines()]


def test_records_go_on_where_the_run_does(tmp_path):
    log = open_log(tmp_path)
    for step in (1, 2, 3, 4):
        log.record({"step": step, "tokens": 10 * step, "loss": 5.0 - step})
    log.rewind(3)
    log.record({"step": 4, "tokens": 40, "loss": 0.5})
    assert steps(tmp_path) == [1, 2, 3, 4]  # whole lines are there while the run goes on
    log.close()
    assert (tmp_path / "loss.png").stat().st_size > 0
    again = open_log(tmp_path, first_step=2)
    again.record({"step": 3, "tokens": 30, "loss": 1.0})
    again.close()
    assert steps(tmp_path) == [1, 2, 3]


class FullDisk(io.StringIO):
    def write(self, _):
        raise OSError(28, "No space left on device")


def test_a_full_disk_below_everything_that_is_written_ends_nothing(tmp_path, monkeypatch):
    """The file, the bar and the lines on stderr, and the picture at the end."""

    def full(*_):
        raise OSError(28, "No space left on device")

    log = open_log(tmp_path, progress=True)
    log.record({"step": 1, "tokens": 10, "loss": 1.0})
    monkeypatch.setattr(sys, "stderr", FullDisk())
    monkeypatch.setattr(os, "write", full)
    monkeypatch.setattr(run_log, "draw_loss", full)
    broken = open_log(tmp_path, first_step=1, progress=True)
    for step in (2, 3):
        broken.record({"step": step, "tokens": 10, "loss": 1.0})
        broken.advance()
    line_printer(is_main=True)("lost")
    said = threading.Thread(target=line_printer(is_main=True), args=("not stuck on a lock",))
    said.start()
    said.join(5)
    assert not said.is_alive()
    broken.rewind(1)
    broken.close()
    monkeypatch.undo()
    assert steps(tmp_path) == [1]


def test_only_the_main_rank_writes(tmp_path, capsys):
    log = open_log(tmp_path, is_main=False)
    log.record({"step": 1, "tokens": 10, "loss": 1.0})
    log.advance()
    log.rewind(0)
    log.close()
    line_printer(is_main=False)("not shown")
    line_printer(is_main=True)("shown")
    assert list(tmp_path.iterdir()) == [] and capsys.readouterr().err == "shown\n"
