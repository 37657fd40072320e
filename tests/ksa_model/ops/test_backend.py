"""Which kernels a model uses: for its device and dtype, after it is moved, and where they are missing."""

import sys

import pytest
import torch

from ksa_model.config import ModelConfigError
from ksa_model.ops import backend as backend_module
from ksa_model.ops import rows, rows_cpu
from ksa_model.ops.attention import blocked, cpu, reference
from ksa_model.ops.backend import Backend
from tests.ksa_model.ops.attention.test_joint import make_layout
from tests.ksa_model.test_model import build, random_text, small_config

ON_GPU = torch.cuda.is_available()
GPU = torch.device("cuda", 0)


@pytest.fixture
def hopper(monkeypatch):
    """A GPU of compute capability 9.0 that is only asked for its capability."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))


def test_on_the_cpu():
    backend = Backend()
    assert (backend.attention, backend.rows) == (cpu, rows_cpu)
    assert backend.loss is backend.gemv is backend.decode is None
    assert not backend.recompute_in_backward
    assert Backend("blocked").attention is blocked and Backend("reference").attention is reference


def test_on_a_gpu(hopper):
    pytest.importorskip("triton", reason="Triton is not installed: pip install -e '.[test]'")
    from ksa_model.ops import triton_gemv, triton_loss, triton_rows
    from ksa_model.ops.attention import cuda, triton_decode

    half, full = (Backend("auto", 128, GPU, dtype) for dtype in (torch.bfloat16, torch.float32))
    assert (half.attention, half.loss) == (cuda, triton_loss)
    with pytest.warns(UserWarning, match=r"slower blocked path.*float32, head_dim=128, compute capability 9.0"):
        backend_module._slower_path.cache_clear()
        assert full.attention is blocked
    assert full.loss is None and half.loss_rows > full.loss_rows
    for backend in (half, full):
        assert (backend.rows, backend.gemv, backend.decode) == (triton_rows, triton_gemv, triton_decode)
        assert backend.fp8.quantize_rows is triton_rows.quantize_rows and backend.recompute_in_backward
    assert Backend("blocked", 128, GPU, torch.bfloat16).attention is blocked


def test_few_rows_without_gradients_use_gemv(hopper):
    triton_gemv = pytest.importorskip("ksa_model.ops.triton_gemv", reason="Triton is not installed")
    half, full = (Backend("auto", 128, GPU, dtype) for dtype in (torch.bfloat16, torch.float32))
    assert half.gemv_for(1) is None
    with torch.no_grad():
        assert [x.gemv_for(n) is triton_gemv for x, n in ((half, 16), (half, 17), (full, 2), (full, 3))] == [
            True, False, True, False,
        ]  # fmt: skip
        assert half.gemv_for(256, 256) is triton_gemv and Backend().gemv_for(1) is None


def forget_kernels(monkeypatch):
    """The next import of a module with kernels reads its file."""
    for name in [name for name in sys.modules if name.startswith("ksa_model.ops.") and holds_kernels(name)]:
        monkeypatch.delitem(sys.modules, name)
        monkeypatch.delattr(name, raising=False)


def holds_kernels(name):
    return name.rpartition(".")[2].startswith("triton_") or name == "ksa_model.ops.attention.cuda"


def test_a_broken_triton_is_not_a_missing_one(hopper, monkeypatch, tmp_path):
    """Half an installation: the package is there, its parts are not."""
    forget_kernels(monkeypatch)
    for name in [name for name in sys.modules if name == "triton" or name.startswith("triton.")]:
        monkeypatch.delitem(sys.modules, name)
    (tmp_path / "triton").mkdir()
    (tmp_path / "triton" / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    backend = Backend("auto", 128, GPU, torch.bfloat16)
    for kernels in ("attention", "rows", "loss", "gemv", "decode", "fp8"):
        with pytest.raises(ModelConfigError, match=r"triton is installed, but ksa_model.ops\.\S+ cannot be imported"):
            getattr(backend, kernels)


def test_without_triton(hopper, monkeypatch):
    forget_kernels(monkeypatch)
    monkeypatch.setitem(sys.modules, "triton", None)
    backend = Backend("auto", 128, GPU, torch.bfloat16)
    assert backend.rows is rows and backend.loss is backend.gemv is backend.decode is None
    backend_module._slower_path.cache_clear()
    with pytest.warns(UserWarning, match="slower blocked path: Triton is missing"):
        assert backend.attention is blocked
    with pytest.raises(ModelConfigError, match="attention_backend=fused needs Triton"):
        _ = Backend("fused", 128, GPU, torch.bfloat16).attention


def test_unsupported_shapes_are_named():
    pytest.importorskip("triton", reason="Triton is not installed: pip install -e '.[test]'")
    device = GPU if ON_GPU else torch.device("cpu")  # fp32, and 12 is no multiple of 8
    with pytest.raises(ModelConfigError, match=r"attention_backend=fused needs a CUDA device.*float32, head_dim=12"):
        _ = Backend("fused", 12, device).attention


def test_layers_share_one_backend_that_follows_the_rows(world):
    decoder = build(world, small_config(layer_pattern="KGCF"))
    pack = make_layout([13, 6], 4, 1, 0)
    decoder.backend.rows = rows  # kept while device and dtype stay the same
    decoder(*random_text(pack), pack)
    assert decoder.backend.rows is rows
    held = {id(module.backend) for module in decoder.modules() if hasattr(module, "backend")}
    assert held == {id(decoder.backend)}
    decoder.to(torch.bfloat16)(*random_text(pack), pack)
    assert decoder.backend.dtype == torch.bfloat16 and decoder.backend.rows is rows_cpu
