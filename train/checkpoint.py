"""Checkpoints: fp32 weights and optimizer moments as whole named tensors, in torch.distributed.checkpoint's format.

    checkpoints/step-00000020/
        .metadata  __0_0.distcp ...   every tensor `master/NAME`, `exp_avg/NAME`, `exp_avg_sq/NAME` in its full shape
        state.json                    step, tokens, loader state, optimizer steps, configuration, versions
        manifest.json                 sha256 and size of every file above; written last

Nothing in it depends on how many ranks wrote it: tensor-parallel shares are stored as slices of the full tensor, ZeRO
partitions are gathered first. A checkpoint is written in a directory of another name, synced, and renamed, so that a
directory called `step-*` is always complete; the newest one is found by listing, there is no pointer to go stale.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from train.config import ConfigError
from train.engine import Engine, full_shape
from train.parallel import World

FORMAT = 1
PREFIX, STATE, MANIFEST = "step-", "state.json", "manifest.json"


class CheckpointError(ConfigError):
    """A checkpoint that is missing, damaged or of another model; the message names the file and what to do."""


@dataclass(frozen=True)
class Progress:
    """How far a run is: everything in a checkpoint that is not a tensor."""

    step: int  # optimizer steps done
    tokens: int  # real tokens seen by all ranks
    loader: dict[str, Any]


def save(
    directory: Path, engine: Engine, world: World, progress: Progress, facts: dict[str, Any], keep_last: int
) -> Path:
    """Write `directory/step-N`, then drop all but the `keep_last` newest. Collective; returns the path.

    `facts` go into state.json as they are (configuration, versions).
    """
    final = directory / f"{PREFIX}{progress.step:08d}"
    aside = directory / f"{final.name}.incomplete"
    if world.is_main:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        _write_json(
            aside / STATE,
            {"format": FORMAT, "step": progress.step, "tokens": progress.tokens, "loader": progress.loader, **facts},
        )
    dist.barrier()
    dcp.save(_tensors_to_save(engine, world), checkpoint_id=aside)
    _write_manifest(aside, world)
    if world.is_main:
        shutil.rmtree(final, ignore_errors=True)  # a resumed run reaches its old steps again
        os.rename(aside, final)
        _sync(directory)
        for old in complete(directory)[:-keep_last]:
            shutil.rmtree(old)
    dist.barrier()
    return final


def complete(directory: Path) -> list[Path]:
    """Finished checkpoints below `directory`, oldest first."""
    if not directory.is_dir():
        return []
    return sorted(p for p in directory.iterdir() if p.name.startswith(PREFIX) and p.name[len(PREFIX) :].isdigit())


def find(resume: str, own_directory: Path) -> Path | None:
    """The checkpoint that `resume` (auto, never, or a path) means for a run that keeps its own in `own_directory`.

    A path may be a checkpoint, or a run directory, which stands for its newest checkpoint. None: start afresh.
    """
    if resume == "never":
        return None
    if resume == "auto":
        found = complete(own_directory)
        return found[-1] if found else None
    path = Path(resume)
    for directory in (path, path / "checkpoints"):
        if (directory / MANIFEST).is_file():
            return directory
        if complete(directory):
            return complete(directory)[-1]
    raise CheckpointError(
        f"resume={resume}: neither a checkpoint (a directory with {MANIFEST}) nor a run directory that holds one; "
        "give such a path, or resume=auto to continue this run, or resume=never to start afresh"
    )


def read_state(checkpoint: Path) -> dict[str, Any]:
    """state.json of a checkpoint, its format checked."""
    try:
        state = json.loads((checkpoint / STATE).read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{checkpoint / STATE} cannot be read: {error}") from error
    if state.get("format") != FORMAT:
        raise CheckpointError(f"{checkpoint} has checkpoint format {state.get('format')}, this version reads {FORMAT}")
    return state


def verify(checkpoint: Path) -> None:
    """Raise `CheckpointError` unless every file is there with the size and sha256 its manifest names."""
    try:
        files = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))["files"]
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{checkpoint / MANIFEST} cannot be read: {error}") from error
    for name, want in files.items():
        path = checkpoint / name
        if not path.is_file():
            raise CheckpointError(f"{path} is missing: the checkpoint is damaged; remove it to use the one before")
        got = _fingerprint(path)
        if got != want:
            raise CheckpointError(
                f"{path} is damaged: {got['bytes']} bytes with sha256 {got['sha256'][:12]}, its manifest "
                f"says {want['bytes']} and {want['sha256'][:12]}; remove the checkpoint to use the one before"
            )


def load(checkpoint: Path, engine: Engine, world: World) -> Progress:
    """Verify and load weights, moments and progress, whatever layout wrote them. Collective."""
    errors: list[str | None] = [None]
    if world.is_main:
        try:
            verify(checkpoint)
        except CheckpointError as error:
            errors = [str(error)]
    dist.broadcast_object_list(errors, src=0)
    if errors[0]:
        raise CheckpointError(errors[0])
    state = read_state(checkpoint)
    _check_shapes(checkpoint, {f"master/{name}": _full_shape(p, world) for name, p in engine.named_parameters()})
    mesh = _tensor_mesh(world)
    for name, parameter in engine.named_parameters():  # one parameter at a time bounds host memory
        shares = {
            f"{kind}/{name}": _as_share(torch.zeros(full_shape(parameter)), parameter, mesh)
            for kind in ("master", "exp_avg", "exp_avg_sq")
        }
        dcp.load(shares, checkpoint_id=checkpoint)
        engine.load_full_state(
            parameter, {key.split("/")[0]: share.to_local().to(world.device) for key, share in shares.items()}
        )
    engine.finish_loading(state["step"])
    return Progress(step=state["step"], tokens=state["tokens"], loader=state["loader"])


def load_weights(checkpoint: Path, model: torch.nn.Module, world: World) -> None:
    """Load the fp32 weights alone into a bare model, for evaluation and sampling. Collective over the world."""
    verify(checkpoint)
    mesh = _tensor_mesh(world)
    named = dict(model.named_parameters())
    _check_shapes(checkpoint, {f"master/{name}": _full_shape(p, world) for name, p in named.items()})
    shares = {f"master/{name}": _as_share(torch.zeros(p.shape), p, mesh) for name, p in named.items()}
    dcp.load(shares, checkpoint_id=checkpoint)
    with torch.no_grad():
        for name, parameter in named.items():
            parameter.copy_(shares[f"master/{name}"].to_local())


# -- tensors ----------------------------------------------------------------------------------------------------------


def _tensors_to_save(engine: Engine, world: World) -> dict[str, DTensor]:
    """Every tensor once: parameter i is handed to the writer by data x context rank i mod their number."""
    mesh, group = _tensor_mesh(world), world.data_context_group
    shares = {}
    for i, (name, parameter) in enumerate(engine.named_parameters()):
        state = engine.full_state(parameter)
        if i % group.size() == group.rank():
            for kind, tensor in state.items():
                shares[f"{kind}/{name}"] = _as_share(tensor.to("cpu", copy=True), parameter, mesh)
    return shares


def _tensor_mesh(world: World) -> DeviceMesh:
    return DeviceMesh.from_group(world.tensor_group, "cpu")


def _partition_dim(parameter: torch.nn.Parameter) -> int | None:
    return parameter.partition_dim if getattr(parameter, "tensor_model_parallel", False) else None  # type: ignore[attr-defined]


def _as_share(tensor: torch.Tensor, parameter: torch.nn.Parameter, mesh: DeviceMesh) -> DTensor:
    """This tensor rank's slice of the full tensor, or the full tensor where it is replicated."""
    dim = _partition_dim(parameter)
    return DTensor.from_local(tensor, mesh, [Replicate() if dim is None else Shard(dim)], run_check=False)


