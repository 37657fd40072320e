"""`blocked` and `cpu` against the dense reference: outputs and every gradient, at awkward sizes, with NaN-poisoned
padding."""

import numpy as np
import pytest
import torch

from ksa_model.layout.sequence import build_layout
from ksa_model.ops.attention import blocked, cpu, joint, reference

HEADS, KV_HEADS, HEAD_DIM = 4, 2, 16

# name: (document lengths, chunk_size, summary_tokens, extra chunks of padding at the end)
PACKS = {
    "one document": ([96], 8, 1, 0),
    "one token": ([1], 8, 1, 0),
    "k-1, k, k+1": ([7, 8, 9], 8, 1, 1),
    "primes": ([13, 31, 2, 61], 4, 1, 0),
    "one-token documents": ([1] * 9, 3, 1, 2),
    "k=1": ([5, 11], 1, 1, 3),
    "m=2": ([29, 40], 8, 2, 1),
    "m=3 short chunk": ([26, 3], 5, 3, 0),
    "m larger than the chunk": ([7, 4], 2, 3, 0),
    "more rows than a block": ([300, 17, 150], 8, 1, 0),
    "causal stretches and a rest": ([600, 30, 5, 520], 8, 1, 2),
    "only padding": ([], 4, 1, 3),
}
WINDOWS = [0, 1, 3, 1000]


