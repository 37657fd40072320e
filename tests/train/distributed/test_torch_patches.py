"""Each patch of torch does what it says, and torch still needs it."""

import inspect
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

ROOT = Path(__file__).resolve().parents[3]

# A CUDA build of torch that finds nvcc and no GPU. torch for the CPU does not look for nvcc: it is told to.
NVCC_WITHOUT_A_GPU = """
import sys, torch
torch.version.cuda = torch.version.cuda or "12.4"
torch.cuda._is_compiled = lambda: True
torch.cuda.is_available = lambda: False
"""


def standard_error_of(statement, tmp_path):
    nvcc = tmp_path / "bin/nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text("#!/bin/sh\n")
    nvcc.chmod(0o755)
    environment = {"CUDA_HOME": str(tmp_path), "PATH": f"{nvcc.parent}:/usr/bin:/bin"}
    command = [sys.executable, "-c", NVCC_WITHOUT_A_GPU + statement]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stderr


@pytest.mark.parametrize("module", ["train.generate", "train.trainer"])
def test_the_missing_cuda_runtime_is_not_reported(tmp_path, module):
    loaded = f"import {module}; assert 'torch.utils.cpp_extension' in sys.modules"
    assert standard_error_of(loaded, tmp_path) == ""


def test_torch_reports_a_missing_cuda_runtime(tmp_path):
    assert "No CUDA runtime is found" in standard_error_of("import torch.utils.cpp_extension", tmp_path)


def test_other_warnings_of_that_module_are_reported(tmp_path):
    other = "import train, torch.utils.cpp_extension as e; e.logger.warning('something else')"
    assert standard_error_of(other, tmp_path).strip().endswith("something else")


def test_torch_warns_of_a_checkpoint_without_a_process_group(tmp_path):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        dcp.save({"tensor": torch.zeros(1)}, checkpoint_id=tmp_path, no_dist=True)
    assert any("torch.distributed is disabled, unavailable or uninitialized" in str(w.message) for w in caught)


def test_megatron_allocates_on_the_current_cuda_device():
    from megatron.core.tensor_parallel import mappings

    assert "torch.cuda.current_device()" in inspect.getsource(mappings)
