"""GEMMs and their gradients against plain torch, fp32 sums of weight gradients, and what is kept for backward."""

import pytest
import torch
from torch.nn import functional as F

from ksa_model.ops import linear, rows
from ksa_model.ops.backend import Backend
from ksa_model.ops.linear import Norm, Target, Weight

CLOSE = dict(rtol=1e-5, atol=1e-5)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def gradients(outputs, inputs):
    weights = [torch.randn(o.shape, generator=torch.Generator().manual_seed(5 + i)) for i, o in enumerate(outputs)]
    return torch.autograd.grad(sum((o * w).sum() for o, w in zip(outputs, weights)), inputs)


@pytest.fixture(params=[False, True], ids=["keeps the normed rows", "recomputes them"])
def backend(request):
    """Keeps the normed rows for backward, or recomputes them as on a GPU."""
    backend = Backend()
    backend.recompute_in_backward = request.param
    return backend


@pytest.mark.parametrize(
    "spans",
    [[(0, 7), (0, 7), (7, 10), (0, 7), (7, 10)], [(0, 10)], [(2, 5), (7, 9)], [(0, 10), (10, 10)]],
    ids=["both streams", "all rows", "rows that nobody asks for", "no rows"],
)
def test_project(backend, spans):
    x, gain = draw(10, 6), draw(6, seed=1)
    weights = [draw(3 + i, 6, seed=2 + i) for i in range(len(spans))]
    found = linear.project(backend, x, Norm(gain, 1e-6), [Target(*span, Weight(w)) for span, w in zip(spans, weights)])
    normed = rows.rms_norm(x, gain, 1e-6)
    wanted = [normed[start:stop] @ w.t() for (start, stop), w in zip(spans, weights)]
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, **CLOSE)
    inputs = [x, gain, *weights]
    for a, b in zip(gradients(found, inputs), gradients(wanted, inputs)):
        torch.testing.assert_close(a, b, **CLOSE)


def test_biases_are_added_to_the_rows_of_their_target(backend):
    x, gain = draw(10, 6), draw(6, seed=1)
    weights, biases = [draw(3, 6, seed=2 + i) for i in range(3)], [draw(3, seed=7), None, draw(3, seed=8)]
    spans = [(0, 7), (0, 7), (7, 10)]
    targets = [Target(*span, Weight(w, bias=bias)) for span, w, bias in zip(spans, weights, biases)]
    found = linear.project(backend, x, Norm(gain, 1e-6), targets)
    normed = rows.rms_norm(x, gain, 1e-6)
    wanted = [F.linear(normed[start:stop], w, bias) for (start, stop), w, bias in zip(spans, weights, biases)]
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, **CLOSE)
    inputs = [x, gain, *weights, biases[0], biases[2]]
    for a, b in zip(gradients(found, inputs), gradients(wanted, inputs)):
        torch.testing.assert_close(a, b, **CLOSE)


def test_targets_that_overlap_in_part_are_refused():
    x, weight = draw(6, 4), draw(3, 4, seed=1)
    found = linear.project(Backend(), x, None, [Target(0, 4, Weight(weight)), Target(2, 6, Weight(weight))])
    with pytest.raises(AssertionError, match="overlap"):
        gradients(found, [x])


@pytest.mark.parametrize("residual", [False, True])
def test_gated_mlp(backend, residual):
    x, gain, gate, up, down = draw(9, 6), draw(6, seed=1), draw(8, 6, seed=2), draw(8, 6, seed=3), draw(6, 8, seed=4)
    parts = linear.gated(backend, x, Norm(gain, 1e-6), Weight(gate), Weight(up))
    found = linear.add_gated_gemm(backend, x if residual else None, parts, Weight(down))
    normed = rows.rms_norm(x, gain, 1e-6)
    want = (F.silu(normed @ gate.t()) * (normed @ up.t())) @ down.t()
    want = want + x if residual else want
    torch.testing.assert_close(found, want, **CLOSE)
    inputs = [x, gain, gate, up, down]
    for a, b in zip(gradients([found], inputs), gradients([want], inputs)):
        torch.testing.assert_close(a, b, **CLOSE)