def _full_shape(parameter: torch.nn.Parameter, world: World) -> tuple[int, ...]:
    shape, dim = list(full_shape(parameter)), _partition_dim(parameter)
    if dim is not None:
        shape[dim] *= world.tensor_group.size()
    return tuple(shape)


def _check_shapes(checkpoint: Path, wanted: dict[str, tuple[int, ...]]) -> None:
    """Name the first tensor in which the checkpoint and this model differ, instead of a loader's stack trace."""
    metadata = dcp.FileSystemReader(checkpoint).read_metadata().state_dict_metadata
    held = {
        name: tuple(entry.size)
        for name, entry in metadata.items()
        if name.startswith("master/") and isinstance(entry, TensorStorageMetadata)
    }
    for name in sorted(wanted.keys() | held.keys()):
        if wanted.get(name) != held.get(name):
            bare = name.removeprefix("master/")
            raise CheckpointError(
                f"{checkpoint} is of another model: {bare} is {held.get(name, 'absent')} there and "
                f"{wanted.get(name, 'absent')} here; use the model settings it was trained with"
            )


# -- files ------------------------------------------------------------------------------------------------------------


def _write_manifest(directory: Path, world: World) -> None:
    """Every rank fingerprints the files it wrote itself; the main rank adds the common ones and writes the list."""
    own = sorted(directory.glob(f"__{dist.get_rank()}_*"))
    if world.is_main:
        own += [directory / ".metadata", directory / STATE]
    fingerprints = {}
    for path in own:
        _sync(path)
        fingerprints[path.name] = _fingerprint(path)
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, fingerprints)
    if world.is_main:
        _write_json(directory / MANIFEST, {"files": {k: v for part in gathered for k, v in sorted(part.items())}})
        _sync(directory)


def _fingerprint(path: Path) -> dict[str, Any]:
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _sha256(file)
    return {"bytes": path.stat().st_size, "sha256": digest}


def _sha256(file) -> str:
    digest = hashlib.sha256()  # Python 3.10 has no hashlib.file_digest
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def _write_json(path: Path, content: dict[str, Any]) -> None:
    with open(path, "w", encoding="utf-8") as file:
        json.dump(content, file, indent=1)
        file.flush()
        os.fsync(file.fileno())


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
