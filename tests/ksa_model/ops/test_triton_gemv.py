"""GEMMs of few rows, and norm and rotation of heads: by Triton's interpreter on the CPU, for real on a GPU."""

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed: pip install -e '.[test]'")

from ksa_model.ops import rows, triton_gemv
from ksa_model.ops.linear import Target, Weight
from ksa_model.ops.triton_gemv import Stream

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def draw(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


@pytest.mark.parametrize("normed", [True, False])
@pytest.mark.parametrize("summary", ["queries and keys", "keys", "none"])
def test_norm_rotate_heads(normed, summary):
    streams, gains = [], (draw(24, seed=3), draw(24, seed=4)) if normed else None
    for count in (3, 6)[: 1 if summary == "none" else 2]:
        angles = draw(count, 1, 12, seed=2) * 9
        q = None if count == 6 and summary == "keys" else draw(count, 4, 24, seed=5 + count)
        streams.append(Stream(q, draw(count, 2, 24, seed=6 + count), angles.cos(), angles.sin()))
    found = triton_gemv.norm_rotate_heads(streams, gains, 1e-6)
    for stream, got in zip(streams, found, strict=True):
        for x, gain, turned in zip((stream.q, stream.k), gains or (None, None), got):
            if x is None:
                assert turned is None
                continue
            want = rows.norm_rotate(x, gain, 1e-6, stream.cos, stream.sin)
            torch.testing.assert_close(turned, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("count, size", [(1, 1100), (2, 40), (2, 2048), (3, 1100), (8, 44), (13, 600)])
def test_gemms_of_few_rows(count, size):
    x, gain = draw(count, size) / 4, draw(size, seed=1)
    weights = [draw(features, size, seed=2 + i) / size**0.5 for i, features in enumerate((40, 16, 7, 33, 20))]
    normed = rows.rms_norm(x, gain, 1e-6)
    spans = [(0, count)] * 4 + [(count - 1, count)]
    got = triton_gemv.project(x, gain, 1e-6, [Target(*span, Weight(w)) for span, w in zip(spans, weights)])
    for out, (start, stop), weight in zip(got, spans, weights, strict=True):
        torch.testing.assert_close(out, normed[start:stop] @ weight.t(), rtol=1e-4, atol=1e-4)
    biases = [None, *(draw(len(weight), seed=20 + i) for i, weight in enumerate(weights[1:]))]
    targets = [Target(*span, Weight(w, bias=bias)) for span, w, bias in zip(spans, weights, biases)]
    for out, plain, bias in zip(triton_gemv.project(x, gain, 1e-6, targets), got, biases, strict=True):
        torch.testing.assert_close(out, plain if bias is None else plain + bias, rtol=1e-6, atol=1e-6)
    gate, up = draw(40, size, seed=8), draw(40, size, seed=9)
    product = rows.swiglu(normed @ gate.t(), normed @ up.t())
    torch.testing.assert_close(triton_gemv.gated(x, gain, 1e-6, gate, up), product, rtol=1e-3, atol=1e-3)
    down = draw(40, size, seed=10)
    want = product + x @ down.t()
    torch.testing.assert_close(triton_gemv.add_gemm(product, x, down), want, rtol=1e-4, atol=1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("count", [1, 2, 5, 8, 16])
def test_gemms_in_bf16(count):
    """At the sizes of a real model, where every tile is walked over many times."""

    def drawn(*shape, seed=0):
        return (draw(*shape, seed=seed) / shape[-1] ** 0.5).bfloat16()

    def check(found, want, tolerance=6e-3):
        assert (found.double() - want).norm() / want.norm() < tolerance

    x, gain = draw(count, 2560, dtype=torch.bfloat16), draw(2560, seed=1, dtype=torch.bfloat16)
    weights = [drawn(n, 2560, seed=n) for n in (4096, 1024, 1000)]
    normed = rows.rms_norm(x.double(), gain.double(), 1e-6)
    for out, weight in zip(triton_gemv.project(x, gain, 1e-6, [Target(0, count, Weight(w)) for w in weights]), weights):
        check(out, normed @ weight.double().t())
    gate, up, down = drawn(9728, 2560, seed=2), drawn(9728, 2560, seed=3), drawn(2560, 9728, seed=4)
    product = rows.swiglu(normed @ gate.double().t(), normed @ up.double().t())
    check(triton_gemv.gated(x, gain, 1e-6, gate, up), product, 1e-2)  # both factors are rounded
    check(triton_gemv.add_gemm(x, product.bfloat16(), down), x + product.bfloat16().double() @ down.double().t())
