"""Hugging Face checkpoints on disk: read any part of any tensor, write tensors one after the other.

Reading never runs code from a file: safetensors hold none, and a pickled checkpoint is opened only where the caller
allows it, by torch's unpickler for tensors alone.

The safetensors library reads. It cannot write a file from tensors that are not all in memory, so `write_safetensors`
writes the format itself: 325 MiB of memory for 1.5 GiB of tensors instead of 1,732 MiB (docs/log.md).
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ksa_model.config import ModelConfigError
from ksa_model.hf.configs import CheckpointSpec, read_config
from train.config.errors import ConfigError

WEIGHTS, INDEX, CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"
_PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")  # in the order in which they are taken
_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
SHARD_BYTES = 2 << 30


class HfError(ConfigError):
    """A Hugging Face directory that cannot be read or does not fit; the message names the file and what to do."""


class HfDirectory:
    """A checkpoint as `save_pretrained` leaves it: config.json and safetensors, one file or several with an index.

    Shapes are read from the files' headers when it is opened, tensors when they are asked for.
    """

    def __init__(self, path: str | Path, allow_pickle: bool = False):
        self.path = Path(path)
        self.config = self._json(CONFIG)
        # One file comes before an index, as in transformers: the index beside it is an older one.
        if (self.path / WEIGHTS).is_file():
            self._files = dict.fromkeys(self._names(self.path / WEIGHTS), self.path / WEIGHTS)
        elif (self.path / INDEX).is_file():
            self._files = self._indexed(INDEX)
        else:
            self._files = self._pickled(allow_pickle)
        self._shapes: dict[str, tuple[int, ...]] = {}
        for file in sorted(set(self._files.values())):
            self._read_shapes(file)

    def names(self) -> list[str]:
        return sorted(self._files)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def read(self, name: str, offset: Iterable[int], size: Iterable[int]) -> torch.Tensor:
        """The box of a tensor at `offset` of `size`, fp32; only its bytes are read."""
        box = tuple(slice(a, a + n) for a, n in zip(offset, size))
        file = self._files[name]
        if file.suffix == ".bin":
            return _load_pickle(file)[name][box].float()
        from safetensors import safe_open

        with safe_open(file, "pt") as tensors:
            return tensors.get_slice(name)[box].float()

    def where(self, name: str) -> str:
        """The file that holds a tensor, for messages."""
        return str(self._files[name])

    def spec(self) -> CheckpointSpec:
        """Which model config.json describes. Raises `HfError` that names the file."""
        try:
            return read_config(self.config)
        except ModelConfigError as error:
            raise HfError(f"{self.path / CONFIG}: {error}") from error

    def _indexed(self, name: str) -> dict[str, Path]:
        weight_map = self._json(name).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
            raise HfError(f"{self.path / name}: weight_map must name a file for each tensor; copy the checkpoint again")
        return {tensor: self._inside(file) for tensor, file in weight_map.items()}

    def _read_shapes(self, file: Path) -> None:
        wanted = [name for name, where in self._files.items() if where == file]
        if file.suffix == ".bin":
            held = {name: tuple(tensor.shape) for name, tensor in _load_pickle(file).items()}
        else:
            held = self._names(file)
        for name in wanted:
            if name not in held:
                raise HfError(f"{file} lacks {name}, which the index says it holds; copy the checkpoint again")
            self._shapes[name] = held[name]
        if extra := sorted(held.keys() - set(wanted)):  # transformers would load them too
            other = self._files.get(extra[0])
            listed = "the index does not list" if other is None else f"the index places in {other.name}"
            raise HfError(
                f"{file} holds {extra[0]}, which {listed}: index and files are of different checkpoints; copy the "
                "checkpoint again"
            )

    def _names(self, file: Path) -> dict[str, tuple[int, ...]]:
        try:
            from safetensors import SafetensorError, safe_open
        except ImportError as error:
            raise HfError(f"{file} needs the package safetensors: pip install 'ksa-train[hf]' ({error})") from error
        try:
            with safe_open(file, "pt") as tensors:
                return {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}
        except (OSError, SafetensorError) as error:
            raise HfError(f"{file} cannot be read as safetensors ({error}); copy the checkpoint again") from error

    def _pickled(self, allowed: bool) -> dict[str, Path]:
        there = [name for name in _PICKLES if (self.path / name).is_file()]
        if not there:
            raise HfError(f"{self.path} holds neither {WEIGHTS} nor {INDEX}; give the directory of a checkpoint")
        if not allowed:
            raise HfError(
                f"{self.path / there[0]} is a pickle, and {WEIGHTS} is missing: convert it, for example with python -m "
                f"train.import_hf {self.path} out=RUN allow_pickle=true if you trust its origin, and use "
                "init_from=RUN"
            )
        if there[0].endswith(".json"):
            return self._indexed(there[0])
        return dict.fromkeys(_load_pickle(self.path / there[0]), self.path / there[0])

    def _inside(self, file: str) -> Path:
        if "/" in file or file in ("", "..") or Path(file).suffix not in (".safetensors", ".bin"):
            raise HfError(f"the index in {self.path} names {file!r}, which is no file of tensors beside it")
        if not (self.path / file).is_file():
            raise HfError(f"{self.path / file} is missing, the index names it; copy the checkpoint again")
        return self.path / file

    def _json(self, name: str) -> dict[str, Any]:
        return read_object(self.path / name)


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file of a Hugging Face directory. Raises `HfError` that names the file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise HfError(
            f"{path} is missing: {path.parent} is no directory of a Hugging Face checkpoint on this machine"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise HfError(f"{path} cannot be read as JSON ({error})") from error
    if not isinstance(content, dict):
        raise HfError(f"{path} must hold a JSON object")
    return content


def _load_pickle(file: Path) -> dict[str, torch.Tensor]:
    try:
        held = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        if not isinstance(held, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in held.values()):
            raise ValueError("it holds something other than tensors by name")
        return held
    except Exception as error:  # any error that a malformed pickle causes
        raise HfError(f"{file} cannot be read as pickled tensors ({type(error).__name__}: {error})") from error


def write_safetensors(
    directory: Path,
    tensors: Sequence[tuple[str, tuple[int, ...], Callable[[], torch.Tensor]]],
    dtype: torch.dtype,
    progress: Callable[[int], object] = lambda _: None,
    shard_bytes: int = SHARD_BYTES,
    *,
    facts: Mapping[str, str] | None = None,
) -> list[Path]:
    """Write (name, shape, read) tensors as safetensors of about `shard_bytes` each, with an index where there are
    several. One tensor is in memory at a time: headers follow from shapes, and each tensor is written once it is read.
    `facts` go into the metadata of every file.
    """
    shards: list[list[tuple[str, tuple[int, ...], Callable[[], torch.Tensor]]]] = [[]]
    filled, total = 0, 0
    for name, shape, read in tensors:
        size = _bytes(shape, dtype)
        if shards[-1] and filled + size > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append((name, shape, read))
        filled, total = filled + size, total + size
    many = len(shards) > 1
    paths: list[Path] = []
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        path = directory / (f"model-{number:05d}-of-{len(shards):05d}.safetensors" if many else WEIGHTS)
        _write_shard(path, shard, dtype, progress, facts or {})
        paths.append(path)
        weight_map |= {name: path.name for name, _, _ in shard}
    if many:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return paths


def _write_shard(
    path: Path, shard: list, dtype: torch.dtype, progress: Callable[[int], object], facts: Mapping[str, str]
) -> None:
    """Write one file: 8 bytes of header length, a JSON header with the offsets of all tensors, then their bytes."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **facts}}
    offset = 0
    for name, shape, _ in shard:
        size = _bytes(shape, dtype)
        header[name] = {"dtype": _DTYPES[dtype], "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, shape, read in shard:
            tensor = read().to(dtype).contiguous()
            if tuple(tensor.shape) != shape:
                raise AssertionError(f"{name} was announced as {shape} and is {tuple(tensor.shape)}")
            file.write(memoryview(tensor.view(-1).view(torch.uint8).numpy()))
            progress(tensor.numel())


def _bytes(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    return torch.Size(shape).numel() * dtype.itemsize
