"""Where DeepSpeed keeps AdamW's fp32 state, for each ZeRO stage: flat views that can be saved and loaded in place.

DeepSpeed has no public call for a rank's own part of the state without a gather, so this reads its internals. The
version is pinned, and the resume tests cover every stage.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

MOMENTS = ("exp_avg", "exp_avg_sq")
STATE = ("master", *MOMENTS)


@dataclass(frozen=True)
class OwnedState:
    """The consecutive elements of one parameter whose optimizer state lives on this rank.

    Elements are counted from `start` in row-major order of `shape`, this tensor rank's shard of the parameter. `state`
    holds fp32 `master`, `exp_avg` and `exp_avg_sq`: flat views into the optimizer's own memory, so that reading them
    copies nothing and writing to them loads them. `replicated`: every data x context rank holds the same.
    """

    name: str
    parameter: torch.nn.Parameter
    shape: tuple[int, ...]
    start: int
    state: dict[str, torch.Tensor]
    replicated: bool


def owned_state(module: torch.nn.Module, optimizer: Any) -> list[OwnedState]:
    """What this rank keeps of each parameter; together the data x context ranks hold every element. No communication.

    `optimizer` is what DeepSpeed made of the AdamW it was given. After writing to the views call `finish_loading`.
    """
    create_moments(optimizer)
    return [owned for name, p in module.named_parameters() if (owned := _owned(name, p, optimizer)) is not None]


def optimizer_steps(optimizer: Any) -> torch.Tensor:
    """Updates that AdamW has applied, which a skipped step is not; 0-d."""
    create_moments(optimizer)
    return next(iter(inner(optimizer).state.values()))["step"]


def finish_loading(optimizer: Any, steps: torch.Tensor) -> None:
    """Copy the fp32 state to the weights that the model computes with, and set AdamW's step counter. Collective."""
    if _is_stage_3(optimizer):
        optimizer._partition_all_parameters()
        for group in range(len(optimizer.fp16_groups)):
            optimizer._reassign_or_swap_out_partitioned_parameters(group)
        persistent = optimizer.persistent_parameters  # small parameters that stay whole on every rank
        if persistent:
            persistent[0].all_gather(persistent)
    elif optimizer is not inner(optimizer):
        optimizer.update_lp_params()
    for flat in _flat_tensors(optimizer):
        state = inner(optimizer).state[flat]
        # A copy for each: stage 3's sub-groups would otherwise advance a shared counter once per group.
        state["step"] = steps.to(state["step"], copy=True).reshape(state["step"].shape)


def create_moments(optimizer: Any) -> None:
    """Create AdamW's moments, and link them to each parameter.

    torch creates them in the first step, and ZeRO stages 1 and 2 link them after the step of the first parameter group,
    so that those of a second group would be missing.
    """
    for flat in _flat_tensors(optimizer):
        state = inner(optimizer).state[flat]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=flat.device)
            state.update({moment: torch.zeros_like(flat) for moment in MOMENTS})
    if hasattr(optimizer, "_lazy_init_hp_params_optimizer_state"):
        optimizer._hp_optimizer_states_linked = False
        optimizer._lazy_init_hp_params_optimizer_state()


def inner(optimizer: Any) -> torch.optim.Optimizer:
    """The AdamW inside; without ZeRO in fp32 it is DeepSpeed's optimizer itself."""
    return getattr(optimizer, "optimizer", optimizer)


def _is_stage_3(optimizer: Any) -> bool:
    return hasattr(optimizer, "fp32_partitioned_groups_flat")


def _flat_tensors(optimizer: Any) -> list[torch.Tensor]:
    if _is_stage_3(optimizer):  # its AdamW holds one sub-group at a time, and only during the step
        return list(optimizer.fp32_partitioned_groups_flat)
    return [flat for group in inner(optimizer).param_groups for flat in group["params"]]


def _owned(name: str, parameter: Any, optimizer: Any) -> OwnedState | None:
    if _is_stage_3(optimizer):
        padded = parameter.partition_numel()
        start = optimizer._get_param_partition_rank(parameter) * padded
        length = min(padded, parameter.ds_numel - start)
        if length <= 0:  # this rank's slice is padding
            return None
        state = {
            key: optimizer._get_fp32_opt_state_partition(
                parameter, release_swap_buffers=False, optim_state_key=None if key == "master" else key
            )[0][:length].detach()
            for key in STATE
        }
        return OwnedState(name, parameter, tuple(parameter.ds_shape), start, state, False)
    if optimizer is inner(optimizer):  # no ZeRO: AdamW works on the parameters themselves
        state = {"master": parameter.detach().view(-1)}
        state |= {key: optimizer.state[parameter][key].view(-1) for key in MOMENTS}
        return OwnedState(name, parameter, tuple(parameter.shape), 0, state, True)
    fragment = parameter._hp_mapping
    if fragment is None:  # all of it lives on other ranks
        return None
    state = {key: fragment.get_hp_fragment(None if key == "master" else key).detach() for key in STATE}
    return OwnedState(name, parameter, tuple(parameter.shape), fragment.lp_fragment_address.start, state, False)
