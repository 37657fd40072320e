"""DeepSpeed as `train/distributed/engine.py` uses it: the only module that imports it, with what is changed in it.

Written for DeepSpeed 0.19.8, the pinned version. Each change gives its reason and the test in
`tests/train/distributed/test_deepspeed_patches.py` that fails when DeepSpeed no longer needs it.
"""

from __future__ import annotations

import collections
import contextlib
import io
import logging
import os
from collections.abc import Iterator
from typing import Any

import torch

from ksa_model.parallel.megatron_patches import lean_imports

# Without this, DeepSpeed probes for accelerators and prints a warning where it finds no GPU.
# Test: `test_deepspeed_warns_without_an_accelerator`.
os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")

import deepspeed
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.utils import clip_grad_norm_
from deepspeed.utils import set_z3_leaf_modules

# The ZeRO optimizers import Muon, which nothing here uses and which imports torch's compiler: seconds for every rank.
# Imported once without the compiler, it is not imported again. Test: `test_muon_imports_the_compiler`.
with lean_imports():
    import deepspeed.runtime.zero.muon.original_muon

# On the CPU, DeepSpeed compiles a shared-memory collective when process groups start, which takes over a minute and a
# C++ compiler. Collectives go through gloo here. Test: `test_deepspeed_would_compile_a_collective`.
if not torch.cuda.is_available():
    deepspeed.ops.__compatible_ops__ = collections.defaultdict(bool)

logging.getLogger("DeepSpeed").setLevel(logging.WARNING)

__all__ = [
    "BF16_Optimizer",
    "accumulate_in_fp32",
    "clip_grad_norm_",
    "deepspeed",
    "quiet_start",
    "set_z3_leaf_modules",
]


def accumulate_in_fp32(optimizer: BF16_Optimizer) -> None:
    """Let the GEMMs that compute weight gradients add them to the fp32 sums directly: see `ksa_model.ops.linear`.

    A gradient that still arrives in bf16 is added once and dropped. DeepSpeed's own way (zero a bf16 sum, add to it,
    convert it to fp32, add that) moves 26 bytes per weight and micro-batch; this moves 8 or 10.
    Test: `test_deepspeed_keeps_bf16_gradients`.
    """
    for group, sums in zip(optimizer.bf16_groups, optimizer.fp32_groups_gradients):
        for parameter, total in zip(group, sums):
            parameter.main_grad = total.view(parameter.shape)
            parameter.grad_added_to_main_grad = False

    def update(parameter: Any, group: int, index: int, clear_lp_grads: bool) -> None:
        if parameter.grad is not None:
            parameter.main_grad.add_(parameter.grad)
        elif not parameter.grad_added_to_main_grad:
            return
        parameter.grad, parameter.grad_added_to_main_grad = None, False
        parameter._hp_grad = optimizer.fp32_groups_gradients[group][index]
        optimizer.fp32_groups_has_gradients[group][index] = True

    optimizer._update_hp_grad = torch.no_grad()(update)


@contextlib.contextmanager
def quiet_start() -> Iterator[None]:
    """Keep DeepSpeed from printing its configuration while `deepspeed.initialize` runs.

    Test: `test_deepspeed_prints_when_it_starts`.
    """
    previous = logging.root.manager.disable
    logging.disable(logging.INFO)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.disable(previous)
