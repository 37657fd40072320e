"""Reading a run's `metrics.jsonl`. Imports nothing heavy, so that launchers can use it too.

Each line is a JSON object with the number `step`; see `train.logs.run_log.RunLog` for what writes it. A run that was
killed can leave part of a line behind, anywhere in the file once it has been resumed. Every reader uses the same rule:
a line that is not such an object is left out and counted, and the lines after it are kept.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

METRICS = "metrics.jsonl"  # its name inside the run directory


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
    """Rewrite the file with the records up to `step` alone.

    After a resume or a rollback the later steps run again, and their old records would be there twice.
    """
    if path.exists():
        kept = [record for record in read_records(path) if record["step"] <= step]
        path.write_text("".join(json.dumps(record) + "\n" for record in kept), encoding="utf-8")


def _parse(line: str) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and is_number(record.get("step")) else None
