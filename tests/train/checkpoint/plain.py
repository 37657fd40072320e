"""A small torch model and AdamW without DeepSpeed, which checkpoints can be made of in this process."""

import torch

from train.checkpoint import storage
from train.checkpoint.manager import Progress
from train.distributed import deepspeed_state

LOADER = {"version": 1, "fingerprint": "f", "next_sample": 12}
FACTS = {"config": {"resume": "auto"}}


class PlainEngine:
    """AdamW without DeepSpeed: what `train.distributed.engine.Engine` is without ZeRO."""

    def __init__(self, seed=0, width=5):
        torch.manual_seed(seed)
        self.module = torch.nn.Sequential(torch.nn.Linear(width, 7), torch.nn.LayerNorm(7))
        self.optimizer = torch.optim.AdamW(self.module.parameters(), lr=0.1, fused=True)

    def train(self, steps=1):
        for _ in range(steps):
            self.module(torch.ones(2, self.module[0].in_features)).square().sum().backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
        return self

    def named_parameters(self):
        return self.module.named_parameters()

    def owned_state(self):
        return deepspeed_state.owned_state(self.module, self.optimizer)

    def optimizer_steps(self):
        return deepspeed_state.optimizer_steps(self.optimizer)

    def finish_loading(self, steps):
        deepspeed_state.finish_loading(self.optimizer, steps)

    def everything(self):
        state = {f"{k}/{o.name}": flat.clone() for o in self.owned_state() for k, flat in o.state.items()}
        return state | {"steps": self.optimizer_steps().clone()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def save(run, step):
    run.save_last(Progress(step, 100 * step, LOADER, {"recent_losses": [1.5]}), FACTS)
    return storage.finished(run.directory)[-1]
