"""The CUDA attention: its Triton kernels run by Triton's interpreter on the CPU, and everything for real on a GPU.

On the CPU the library kernel for long causal stretches has a plain stand-in with its signature, so that what is shown
is what is ours: how stretches are found, cut, viewed, merged, and how their gradients come back.
"""

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed: pip install -e '.[test]'")

from ksa_model.layout.sequence import ShardedLayout
from ksa_model.memory import BlockActivations, HostPool, SavedOutput
from ksa_model.ops.attention import blocked, cuda, joint, reference
from tests.ksa_model.ops.attention.test_joint import PACKS, make_layout

gpu = pytest.mark.gpu
ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
DTYPE = torch.bfloat16 if ON_GPU else torch.float32
OUT_ERROR, GRAD_ERROR = (4e-3, 8e-3) if ON_GPU else (1e-5, 2e-5)


# The interpreter takes a second for a hundred rows: the packs in which something else is at stake.
INTERPRETED = ["k-1, k, k+1", "one-token documents", "m=3 short chunk", "m larger than the chunk", "only padding"]


def draw(pack, heads, kv_heads, head_dim, dtype=DTYPE, seed=0):
    """q, k, v of text and k, v of summaries; everything that may not be read is NaN-free but large."""
    generator = torch.Generator().manual_seed(seed)

    def rows(count, heads):
        x = torch.randn(count, heads, head_dim, generator=generator)
        return x.to(DEVICE, dtype).requires_grad_()

    return [
        rows(pack.num_text, heads),
        rows(pack.num_text, kv_heads),
        rows(pack.num_text, kv_heads),
        rows(pack.num_summary, kv_heads),
        rows(pack.num_summary, kv_heads),
    ]


def error(got, want, floor=1e-20):
    """Relative to the norm of `want`, or to `floor` where that is larger."""
    got, want = got.detach().float(), want.detach().float()
    return float((got - want).norm() / want.norm().clamp(min=floor))


def compare(run, check, inputs, pack, out_error=OUT_ERROR, grad_error=GRAD_ERROR):
    """`run` in the inputs' dtype against `check` in fp32: output and all gradients."""
    exact = [x.detach().float().requires_grad_() for x in inputs]
    real = torch.from_numpy(pack.text_is_real).to(DEVICE)
    weights = torch.randn(inputs[0].shape, generator=torch.Generator().manual_seed(3)).to(DEVICE)
    poison_allocator()
    got, want = run(*inputs), check(*exact)
    assert (got[~real] == 0).all()
    assert error(got[real], want[real]) <= out_error
    # Padding rows get gradients too; nothing of them may reach a key.
    got_grads = torch.autograd.grad(got, inputs, weights.to(got.dtype), allow_unused=True)
    want_grads = torch.autograd.grad(want, exact, weights * real[:, None, None], allow_unused=True)
    for g, w in zip(got_grads, want_grads):
        if w is None:
            assert g is None or not g.any()
        else:  # rows that see one key alone have no gradient but rounding
            assert error(g, w, floor=0.02 * float(weights.norm())) <= grad_error


def poison_allocator():
    """Fill freed GPU memory with NaN, so that a value nobody wrote shows."""
    if ON_GPU:
        blocks = [torch.full((2**20,), float("nan"), device=DEVICE) for _ in range(32)]
        small = [torch.full((2**size,), float("nan"), device=DEVICE) for size in range(4, 18) for _ in range(4)]
        del blocks, small


@pytest.fixture(autouse=True)
def without_cudnn(monkeypatch):
    """On the CPU, a plain stand-in for cuDNN."""
    if ON_GPU:
        return
    monkeypatch.setattr(cuda, "_cudnn_forward", plain_forward)
    monkeypatch.setattr(cuda, "_cudnn_backward", plain_backward)


def plain_scores(q, k, causal):
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    scores = q @ k.transpose(2, 3) * q.shape[-1] ** -0.5
    if causal:
        scores = scores.masked_fill(~torch.ones(scores.shape[2:], dtype=torch.bool).tril(), float("-inf"))
    return scores


