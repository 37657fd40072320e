"""Reading a checkpoint into a model or an engine, whatever parallel layout wrote it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from train import stages
from train.checkpoint import parameters, storage, tensors
from train.checkpoint.collective import CheckpointGroup
from train.checkpoint.locate import read_state
from train.checkpoint.storage import CheckpointError, CheckpointPath
from train.checkpoint.tensors import Pieces
from train.distributed.groups import World

if TYPE_CHECKING:  # the commands do without DeepSpeed, whose import takes seconds
    from train.distributed.engine import Engine


def load_engine(
    checkpoint: CheckpointPath,
    state: dict[str, Any],
    engine: Engine,
    world: World,
    group: CheckpointGroup,
    *,
    moments: bool,
    seed: int | None,
) -> None:
    """Read this rank's part of the weights, and of AdamW's moments with `moments`. Collective. `state`: state.json.

    With a `seed` the random generators are restored too; a rank that the checkpoint has none for, because the parallel
    layout changed, seeds its own from `seed`. A failure on one rank is a `CheckpointError` on all, before any changes.
    """
    error, finish = None, None
    try:
        held = tensors.shapes(checkpoint)
        named = dict(engine.named_parameters())
        dropped = {name for name in named if stages.is_dropped(name, state.get("own_share", 1.0))}
        dropped -= parameters.names(held)
        parameters.check_shapes(checkpoint, held, named, world, dropped)
        wanted = {
            f"{kind}/{owned.name}": parameters.owned_pieces(owned, owned.state[kind], world)
            for owned in engine.owned_state()
            if owned.name not in dropped
            for kind in (("master", "exp_avg", "exp_avg_sq") if moments else ("master",))
        }
        steps = torch.full((1,), float(state["step"] if moments else 0))
        if moments and "optimizer/steps" in held:
            wanted["optimizer/steps"] = parameters.whole(steps)
        restore_generators = _read_generators(held, wanted, world, (seed, state["step"]))
        tensors.read(checkpoint, wanted)

        def finish() -> None:
            engine.finish_loading(steps)
            restore_generators()

    except CheckpointError as problem:
        error = problem
    group.raise_together(error)
    assert finish is not None
    finish()


def _read_generators(
    held: dict[str, Any], wanted: dict[str, Pieces], world: World, seed: tuple[int | None, int]
) -> Callable[[], None]:
    """Add this rank's generators to `wanted`; returns what sets them after reading. `seed`: (seed or None, step)."""
    if seed[0] is None:
        return lambda: None
    generators = tensors.generators(world.device)
    keys = {name: f"rng/{world.rank}/{name}" for name in generators}
    stored = {name: key for name, key in keys.items() if held.get(key) == tuple(generators[name].shape)}
    wanted |= {key: parameters.whole(generators[name]) for name, key in stored.items()}

    def restore() -> None:
        if stored.keys() == generators.keys():
            tensors.set_generators(generators, world.device)
        else:
            torch.manual_seed(hash((*seed, world.rank)) & 0x7FFFFFFF)

    return restore


def load_weights(checkpoint: CheckpointPath, model: torch.nn.Module, world: World) -> None:
    """Verify `checkpoint` and load its fp32 weights into a bare model, for evaluation and generation.

    Raises `CheckpointError`.
    """
    storage.verify(checkpoint)
    read_state(checkpoint)
    named = dict(model.named_parameters())
    parameters.check_shapes(checkpoint, tensors.shapes(checkpoint), named, world)
    flats = {name: torch.empty(p.numel()) for name, p in named.items()}
    wanted = {
        f"master/{name}": parameters.shard_pieces(p, tuple(p.shape), flats[name], 0, world) for name, p in named.items()
    }
    tensors.read(checkpoint, wanted)
    with torch.no_grad():
        for name, parameter in named.items():
            parameter.copy_(flats[name].view(parameter.shape))
