"""The validation loss of a run: loss on held-out documents."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist

from data_pipeline import Loader, Samples
from ksa_model.config import ModelConfig
from train.batches import Batch, batch_maker
from train.distributed.groups import World


class HeldOut:
    """The first packed samples of the validation split, the same at every call and on every parallel layout."""

    def __init__(self, held_out: Samples | None, model_config: ModelConfig, world: World, num_samples: int):
        """`held_out` None: there are no held-out documents, and `loss` is None."""
        self._world = world
        self.on_batch: Callable[[], None] = lambda: None  # called after every batch of `loss`
        self._batches: list[Batch] = []
        self._weights: list[int] = []
        if held_out is None or num_samples == 0:
            return
        wanted, ranks = min(num_samples, held_out.num_samples), world.data_size
        # All ranks run the same number of forwards, because they are collective under ZeRO-3. Samples beyond
        # `num_samples` get weight 0.
        rounded = -(-wanted // ranks) * ranks
        maker = batch_maker(model_config, world.context_group.rank(), world.context_group.size())
        loader = Loader(
            held_out,
            samples_per_step=rounded,
            dp_rank=world.data_rank,
            dp_size=ranks,
            prefetch=rounded // ranks,
            transform=maker,
        )
        self._batches = loader.next_step()
        self._weights = [int(j * ranks + world.data_rank < wanted) for j in range(len(self._batches))]
        loader.close()

    def loss(self, model: Callable[..., torch.Tensor]) -> float | None:
        """Mean loss per token over all ranks, or None without validation samples. Collective."""
        if not self._batches:
            return None
        sums = torch.zeros(2, dtype=torch.float64, device=self._world.device)
        with torch.no_grad():
            for batch, weight in zip(self._batches, self._weights):
                batch = batch.to(self._world.device)
                sums[0] += weight * model(batch.tokens, batch.labels, batch.layout)
                sums[1] += weight * batch.num_labels
                self.on_batch()
        dist.all_reduce(sums, group=self._world.data_context_group)
        return (sums[0] / sums[1]).item()
