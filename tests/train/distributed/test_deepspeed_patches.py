"""DeepSpeed still needs each patch of `train/distributed/deepspeed_patches.py`.

A failing test says that a patch can go. The patched library is tested where it is used: test_micro_batches.py,
test_resume.py and test_layouts.py train with it.
"""

import importlib
import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[3]


def run_unpatched(code, **variables):
    """The output of `code` in a new interpreter on the CPU, which imports nothing of this project."""
    environment = {key: value for key, value in os.environ.items() if key not in ("DS_ACCELERATOR", "PYTHONPATH")}
    environment |= {"CUDA_VISIBLE_DEVICES": "", **variables}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd="/", env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="only where DeepSpeed finds no GPU")
def test_deepspeed_warns_without_an_accelerator():
    code = "import deepspeed; deepspeed.accelerator.get_accelerator()"
    assert "Setting accelerator to CPU" in run_unpatched(code)
    assert "Setting accelerator to CPU" not in run_unpatched(code, DS_ACCELERATOR="cpu")


def test_muon_imports_the_compiler():
    code = (
        "import sys, deepspeed; before = 'torch._inductor.compile_fx' in sys.modules\n"
        "import deepspeed.runtime.zero.muon.original_muon; print(before, 'torch._inductor.compile_fx' in sys.modules)"
    )
    assert "False True" in run_unpatched(code, DS_ACCELERATOR="cpu")


def test_deepspeed_would_compile_a_collective():
    collectives = importlib.import_module("deepspeed.comm.torch")  # `deepspeed.comm.torch` is torch itself
    assert "__compatible_ops__.get(builder.NAME" in inspect.getsource(collectives)


def test_deepspeed_keeps_bf16_gradients():
    """Its own update adds a bf16 gradient to the fp32 sum and keeps the bf16 one; it knows nothing of `main_grad`."""
    from deepspeed.runtime import bf16_optimizer

    update = inspect.getsource(bf16_optimizer.BF16_Optimizer._update_hp_grad)
    assert "hp_grad.data.add_(lp.grad.data.to(hp_grad.dtype)" in update and "lp.grad.zero_()" in update
    assert "main_grad" not in inspect.getsource(bf16_optimizer)


STARTED = """
import os, torch, deepspeed
os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
deepspeed.ops.__compatible_ops__ = dict()
model = torch.nn.Linear(2, 2)
config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 1}, "bf16": {"enabled": True}}
config["data_types"] = {"grad_accum_dtype": "fp32"}
deepspeed.initialize(model=model, optimizer=torch.optim.AdamW(model.parameters()), config=config)
"""


def test_deepspeed_prints_when_it_starts():
    assert "begin bf16_optimizer" in run_unpatched(STARTED, DS_ACCELERATOR="cpu")
