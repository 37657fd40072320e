"""Parameters of a model as tensors of a checkpoint: which part of the whole tensor a rank holds, and its name."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import TYPE_CHECKING

import torch

from train.checkpoint_files import CheckpointError, Place
from train.checkpoint_tensors import Pieces
from train.parallel import World

if TYPE_CHECKING:
    from train.sharded_state import OwnedState


def names(held: Iterable[str]) -> set[str]:
    """Parameters among the tensors of a checkpoint."""
    return {name.removeprefix("master/") for name in held if name.startswith("master/")}


def pieces(owned: OwnedState, flat: torch.Tensor, world: World) -> Pieces:
    """Where the elements of one state of `owned`, held in `flat`, lie in the whole tensor."""
    return share(owned.parameter, owned.shape, flat, owned.start, world)


def share(
    parameter: torch.nn.Parameter, shape: tuple[int, ...], flat: torch.Tensor, start: int, world: World
) -> Pieces:
    """Pieces of a parameter's full tensor for elements start ... of this tensor rank's share of it."""
    full, offset, dim = list(shape), [0] * len(shape), _partition_dim(parameter)
    if dim is not None:
        full[dim] *= world.tensor_group.size()
        offset[dim] = shape[dim] * world.tensor_rank
    return Pieces(full, flat, shape=shape, start=start, offset=offset)


def whole(tensor: torch.Tensor) -> Pieces:
    """A tensor that is on no other rank."""
    return Pieces((tensor.numel(),), tensor.view(-1))


def _partition_dim(parameter: torch.nn.Parameter) -> int | None:
    return parameter.partition_dim if getattr(parameter, "tensor_model_parallel", False) else None  # type: ignore[attr-defined]


def check_shapes(
    checkpoint: Place,
    held: dict[str, tuple[int, ...]],
    named: dict[str, torch.nn.Parameter],
    world: World,
    may_lack: Collection[str] = (),
) -> None:
    """Name the first tensor in which the checkpoint and this model differ, instead of a loader's stack trace."""
    there = {name.removeprefix("master/"): shape for name, shape in held.items() if name.startswith("master/")}
    for name in sorted((named.keys() | there.keys()) - set(may_lack)):
        wanted = None
        if name in named:
            shape, dim = list(getattr(named[name], "ds_shape", named[name].shape)), _partition_dim(named[name])
            if dim is not None:
                shape[dim] *= world.tensor_group.size()
            wanted = tuple(shape)
        if wanted != there.get(name):
            raise CheckpointError(
                f"{checkpoint} is of another model: {name} is {there.get(name, 'absent')} there and "
                f"{wanted or 'absent'} here; use the model settings it was trained with"
            )
