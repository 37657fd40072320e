"""Pooled keys and values: plain torch and the Triton kernels against sums written out token by token."""

import pytest
import torch

from ksa_model.ops import pooling
from ksa_model.ops.pooling import ChunkRows

try:
    from ksa_model.ops import triton_pooling
except ImportError:
    triton_pooling = None  # type: ignore[assignment]
needs_triton = pytest.mark.skipif(triton_pooling is None, reason="needs Triton")
MODULES = pytest.mark.parametrize("module", [pooling, pytest.param(triton_pooling, marks=needs_triton)],
                                  ids=["plain", "triton"])  # fmt: skip


def draw(chunks, size, heads=2, d=8, learned=True, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"

    def normal(*shape):
        return torch.randn(*shape, generator=generator).to(device, dtype).requires_grad_()

    rows = chunks * size
    keys_and_values = normal(rows, heads, d), normal(rows, heads, d)
    return ChunkRows(*keys_and_values, *((normal(rows, heads), normal(heads * size)) if learned else (None, None)))


def written_out(rows, size):
    """Token by token, in fp64."""
    chunks, (_, heads, d) = len(rows.k) // size, rows.k.shape
    k, v = rows.k.double(), rows.v.double()
    found = []
    for x in (k, v):
        pooled = []
        for chunk in range(chunks):
            for head in range(heads):
                weights = x.new_ones(size)
                if rows.scores is not None:
                    score = rows.scores.double()[chunk * size : (chunk + 1) * size, head]
                    weights = (score + rows.bias.double()[head * size : (head + 1) * size]).exp()
                of_tokens = [weights[i] * x[chunk * size + i, head] for i in range(size)]
                pooled.append(sum(of_tokens) / weights.sum())
        found.append(torch.stack(pooled).view(chunks, heads, d))
    return found


def gradients(outputs, rows):
    inputs = [x for x in rows if x is not None]
    weights = [
        torch.randn(x.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64).to(x.device)
        for x in outputs
    ]
    return torch.autograd.grad(sum((x.double() * w).sum() for x, w in zip(outputs, weights)), inputs)


@MODULES
@pytest.mark.parametrize("learned", [True, False], ids=["learned", "means"])
@pytest.mark.parametrize(
    "chunks, size, heads, d", [(1, 1, 1, 2), (5, 4, 2, 8), (3, 7, 3, 6), (2, 16, 2, 16), (9, 3, 1, 64)]
)
def test_pooling_is_the_weighted_sum_of_each_chunk(module, learned, chunks, size, heads, d):
    rows = draw(chunks, size, heads, d, learned)
    got, want = module.pool(rows, size), written_out(rows, size)
    for x, y in zip(got, want):
        torch.testing.assert_close(x, y.float(), rtol=1e-5, atol=1e-6)
    for x, y in zip(gradients(got, rows), gradients(want, rows)):
        torch.testing.assert_close(x, y, rtol=2e-5, atol=2e-6)


@MODULES
@pytest.mark.parametrize("learned", [True, False], ids=["learned", "means"])
def test_sums_of_bf16_rows_round_only_once(module, learned):
    """Long chunks of rows with a common part: sums in bf16 would be wrong by percents."""
    low = draw(4, 64, learned=learned, dtype=torch.bfloat16)
    with torch.no_grad():
        low.k.add_(4)
    high = ChunkRows(*(None if x is None else x.detach().double().requires_grad_() for x in low))
    got, want = module.pool(low, 64), written_out(high, 64)
    # Triton's interpreter cuts bf16 off instead of rounding.
    rounding = 2**-8 if module is pooling or low.k.is_cuda else 2**-7
    for x, y in zip(got, want):
        assert x.dtype == torch.bfloat16
        torch.testing.assert_close(x.double(), y, rtol=rounding, atol=1e-6)
    for x, y in zip(gradients(got, low), gradients(want, high)):
        assert (x.double() - y).norm() / y.norm() < rounding


@MODULES
def test_rows_may_be_slices_of_a_wider_tensor(module):
    rows = draw(3, 4)
    wide = torch.zeros(12, 40, device=rows.k.device)
    wide[:, 3:19] = rows.k.detach().flatten(1)
    strided = rows._replace(k=wide[:, 3:19].unflatten(1, (2, 8)).requires_grad_())
    for x, y in zip(module.pool(strided, 4), module.pool(rows, 4)):
        torch.testing.assert_close(x, y, rtol=0, atol=0)


@MODULES
def test_zero_scores_are_means(module):
    """Learned pooling starts as mean pooling, bit by bit where 1/k is exact."""
    rows = draw(5, 8)
    zero = rows._replace(scores=torch.zeros_like(rows.scores), bias=torch.zeros_like(rows.bias))
    for x, y in zip(module.pool(zero, 8), module.pool(ChunkRows(rows.k, rows.v), 8)):
        torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-7)


@needs_triton
def test_chunks_too_large_for_a_program_are_pooled_in_plain_torch(monkeypatch):
    rows = draw(2, 8)
    want = triton_pooling.pool(rows, 8)
    monkeypatch.setattr(triton_pooling, "MAX_TILE", 32)
    monkeypatch.delattr(triton_pooling, "_PoolChunks")
    for x, y in zip(triton_pooling.pool(rows, 8), want):
        torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-7)