def plain_forward(q, k, v, causal):
    scores = plain_scores(q, k, causal)
    out = scores.softmax(-1) @ v.repeat_interleave(q.shape[1] // v.shape[1], dim=1)
    return torch.empty_like(q).copy_(out), scores.logsumexp(-1)  # in q's memory order, as the library does


def plain_backward(grad_out, q, k, v, out, lse, causal):
    group = q.shape[1] // k.shape[1]
    weights = (plain_scores(q, k, causal) - lse).exp()
    grad_v = weights.transpose(2, 3) @ grad_out
    grad_weights = grad_out @ v.repeat_interleave(group, dim=1).transpose(2, 3)
    grad_scores = weights * (grad_weights - (grad_out * out).sum(-1, keepdim=True)) * q.shape[-1] ** -0.5
    grad_q = grad_scores @ k.repeat_interleave(group, dim=1)
    grad_k = grad_scores.transpose(2, 3) @ q
    shared = lambda x: x.unflatten(1, (-1, group)).sum(2)
    return torch.empty_like(q).copy_(grad_q), shared(grad_k), shared(grad_v)


def ksa(pack, window, kernels=cuda):
    """Of the five inputs, and where there is a sixth, with these queries for the far part."""
    return lambda *x: joint.ksa_attention(x[:5], pack, window, kernels, q_far=x[5] if len(x) > 5 else None)


def text(pack, mixer, size, kernels=cuda):
    return lambda *x: joint.text_attention(x, pack, mixer, size, kernels)


@pytest.mark.parametrize("window", [0, 3, 1000] if ON_GPU else [3])
@pytest.mark.parametrize("name", PACKS if ON_GPU else INTERPRETED)
def test_ksa_matches_reference(name, window):
    pack = make_layout(*PACKS[name])
    compare(ksa(pack, window), ksa(pack, window, reference), draw(pack, 4, 2, 16), pack)


@pytest.mark.parametrize("name", PACKS if ON_GPU else ["m=2", "only padding"])
def test_far_queries_of_their_own_match_reference(name):
    pack = make_layout(*PACKS[name])
    inputs = [*draw(pack, 4, 2, 16), draw(pack, 4, 2, 16, seed=5)[0]]
    compare(ksa(pack, 3), ksa(pack, 3, reference), inputs, pack)


@pytest.mark.parametrize("mixer,size", [("F", 0), ("S", 1), ("S", 7), ("C", 0), ("C", 2)])
@pytest.mark.parametrize("name", ["primes", "m=2", "only padding"] if ON_GPU else ["k-1, k, k+1", "only padding"])
def test_text_mixers_match_reference(name, mixer, size):
    pack = make_layout(*PACKS[name])
    compare(text(pack, mixer, size), text(pack, mixer, size, reference), draw(pack, 4, 2, 16)[:3], pack)


@pytest.mark.parametrize("name", PACKS)
def test_summaries_match_reference(name):
    pack = make_layout(*PACKS[name])
    q = torch.randn(pack.num_summary, 4, 16, generator=torch.Generator().manual_seed(5)).to(DEVICE, DTYPE)
    inputs = [q.requires_grad_(), *draw(pack, 4, 2, 16)[1:]]
    real = torch.from_numpy(pack.chunk_lengths > 0).repeat_interleave(pack.summary_tokens).to(DEVICE)
    weights = torch.randn(q.shape, generator=torch.Generator().manual_seed(3)).to(DEVICE) * real[:, None, None]
    results = []
    for kernels, given in ((cuda, inputs), (reference, [x.detach().float().requires_grad_() for x in inputs])):
        out = kernels.summary_attention(*given, pack)
        results.append([out * real[:, None, None], *torch.autograd.grad(out, given, weights.to(out.dtype))])
    for i, (got, want) in enumerate(zip(*results)):
        assert torch.isfinite(got).all()
        assert error(got, want, floor=1e-6 + 0.02 * float(weights.norm())) <= (GRAD_ERROR if i else OUT_ERROR)


@pytest.mark.parametrize("small_call,kv_heads", [(1, 2), (2**26, 2), (2**26, 1)])  # one head a call, or all of them
@pytest.mark.parametrize("m", [1, 2])
@pytest.mark.parametrize("lengths", [[120], [73, 7, 60], [30, 91]] if ON_GPU else [[70], [41, 7, 30]])
def test_long_stretches_go_to_the_library(monkeypatch, lengths, m, small_call, kv_heads):
    """With a low threshold every document is a run: whole ones, rounded ones, and what rounding leaves over."""
    monkeypatch.setattr(cuda, "MIN_RUN_STEPS", 5)
    monkeypatch.setattr(cuda, "SMALL_CALL", small_call)
    pack = make_layout(lengths, 4, m, 0)
    runs, _ = pack.far_ranges(2).causal_split(5)
    assert runs and sum(run.num_rows for run in runs) > pack.num_text // 4
    compare(ksa(pack, 2), ksa(pack, 2, reference), draw(pack, 4, kv_heads, 16), pack)
    compare(text(pack, "F", 0), text(pack, "F", 0, reference), draw(pack, 4, kv_heads, 16)[:3], pack)


@pytest.mark.parametrize(
    "heads,kv_heads,share,number",
    [
        (16, 16, 0.16, 8),
        (16, 16, 0.32, 4),
        (32, 8, 0.32, 8),
        (14, 2, 0.16, 14),
        (22, 22, 0.16, 11),
        (22, 22, 0.32, 4),
        (17, 17, 0.16, 9),
        (40, 8, 0.32, 8),
    ],
)
def test_calls_have_every_head_once(heads, kv_heads, share, number):
    pack = make_layout([131_072], 8, 1, 0)
    (run,), _ = pack.far_ranges(128).causal_split(cuda.MIN_RUN_STEPS)
    q, k = (torch.empty(pack.num_text, n, 128, dtype=torch.bfloat16, device="meta") for n in (heads, kv_heads))
    calls = list(cuda._calls(run, q, k, share))
    assert len(calls) == number
    assert [head for call in calls for head in range(heads)[call.heads]] == list(range(heads))
    for call in calls:
        group = heads // kv_heads
        assert {head // group for head in range(heads)[call.heads]} == set(range(kv_heads)[call.kv_heads])


@pytest.mark.parametrize("head_dim", [64, 96, 128, 256] if ON_GPU else [24])
def test_head_dimensions(head_dim):
    pack = make_layout([75, 120, 9] if ON_GPU else [43, 9], 8, 1, 2)
    compare(ksa(pack, 4), ksa(pack, 4, reference), draw(pack, 4, 2, head_dim), pack)
    compare(text(pack, "F", 0), text(pack, "F", 0, reference), draw(pack, 2, 1, head_dim)[:3], pack)


@gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("k,window,heads,kv_heads", [(8, 16, 8, 8), (4, 40, 8, 2), (16, 0, 4, 4), (1, 100, 4, 1)])
def test_thousands_of_rows(dtype, k, window, heads, kv_heads):
    """Documents of every size in one pack, against the reference a slice of heads at a time would allow."""
    lengths = [2900, 10, 10, 10, 1537, 1, 1021]
    pack = make_layout(lengths, k, 1, 3)
    compare(ksa(pack, window), ksa(pack, window, reference), draw(pack, heads, kv_heads, 128, dtype), pack)


@gpu
@pytest.mark.parametrize("mixer", ["F", "S", "C"])
@pytest.mark.parametrize("heads,kv_heads,head_dim", [(8, 2, 64), (4, 4, 64), (4, 4, 128), (4, 1, 96)])
def test_text_mixers_at_real_sizes(mixer, heads, kv_heads, head_dim):
    """Many tiles a document, as small ones of a few heads never have: a compiler has got those right, these wrong."""
    pack = make_layout([2900, 64, 1537, 200, 1, 1021, 4500], 8, 1, 3)
    size = {"F": 0, "S": 136, "C": 16}[mixer]
    inputs = draw(pack, heads, kv_heads, head_dim)[:3]
    compare(text(pack, mixer, size), text(pack, mixer, size, blocked), inputs, pack)


@gpu
def test_library_runs_at_real_sizes():
    """A document long enough for cuDNN by the real threshold, against the blocked path in fp32."""
    pack = make_layout([24_001, 5], 8, 1, 0)
    assert pack.far_ranges(16).causal_split(cuda.MIN_RUN_STEPS)[0]
    compare(ksa(pack, 16), ksa(pack, 16, blocked), draw(pack, 4, 2, 128), pack)
    far_queries = draw(pack, 4, 2, 128, seed=5)[0]
    compare(ksa(pack, 16), ksa(pack, 16, blocked), [*draw(pack, 4, 2, 128), far_queries], pack)
    compare(text(pack, "F", 0), text(pack, "F", 0, blocked), draw(pack, 4, 2, 128)[:3], pack)


@pytest.mark.parametrize("context_size", [2, 4])
def test_context_ranks_see_what_one_rank_sees(monkeypatch, context_size):
    """Every rank's share alone, with the buffers that the exchanges would bring: rectangles, halos, holes. Two query
    heads share their keys, one at a time."""
    monkeypatch.setattr(cuda, "MIN_RUN_STEPS", 4)
    monkeypatch.setattr(cuda, "SMALL_CALL", 1)
    window, k = 2, 4
    for lengths in ([128], [17, 76, 32], [9, 115]):
        pack = make_layout(lengths, k, 1, 0)
        q, k_text, v_text, k_summary, v_summary = (x.detach() for x in draw(pack, 2, 1, 8))
        want = reference.ksa_attention(q, k_text, v_text, k_summary, v_summary, pack, window)
        want_full = reference.text_attention(q, k_text, v_text, pack, "F")
        for rank in range(context_size):
            shard = ShardedLayout(pack, rank, context_size)
            take = lambda x, shard=shard: x[torch.from_numpy(shard.rows(np.arange(len(x)))).to(DEVICE)]
            near = shard.near_ranges(window)
            own_near = (take(k_text), take(v_text), shard.local_keys(near))
            halo = (*(halo_of(x, rank, context_size, window * k) for x in (k_text, v_text)),
                    shard.halo_keys(near, window * k))  # fmt: skip
            far = (k_summary, v_summary, shard.far_ranges(window))
            mine = take(q)
            check_groups(mine, [[own_near], [far, halo]], take(want))
            whole = (k_text, v_text, shard.full_ranges())
            assert error(cuda.attend(mine, [whole]).out, take(want_full)) < OUT_ERROR
            own = (take(k_text), take(v_text), shard.local_keys(shard.full_ranges()))
            earlier = (k_text, v_text, shard.remote_prefix(shard.full_ranges()))
            assert lengths != [128] or earlier[2].causal_split(4)[0]  # rectangles for the library
            check_groups(mine, [[own], [earlier]], take(want_full))


def check_groups(q, groups, want):
    """The joint softmax over groups of parts, one after the other, and every gradient, with `want` as that of out."""
    softmax = None
    for group in groups:
        softmax = cuda.attend(q, group, softmax)
    assert error(softmax.out, want) < OUT_ERROR
    gradient = cuda.Gradient(want, q, softmax)
    grad_q, *grads = check_gradient(want, q, [part for group in groups for part in group], softmax)
    found = [pair for group in reversed(groups) for pair in reversed(gradient.add(group))]
    for got, expected in zip(found, reversed(grads)):
        for one, right in zip(got, expected):
            assert error(one, right) < GRAD_ERROR
    assert error(gradient.grad_q, grad_q) < GRAD_ERROR


def halo_of(x, rank, size, halo_rows):
    """[rows before the first slice | rows before the second] of one rank, from the whole sample, behind zeros."""
    rows = len(x) // (2 * size)
    padded = torch.cat([x.new_zeros(halo_rows, *x.shape[1:]), x])
    return torch.cat([padded[i * rows : i * rows + halo_rows] for i in (rank, 2 * size - 1 - rank)])


def check_gradient(grad_out, q, parts, softmax):
    """The same gradients from the blocked path."""
    gradient = blocked.Gradient(grad_out, q, softmax)
    grads = [gradient.add([part])[0] for part in parts]
    return gradient.grad_q, *grads


def test_a_rerun_takes_what_was_kept(monkeypatch):
    """The joint result of a first run, by way of the host, serves a second one: nothing is attended to again, and
    gradients are the same bits. 13 rows: the log-sum-exp's own are padded to 16."""
    pack = make_layout([9, 4], 1, 1, 0)
    inputs, pool = draw(pack, 2, 1, 16), HostPool(2**20)
    shelf = BlockActivations(pool, None)
    kept, attend, calls = SavedOutput(shelf), cuda.attend, []
    monkeypatch.setattr(cuda, "attend", lambda *arguments: calls.append(0) or attend(*arguments))
    found = []
    for _ in range(2):
        out = joint.ksa_attention(inputs, pack, 2, cuda, kept=kept)
        found.append([out, *torch.autograd.grad(out.square().sum(), inputs)])
        shelf.leave_device()
    assert len(calls) == 1 and pool.held_bytes == out.numel() * out.element_size() + 2 * 13 * 4
    assert all(torch.equal(a, b) for a, b in zip(*found))


@gpu
def test_new_documents_compile_nothing(capsys):
    """Packs of one length with ever new documents: after the first, no kernel of ours is compiled again."""
    from ksa_model.ops.attention import triton_attention, triton_summary

    def compiled():
        """Variants of every kernel in the two modules."""
        found = [x for module in (triton_attention, triton_summary) for x in vars(module).values()]
        return sum(len(cache[0]) for kernel in found for cache in getattr(kernel, "device_caches", {}).values())

    random, counts = np.random.default_rng(1), []
    for _ in range(8):
        lengths = random.integers(1, 3000, 64)
        lengths = lengths[np.cumsum(-(-lengths // 8) * 8) <= 32768]
        pack = make_layout(lengths.tolist(), 8, 1, 4096 - int((-(-lengths // 8)).sum()))  # padded to 32,768 rows
        q, k, v, k_summary, v_summary = draw(pack, 4, 4, 64)
        out = joint.ksa_attention((q, k, v, k_summary, v_summary), pack, 16, cuda)
        of_full = joint.text_attention((q, k, v), pack, "F", 0, cuda)
        of_summaries = cuda.summary_attention(k_summary, k, v, k_summary, v_summary, pack)
        (out.sum() + of_full.sum() + of_summaries.sum()).backward()
        counts.append(compiled())
    with capsys.disabled():
        print(f"\nkernel variants after each of 8 packs: {counts}")
    assert counts[0] > 0 and counts[-1] == counts[1]
