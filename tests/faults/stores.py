"""The object store of the faults: an S3 server on loopback that dies, stutters and comes back."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

BUCKET = "faults"


class Store:
    """Holds the corpus as one file, cut into files for streaming, and as prepared shards."""

    def __init__(self, corpus: Path, prepared: Path, folder: Path):
        import s3fs

        from tests.data_pipeline.s3 import FlakyS3

        logging.getLogger("werkzeug").setLevel(logging.CRITICAL)  # its failures are meant
        self.server = FlakyS3()
        self.environment = {
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_MAX_ATTEMPTS": "1",
            "AWS_ENDPOINT_URL": self.server.url,
        }
        parts = folder / "parts"
        parts.mkdir()
        lines = corpus.read_text(encoding="utf-8").splitlines(keepends=True)
        for number in range(6):
            (parts / f"{number}.jsonl").write_text("".join(lines[number::6]), encoding="utf-8")
        before = dict(os.environ)
        os.environ.update(self.environment)
        try:
            s3 = s3fs.S3FileSystem(skip_instance_cache=True)
            s3.makedirs(BUCKET, exist_ok=True)
            s3.put(str(corpus), f"{BUCKET}/{corpus.name}")
            s3.put(str(parts), f"{BUCKET}/parts", recursive=True)
            s3.put(str(prepared), f"{BUCKET}/prepared", recursive=True)
        finally:
            os.environ.clear()
            os.environ.update(before)
        self.corpus = f"s3://{BUCKET}/{corpus.name}"
        self.streamed_here = {**_stream(prepared), "data__path": str(parts), "data__cache_dir": str(folder / "slabs")}
        self._streamed = {**_stream(prepared), "data__path": f"s3://{BUCKET}/parts", "data__retries": 1}
        self._shards = {"data": {"source": "shards"}, "data__path": f"s3://{BUCKET}/prepared", "data__retries": 1}

    def changes(self, data: str, cache: Path) -> dict[str, Any]:
        """The configuration of a run on `data` (stream or shards) with a data cache of its own."""
        return {"stream": self._streamed, "shards": self._shards}[data] | {"data__cache_dir": str(cache)}

    def close(self) -> None:
        self.server.stop()


def _stream(prepared: Path) -> dict[str, Any]:
    """Several slabs in a run, each from several files."""
    return {
        "data": {"source": "jsonl", "stream": True, "slab_mb": 0.005},
        "data__tokenizer": str(prepared / "tokenizer.model"),
    }
