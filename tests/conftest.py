import atexit
import gc
import os
from pathlib import Path

import pytest

os.environ.setdefault("WANDB_MODE", "offline")
# Models here are tiny, and several processes share the cores: more threads would only wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch  # reads the lines above

if not torch.cuda.is_available():  # Triton's interpreter runs the GPU kernels; read when Triton is first imported
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(scope="session")
def world():
    """A world of one gloo rank, for tests of the model in this process."""
    from train.distributed import groups

    torch.set_num_threads(1)
    yield groups.initialize(groups.ParallelConfig(), torch.device("cpu"))
    groups.shutdown()


# The files that take longest, so that parallel workers begin with them (`--dist loadfile --no-loadscope-reorder`): a
# long one begun last would run alone.
LONGEST_FIRST = [
    "launch/test_slurm_cluster.py",
    "train/test_resume.py",
    "train/test_layouts.py",
    "faults/test_faults.py",
    "launch/test_local.py",
    "launch/test_sweep.py",
    "data_pipeline/text/test_prepare.py",
    "train/test_health.py",
    "train/hf/test_interop.py",
    "train/test_stages.py",
    "train/test_learns.py",
    "train/test_command_line.py",
    "test_bad_values.py",
    "train/test_generate.py",
    "train/test_golden.py",
    "ksa_model/ops/attention/test_triton_decode.py",
    "ksa_model/decoding/test_cache.py",
    "ksa_model/ops/attention/test_cuda.py",
    "ksa_model/parallel/test_context.py",
    "data_pipeline/packing/test_loader.py",
    "data_pipeline/text/test_prepare_kill.py",
]


def pytest_collection_modifyitems(items):
    here = Path(__file__).parent
    order = {here / name: i for i, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: order.get(item.path, len(order)))
    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="needs a CUDA device; this machine has none")
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(skip)


def pytest_collection_finish(session):
    """What was imported stays: a tenth of the tests' time went into looking through it for garbage."""
    gc.collect()
    gc.freeze()
    atexit.register(gc.unfreeze)  # or libraries that count what they made call it leaked


def pytest_addoption(parser):
    parser.addoption(
        "--whole-matrix", action="store_true", help="train on every parallel layout, not only a covering subset"
    )
