"""manifest.json of a prepared corpus: its format, and the hashes of shards that it records."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from data_pipeline.config import SPLITS
from data_pipeline.errors import DataError
from data_pipeline.store.files import read_json

MANIFEST = "manifest.json"
TOKENIZER = "tokenizer.model"
FORMAT_VERSION = 2
_SHARD_KEYS = ("name", "sha256_bin", "sha256_idx")


def check_format(manifest: dict[str, Any], path: str) -> None:
    """Raise DataError if a manifest has another format version or lacks a key that is read later.

    Args:
        manifest: its content.
        path: path or URL, for messages.
    """
    if manifest.get("format") != FORMAT_VERSION:
        raise DataError(f"{path}: has format {manifest.get('format')!r}, expected {FORMAT_VERSION}; prepare it again")
    with damage_errors(path, "prepare it again"):
        _ = [manifest["tokenizer"][key] for key in ("fingerprint", "vocab_size")]
        for split in (manifest["splits"][split] for split in SPLITS):
            _ = split["text_bytes"], [shard[key] for shard in split["shards"] for key in _SHARD_KEYS]


@contextmanager
def damage_errors(path: str, advice: str) -> Iterator[None]:
    """A missing key or a value of another type, met inside, becomes a DataError: the file `path` is damaged."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        detail = f"lacks {error}" if isinstance(error, KeyError) else f"holds a wrong value ({error})"
        raise DataError(f"{path}: {detail}, so it is damaged; {advice}") from error


def shard_hashes(prefixes: Sequence[str | Path]) -> list[list[str]]:
    """The sha256 (hex) of `[tokenizer, .bin, .idx]` of each shard, read from the manifests in their directories.

    Raises:
        DataError: a manifest is missing or damaged, or does not list a shard.
    """
    known: dict[Path, list[str]] = {}
    paths = [Path(prefix) for prefix in prefixes]
    for directory in {path.parent for path in paths}:
        manifest = read_json(directory / MANIFEST)
        check_format(manifest, str(directory / MANIFEST))
        for split in SPLITS:
            for shard in manifest["splits"][split]["shards"]:
                hashes = [manifest["tokenizer"]["fingerprint"], shard["sha256_bin"], shard["sha256_idx"]]
                known[directory / shard["name"]] = hashes
    for path in paths:
        if path not in known:
            raise DataError(f"{path}: is not a shard that {path.parent / MANIFEST} lists")
    return [known[path] for path in paths]
