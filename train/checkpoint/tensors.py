"""Tensors of a checkpoint, in the format of torch.distributed.checkpoint (DCP).

Any parallel layout reads what another wrote.

Every tensor has one name and its full shape. A rank holds pieces of it: axis-aligned boxes cut from the flat runs in
which ZeRO shards, offset to where tensor parallelism puts the rank's shard. Writing gathers nothing, and reading
fetches the boxes that overlap.

Reading never runs code from a file. DCP's `.metadata` is a pickle: it is read here with an unpickler that knows the
classes of that format and nothing else. The tensors are read by `torch.load(weights_only=True)`, and a file that
declares any other kind of entry, which DCP would unpickle freely, is refused.
"""

from __future__ import annotations

import io
import math
import pathlib
import pickle
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemBase, FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from train.checkpoint.storage import CheckpointError, CheckpointPath
from train.distributed.torch_patches import silence_undistributed_checkpoints

silence_undistributed_checkpoints()

METADATA = ".metadata"
BLOCK_BYTES = 1 << 28  # of host memory; a power of two, because page-locked memory comes in those
Box = tuple[tuple[int, ...], tuple[int, ...]]  # offsets, sizes


def boxes(shape: Sequence[int], start: int, stop: int) -> list[Box]:
    """Boxes that cover the row-major elements start ... stop - 1 of a tensor, in their order.

    boxes((3, 4), 2, 9) == [((0, 2), (1, 2)), ((1, 0), (1, 4)), ((2, 0), (1, 1))]
    """
    if start >= stop:
        return []
    if len(shape) <= 1:
        return [((start,), (stop - start,))] if shape else [((), ())]
    row = math.prod(shape[1:])
    first, last = -(-start // row), stop // row  # the whole rows are first ... last - 1

    def within(index: int, begin: int, end: int) -> list[Box]:
        return [((index, *offsets), (1, *sizes)) for offsets, sizes in boxes(shape[1:], begin, end)]

    if first > last:
        return within(last, start - last * row, stop - last * row)
    found = within(first - 1, start - (first - 1) * row, row) if start < first * row else []
    if first < last:
        found.append(((first, *(0 for _ in shape[1:])), (last - first, *shape[1:])))
    if last * row < stop:
        found += within(last, 0, stop - last * row)
    return found


class Pieces:
    """What one rank holds of one tensor: boxes, and the memory to write them from or read them into.

    `flat` holds the elements from `start` on of a row-major shard of shape `shape`, at `offset` in the full tensor.
    """

    def __init__(
        self,
        full_shape: Sequence[int],
        flat: torch.Tensor,
        *,
        shape: Sequence[int] | None = None,
        start: int = 0,
        offset: Sequence[int] | None = None,
    ):
        shape = full_shape if shape is None else shape
        offset = [0] * len(shape) if offset is None else offset
        self._size, self.dtype = torch.Size(full_shape), flat.dtype
        self._pieces: dict[torch.Size, torch.Tensor] = {}
        taken = 0
        for at, sizes in boxes(shape, start, start + flat.numel()):
            count = math.prod(sizes)
            self._pieces[torch.Size(a + b for a, b in zip(at, offset))] = flat[taken : taken + count].view(sizes)
            taken += count

    def size(self) -> torch.Size:
        return self._size

    @property
    def num_bytes(self) -> int:
        """Of what this rank holds."""
        return sum(piece.numel() * piece.element_size() for piece in self._pieces.values())

    def piece(self, offset: torch.Size) -> torch.Tensor:
        return self._pieces[offset]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [ChunkStorageMetadata(at, piece.shape) for at, piece in self._pieces.items()]

    def __create_write_items__(self, name: str, _: object) -> list[WriteItem]:
        return write_items(name, self._size, self.dtype, [(at, piece.shape) for at, piece in self._pieces.items()])


def write_items(
    name: str, size: torch.Size, dtype: torch.dtype, pieces: list[tuple[torch.Size, torch.Size]]
) -> list[WriteItem]:
    """DCP's write items for the (offset, size) boxes of a tensor."""
    properties = TensorProperties(dtype=dtype)
    return [
        WriteItem(
            MetadataIndex(name, offset),
            WriteItemType.SHARD,
            tensor_data=TensorWriteData(ChunkStorageMetadata(offset, sizes), properties, size),
        )
        for offset, sizes in pieces
    ]


def write(
    checkpoint: CheckpointPath,
    tensors: dict[str, Any],
    group: torch.distributed.ProcessGroup | None,
    *,
    num_files: int = 1,
    progress: Callable[[int], object] = lambda _: None,
) -> dict[str, dict[str, Any]]:
    """Write this rank's pieces (or objects with the same methods) below `checkpoint`. Collective over `group`.

    Returns the fingerprints of the files that this rank wrote: `num_files` of tensors, and on one rank the metadata.
    Pieces that several ranks hold are written once. `progress` is called with the number of elements of each piece.
    """
    writer = _Writer(checkpoint, num_files)
    planner = _SavePlanner(progress)
    dcp.save(tensors, storage_writer=writer, planner=planner, process_group=group, no_dist=group is None)
    return writer.files.written


def read(checkpoint: CheckpointPath, tensors: dict[str, Pieces]) -> None:
    """Fill the pieces from `checkpoint`; each rank reads by itself. Raises `CheckpointError`."""
    reader = _Reader(checkpoint)
    held = reader.read_metadata().state_dict_metadata
    for name, pieces in tensors.items():
        if name not in held or held[name].size != pieces.size():  # type: ignore[union-attr]
            saved = tuple(held[name].size) if name in held else "absent"  # type: ignore[union-attr]
            raise CheckpointError(f"{checkpoint}: {name} is {saved} there and {tuple(pieces.size())} here")
    try:
        dcp.load(tensors, storage_reader=reader, planner=_LoadPlanner(), no_dist=True)
    except dcp.CheckpointException as error:
        cause = next(iter(error.failures.values()))[0]
        raise CheckpointError(f"{checkpoint} cannot be read ({type(cause).__name__}: {cause})") from error


def shapes(checkpoint: CheckpointPath) -> dict[str, tuple[int, ...]]:
    """Name -> full shape of every tensor of a checkpoint."""
    metadata = _Reader(checkpoint).read_metadata().state_dict_metadata
    return {name: tuple(entry.size) for name, entry in metadata.items()}  # type: ignore[union-attr]


def entry(checkpoint: CheckpointPath, name: str) -> TensorStorageMetadata:
    """Shape, dtype and pieces of one tensor of a checkpoint."""
    return _Reader(checkpoint).read_metadata().state_dict_metadata[name]  # type: ignore[return-value]


def read_tensor(checkpoint: CheckpointPath, name: str) -> torch.Tensor:
    """One full tensor of a checkpoint."""
    found = entry(checkpoint, name)
    tensor = torch.empty(found.size, dtype=found.properties.dtype)
    read(checkpoint, {name: Pieces(tensor.shape, tensor.view(-1))})
    return tensor


# -- this rank's memory ------------------------------------------------------------------------------------------------


class HostMemory:
    """Host copies of tensors, in memory that is kept from one save to the next. fp32 only."""

    def __init__(self, pinned: bool):
        self._pinned = pinned
        self._blocks: list[torch.Tensor] = []
        self.rewind()

    def rewind(self) -> None:
        """Use the memory again, from its start."""
        self._block = self._used = 0

    def copy(self, source: torch.Tensor) -> torch.Tensor:
        """A copy of flat `source`; complete once `wait` has returned."""
        count = source.numel()
        while self._block < len(self._blocks) and self._used + count > self._blocks[self._block].numel():
            self._block, self._used = self._block + 1, 0
        if self._block == len(self._blocks):
            self._blocks.append(self._allocate(max(count, min(BLOCK_BYTES // 4, 16 * count))))
        target = self._blocks[self._block][self._used : self._used + count]
        self._used += count
        return target.copy_(source, non_blocking=self._pinned)

    def wait(self) -> None:
        """Wait until all copies are complete."""
        if self._pinned:
            event = torch.cuda.Event()
            event.record()
            event.synchronize()

    def _allocate(self, count: int) -> torch.Tensor:
        return torch.empty(count, dtype=torch.float32, pin_memory=self._pinned)


def generators(device: torch.device) -> dict[str, torch.Tensor]:
    """The states of this rank's random number generators: name -> bytes."""
    states = {"torch": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def set_generators(states: dict[str, torch.Tensor], device: torch.device) -> None:
    torch.set_rng_state(states["torch"])
    if "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)


# -- DCP's parts ------------------------------------------------------------------------------------------------------


class _Files(FileSystemBase):
    """A file system for DCP inside one directory; it keeps the fingerprint of each file it writes."""

    def __init__(self, checkpoint: CheckpointPath):
        self._checkpoint = checkpoint
        self.written: dict[str, dict[str, Any]] = {}

    @contextmanager
    def create_stream(self, path: Any, mode: str) -> Iterator[Any]:
        name = str(path).removesuffix(".tmp")  # the whole directory is incomplete until it is renamed
        if "/" in name:
            raise CheckpointError(f"{self._checkpoint} names a file outside itself: {name}")
        if mode == "rb":
            with (self._checkpoint / name).open() as file:
                yield file
            return
        with (self._checkpoint / name).create() as file:
            yield file
        self.written[name] = file.fingerprint

    def concat_path(self, path: Any, suffix: str) -> str:
        return suffix

    def rename(self, path: Any, new_path: Any) -> None:
        pass

    def init_path(self, path: Any) -> str:
        return ""

    def mkdir(self, path: Any) -> None:
        pass

    def exists(self, path: Any) -> bool:
        return False

    def rm_file(self, path: Any) -> None:
        raise NotImplementedError("a new checkpoint is empty: there is nothing to remove")

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return True


class _Writer(FileSystemWriter):
    def __init__(self, checkpoint: CheckpointPath, num_files: int):
        # Files sync themselves on closing. The tensors are on the host already, so nothing is copied ahead.
        super().__init__("", sync_files=False, thread_count=num_files, per_thread_copy_ahead=0)
        self.fs = self.files = _Files(checkpoint)  # type: ignore[assignment]
        self.path = ""


class _Reader(FileSystemReader):
    def __init__(self, checkpoint: CheckpointPath):
        super().__init__("")
        self._checkpoint = checkpoint
        self._metadata: Metadata | None = None
        self.fs = _Files(checkpoint)  # type: ignore[assignment]
        self.path = ""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        if self._metadata is None:
            self._metadata = self._read()
            self._metadata.storage_meta = StorageMeta(load_id=self.load_id)
        return self._metadata

    def _read(self) -> Metadata:
        path = self._checkpoint / METADATA
        try:
            metadata = _MetadataUnpickler(io.BytesIO(path.read())).load()
        except CheckpointError:
            raise
        except Exception as error:  # whatever a malformed pickle makes the unpickler raise
            raise CheckpointError(f"{path} cannot be read ({type(error).__name__}: {error})") from error
        _check(metadata, path)
        return metadata


class _SavePlanner(DefaultSavePlanner):
    def __init__(self, progress: Callable[[int], object]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._progress = progress

    def lookup_object(self, index: MetadataIndex) -> Any:
        piece = self.state_dict[index.fqn].piece(index.offset)
        self._progress(piece.numel())
        return piece


class _LoadPlanner(DefaultLoadPlanner):
    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def set_up_planner(self, state_dict: Any, metadata: Any = None, is_coordinator: bool = False) -> None:
        self.state_dict, self.original_state_dict = state_dict, state_dict
        self.metadata, self.is_coordinator = metadata, is_coordinator

    def lookup_tensor(self, index: MetadataIndex) -> torch.Tensor:
        return self.state_dict[index.fqn].piece(index.offset)

    def load_bytes(self, read_item: Any, value: Any) -> None:
        raise CheckpointError(f"{read_item.dest_index.fqn} is not a tensor")  # DCP would unpickle it


def _classes() -> dict[tuple[str, str], Any]:
    from torch.distributed.checkpoint import filesystem, metadata
    from torch.serialization import _get_layout

    known: dict[tuple[str, str], Any] = {
        ("torch", "Size"): torch.Size,
        ("torch.serialization", "_get_layout"): _get_layout,
        (filesystem.__name__, "_StorageInfo"): filesystem._StorageInfo,
        ("pathlib", "PosixPath"): pathlib.PurePosixPath,  # stock DCP notes where it wrote; not used
        ("pathlib._local", "PosixPath"): pathlib.PurePosixPath,
    }
    for name in ("Metadata", "MetadataIndex", "TensorStorageMetadata", "ChunkStorageMetadata", "TensorProperties"):
        known[metadata.__name__, name] = getattr(metadata, name)
    for name in ("StorageMeta", "_MEM_FORMAT_ENCODING", "BytesStorageMetadata"):
        known[metadata.__name__, name] = getattr(metadata, name)
    for name in ("float64", "float32", "bfloat16", "float16", "uint8", "int32", "int64"):
        known["torch", name] = getattr(torch, name)
    return known


class _MetadataUnpickler(pickle.Unpickler):
    """Loads the data classes of DCP's metadata, by their exact names, and refuses everything else."""

    _known = _classes()

    def find_class(self, module: str, name: str) -> Any:
        try:
            return self._known[module, name]
        except KeyError:
            raise CheckpointError(
                f"the checkpoint's {METADATA} names {module}.{name}, which does not belong there and could run code: "
                "the file is not read"
            ) from None


def _check(metadata: Any, path: CheckpointPath) -> None:
    """Raise `CheckpointError` unless every entry is a complete tensor in files of this checkpoint."""
    if not isinstance(metadata, Metadata) or not isinstance(metadata.state_dict_metadata, dict):
        raise CheckpointError(f"{path} does not hold the metadata of a checkpoint")
    for name, entry in metadata.state_dict_metadata.items():
        if not isinstance(entry, TensorStorageMetadata):
            raise CheckpointError(f"{path} declares {name} as something other than a tensor: it is not read")
        if sum(math.prod(chunk.sizes) for chunk in entry.chunks) != math.prod(entry.size):
            raise CheckpointError(f"{path} does not hold every element of {name}")
    for info in (metadata.storage_data or {}).values():
        if "/" in info.relative_path or info.transform_descriptors:
            raise CheckpointError(f"{path} names a file outside this checkpoint: {info.relative_path}")
