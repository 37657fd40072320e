"""`python -m train.report RUN... | SWEEP [output=DIRECTORY]`: what runs reached and what they cost, on one page.

The HTML page contains its pictures, so the one file can be sent on. The same pictures are written next to it as PNGs.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from data_pipeline.cli import printing
from train.config.conversion import expand_home
from train.config.errors import ConfigError
from train.distributed.signals import BAD_INPUT
from train.report.page import write_report


def main(arguments: Sequence[str]) -> int:
    """The command; returns its exit code."""
    outputs = [a.removeprefix("output=") for a in arguments if a.startswith("output=")]
    paths = [Path(a) for a in arguments if not a.startswith("output=")]
    if not paths or any(str(p) in ("-h", "--help", "help") for p in paths):
        print(__doc__)
        return 0 if paths else BAD_INPUT
    try:
        written = write_report(paths, Path(expand_home(outputs[-1])) if outputs else None)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return BAD_INPUT
    print(f"{written}, with {len(list(written.parent.glob('*.png')))} pictures in the same directory")
    return 0


if __name__ == "__main__":
    sys.exit(printing(lambda: main(sys.argv[1:])))
