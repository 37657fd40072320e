"""DeepSpeed behind five methods: the only module that imports it, and the only one that knows its insides."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import io
import logging
import os
from collections.abc import Callable, Iterator

import torch
from torch.profiler import record_function

from ksa_model.megatron import lean_imports
from train import sharded_state
from train.health import bad_norm
from train.optim import OptimConfig, parameter_groups
from train.parallel import ParallelConfig, World
from train.perf import PREFIX
from train.sharded_state import OwnedState

os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
import deepspeed
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.utils import clip_grad_norm_
from deepspeed.utils import set_z3_leaf_modules

with lean_imports():  # its optimizers ask for this one, which nothing here uses and which brings in torch's compiler
    import deepspeed.runtime.zero.muon.original_muon

if not torch.cuda.is_available():
    # On the CPU DeepSpeed compiles a shared-memory collective when groups start (over a minute, and it needs a C++
    # compiler). Nothing here uses it: collectives go through gloo.
    deepspeed.ops.__compatible_ops__ = collections.defaultdict(bool)
logging.getLogger("DeepSpeed").setLevel(logging.WARNING)


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
        """Parameters whose name `trains` refuses stay as they are: they get no gradient and no update."""
        shards = world.data_context_group.size()
        parallel = dataclasses.replace(parallel, zero=parallel.zero_in_use(precision, shards))
        self.module = model if parallel.zero == 3 else model.to(world.device)  # stage 3 moves one shard at a time
        self._mpu, self._device = world.mpu(), world.device
        self._is_sharded = parallel.zero == 3
        self._own_clip = optim.grad_clip if parallel.zero == 0 and precision == "fp32" else None
        groups = parameter_groups(self.module, optim.weight_decay, trains)
        optimizer = torch.optim.AdamW(groups, lr=optim.lr, betas=optim.betas, eps=optim.eps, fused=True)
        if parallel.zero == 3:  # a block multiplies with its submodules' weights: they come and go together
            set_z3_leaf_modules(self.module, list({type(block) for block in self.module.blocks}))  # type: ignore
        largest_block = max(sum(p.numel() for p in block.parameters()) for block in self.module.blocks)  # type: ignore
        with _quiet():
            self._deepspeed, self._optimizer, _, _ = deepspeed.initialize(
                model=self.module,
                optimizer=optimizer,
                mpu=self._mpu,
                dist_init_required=False,
                config=_deepspeed_config(optim, parallel, precision, micro_batches, largest_block),
            )
        for name, parameter in self.module.named_parameters():
            # Only now: DeepSpeed would leave them out of the state that is saved and handed on.
            parameter.requires_grad_(trains(name))
        if parallel.zero == 0 and shards == 1:  # it would join all gradients, to add them up over one rank
            self._deepspeed.enable_backward_allreduce = False
        if isinstance(self._optimizer, BF16_Optimizer):
            _accumulate_in_fp32(self._optimizer)
        self._skip: torch.Tensor | None = None
        self._norm: torch.Tensor | float | None = None
        sharded_state.inner(self._optimizer).register_step_pre_hook(self._veto)

    def anneal(self, own_share: float) -> None:
        """See `ksa_model.model.Decoder.anneal`."""
        self.module.anneal(own_share)  # type: ignore[operator]

    def look_at_gains(self) -> None:
        """See `ksa_model.model.Decoder.look_at_gains`. Collective."""
        gains = [
            p for name, p in self.module.named_parameters() if name.endswith(("query_norm.weight", "key_norm.weight"))
        ]
        with deepspeed.zero.GatheredParameters(gains, enabled=self._is_sharded):
            self.module.look_at_gains()  # type: ignore[operator]

    def __call__(self, *arguments) -> torch.Tensor:
        """The model's forward. Stage 3 brings in weights only for calls that come through here."""
        return self._deepspeed(*arguments)

    def backward(self, loss: torch.Tensor) -> None:
        """Accumulate the gradients of a scalar loss; on the last micro-batch of a step also reduce them."""
        self._deepspeed.backward(loss, scale_wrt_gas=False)
        if not self._deepspeed.is_gradient_accumulation_boundary():
            self._deepspeed.step()  # counts the micro-batch, updates nothing

    def step(self, lr: float, skip: torch.Tensor | None = None) -> torch.Tensor | float:
        """Clip, update, clear gradients. Returns the global gradient norm before clipping, on the device.

        Where the norm is not finite, or `skip` (0-d fp32, alike on all ranks) is 1, nothing is updated.
        """
        for group in self._optimizer.param_groups:
            group["lr"] = 0.0 if group["frozen"] else lr
        self._skip = skip
        with record_function(PREFIX + "optimizer"):
            if self._own_clip is not None:  # DeepSpeed clips here too, but keeps the norm to itself
                limit = self._own_clip or float("inf")
                self._norm = clip_grad_norm_(self.module.parameters(), max_norm=limit, mpu=self._mpu)
                self._deepspeed.step()
                return self._norm
            self._deepspeed.step()
            return self._deepspeed.get_global_grad_norm()

    # -- state: what `train/checkpoint.py` saves and loads -------------------------------------------------------------

    def named_parameters(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        return self.module.named_parameters()

    def owned_state(self) -> list[OwnedState]:
        """fp32 weights and moments that live on this rank, as views; see `train/sharded_state.py`."""
        return sharded_state.owned_state(self.module, self._optimizer)

    def optimizer_steps(self) -> torch.Tensor:
        """Updates that AdamW has applied, which a skipped step is not; 0-d."""
        return sharded_state.optimizer_steps(self._optimizer)

    def finish_loading(self, optimizer_steps: torch.Tensor) -> None:
        """After writing to the views of `owned_state`: let the weights that compute follow. Collective."""
        sharded_state.finish_loading(self._optimizer, optimizer_steps)
        self.look_at_gains()

    def _veto(self, *_: object) -> None:
        """Before AdamW's own step: its fused kernel leaves everything as it is where `found_inf` is 1."""
        norm = self._norm if self._own_clip is not None else getattr(self._optimizer, "_global_grad_norm", None)
        bad = bad_norm(norm, self._device)
        if self._skip is not None:
            bad = torch.maximum(bad, self._skip)
        optimizer = sharded_state.inner(self._optimizer)
        device = next(p for group in optimizer.param_groups for p in group["params"]).device
        optimizer.found_inf = bad.to(device)  # type: ignore[attr-defined]


def _accumulate_in_fp32(optimizer: BF16_Optimizer) -> None:
    """Let the products that make weight gradients add them to the fp32 sums themselves: see `ksa_model.linear`.

    What still comes as a bf16 gradient is added in one pass and dropped. DeepSpeed's own way, a bf16 sum that is set to
    zero, added to, copied to fp32 and added again, moves 26 bytes a weight and micro-batch where this takes 8 or 10.
    """
    for group, sums in zip(optimizer.bf16_groups, optimizer.fp32_groups_gradients):
        for parameter, total in zip(group, sums):
            parameter.main_grad = total.view(parameter.shape)
            parameter.grad_added_to_main_grad = False

    def take(parameter, group: int, index: int, clear_lp_grads: bool) -> None:
        if parameter.grad is not None:
            parameter.main_grad.add_(parameter.grad)
        elif not parameter.grad_added_to_main_grad:
            return
        parameter.grad, parameter.grad_added_to_main_grad = None, False
        parameter._hp_grad = optimizer.fp32_groups_gradients[group][index]
        optimizer.fp32_groups_has_gradients[group][index] = True

    optimizer._update_hp_grad = torch.no_grad()(take)


def _deepspeed_config(
    optim: OptimConfig, parallel: ParallelConfig, precision: str, micro_batches: int, largest_block: int
) -> dict:
    zero: dict = {"stage": parallel.zero}
    if parallel.zero == 3:  # while a block computes, all weights of the next are gathered: the default ends at 50M
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
        config["data_types"] = {"grad_accum_dtype": "fp32"}  # micro-batches add up in fp32
    return config


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """DeepSpeed prints its configuration while it starts; a run's own output should be readable."""
    previous = logging.root.manager.disable
    logging.disable(logging.INFO)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.disable(previous)
