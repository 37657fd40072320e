"""DeepSpeed behind five methods. Only this folder knows its internals."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

import torch
from torch.profiler import record_function

from train.config.sections import OptimConfig, ParallelConfig
from train.distributed import deepspeed_state
from train.distributed.deepspeed_patches import (
    BF16_Optimizer,
    accumulate_in_fp32,
    clip_grad_norm_,
    deepspeed,
    quiet_start,
    set_z3_leaf_modules,
)
from train.distributed.deepspeed_state import OwnedState
from train.distributed.groups import World
from train.health import bad_norm
from train.optim import parameter_groups

PART_PREFIX = "part: "  # profiler ranges whose names start with this are counted together


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
        trains: Callable[[str], bool] = lambda name: True,
    ):
        """Parameters whose name `trains` refuses are frozen: no gradient, no update."""
        shards = world.data_context_group.size()
        parallel = dataclasses.replace(parallel, zero=parallel.zero_in_use(precision, shards))
        self.module = model if parallel.zero == 3 else model.to(world.device)  # stage 3 moves one shard at a time
        self._mpu, self._device = world.mpu(), world.device
        self._is_sharded = parallel.zero == 3
        self._own_clip = optim.grad_clip if parallel.zero == 0 and precision == "fp32" else None
        groups = parameter_groups(self.module, optim.weight_decay, trains)
        optimizer = torch.optim.AdamW(groups, lr=optim.lr, betas=optim.betas, eps=optim.eps, fused=True)
        if parallel.zero == 3:  # a block uses its submodules' weights directly: gather them together
            set_z3_leaf_modules(self.module, list({type(block) for block in self.module.blocks}))  # type: ignore
        largest_block = max(sum(p.numel() for p in block.parameters()) for block in self.module.blocks)  # type: ignore
        with quiet_start():
            self._deepspeed, self._optimizer, _, _ = deepspeed.initialize(
                model=self.module,
                optimizer=optimizer,
                mpu=self._mpu,
                dist_init_required=False,
                config=_deepspeed_config(optim, parallel, precision, micro_batches, largest_block),
            )
        for name, parameter in self.module.named_parameters():
            # Only now: DeepSpeed would leave frozen parameters out of the state that checkpoints hold.
            parameter.requires_grad_(trains(name))
        if (
            parallel.zero == 0 and shards == 1
        ):  # it would copy all gradients into one buffer to reduce them over a single rank
            self._deepspeed.enable_backward_allreduce = False
        if isinstance(self._optimizer, BF16_Optimizer):
            accumulate_in_fp32(self._optimizer)
        self.on_backward: Callable[[], None] = lambda: None  # called after the backward of every micro-batch
        self._skip: torch.Tensor | None = None
        self._norm: torch.Tensor | float | None = None
        deepspeed_state.inner(self._optimizer).register_step_pre_hook(self._veto)

    def anneal(self, summary_projection_weight: float) -> None:
        """See `ksa_model.model.Decoder.anneal`."""
        self.module.anneal(summary_projection_weight)  # type: ignore[operator]

    def refresh_norm_gain_flags(self) -> None:
        """See `ksa_model.model.Decoder.refresh_norm_gain_flags`. Collective."""
        gains = [
            p for name, p in self.module.named_parameters() if name.endswith(("query_norm.weight", "key_norm.weight"))
        ]
        with deepspeed.zero.GatheredParameters(gains, enabled=self._is_sharded):
            self.module.refresh_norm_gain_flags()  # type: ignore[operator]

    def __call__(self, *arguments) -> torch.Tensor:
        """The model's forward. ZeRO-3 gathers weights only for calls through this."""
        return self._deepspeed(*arguments)

    def backward(self, loss: torch.Tensor) -> None:
        """Accumulate the gradients of a scalar loss; on the last micro-batch of a step also reduce them."""
        self._deepspeed.backward(loss, scale_wrt_gas=False)
        if not self._deepspeed.is_gradient_accumulation_boundary():
            self._deepspeed.step()  # counts the micro-batch, updates nothing
        self.on_backward()

    def step(self, lr: float, skip: torch.Tensor | None = None) -> torch.Tensor | float:
        """Clip, update, clear gradients. Returns the global gradient norm before clipping, on the device.

        Nothing is updated if the norm is not finite, or if `skip` (0-d fp32, the same on all ranks) is 1.
        """
        for group in self._optimizer.param_groups:
            group["lr"] = 0.0 if group["frozen"] else lr
        self._skip = skip
        with record_function(PART_PREFIX + "optimizer"):
            if self._own_clip is not None:  # DeepSpeed clips here too, but does not return the norm
                limit = self._own_clip or float("inf")
                self._norm = clip_grad_norm_(self.module.parameters(), max_norm=limit, mpu=self._mpu)
                self._deepspeed.step()
                return self._norm
            self._deepspeed.step()
            return self._deepspeed.get_global_grad_norm()

    # -- state: what `train/checkpoint` saves and loads ----------------------------------------------------------------

    def named_parameters(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        return self.module.named_parameters()

    def owned_state(self) -> list[OwnedState]:
        """fp32 weights and moments that live on this rank, as views; see `train/distributed/deepspeed_state.py`."""
        return deepspeed_state.owned_state(self.module, self._optimizer)

    def optimizer_steps(self) -> torch.Tensor:
        """Updates that AdamW has applied, which a skipped step is not; 0-d."""
        return deepspeed_state.optimizer_steps(self._optimizer)

    def finish_loading(self, optimizer_steps: torch.Tensor) -> None:
        """Call after writing to the views of `owned_state`: updates the weights of the model. Collective."""
        deepspeed_state.finish_loading(self._optimizer, optimizer_steps)
        self.refresh_norm_gain_flags()

    def _veto(self, *_: object) -> None:
        """A hook before AdamW's step: its fused kernel changes nothing when `found_inf` is 1."""
        norm = self._norm if self._own_clip is not None else getattr(self._optimizer, "_global_grad_norm", None)
        bad = bad_norm(norm, self._device)
        if self._skip is not None:
            bad = torch.maximum(bad, self._skip)
        optimizer = deepspeed_state.inner(self._optimizer)
        device = next(p for group in optimizer.param_groups for p in group["params"]).device
        optimizer.found_inf = bad.to(device)  # type: ignore[attr-defined]


def _deepspeed_config(
    optim: OptimConfig, parallel: ParallelConfig, precision: str, micro_batches: int, largest_block: int
) -> dict:
    zero: dict = {"stage": parallel.zero}
    if parallel.zero == 3:  # enough to gather all weights of the next block; the default is 50M
        zero["stage3_prefetch_bucket_size"] = largest_block
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
        config["data_types"] = {"grad_accum_dtype": "fp32"}  # micro-batches are summed in fp32
    return config
