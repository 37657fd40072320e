"""`python -m train.report RUN... | SWEEP [output=DIRECTORY]`: what runs reached and what they cost, on one page.

The HTML page contains its pictures, so the one file can be sent on. The same pictures are written next to it as PNGs.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from data_pipeline import commands
from train.config.run_directory import named_directory
from train.config.schema import USER_ERRORS
from train.distributed.signals import BAD_INPUT
from train.report.page import write_report

USAGE = "python -m train.report RUN... | SWEEP [output=DIRECTORY]"


def main(arguments: Sequence[str]) -> int:
    """The command; returns its exit code."""
    outputs = [a.removeprefix("output=") for a in arguments if a.startswith("output=")]
    paths = [a for a in arguments if not a.startswith("output=")]
    if not paths or any(p in ("-h", "--help", "help") for p in paths):
        print(__doc__)
        return 0 if paths else BAD_INPUT
    return commands.run(lambda: _run(paths, outputs[-1] if outputs else None), arguments, USER_ERRORS)


def _run(paths: list[str], output: str | None) -> None:
    runs = [named_directory(path, USAGE) for path in paths]
    written = write_report(runs, None if output is None else named_directory(output, USAGE))
    print(f"{written}, with {len(list(written.parent.glob('*.png')))} pictures in the same directory")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
