"""Norm, norm with rotation and SwiGLU: the kernels against their plain twins, values and gradients, by Triton's
interpreter on the CPU and for real on a GPU."""

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed: pip install -e '.[test]'")

from ksa_model.ops import rows, triton_rows

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")


def draw(*shape, seed=0, dtype=torch.float32):
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)
    return x.requires_grad_()


def compare(fast, plain, inputs, **tolerance):
    got, want = fast(*inputs), plain(*inputs)
    assert got.dtype == want.dtype
    torch.testing.assert_close(got, want, **tolerance)
    weights = torch.randn(got.shape, generator=torch.Generator().manual_seed(9)).to(DEVICE, got.dtype)
    for g, w in zip(torch.autograd.grad(got, inputs, weights), torch.autograd.grad(want, inputs, weights)):
        assert g.dtype == w.dtype
        torch.testing.assert_close(g, w, **tolerance)


CLOSE = dict(rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("count, size", [(1, 8), (5, 48), (37, 100), (0, 8)])
def test_rms_norm(monkeypatch, count, size):
    monkeypatch.setattr(triton_rows, "PROGRAMS", 4)  # several rows each
    fast = lambda x, weight: triton_rows.RMSNorm.apply(x, weight, 1e-6)
    compare(fast, lambda x, w: rows.rms_norm(x, w, 1e-6), [draw(count, size), draw(size, seed=1)], **CLOSE)


@pytest.mark.parametrize("normed", [True, False])
@pytest.mark.parametrize("count, heads, d", [(1, 4, 16), (23, 3, 24), (0, 2, 8)])
def test_norm_rotate(monkeypatch, count, heads, d, normed):
    monkeypatch.setattr(triton_rows, "PROGRAMS", 2)
    angles = draw(count, 1, d // 2, seed=2).detach() * 10
    table = 1.2 * angles.cos(), 1.2 * angles.sin()  # a factor, as YaRN's
    inputs = [draw(count, heads, d)] + ([draw(d, seed=1)] if normed else [])
    fast = lambda x, weight=None: triton_rows.NormRotate.apply(x, weight, 1e-6, *table)
    compare(fast, lambda x, weight=None: rows.norm_rotate(x, weight, 1e-6, *table), inputs, **CLOSE)


def test_norm_rotate_in_bf16():
    """Backward finds the normed rows from the rounded result: its gradients are as good as 16 bits are."""
    x, gain = draw(500, 4, 64, dtype=torch.bfloat16), draw(64, seed=1, dtype=torch.bfloat16)
    angles = draw(500, 1, 32, seed=2).detach() * 10
    table, weights = (angles.cos(), angles.sin()), draw(500, 4, 64, seed=3).detach().bfloat16()
    exact = [i.detach().float().requires_grad_() for i in (x, gain)]
    want = torch.autograd.grad(rows.norm_rotate(*exact, 1e-6, *table), exact, weights.float())
    for g, w in zip(torch.autograd.grad(triton_rows.NormRotate.apply(x, gain, 1e-6, *table), (x, gain), weights), want):
        assert (g.float() - w).norm() / w.norm() < 8e-3


@pytest.mark.parametrize("ratio", [1, 7, 100, None])
def test_gradients_under_uneven_gains(ratio):
    """Each half by itself, so that the large gains' gradients do not hide the small ones'. None: gains of zero."""
    x = draw(300, 4, 64, dtype=torch.bfloat16)
    gain = torch.ones(64, device=DEVICE, dtype=torch.bfloat16)
    gain[32:] = 0 if ratio is None else 1 / ratio
    gain.requires_grad_()
    angles = draw(300, 1, 32, seed=2).detach() * 10
    table, weights = (angles.cos(), angles.sin()), draw(300, 4, 64, seed=3).detach().bfloat16()
    assert rows.is_uneven(gain) == (ratio in (100, None))
    exact = [i.detach().float().requires_grad_() for i in (x, gain)]
    want = torch.autograd.grad(rows.norm_rotate(*exact, 1e-6, *table), exact, weights.float())
    out = triton_rows.NormRotate.apply(x, gain, 1e-6, *table, rows.is_uneven(gain))
    for g, w in zip(torch.autograd.grad(out, (x, gain), weights), want):
        for half in (slice(0, 32), slice(32, 64)):
            difference, size = (g.float() - w)[..., half].norm(), w[..., half].norm()
            assert difference <= 1.5e-2 * size


def test_swiglu():
    compare(triton_rows.SwiGLU.apply, rows.swiglu, [draw(3, 1111), draw(3, 1111, seed=1)], **CLOSE)


@pytest.mark.gpu
def test_bf16_and_large():
    """In bf16 both round once; the gain's gradient is a sum over many rows."""
    x, weight = draw(20_000, 2048, dtype=torch.bfloat16), draw(2048, seed=1, dtype=torch.bfloat16)
    for fast, plain, inputs in (
        (lambda x, w: triton_rows.RMSNorm.apply(x, w, 1e-6), lambda x, w: rows.rms_norm(x, w, 1e-6), (x, weight)),
        (triton_rows.SwiGLU.apply, rows.swiglu, (x, draw(20_000, 2048, seed=2, dtype=torch.bfloat16))),
    ):
        got, want = fast(*inputs), plain(*(i.detach().float().requires_grad_() for i in inputs))
        assert (got.float() - want).norm() / want.norm() < 4e-3
        exact = [i.detach().float().requires_grad_() for i in inputs]
        weights = torch.randn_like(want)
        for g, w in zip(
            torch.autograd.grad(fast(*inputs), inputs, weights.bfloat16()),
            torch.autograd.grad(plain(*exact), exact, weights),
        ):
            assert (g.float() - w).norm() / w.norm() < 8e-3
