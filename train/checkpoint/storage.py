"""The files of checkpoints, in a local directory or behind an fsspec URL, and the protocol that commits them.

    DIRECTORY/
        step-00000020/              a finished checkpoint: tensors, state.json, manifest.json
        step-00000040.incomplete/   one that was being written; the next start removes it
        step-00000030.damaged/      quarantined: it failed verification; delete it after you have inspected it
        step-00000050.abandoned/    quarantined: the run went back to an earlier step and continued from there

Locally a checkpoint is written under another name, synced, and renamed. Object stores cannot rename, so each save has
its own key there, `step-00000020-1f3a9c04/`, and is finished once its manifest exists, which is written last. The
newest checkpoint is found by listing; there is no pointer that could go stale.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import re
import uuid
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from data_pipeline.store.files import sync_directory
from train.config.errors import ConfigError

STATE, MANIFEST = "state.json", "manifest.json"
_FINISHED = re.compile(r"step-(\d{8,})(-[0-9a-f]{8})?")
MARGIN = 1 << 16  # bytes that a checkpoint takes at least beside its tensors: metadata, state.json, manifest.json
_INCOMPLETE, _REMOVED, _REPLACED = ".incomplete", ".removed", ".replaced"


class CheckpointError(ConfigError):
    """A checkpoint that is missing, damaged or of another model. The message names the file and what to do."""


class SaveError(RuntimeError):
    """The last checkpoint of a run could not be written; the message says why, and what it needs."""


class CheckpointPath:
    """A local path or an fsspec URL, and what checkpoints do with it. Its methods raise `OSError`."""

    def __init__(self, location: str | os.PathLike):
        try:
            self._fs, path = fsspec.core.url_to_fs(os.fspath(location))
        except (ValueError, ImportError) as error:  # an unknown protocol, or one whose package is missing
            raise CheckpointError(f"{os.fspath(location)} cannot be opened: {error}") from error
        self.path = path.rstrip("/")

    @property
    def is_local(self) -> bool:
        return isinstance(self._fs, LocalFileSystem)

    @property
    def name(self) -> str:
        return self.path.rsplit("/", 1)[-1]

    @property
    def parent(self) -> CheckpointPath:
        above = object.__new__(CheckpointPath)
        above._fs, above.path = self._fs, self.path.rpartition("/")[0]
        return above

    @property
    def step(self) -> int:
        """The step of a finished checkpoint, from its name."""
        match = _FINISHED.fullmatch(self.name)
        assert match is not None, f"{self} is not the name of a checkpoint"
        return int(match[1])

    def __str__(self) -> str:
        return self.path if self.is_local else self._fs.unstrip_protocol(self.path)

    def __fspath__(self) -> str:
        return str(self)

    def __truediv__(self, name: str) -> CheckpointPath:
        child = object.__new__(CheckpointPath)
        child._fs, child.path = self._fs, f"{self.path}/{name}"
        return child

    def exists(self) -> bool:
        with self._reachable():
            return self._fs.exists(self.path)

    def is_file(self) -> bool:
        with self._reachable():
            return self._fs.isfile(self.path)

    def entries(self) -> dict[str, int]:
        """Name -> size in bytes of everything directly below; empty where nothing exists."""
        self._fs.invalidate_cache(self.path)
        try:
            with self._reachable():
                found = self._fs.ls(self.path, detail=True)
        except (FileNotFoundError, NotADirectoryError):
            return {}
        return {entry["name"].rstrip("/").rsplit("/", 1)[-1]: int(entry["size"] or 0) for entry in found}

    @contextmanager
    def _reachable(self) -> Iterator[None]:
        """Turn errors of the store's own classes, such as missing credentials, into `CheckpointError`."""
        try:
            yield
        except OSError:
            raise
        except Exception as error:
            raise CheckpointError(f"{self} cannot be reached: {type(error).__name__}: {error}") from error

    def open(self) -> io.IOBase:
        """Open this file for reading."""
        return self._fs.open(self.path, "rb")

    def read(self) -> bytes:
        with self.open() as file:
            return file.read()

    def write(self, content: bytes) -> dict[str, Any]:
        """Write this file and sync it; returns its fingerprint."""
        with self.create() as file:
            file.write(content)
        return file.fingerprint

    def create_exclusively(self, content: bytes) -> bytes:
        """Write this file, whole or not at all, unless it exists; returns what it holds then.

        Behind a URL this takes a store that can refuse to replace a file; on others it is a look and a write.
        """
        if self.is_local:
            self._link(content)
        else:
            self._fs.invalidate_cache(self.path)
            if self.exists():  # a store may take `mode` and ignore it
                return self.read()
            try:
                self._fs.pipe_file(self.path, content, mode="create")
            except Exception:  # it exists, or the store or its package cannot do this: classes differ
                self._fs.invalidate_cache(self.path)
                if not self.exists():
                    self.write(content)
        return self.read()

    def _link(self, content: bytes) -> None:
        temporary = f"{self.path}.{uuid.uuid4().hex[:8]}.tmp"
        CheckpointPath(temporary).write(content)
        try:
            os.link(temporary, self.path)
            sync_directory(os.path.dirname(self.path))
        except FileExistsError:
            pass
        except OSError:  # a file system without hard links
            with contextlib.suppress(FileExistsError), open(self.path, "xb") as file:
                file.write(content)
        finally:
            os.unlink(temporary)

    @contextmanager
    def create(self) -> Iterator[HashedFile]:
        """Open this file for writing; its content is on the disk when the block ends."""
        file = HashedFile(self._fs.open(self.path, "wb"))
        try:
            yield file
        finally:
            file.close()

    def make(self) -> None:
        self._fs.makedirs(self.path, exist_ok=True)
        if self.is_local:
            sync_directory(os.path.dirname(self.path))

    def rename(self, name: str) -> None:
        """Rename this directory within its parent; local only."""
        parent = os.path.dirname(self.path)
        os.rename(self.path, os.path.join(parent, name))
        sync_directory(parent)

    def remove(self) -> None:
        if self.exists():
            self._fs.rm(self.path, recursive=True)

    def move_file(self, name: str, to: str) -> None:
        self._fs.mv(f"{self.path}/{name}", f"{self.path}/{to}")

    def sync(self) -> None:
        if self.is_local:
            sync_directory(self.path)


