"""Loss on held-out documents."""

from __future__ import annotations

import torch
import torch.distributed as dist

from data_pipeline import Loader, Plan
from ksa_model.config import ModelConfig
from train.batches import batch_maker
from train.parallel import World


class HeldOut:
    """The first packed samples of the validation split, the same at every call and on every layout."""

    def __init__(self, plan: Plan | None, model_config: ModelConfig, world: World, num_samples: int):
        self._world = world
        self._batches = []
        samples = min(num_samples, plan.num_samples) // world.data_size * world.data_size if plan else 0
        if plan is not None and samples:
            loader = Loader(
                plan,
                samples_per_step=samples,
                dp_rank=world.data_rank,
                dp_size=world.data_size,
                prefetch=samples,
                transform=batch_maker(model_config),
            )
            self._batches = loader.next_step()
            loader.close()

    def loss(self, model: torch.nn.Module) -> float | None:
        """Mean loss per token over all ranks, or None without validation samples. Collective."""
        if not self._batches:
            return None
        sums = torch.zeros(2, dtype=torch.float64, device=self._world.device)
        with torch.no_grad():
            for batch in self._batches:
                batch = batch.to(self._world.device)
                sums[0] += model(batch.tokens, batch.labels, batch.layout)
                sums[1] += batch.num_labels
        dist.all_reduce(sums, group=self._world.data_context_group)
        return (sums[0] / sums[1]).item()