def test_frozen_weights_get_no_gradient(backend):
    x, gain, gate, up, down = draw(9, 6), draw(6, seed=1), draw(8, 6, seed=2), draw(8, 6, seed=3), draw(6, 8, seed=4)
    for weight in (gate, down):
        weight.requires_grad_(False)
    parts = linear.gated(backend, x, Norm(gain, 1e-6), Weight(gate), Weight(up))
    linear.add_gated_gemm(backend, x, parts, Weight(down)).sum().backward()
    assert gate.grad is None and down.grad is None and up.grad is not None and x.grad is not None


def test_weight_gradients_add_up_in_main_grad():
    """Twice through the same weight, two backward passes: one fp32 sum, no gradient of the weight's own dtype."""
    x = draw(50, 6).detach().bfloat16().requires_grad_()
    weight = draw(4, 6, seed=1).detach().bfloat16().requires_grad_()
    weight.main_grad = torch.ones(4, 6)
    want = torch.ones(4, 6)
    for seed in (2, 3):
        a, b = linear.project(Backend(), x, None, [Target(0, 20, Weight(weight)), Target(20, 50, Weight(weight))])
        given = draw(50, 4, seed=seed).detach().bfloat16()
        torch.autograd.backward([a, b], [given[:20], given[20:]])
        want += given.float().t() @ x.detach().float()
    assert weight.grad is None and weight.grad_added_to_main_grad
    torch.testing.assert_close(weight.main_grad, want, rtol=2e-2, atol=2e-2)  # on the CPU each GEMM is in bf16


def test_what_is_kept(backend):
    """Bytes that a normed MLP keeps beside its input: gate and up, and unless they are recomputed two more tensors."""
    kept = {}

    def pack(tensor):
        kept[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
        return tensor

    x, gain, gate, up, down = draw(64, 16), draw(16, seed=1), draw(32, 16, seed=2), draw(32, 16, seed=3), draw(16, 32)
    own = {t.data_ptr() for t in (x, gain, gate, up, down)}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        parts = linear.gated(backend, x, Norm(gain, 1e-6), Weight(gate), Weight(up))
        linear.add_gated_gemm(backend, x, parts, Weight(down))
    found = sum(size for pointer, size in kept.items() if pointer not in own)
    least = 2 * 64 * 32 * 4 + 64 * 4  # and the norm's scale on the CPU
    assert found == least if backend.recompute_in_backward else found >= least + 64 * 16 * 4 + 64 * 32 * 4


@pytest.mark.gpu
def test_fp32_sums_on_a_gpu():
    x = torch.randn(5000, 64, device="cuda").bfloat16().requires_grad_()
    weight = torch.randn(48, 64, device="cuda").bfloat16().requires_grad_()
    weight.main_grad = torch.ones(48, 64, device="cuda")
    backend = Backend()
    backend.select_for(x)
    (out,) = linear.project(backend, x, None, [Target(0, 5000, Weight(weight))])
    given = torch.randn(5000, 48, device="cuda").bfloat16()
    out.backward(given)
    want = 1 + given.double().t() @ x.detach().double()
    torch.testing.assert_close(weight.main_grad.double(), want, rtol=1e-4, atol=1e-2)


@torch.no_grad()
def test_a_sum_may_overwrite_its_rows():
    x, y, weight = draw(9, 6), draw(9, 8, seed=1), draw(6, 8, seed=2)
    given, want = x.clone(), x + y @ weight.t()
    assert linear.add_gemm(Backend(), given, y, Weight(weight), reuse=True).data_ptr() == given.data_ptr()
    torch.testing.assert_close(given, want, **CLOSE)
    given = x.clone()
    torch.testing.assert_close(linear.add_gemm(Backend(), given, y, Weight(weight)), want, **CLOSE)
    assert torch.equal(given, x)