class HashedFile(io.RawIOBase):
    """A file being written. Its sha256 is of the bytes given to it, not of what the disk returns later."""

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
                pass  # an object store has the file once it is closed
        finally:
            self._raw.close()
        super().close()

    @property
    def fingerprint(self) -> dict[str, Any]:
        return {"bytes": self._size, "sha256": self._digest.hexdigest()}


def finished(directory: str | os.PathLike) -> list[CheckpointPath]:
    """Finished checkpoints below `directory`, oldest first; not verified."""
    parent = directory if isinstance(directory, CheckpointPath) else CheckpointPath(directory)
    found = [
        parent / name
        for name in parent.entries()
        if _FINISHED.fullmatch(name) and (parent.is_local or MANIFEST in (parent / name).entries())
    ]
    return sorted(found, key=lambda checkpoint: (checkpoint.step, checkpoint.name))


def begin(directory: CheckpointPath, step: int) -> CheckpointPath:
    """An empty directory to write the checkpoint of `step` in; `commit` finishes it."""
    if not directory.exists():
        directory.make()
    if directory.is_local:
        incomplete = directory / f"step-{step:08d}{_INCOMPLETE}"
        incomplete.remove()
    else:
        incomplete = directory / f"step-{step:08d}-{uuid.uuid4().hex[:8]}"
    incomplete.make()
    return incomplete


def commit(
    incomplete: CheckpointPath, directory: CheckpointPath, files: dict[str, dict[str, Any]], facts: dict[str, Any]
) -> CheckpointPath:
    """Write the manifest, which finishes the checkpoint in `incomplete`. `files`: name -> fingerprint.

    Returns the finished checkpoint. It replaces one of the same step.
    """
    manifest = {"files": dict(sorted(files.items())), **facts}
    (incomplete / MANIFEST).write(json.dumps(manifest, indent=1).encode())
    incomplete.sync()
    if not incomplete.is_local:
        for older in finished(directory):
            if older.step == incomplete.step and older.name != incomplete.name:
                discard(older)
        return incomplete
    final = directory / incomplete.name.removesuffix(_INCOMPLETE)
    replaced = directory / f"{final.name}{_REPLACED}"
    if final.exists():  # a rename cannot replace a directory with files; `tidy` undoes this after a crash here
        replaced.remove()
        final.rename(replaced.name)
    incomplete.rename(final.name)
    replaced.remove()
    return final


def prune(directory: CheckpointPath, stays: Callable[[list[int]], Collection[int]]) -> list[str]:
    """Remove the finished checkpoints that do not stay; returns their names. `stays`: all steps -> those that stay."""
    checkpoints = finished(directory)
    stay = stays([checkpoint.step for checkpoint in checkpoints])
    removed = [checkpoint for checkpoint in checkpoints if checkpoint.step not in stay]
    for checkpoint in removed:
        discard(checkpoint)
    return [checkpoint.name for checkpoint in removed]


