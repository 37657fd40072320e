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
from deepspeed.runtime.utils import clip_grad_norm_
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)

if not torch.cuda.is_available():
    # On the CPU DeepSpeed compiles a shared-memory collective when groups start (over a minute, and it needs a C++
    # compiler). Nothing here uses it: collectives go through gloo.
    deepspeed.ops.__compatible_ops__ = collections.defaultdict(bool)
logging.getLogger("DeepSpeed").setLevel(logging.WARNING)

MOMENTS = ("exp_avg", "exp_avg_sq")


class Engine:
    """A model under ZeRO with AdamW, gradient accumulation and global-norm clipping.

    One optimizer step is `micro_batches` times forward and `backward`, then `step`. Losses are sums; the caller scales
    each so that the gradients averaged over data x context ranks are those of the mean over all valid tokens.
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
        self.module = model if parallel.zero == 3 else model.to(world.device)  # stage 3 moves one shard at a time
        self._mpu = world.mpu()
        self._own_clip = optim.grad_clip if parallel.zero == 0 and precision == "fp32" else None
        groups = parameter_groups(self.module, optim.weight_decay)
        optimizer = torch.optim.AdamW(groups, lr=optim.lr, betas=optim.betas, eps=optim.eps, fused=True)
        with _quiet():
            self._deepspeed, self._optimizer, _, _ = deepspeed.initialize(
                model=self.module,
                optimizer=optimizer,
                mpu=self._mpu,
                dist_init_required=False,
                config=_deepspeed_config(optim, parallel, precision, micro_batches),
            )

    def __call__(self, *arguments) -> torch.Tensor:
        """The model's forward. Stage 3 brings in weights only for calls that come through here."""
        return self._deepspeed(*arguments)

    def backward(self, loss: torch.Tensor) -> None:
        """Accumulate the gradients of a scalar loss; on the last micro-batch of a step also reduce them."""
        self._deepspeed.backward(loss, scale_wrt_gas=False)
        if not self._deepspeed.is_gradient_accumulation_boundary():
            self._deepspeed.step()  # counts the micro-batch, updates nothing

    def step(self, lr: float) -> torch.Tensor | float:
        """Clip, update, clear gradients. Returns the global gradient norm before clipping, on the device."""
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        if self._own_clip is not None:  # DeepSpeed clips here too, but keeps the norm to itself
            limit = self._own_clip or float("inf")
            norm = clip_grad_norm_(self.module.parameters(), max_norm=limit, mpu=self._mpu)
            self._deepspeed.step()
            return norm
        self._deepspeed.step()
        return self._deepspeed.get_global_grad_norm()

    # -- state, whole tensors at a time, whatever the ZeRO stage -------------------------------------------------------

    def named_parameters(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        return self.module.named_parameters()

    def full_state(self, parameter: torch.nn.Parameter) -> dict[str, torch.Tensor]:
        """fp32 `master`, `exp_avg`, `exp_avg_sq` of a parameter (this tensor rank's share of it).

        Collective over data x context ranks.
        """
        self._make_moments()
        if self._unsharded:
            moments = self._optimizer.state[parameter]
            return {"master": parameter.detach(), **{moment: moments[moment] for moment in MOMENTS}}
        state = {"master": safe_get_full_fp32_param(parameter)}
        state |= {moment: safe_get_full_optimizer_state(parameter, moment) for moment in MOMENTS}
        return {key: value.detach().view(full_shape(parameter)) for key, value in state.items()}

    def load_full_state(self, parameter: torch.nn.Parameter, state: dict[str, torch.Tensor]) -> None:
        """Inverse of `full_state`; call `finish_loading` after the last parameter."""
        self._make_moments()
        if self._unsharded:
            with torch.no_grad():
                parameter.copy_(state["master"])
            for moment in MOMENTS:
                self._optimizer.state[parameter][moment].copy_(state[moment])
        elif hasattr(parameter, "ds_id"):
            safe_set_local_fp32_param(parameter, self._own_partition(parameter, state["master"]))
            for moment in MOMENTS:
                safe_set_local_optimizer_state(parameter, self._own_partition(parameter, state[moment]), moment)
        else:
            safe_set_full_fp32_param(parameter, state["master"])
            with torch.no_grad():
                parameter.copy_(state["master"])
            for moment in MOMENTS:
                safe_set_full_optimizer_state(parameter, state[moment], moment)

    def finish_loading(self, optimizer_steps: int) -> None:
        """Set AdamW's own step counter, which its bias correction uses, and refresh stage 3's working weights."""
        for state in self._inner_optimizer.state.values():
            if "step" in state:
                state["step"] = torch.full_like(state["step"], float(optimizer_steps))
        if self._is_stage_3:
            for sub_group in range(len(self._optimizer.fp32_partitioned_groups_flat)):
                self._optimizer._reassign_or_swap_out_partitioned_parameters(sub_group)
            persistent = self._optimizer.persistent_parameters  # small weights that every rank keeps whole
            if persistent:
                persistent[0].partition(persistent)
                persistent[0].all_gather(persistent)

    @property
    def _unsharded(self) -> bool:
        """Stage 0 in fp32: DeepSpeed steps with the plain optimizer."""
        return isinstance(self._optimizer, torch.optim.AdamW)

    @property
    def _is_stage_3(self) -> bool:
        return hasattr(self._optimizer, "fp32_partitioned_groups_flat")

    @property
    def _inner_optimizer(self) -> torch.optim.Optimizer:
        return self._optimizer if self._unsharded else self._optimizer.optimizer

    def _own_partition(self, parameter: torch.nn.Parameter, whole: torch.Tensor) -> torch.Tensor:
        """This rank's slice of a flat tensor that stage 3 pads to equal slices."""
        size = parameter.partition_numel()  # type: ignore[attr-defined]
        group = self._mpu.get_data_parallel_group()
        padded = torch.nn.functional.pad(whole.flatten(), (0, size * group.size() - whole.numel()))
        return padded[size * group.rank() : size * (group.rank() + 1)]

    def _make_moments(self) -> None:
        """Make AdamW's moments exist and be reachable from each parameter.

        torch creates them in the first step; DeepSpeed's stages 1 and 2 link them after the first *group's* step only,
        so with two groups the second's would be missing.
        """
        for flat in self._optimizer_tensors():
            state = self._inner_optimizer.state[flat]
            if not state:
                state["step"] = torch.zeros((), dtype=torch.float32, device=flat.device)
                state.update({moment: torch.zeros_like(flat) for moment in MOMENTS})
        if hasattr(self._optimizer, "_lazy_init_hp_params_optimizer_state"):
            self._optimizer._hp_optimizer_states_linked = False
            self._optimizer._lazy_init_hp_params_optimizer_state()

    def _optimizer_tensors(self) -> list[torch.Tensor]:
        if self._is_stage_3:  # its inner optimizer holds one sub-group at a time, during the step only
            return list(self._optimizer.fp32_partitioned_groups_flat)
        return [tensor for group in self._inner_optimizer.param_groups for tensor in group["params"]]


def full_shape(parameter: torch.nn.Parameter) -> torch.Size:
    """Shape of a parameter (this tensor rank's share), also while stage 3 holds it in slices."""
    return getattr(parameter, "ds_shape", parameter.shape)


def _deepspeed_config(optim: OptimConfig, parallel: ParallelConfig, precision: str, micro_batches: int) -> dict:
    zero: dict = {"stage": parallel.zero}
    if parallel.offload == "optimizer":
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": micro_batches,
        "gradient_clipping": 0.0 if parallel.zero == 0 and precision == "fp32" else optim.grad_clip,
        "zero_optimization": zero,
        "zero_force_ds_cpu_optimizer": False,  # AdamW is torch's own, on the host too
        "bf16": {"enabled": precision == "bf16"},
        "steps_per_print": 2**31,
    }
    if precision == "bf16":
        config["data_types"] = {"grad_accum_dtype": "fp32"}  # micro-batches add up in fp32
    return config


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """DeepSpeed prints its configuration while it starts; a run's own output should be readable."""
    previous = logging.root.manager.disable
    logging.disable(logging.INFO)
    try:
        yield
    finally:
        logging.disable(previous)
