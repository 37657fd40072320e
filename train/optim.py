"""The optimizer's parameter groups: which weights decay, and which are frozen."""

from __future__ import annotations

from collections.abc import Callable

import torch


def parameter_groups(
    model: torch.nn.Module, weight_decay: float, trains: Callable[[str], bool] = lambda name: True
) -> list[dict]:
    """Groups for `torch.optim.AdamW`, each with the keys `params`, `weight_decay` and `frozen`.

    Matrices decay; vectors (norm gains, biases, decay rates) and embeddings (text and summary) do not. Parameters whose
    name `trains` refuses are in groups with `frozen` set: no step changes them, but checkpoints hold them.
    """
    groups: dict[tuple[bool, bool], list[torch.nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        decays = parameter.ndim >= 2 and "embedding" not in name
        groups.setdefault((trains(name), decays), []).append(parameter)
    return [
        dict(params=groups[trained, decays], weight_decay=weight_decay if decays else 0.0, frozen=not trained)
        for trained in (True, False)
        for decays in (True, False)
        if (trained, decays) in groups
    ]