def discard(checkpoint: CheckpointPath) -> None:
    """Remove a checkpoint. A crash on the way leaves nothing that looks finished."""
    if checkpoint.is_local:
        name = f"{checkpoint.name}{_REMOVED}"
        checkpoint.rename(name)
        (CheckpointPath(os.path.dirname(checkpoint.path)) / name).remove()
    else:
        checkpoint._fs.rm(f"{checkpoint.path}/{MANIFEST}")
        checkpoint.remove()


def quarantine(checkpoint: CheckpointPath, reason: str) -> str:
    """Take a checkpoint out of the list without deleting it. `reason`, a word, becomes part of its name, which is
    returned."""
    if not checkpoint.is_local:
        checkpoint.move_file(MANIFEST, f"{MANIFEST}.{reason}")
        return f"{checkpoint}/{MANIFEST}.{reason}"
    name = f"{checkpoint.name}.{reason}"
    (CheckpointPath(os.path.dirname(checkpoint.path)) / name).remove()
    checkpoint.rename(name)
    return f"{checkpoint}.{reason}"


def tidy(directory: CheckpointPath) -> list[str]:
    """Remove what interrupted saves left behind; returns the names. For one process, while no save runs."""
    removed = []
    entries = directory.entries()
    for name in sorted(entries):
        bare = name.removesuffix(_REPLACED)
        if name.endswith(_REPLACED) and _FINISHED.fullmatch(bare) and bare not in entries:
            (directory / name).rename(bare)  # its successor was not finished
        elif name.endswith((_INCOMPLETE, _REMOVED, _REPLACED)) and _FINISHED.match(name):
            (directory / name).remove()
            removed.append(name)
        elif not directory.is_local and _FINISHED.fullmatch(name):
            inside = (directory / name).entries()
            if not any(file.startswith(MANIFEST) for file in inside):
                (directory / name).remove()
                removed.append(name)
    return removed


def free_bytes(directory: CheckpointPath) -> int | None:
    """Bytes that this user may still write below `directory`; None where nobody knows, as behind a URL."""
    if not directory.is_local:
        return None
    path = directory.path
    while not os.path.exists(path) and os.path.dirname(path) != path:
        path = os.path.dirname(path)
    try:
        found = os.statvfs(path)
    except OSError:
        return None
    return found.f_bavail * found.f_frsize


def size(checkpoint: CheckpointPath) -> int:
    """Bytes of all files of a checkpoint; beside the tensors, every piece of one has some."""
    return sum(checkpoint.entries().values())


def is_restorable(directory: CheckpointPath) -> bool:
    """Whether `tidy` will restore a finished checkpoint, because a process was killed while it replaced it."""
    return any(name.endswith(_REPLACED) for name in directory.entries())


def read_manifest(checkpoint: CheckpointPath) -> dict[str, Any]:
    """manifest.json of a checkpoint: `files` maps names to `bytes` and `sha256`."""
    try:
        manifest = json.loads((checkpoint / MANIFEST).read())
        for want in manifest["files"].values():
            want["bytes"], want["sha256"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{checkpoint / MANIFEST} cannot be read ({type(error).__name__}: {error}): the checkpoint is damaged"
        ) from error
    return manifest


def verify(checkpoint: CheckpointPath, rank: int = 0, size: int = 1, progress: Any = None) -> None:
    """Raise `CheckpointError` unless every file exists with the size and sha256 that the manifest names.

    With several ranks each reads every `size`-th file, largest first: all must call it and share the result.
    `progress` is called with the number of bytes read.
    """
    files = read_manifest(checkpoint)["files"]
    existing = checkpoint.entries()
    for name in files:
        if "/" in name or name not in existing:
            raise CheckpointError(f"{checkpoint / name} is missing: the checkpoint is damaged")
    by_size = sorted(files, key=lambda name: (-files[name]["bytes"], name))
    for name in by_size[rank::size]:
        expected = files[name]
        try:
            actual = _fingerprint(checkpoint / name, progress)
        except OSError as error:
            raise CheckpointError(f"{checkpoint / name} cannot be read ({error}): the checkpoint is damaged") from error
        if actual != expected:
            raise CheckpointError(
                f"{checkpoint / name} is damaged: {actual['bytes']} bytes with sha256 {actual['sha256'][:12]}, its "
                f"manifest says {expected['bytes']} and {expected['sha256'][:12]}"
            )


def _fingerprint(file: CheckpointPath, progress: Any) -> dict[str, Any]:
    digest, size = hashlib.sha256(), 0
    with file.open() as stream:
        while block := stream.read(1 << 22):
            digest.update(block)
            size += len(block)
            if progress is not None:
                progress(len(block))
    return {"bytes": size, "sha256": digest.hexdigest()}
