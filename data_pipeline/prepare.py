"""Raw text to token shards: `python -m data_pipeline.prepare source=jsonl path=... out=...`.

Writes below `out`:

    <corpus>-<fingerprint>/tokenizer.model
                           train-00000.bin .idx, validation-00000.bin .idx, ...
                           progress.json          during the work: what is finished, and where to continue
                           manifest.json          written last: all other files are complete when it exists

The fingerprint in the name is that of the request: the input files (size, time stamp and ranges of their content), the
split and the tokenizer. Equal requests share the result; nothing is prepared twice.

After an interruption, the same command continues after the last finished shards. Shards of both splits are closed
together, at the end of a document, and then progress.json is replaced, so no document is lost or doubled.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence

from data_pipeline import cli
from data_pipeline.config import SPLITS
from data_pipeline.text.prepare import inexact_lines, prepare

_UNUSED_FIELDS = tuple(
    "seed prefetch_samples cache_gb stream slab_mb accept_changes corpora temperature stages tasks probe_tokens".split()
)


def _command(arguments: Sequence[str]) -> None:
    started = time.perf_counter()
    config, _ = cli.parse(arguments, exclude=_UNUSED_FIELDS, rename={"cache_dir": "out"})
    data = prepare(config, progress=True)
    seconds = time.perf_counter() - started
    print(f"{data.directory}: vocabulary {data.vocab_size}, {seconds:.1f} s")
    for split in SPLITS:
        summary = data.manifest["splits"][split]
        rate = summary["text_bytes"] / max(summary["tokens"], 1)
        counts = f"{summary['documents']:>9} documents  {summary['tokens']:>12} tokens"
        print(f"  {split:10} {counts}  {rate:.2f} bytes/token")
    for reason, count in sorted(data.manifest["source"]["skipped"].items()):
        print(f"  left out   {count:>9} documents  {reason}")
    for line in inexact_lines(data.manifest):
        print(f"  {line}")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    return cli.run(__doc__ or "", _command, arguments)


if __name__ == "__main__":
    sys.exit(main())
