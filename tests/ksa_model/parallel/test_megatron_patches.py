"""megatron-core without the patches: each test fails when a patch of `megatron_patches` is no longer needed."""

import builtins
import json
import subprocess
import sys
import warnings

import pytest
import torch

from ksa_model.parallel.megatron_patches import lean_imports, silence_warnings

UNPATCHED = """
import json, sys, warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import torch
    import torch.distributed as dist
    from megatron.core import parallel_state
    from megatron.core.model_parallel_config import ModelParallelConfig
    from megatron.core.tensor_parallel import RowParallelLinear, mappings

    imported = sorted({"torch._inductor.compile_fx", "wandb"} & set(sys.modules))
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    parallel_state.initialize_model_parallel(create_gloo_process_groups=False)
    group = parallel_state.get_tensor_model_parallel_group()
    config = ModelParallelConfig(use_cpu_initialization=True, perform_initialization=False)
    layer = RowParallelLinear(
        4, 4, config=config, init_method=None, bias=False, input_is_parallel=True, skip_bias_add=False, tp_group=group
    )
    layer(torch.ones(2, 4))
    mappings.dist_all_gather_func(torch.empty(2), torch.ones(2), group=group)
print(json.dumps([imported, [[w.category.__name__, str(w.message)] for w in caught]]))
"""


@pytest.fixture(scope="module")
def unpatched():
    """(imported modules, [category, message] of every warning) of a process that uses megatron-core as it is."""
    done = subprocess.run([sys.executable, "-c", UNPATCHED], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def silenced(warned: list) -> list:
    """The warnings that `silence_warnings` drops."""
    dropped = []
    for category, message in warned:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            silence_warnings()
            warnings.warn(message, getattr(builtins, category), stacklevel=1)
        dropped += [message] * (not caught)
    return dropped


def test_megatron_imports_the_compiler_and_wandb(unpatched):
    pytest.importorskip("wandb", reason="wandb is not installed: pip install wandb")
    assert unpatched[0] == ["torch._inductor.compile_fx", "wandb"]


def test_megatron_reports_missing_libraries(unpatched):
    assert any("Transformer Engine and Apex are not installed" in message for message in silenced(unpatched[1]))


def test_row_parallel_linear_drops_its_group(unpatched):
    assert any("tp_group is None, using default tp group" in message for message in silenced(unpatched[1]))


def test_megatron_calls_deprecated_collectives(unpatched):
    assert any("all_gather_into_tensor` is deprecated" in message for message in silenced(unpatched[1]))


def test_lean_imports_restores_what_it_replaced():
    compiler, wandb = torch.compile, sys.modules.get("wandb")
    with pytest.raises(ZeroDivisionError), lean_imports():
        assert torch.compile(max) is max and torch.compile(dynamic=True)(max) is max
        raise ZeroDivisionError
    assert torch.compile is compiler and sys.modules.get("wandb") is wandb
