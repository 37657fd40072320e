"""Faults of a run's own files: checkpoints, records and configuration that are damaged or half written."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from random import Random

from tests.faults import harms
from tests.faults.victim import Case
from train.config.run_directory import CONFIG
from train.logs.metrics import METRICS, read_records


def flip_a_bit(path: Path | str, draw: Random) -> None:
    with open(path, "r+b") as file:
        at = draw.randrange(os.fstat(file.fileno()).st_size)
        file.seek(at)
        byte = file.read(1)[0] ^ (1 << draw.randrange(8))
        file.seek(at)
        file.write(bytes([byte]))


def truncate(path: Path | str, draw: Random) -> None:
    os.truncate(path, draw.randrange(os.path.getsize(path)))


def _damage_newest_checkpoint(case: Case, files: list[str], harm) -> None:
    """Kill the run, damage one of the `files` (all, where it is empty), and see that the one before is used."""
    victim = case.victim
    victim.wait_for_checkpoints(2)
    victim.kill()
    newest = victim.checkpoints()[-1]
    harm(newest / case.draw.choice(files or sorted(newest.entries())))
    world = victim.start()
    assert "DAMAGED CHECKPOINT" in world.output() and "set aside as" in world.output(), world.outputs()
    assert world.resumed_at < newest.step


def flipped_checkpoint(case: Case) -> None:
    tensors = [name for name in case.victim.wait_for_checkpoints(2)[-1].entries() if name != "manifest.json"]
    _damage_newest_checkpoint(case, sorted(tensors), lambda path: flip_a_bit(path, case.draw))


def truncated_checkpoint(case: Case) -> None:
    _damage_newest_checkpoint(case, [], lambda path: truncate(path, case.draw))


def checkpoint_without_a_file(case: Case) -> None:
    _damage_newest_checkpoint(case, [], lambda path: path.remove())


def kill_in_the_rewrite_of_the_log(case: Case) -> None:
    """A resume takes the records after the checkpoint out of metrics.jsonl; it is killed before any of its steps."""
    victim = case.victim
    while True:
        newest = victim.wait_for_checkpoints(1)[-1].step
        victim.wait_for_step(newest + 1)
        victim.kill()
        if read_records(victim.directory / METRICS)[-1]["step"] > victim.checkpoints()[-1].step:
            break  # else nothing would be rewritten
        victim.start()
    before = victim.held_records()
    world = victim.launch([(harms.die_before, 0, "metrics", case.draw.randrange(2, 7))])
    codes = world.end(patience=2)
    assert codes[0] == -signal.SIGKILL, f"exit codes {codes}:\n{world.outputs()}"
    lost = before - victim.held_records()
    assert not lost, f"the rewrite has lost {len(lost)} records"
    victim.start()


def torn_log(case: Case) -> None:
    """What a crash of a machine leaves in metrics.jsonl: part of a line at the end, or garbage between two lines."""
    victim, draw = case.victim, case.draw
    newest = victim.wait_for_checkpoints(1)[-1].step
    victim.kill()
    path = victim.directory / METRICS
    lines = path.read_bytes().splitlines(keepends=True)
    if draw.random() < 0.5:
        last = json.dumps({"step": newest + 1, "loss": 2.5, "lr": 0.01}).encode()
        path.write_bytes(b"".join(lines) + last[: draw.randrange(1, len(last))])
    else:
        garbage = draw.choice([b"\0" * 300, b'{"step": 3, "lo', b"\xff\xfe\x80", b'{"loss": 1.0}', b"[]"]) + b"\n"
        at = draw.randrange(len(lines) + 1)
        path.write_bytes(b"".join([*lines[:at], garbage, *lines[at:]]))
    victim.start()
    assert read_records(path)[: newest - 1], "the sound lines are gone"


def torn_config(case: Case) -> None:
    """config.yaml of the run directory ends in the middle: refused, or what is left is enough."""
    victim = case.victim
    victim.kill()
    path = victim.directory / CONFIG
    whole = path.read_bytes()
    path.write_bytes(whole[: case.draw.randrange(len(whole))])
    line = victim.refusal()
    if line:
        assert str(path) in line and "rename it, and the next start writes it again" in line, line
        path.rename(path.with_suffix(".torn"))
        victim.start()
    assert path.read_bytes() == whole