def make_layout(lengths, k, m, padding_chunks):
    starts, row = [], 0
    for length in lengths:
        starts.append(row)
        row += -(-length // k) * k
    return build_layout(np.array(starts, int), np.array(lengths, int), row + padding_chunks * k, k, m)


def random_inputs(pack, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def draw(rows, heads):
        return torch.randn(rows, heads, HEAD_DIM, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

    return (
        draw(pack.num_text, HEADS),
        draw(pack.num_text, KV_HEADS),
        draw(pack.num_text, KV_HEADS),
        draw(pack.num_summary, KV_HEADS),
        draw(pack.num_summary, KV_HEADS),
    )


def assert_same(fast, slow, inputs, pack, rows):
    """Outputs and gradients agree; `rows` are the query rows that count (padding carries no gradient)."""
    weights = (
        torch.randn(fast.shape, dtype=torch.float32, generator=torch.Generator().manual_seed(9)) * rows[:, None, None]
    )
    torch.testing.assert_close(fast * rows[:, None, None], slow * rows[:, None, None], rtol=2e-5, atol=2e-5)
    assert torch.isfinite(fast).all(), "padding must stay finite: later layers read it"
    fast_grads = torch.autograd.grad((fast * weights).sum(), inputs, allow_unused=True)
    slow_grads = torch.autograd.grad((slow * weights).sum(), inputs, allow_unused=True)
    for got, want in zip(fast_grads, slow_grads):
        got, want = (torch.zeros(()) if g is None else g for g in (got, want))
        torch.testing.assert_close(got, want.expand_as(got), rtol=5e-5, atol=5e-5)


KERNELS = pytest.mark.parametrize("kernels", [cpu, blocked], ids=["cpu", "blocked"])


@KERNELS
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("name", PACKS)
def test_ksa_attention_matches_reference(name, window, kernels):
    pack = make_layout(*PACKS[name])
    inputs = [x.detach().float().requires_grad_() for x in random_inputs(pack)]
    fast = joint.ksa_attention(inputs, pack, window, kernels)
    slow = reference.ksa_attention(*inputs, pack, window)
    assert_same(fast, slow, inputs, pack, torch.from_numpy(pack.text_is_real))
    assert (fast[~torch.from_numpy(pack.text_is_real)] == 0).all()


@KERNELS
@pytest.mark.parametrize("window", [0, 2])
@pytest.mark.parametrize("name", PACKS)
def test_far_queries_of_their_own_match_reference(name, window, kernels):
    pack = make_layout(*PACKS[name])
    inputs = [x.detach().float().requires_grad_() for x in random_inputs(pack)]
    q_far = random_inputs(pack, seed=5)[0].detach().float().requires_grad_()
    fast = joint.ksa_attention(inputs, pack, window, kernels, q_far=q_far)
    slow = reference.ksa_attention(*inputs, pack, window, q_far)
    assert_same(fast, slow, [*inputs, q_far], pack, torch.from_numpy(pack.text_is_real))


@KERNELS
@pytest.mark.parametrize("mixer", ["F", "S", "C"])
@pytest.mark.parametrize("name", PACKS)
def test_text_mixers_match_reference(name, mixer, kernels):
    pack = make_layout(*PACKS[name])
    inputs = [x.detach().float().requires_grad_() for x in random_inputs(pack)[:3]]
    for size in (1, 7) if mixer == "S" else (0, 2):
        fast = joint.text_attention(inputs, pack, mixer, size, kernels)
        slow = reference.text_attention(*inputs, pack, mixer, size)
        assert_same(fast, slow, inputs, pack, torch.from_numpy(pack.text_is_real))


@pytest.mark.parametrize("name", PACKS)
def test_summary_attention_matches_reference(name):
    pack = make_layout(*PACKS[name])
    q, k_text, v_text, k_summary, v_summary = (x.detach().float() for x in random_inputs(pack))
    q = torch.randn(pack.num_summary, HEADS, HEAD_DIM)
    inputs = [x.requires_grad_() for x in (q, k_text, v_text, k_summary, v_summary)]
    fast = blocked.summary_attention(*inputs, pack)
    slow = reference.summary_attention(*inputs, pack)
    real = torch.from_numpy(pack.chunk_lengths > 0).repeat_interleave(pack.summary_tokens)
    assert_same(fast, slow, inputs, pack, real)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_stays_close_to_fp32(dtype):
    pack = make_layout([300, 17, 150], 8, 1, 0)
    low = [x.detach().to(dtype).requires_grad_() for x in random_inputs(pack)]
    high = [x.detach().float().requires_grad_() for x in low]
    out, want = joint.ksa_attention(low, pack, 3, cpu), reference.ksa_attention(*high, pack, 3)
    assert out.dtype == dtype
    assert (out.float() - want).norm() / want.norm() < 4e-3
    weights = torch.randn_like(want)
    got = torch.autograd.grad((out.float() * weights).sum(), low)
    for g, w in zip(got, torch.autograd.grad((want * weights).sum(), high)):
        assert (g.float() - w).norm() / w.norm() < 8e-3


def test_padding_keys_are_never_read():
    """Large values in every padding row of every key and value change nothing, to the last bit."""
    pack = make_layout([13, 6, 29], 4, 1, 3)
    inputs = [x.detach().float() for x in random_inputs(pack)]
    clean = joint.ksa_attention(inputs, pack, 1, cpu)
    real = torch.from_numpy(pack.text_is_real)
    chunk_real = torch.from_numpy(pack.chunk_lengths > 0)
    for x in inputs[1:3]:
        x[~real] = 100.0
    for x in inputs[3:]:
        x[~chunk_real] = 100.0
    torch.testing.assert_close(joint.ksa_attention(inputs, pack, 1, cpu)[real], clean[real], rtol=0, atol=0)


def test_documents_do_not_leak():
    """A document's output is the same alone and in any pack, whatever its neighbours hold."""
    alone = make_layout([37], 4, 1, 0)
    inputs = [x.detach().float() for x in random_inputs(alone)]
    want = joint.ksa_attention(inputs, alone, 2, cpu)[:37]
    packed = make_layout([11, 37, 5], 4, 1, 0)
    others = [x.detach().float() * 50 for x in random_inputs(packed, seed=1)]
    start = 12
    for x, y in zip(others[:3], inputs[:3]):
        x[start : start + 40] = y
    for x, y in zip(others[3:], inputs[3:]):
        x[start // 4 : start // 4 + 10] = y
    torch.testing.assert_close(
        joint.ksa_attention(others, packed, 2, cpu)[start : start + 37], want, rtol=1e-5, atol=1e-5
    )


def test_blocked_path_keeps_no_dense_tensor():
    """Peak extra memory grows with T, not T*T: the largest tensor ever allocated in forward and backward is a block."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            for x in result if isinstance(result, (tuple, list)) else (result,):
                if isinstance(x, torch.Tensor):
                    self.numel = max(self.numel, x.numel())
            return result

    largest = {}
    for tokens in (1024, 2048):
        pack = make_layout([tokens], 8, 1, 0)
        inputs = [x.detach().float().requires_grad_() for x in random_inputs(pack)]
        with Largest() as mode:
            joint.ksa_attention(inputs, pack, 16, cpu).sum().backward()
        largest[tokens] = mode.numel
    assert largest[2048] < 2.5 * largest[1024]  # in blocks: those at a document's beginning are taken apart
    assert largest[2048] < 2048 * 2048 // 8
