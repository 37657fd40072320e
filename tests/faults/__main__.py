"""`python -m tests.faults [injections=200] [seed=6] [kinds=NAME,...] [out=docs/results/faults.json]`

Injects faults into small runs on two CPU ranks, and prints for each kind how many were injected, from how many the run
recovered, and how many were lost. A run recovers if every start is as the kind says and its end is that of an
undisturbed run, bit for bit, with all records and sound checkpoints. The exit code is 1 if any was lost; their runs are
kept, and the reasons are printed.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from tests.faults import campaign
from tests.faults.campaign import KINDS, Kind, Result
from tests.faults.victim import EVERY, RANKS, STEPS, Setting
from tests.train.runs import write_corpus


def available(setting: Setting, kinds: Sequence[Kind]) -> list[Kind]:
    """The kinds that can be injected here; prints which cannot, and why."""
    for kind in kinds:
        if obstacle := kind.obstacle(setting):
            print(f"{kind.name} is not injected: {obstacle}")
    return [kind for kind in kinds if not kind.obstacle(setting)]


def table(results: Sequence[Result]) -> dict[str, dict[str, Any]]:
    """Kind -> its counts."""
    rows: dict[str, dict[str, Any]] = {}
    for result in results:
        kind = result.injection.kind
        row = rows.setdefault(
            kind.name, {"fault": kind.text, "outcome": kind.outcome, "injected": 0, "recovered": 0, "lost": 0}
        )
        row["injected"] += 1
        row["lost" if result.lost else "recovered"] += 1
    order = [kind.name for kind in KINDS]
    return dict(sorted(rows.items(), key=lambda item: order.index(item[0])))


def main(arguments: list[str]) -> int:
    options = dict(argument.split("=", 1) for argument in arguments)
    names = options.get("kinds", "")
    kinds = [kind for kind in KINDS if not names or kind.name in names.split(",")]
    number, seed, began = int(options.get("injections", 200)), int(options.get("seed", 6)), time.monotonic()
    folder = Path(tempfile.mkdtemp(prefix="faults-"))
    (folder / "corpus").mkdir()
    setting = Setting(folder, write_corpus(folder / "corpus" / "corpus.jsonl"))
    results: list[Result] = []
    try:
        for injections in campaign.runs(campaign.plan(number, seed, available(setting, kinds))):
            since = time.monotonic()
            found = campaign.suffer(setting, injections, keep=True)
            results += found
            seconds = time.monotonic() - since
            took = ", ".join(f"{result.injection.kind.name} {result.seconds:.1f} s" for result in found)
            print(f"{len(results):4d}  {seconds:5.1f} s  {took}", flush=True)
            for result in found:
                if result.lost:
                    name, own_seed = result.injection.kind.name, result.injection.seed
                    print(f"LOST {name} (seed {own_seed}): {result.lost}", flush=True)
    finally:
        setting.close()
    rows, lost = table(results), sum(bool(result.lost) for result in results)
    print(f"\n{'kind':32} {'injected':>9} {'recovered':>9} {'lost':>5}   the right outcome")
    for name, row in rows.items():
        print(f"{name:32} {row['injected']:9} {row['recovered']:9} {row['lost']:5}   {row['outcome']}")
    print(f"{'all':32} {len(results):9} {len(results) - lost:9} {lost:5}   {len(rows)} kinds")
    if "out" in options:
        content = {
            "command": " ".join(["python -m tests.faults", *arguments]),
            "device": f"CPU, {os.cpu_count()} cores",
            "versions": {"torch": torch.__version__, "python": platform.python_version()},
            "date": datetime.now(timezone.utc).date().isoformat(),
            "seconds": round(time.monotonic() - began),
            "run": {"ranks": RANKS, "steps": STEPS, "steps_between_saves": EVERY},
            "injected": len(results),
            "recovered": len(results) - lost,
            "lost": lost,
            "kinds": rows,
        }
        Path(options["out"]).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    if not lost:
        shutil.rmtree(folder, ignore_errors=True)
    return 1 if lost else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
