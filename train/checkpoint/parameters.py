"""Parameters as tensors of a checkpoint: their names, and which part of the full tensor a rank holds."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import TYPE_CHECKING

import torch

from train.checkpoint.storage import CheckpointError, CheckpointPath
from train.checkpoint.tensors import Pieces
from train.distributed.groups import World

if TYPE_CHECKING:
    from train.distributed.deepspeed_state import OwnedState


def names(held: Iterable[str]) -> set[str]:
    """Names of the parameters among the tensors of a checkpoint."""
    return {name.removeprefix("master/") for name in held if name.startswith("master/")}


def owned_pieces(owned: OwnedState, flat: torch.Tensor, world: World) -> Pieces:
    """Pieces of the full tensor for one state of `owned`, whose elements are in `flat`."""
    return shard_pieces(owned.parameter, owned.shape, flat, owned.start, world)


def shard_pieces(
    parameter: torch.nn.Parameter, shape: tuple[int, ...], flat: torch.Tensor, start: int, world: World
) -> Pieces:
    """Pieces of a parameter's full tensor.

    `flat` holds the elements from `start` on of this tensor rank's shard, which has the shape `shape`.
    """
    full, offset, dim = list(shape), [0] * len(shape), _partition_dim(parameter)
    if dim is not None:
        full[dim] *= world.tensor_group.size()
        offset[dim] = shape[dim] * world.tensor_rank
    return Pieces(full, flat, shape=shape, start=start, offset=offset)


def whole(tensor: torch.Tensor) -> Pieces:
    """A tensor that this rank alone holds, flattened."""
    return Pieces((tensor.numel(),), tensor.view(-1))


def _partition_dim(parameter: torch.nn.Parameter) -> int | None:
    return parameter.partition_dim if getattr(parameter, "tensor_model_parallel", False) else None  # type: ignore[attr-defined]


def check_shapes(
    checkpoint: CheckpointPath,
    held: dict[str, tuple[int, ...]],
    named: dict[str, torch.nn.Parameter],
    world: World,
    optional: Collection[str] = (),
) -> None:
    """Raise `CheckpointError` that names the first parameter whose shape differs between the checkpoint and the model.

    `held`: shapes of the checkpoint's tensors. Parameters in `optional` may be missing.
    """
    saved = {name.removeprefix("master/"): shape for name, shape in held.items() if name.startswith("master/")}
    for name in sorted((named.keys() | saved.keys()) - set(optional)):
        wanted = None
        if name in named:
            shape, dim = list(getattr(named[name], "ds_shape", named[name].shape)), _partition_dim(named[name])
            if dim is not None:
                shape[dim] *= world.tensor_group.size()
            wanted = tuple(shape)
        if wanted != saved.get(name):
            raise CheckpointError(
                f"{checkpoint} is of another model: {name} is {saved.get(name, 'absent')} there and "
                f"{wanted or 'absent'} here; use the model settings it was trained with"
            )
