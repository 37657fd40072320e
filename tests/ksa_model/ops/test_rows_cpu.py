import pytest
import torch

from ksa_model.ops import rows
from ksa_model.ops.rows_cpu import RMSNormCPU, RotateCPU


@pytest.mark.parametrize("shape", [(1, 1), (7, 16), (5, 3, 64), (0, 8)])
@pytest.mark.parametrize("scale", [1.0, 1e-6, 1e6])
def test_equals_torchs_own(shape, scale):
    generator = torch.Generator().manual_seed(0)
    x, grad = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    inputs = [(x * scale).requires_grad_(), torch.linspace(0.5, 2, shape[-1], dtype=torch.float64).requires_grad_()]
    want = torch.nn.functional.rms_norm(inputs[0], shape[-1:], inputs[1], 1e-6)
    got = RMSNormCPU.apply(*inputs, 1e-6)
    torch.testing.assert_close(got, want)
    for mine, theirs in zip(torch.autograd.grad(got, inputs, grad), torch.autograd.grad(want, inputs, grad)):
        torch.testing.assert_close(mine, theirs)


def test_a_row_of_zeros_has_finite_gradients():
    x = torch.zeros(2, 8, requires_grad=True)
    RMSNormCPU.apply(x, torch.ones(8), 1e-6).sum().backward()
    assert torch.isfinite(x.grad).all()


@pytest.mark.parametrize("shape", [(1, 1, 2), (7, 3, 16), (0, 2, 8)])
def test_rotation_equals_the_plain_one(shape):
    generator = torch.Generator().manual_seed(0)
    wide = torch.randn(shape[0], shape[1] + 1, shape[2], generator=generator)
    x, grad = wide[:, 1:].requires_grad_(), torch.randn(shape, generator=generator)  # heads of a wider row: strided
    angle = 100 * torch.rand(shape[0], 1, shape[2] // 2, generator=generator)
    want = rows.rotate(x, (angle.cos(), angle.sin()))
    got = RotateCPU.apply(x, angle.cos(), angle.sin())
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(torch.autograd.grad(got, x, grad), torch.autograd.grad(want, x, grad))
