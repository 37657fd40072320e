"""Reading a run's `metrics.jsonl`. Imports nothing heavy, so that launchers can use it too.

Each line is a JSON object with the number `step`; see `train.logs.metrics_file` for what writes it. A run that was
killed can leave part of a line behind, anywhere in the file once it has been resumed. Every reader uses the same rule:
a line that is not such an object is left out and counted, and the lines after it are kept.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

METRICS = "metrics.jsonl"  # its name inside the run directory
SUPERSEDED = "metrics.superseded.jsonl"  # beside it: what was taken out of it, in the order in which that happened


def read_records(path: Path) -> list[dict[str, Any]]:
    """The records of a `metrics.jsonl` in file order; empty where there is no file."""
    return read_with_torn(path)[0]


def read_with_torn(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The records of a `metrics.jsonl`, and the number of lines that are not records. Blank lines are not counted."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return [], 0
    records, torn = [], 0
    for line in text.split("\n"):
        record = _parse(line)
        if record is not None:
            records.append(record)
        else:
            torn += bool(line.strip())
    return records, torn


def is_number(value: Any) -> bool:
    """Whether a JSON value is a number; true and false are not."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def drop_records_after(path: Path, step: int) -> None:
    """Take the records after `step`, and lines that are not records, out of the file: they go to `SUPERSEDED`.

    After a resume or a rollback the later steps run again, and their old records would be there twice. The file is
    never shortened in place: a kill at any moment leaves the old one or the new one, whole.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return
    kept, superseded = [], []
    for line in content.split(b"\n"):
        record = _parse(line.decode("utf-8", errors="replace"))
        if record is not None and record["step"] <= step:
            kept.append(line + b"\n")
        elif line.strip():
            superseded.append(line + b"\n")
    if not superseded and b"".join(kept) == content:
        return
    if superseded:
        with open(path.with_name(SUPERSEDED), "ab") as file:
            file.write(b"".join(superseded))
            file.flush()
            os.fsync(file.fileno())
    from data_pipeline.store.files import atomic_write  # imports numpy, which readers do without

    with atomic_write(path) as file:
        file.write(b"".join(kept))


def _parse(line: str) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    if not isinstance(record, dict):
        return None
    # Files of earlier versions may hold NaN, which is no JSON: such a value is as good as absent.
    record = {k: value for k, value in record.items() if not (isinstance(value, float) and not math.isfinite(value))}
    return record if is_number(record.get("step")) else None
