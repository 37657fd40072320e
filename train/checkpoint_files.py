"""The files of checkpoints: directories on this machine or behind an fsspec URL, written so that none is half there.

    DIRECTORY/
        step-00000020/              a finished checkpoint: tensors, state.json, manifest.json
        step-00000040.incomplete/   one that was being written; removed by the next start
        step-00000030.damaged/      one that failed verification, set aside; delete it when you have seen it
        step-00000050.abandoned/    one from beyond the step at which the run went on, set aside

On this machine a checkpoint is written under another name, synced, and renamed. Object stores cannot rename, so
there each save has a key of its own, `step-00000020-1f3a9c04/`, and counts from the moment its manifest, written last,
exists.
The newest one is found by listing; there is no pointer to go stale.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from train.config import ConfigError

STATE, MANIFEST = "state.json", "manifest.json"
_FINISHED = re.compile(r"step-(\d{8,})(-[0-9a-f]{8})?")
_INCOMPLETE, _REMOVED, _REPLACED = ".incomplete", ".removed", ".replaced"


class CheckpointError(ConfigError):
    """A checkpoint that is missing, damaged or of another model; the message names the file and what to do."""


class Place:
    """A directory, local or remote, and the few things that are done with its files. They raise `OSError`."""

    def __init__(self, location: str | os.PathLike):
        try:
            self._fs, path = fsspec.core.url_to_fs(os.fspath(location))
        except (ValueError, ImportError) as error:  # a protocol that nobody knows, or whose package is missing
            raise CheckpointError(f"{os.fspath(location)} cannot be opened: {error}") from error
        self.path = path.rstrip("/")

    @property
    def is_local(self) -> bool:
        return isinstance(self._fs, LocalFileSystem)

    @property
    def name(self) -> str:
        return self.path.rsplit("/", 1)[-1]

    def __str__(self) -> str:
        return self.path if self.is_local else self._fs.unstrip_protocol(self.path)

    def __fspath__(self) -> str:
        return str(self)

    def __truediv__(self, name: str) -> Place:
        child = object.__new__(Place)
        child._fs, child.path = self._fs, f"{self.path}/{name}"
        return child

    def exists(self) -> bool:
        with self._reached():
            return self._fs.exists(self.path)

    def entries(self) -> dict[str, int]:
        """Name -> bytes of everything directly below; empty where there is nothing."""
        self._fs.invalidate_cache(self.path)
        try:
            with self._reached():
                found = self._fs.ls(self.path, detail=True)
        except (FileNotFoundError, NotADirectoryError):
            return {}
        return {entry["name"].rstrip("/").rsplit("/", 1)[-1]: int(entry["size"] or 0) for entry in found}

    @contextmanager
    def _reached(self) -> Iterator[None]:
        """What a store raises of its own kinds, for want of credentials say, is a `CheckpointError`."""
        try:
            yield
        except OSError:
            raise
        except Exception as error:
            raise CheckpointError(f"{self} cannot be reached: {type(error).__name__}: {error}") from error

    def open(self) -> io.IOBase:
        """This path, as a file, for reading."""
        return self._fs.open(self.path, "rb")

    def read(self) -> bytes:
        with self.open() as file:
            return file.read()

    def write(self, content: bytes) -> dict[str, Any]:
        """Write this path as a file, synced; returns its fingerprint."""
        with self.create() as file:
            file.write(content)
        return file.fingerprint

    @contextmanager
    def create(self) -> Iterator[HashedFile]:
        """This path as a file to write; what was written is on the disk when the block ends."""
        file = HashedFile(self._fs.open(self.path, "wb"))
        try:
            yield file
        finally:
            file.close()

    def make(self) -> None:
        self._fs.makedirs(self.path, exist_ok=True)
        if self.is_local:
            _sync_directory(os.path.dirname(self.path))

    def rename(self, name: str) -> None:
        """Local only: give this directory another name beside the old one."""
        parent = os.path.dirname(self.path)
        os.rename(self.path, os.path.join(parent, name))
        _sync_directory(parent)

    def remove(self) -> None:
        if self.exists():
            self._fs.rm(self.path, recursive=True)

    def move_file(self, name: str, to: str) -> None:
        self._fs.mv(f"{self.path}/{name}", f"{self.path}/{to}")

    def sync(self) -> None:
        if self.is_local:
            _sync_directory(self.path)


class HashedFile(io.RawIOBase):
    """A file being written whose sha256 is of what was meant to be written, not of what a disk gave back."""

    def __init__(self, raw: Any):
        self._raw, self._digest, self._size = raw, hashlib.sha256(), 0

    def writable(self) -> bool:
        return True

    def write(self, content: Any) -> int:
        view = memoryview(content).cast("B")
        self._digest.update(view)
        self._raw.write(view)
        self._size += len(view)
        return len(view)

    def tell(self) -> int:
        return self._size

    def flush(self) -> None:
        if not self._raw.closed:
            self._raw.flush()

    def close(self) -> None:
        if self._raw.closed:
            return
        try:
            self._raw.flush()
            try:
                os.fsync(self._raw.fileno())
            except (AttributeError, io.UnsupportedOperation):
                pass  # an object store has accepted the file once it is closed
        finally:
            self._raw.close()
        super().close()

    @property
    def fingerprint(self) -> dict[str, Any]:
        return {"bytes": self._size, "sha256": self._digest.hexdigest()}


@dataclass(frozen=True)
class Saved:
    """A finished checkpoint, not verified yet."""

    step: int
    place: Place


def finished(directory: Place) -> list[Saved]:
    """Finished checkpoints below `directory`, oldest first."""
    found = []
    for name in directory.entries():
        match = _FINISHED.fullmatch(name)
        if match and (directory.is_local or MANIFEST in (directory / name).entries()):
            found.append(Saved(int(match[1]), directory / name))
    return sorted(found, key=lambda saved: (saved.step, saved.place.name))


def begin(directory: Place, step: int) -> Place:
    """An empty place to write the checkpoint of `step` in; `commit` makes it count."""
    if not directory.exists():
        directory.make()
    if directory.is_local:
        aside = directory / f"step-{step:08d}{_INCOMPLETE}"
        aside.remove()
    else:
        aside = directory / f"step-{step:08d}-{uuid.uuid4().hex[:8]}"
    aside.make()
    return aside


def commit(aside: Place, directory: Place, files: dict[str, dict[str, Any]], facts: dict[str, Any]) -> Place:
    """Write the manifest and let the checkpoint in `aside` count; returns where it is. `files`: name -> fingerprint."""
    manifest = {"files": dict(sorted(files.items())), **facts}
    (aside / MANIFEST).write(json.dumps(manifest, indent=1).encode())
    aside.sync()
    if not aside.is_local:
        step = int(_FINISHED.fullmatch(aside.name)[1])  # type: ignore[index]
        for older in finished(directory):
            if older.step == step and older.place.name != aside.name:
                discard(older.place)
        return aside
    final = directory / aside.name.removesuffix(_INCOMPLETE)
    replaced = directory / f"{final.name}{_REPLACED}"
    if final.exists():  # a rename cannot replace a directory that holds files; `tidy` undoes this if we die here
        replaced.remove()
        final.rename(replaced.name)
    aside.rename(final.name)
    replaced.remove()
    return final


def prune(directory: Place, keep_last: int, keep_every: int | None) -> None:
    """Drop all but the newest `keep_last` and those whose step is a multiple of `keep_every`."""
    for saved in finished(directory)[:-keep_last]:
        if not keep_every or saved.step % keep_every:
            discard(saved.place)


def discard(checkpoint: Place) -> None:
    """Remove a checkpoint so that a crash on the way leaves nothing that looks finished."""
    if checkpoint.is_local:
        name = f"{checkpoint.name}{_REMOVED}"
        checkpoint.rename(name)
        (Place(os.path.dirname(checkpoint.path)) / name).remove()
    else:
        checkpoint._fs.rm(f"{checkpoint.path}/{MANIFEST}")
        checkpoint.remove()


def set_aside(checkpoint: Place, why: str) -> str:
    """Take a checkpoint out of the list without deleting it; `why` is a word. Returns what it is called now."""
    if not checkpoint.is_local:
        checkpoint.move_file(MANIFEST, f"{MANIFEST}.{why}")
        return f"{checkpoint}/{MANIFEST}.{why}"
    name = f"{checkpoint.name}.{why}"
    (Place(os.path.dirname(checkpoint.path)) / name).remove()
    checkpoint.rename(name)
    return f"{checkpoint}.{why}"


def tidy(directory: Place) -> list[str]:
    """Remove what an interrupted save left behind; returns the names. For one process, while no save is running."""
    removed = []
    entries = directory.entries()
    for name in sorted(entries):
        bare = name.removesuffix(_REPLACED)
        if name.endswith(_REPLACED) and _FINISHED.fullmatch(bare) and bare not in entries:
            (directory / name).rename(bare)  # its successor never got its place
        elif name.endswith((_INCOMPLETE, _REMOVED, _REPLACED)) and _FINISHED.match(name):
            (directory / name).remove()
            removed.append(name)
        elif not directory.is_local and _FINISHED.fullmatch(name):
            inside = (directory / name).entries()
            if not any(file.startswith(MANIFEST) for file in inside):
                (directory / name).remove()
                removed.append(name)
    return removed


def read_manifest(checkpoint: Place) -> dict[str, Any]:
    try:
        manifest = json.loads((checkpoint / MANIFEST).read())
        for want in manifest["files"].values():
            want["bytes"], want["sha256"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{checkpoint / MANIFEST} cannot be read ({type(error).__name__}: {error}): the checkpoint is damaged"
        ) from error
    return manifest


def verify(checkpoint: Place, rank: int = 0, size: int = 1, progress: Any = None) -> None:
    """Raise `CheckpointError` unless each file is there with the size and sha256 its manifest names.

    With several ranks each reads every `size`-th file, largest first, so all must call it and agree. `progress` is
    called with the number of bytes read.
    """
    files = read_manifest(checkpoint)["files"]
    there = checkpoint.entries()
    for name in files:
        if "/" in name or name not in there:
            raise CheckpointError(f"{checkpoint / name} is missing: the checkpoint is damaged")
    by_size = sorted(files, key=lambda name: (-files[name]["bytes"], name))
    for name in by_size[rank::size]:
        want = files[name]
        try:
            got = _fingerprint(checkpoint / name, progress)
        except OSError as error:
            raise CheckpointError(f"{checkpoint / name} cannot be read ({error}): the checkpoint is damaged") from error
        if got != want:
            raise CheckpointError(
                f"{checkpoint / name} is damaged: {got['bytes']} bytes with sha256 {got['sha256'][:12]}, its manifest "
                f"says {want['bytes']} and {want['sha256'][:12]}"
            )


def _fingerprint(file: Place, progress: Any) -> dict[str, Any]:
    digest, size = hashlib.sha256(), 0
    with file.open() as stream:
        while block := stream.read(1 << 22):
            digest.update(block)
            size += len(block)
            if progress is not None:
                progress(len(block))
    return {"bytes": size, "sha256": digest.hexdigest()}


def _sync_directory(path: str) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
