"""DeepSpeed behind five methods: the only module that imports it, and the only one that knows its insides."""

from __future__ import annotations

import collections
import contextlib
import logging
import os
from collections.abc import Iterator

import torch

from train.optim import OptimConfig, parameter_groups
from train.parallel import ParallelConfig, World

os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
import deepspeed
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
)

if not torch.cuda.is_available():
    # On the CPU DeepSpeed compiles a shared-memory collective when groups start (over a minute, and it needs a C++
    # compiler). Nothing here uses it: collectives go through gloo.
    deepspeed.ops.__compatible_ops__ = collections.defaultdict(bool)
logging.getLogger("DeepSpeed").setLevel(logging.WARNING)

MOMENTS = ("exp_avg", "exp_avg_sq")


class Engine:
    """A model under ZeRO with AdamW, gradient accumulation and global-norm clipping.

    One optimizer step is `micro_batches` calls of `backward`, then `step`. Losses are sums; the caller scales each so
    that the gradients averaged over data x context ranks are those of the mean over all valid tokens.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        optim: OptimConfig,
        parallel: ParallelConfig,
        world: World,
        *,
        precision: str,
        micro_batches: int,
    ):
        self.module = model.to(world.device)
        self.world = world
        optimizer = torch.optim.AdamW(
            parameter_groups(self.module, optim.weight_decay), lr=optim.lr, betas=optim.betas, eps=optim.eps, fused=True
        )
        with _quiet():
            self._deepspeed, self._optimizer, _, _ = deepspeed.initialize(
                model=self.module,
                optimizer=optimizer,
                mpu=world.mpu(),
                dist_init_required=False,
                config=_deepspeed_config(optim, parallel, precision, micro_batches),
            )
        self._param_groups = self._optimizer.param_groups

    def backward(self, loss: torch.Tensor) -> None:
        """Accumulate the gradients of a scalar loss; on the last micro-batch of a step also reduce them."""
        self._deepspeed.backward(loss, scale_wrt_gas=False)
        if not self._deepspeed.is_gradient_accumulation_boundary():
            self._deepspeed.step()  # counts the micro-batch, updates nothing

    def step(self, lr: float) -> torch.Tensor | float:
        """Clip, update, clear gradients. Returns the global gradient norm before clipping, on the device."""
        for group in self._param_groups:
            group["lr"] = lr
        self._deepspeed.step()
        return self._deepspeed.get_global_grad_norm()

    # -- state, whole tensors at a time, whatever the ZeRO stage -------------------------------------------------------

    def named_parameters(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        return self.module.named_parameters()

    def full_state(self, parameter: torch.nn.Parameter) -> dict[str, torch.Tensor]:
        """fp32 `master`, `exp_avg`, `exp_avg_sq` of a parameter (this tensor rank's share of it).

        Collective over data x context ranks. Only after a first step: AdamW has no moments before.
        """
        self._link_optimizer_state()
        state = {"master": safe_get_full_fp32_param(parameter)}
        for moment in MOMENTS:
            state[moment] = safe_get_full_optimizer_state(parameter, moment)
        return {key: value.detach() for key, value in state.items()}

    def load_full_state(self, parameter: torch.nn.Parameter, state: dict[str, torch.Tensor]) -> None:
        """Inverse of `full_state`; call `finish_loading` after the last parameter."""
        self._link_optimizer_state()
        safe_set_full_fp32_param(parameter, state["master"])
        with torch.no_grad():
            parameter.copy_(state["master"])
        for moment in MOMENTS:
            safe_set_full_optimizer_state(parameter, state[moment], moment)

    def finish_loading(self, optimizer_steps: int) -> None:
        """Set AdamW's own step counter, which its bias correction uses."""
        for state in self._inner_optimizer.state.values():
            state["step"] = torch.full_like(state["step"], float(optimizer_steps))

    @property
    def _inner_optimizer(self) -> torch.optim.Optimizer:
        return self._optimizer.optimizer

    def _link_optimizer_state(self) -> None:
        """Make AdamW's moments exist and be reachable from each parameter.

        torch creates them in the first step, and DeepSpeed links them after the first *group's* step only, so with two
        groups the second would be missing.
        """
        for group in self._inner_optimizer.param_groups:
            for flat in group["params"]:
                state = self._inner_optimizer.state[flat]
                if not state:
                    state["step"] = torch.zeros((), dtype=torch.float32, device=flat.device)
                    state.update({moment: torch.zeros_like(flat) for moment in MOMENTS})
        self._optimizer._hp_optimizer_states_linked = False
        self._optimizer._lazy_init_hp_params_optimizer_state()


def _deepspeed_config(optim: OptimConfig, parallel: ParallelConfig, precision: str, micro_batches: int) -> dict:
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": micro_batches,
        "gradient_clipping": optim.grad_clip,
        "zero_optimization": {"stage": parallel.zero},
        "bf16": {"enabled": precision == "bf16"},
        # Micro-batches add up in fp32 whatever they are computed in.
        **({"data_types": {"grad_accum_dtype": "fp32"}} if precision == "bf16" else {}),
        "steps_per_print": 2**31,
    }


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """DeepSpeed prints its configuration while it starts; a run's own output should be readable."""
    previous = logging.root.manager.disable
    logging.disable(logging.INFO)
    try:
        yield
    finally:
        logging.disable(previous)
