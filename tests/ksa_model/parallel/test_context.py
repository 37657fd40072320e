"""Context-parallel exchanges between real ranks, and losses and gradients of several ranks against one."""

import pytest
import torch

from ksa_model.config import MemoryConfig
from ksa_model.layout.sequence import ShardedLayout
from ksa_model.parallel.context import ContextParallel, Gather, Halo
from tests.ksa_model.layout.test_sequence import pack_of
from tests.ksa_model.test_model import random_text, small_config, spread_biases, spread_pooling
from tests.ranks import run_on_ranks


def exchange_on_a_rank(size: int):
    from train.distributed import groups

    world = groups.initialize(groups.ParallelConfig(context=size), torch.device("cpu"))
    context = ContextParallel(world.context_group)
    whole = torch.arange(4 * size * 3 * 2 * 2, dtype=torch.float32).view(4 * size * 3, 2, 2)  # 2P slices of 6 rows
    n = len(whole) // (2 * size)
    own = torch.cat([whole[i * n : (i + 1) * n] for i in (context.rank, 2 * size - 1 - context.rank)])
    halos = Halo(context, 4).start(own, 10 * own).wait()
    gathered = Gather(context, "text").start(own, 10 * own).wait()
    # Each rank's gradient is its rank + 1 everywhere: sums say who sent what.
    gradient = torch.full_like(halos[0], context.rank + 1.0)
    total = torch.ones_like(own), torch.zeros_like(own)
    halo_grads = Halo(context, 4).start_backward(gradient, 10 * gradient).add_to(total)
    gradient = (context.rank + 1) * whole
    gather_grads = Gather(context, "text").start_backward(gradient, 10 * gradient).add_to(None)
    total = own.clone(), own.clone()
    added_grads = Gather(context, "text").start_backward(gradient, 10 * gradient).add_to(total)
    return context.rank, own, halos, gathered, halo_grads, gather_grads, added_grads, dict(context.received_bytes)


@pytest.mark.parametrize("size", [2, 4])
def test_exchanges(size):
    whole = torch.arange(4 * size * 3 * 2 * 2, dtype=torch.float32).view(4 * size * 3, 2, 2)
    n, h = 6, 4
    padded = torch.cat([torch.zeros(h, 2, 2), whole])
    for rank, own, halos, gathered, halo_grads, gather_grads, added_grads, received in run_on_ranks(
        size, exchange_on_a_rank, size
    ):
        slices = (rank, 2 * size - 1 - rank)
        want = torch.cat([padded[i * n : i * n + h] for i in slices])
        assert torch.equal(halos[0], want) and torch.equal(halos[1], 10 * want)
        assert torch.equal(gathered[0], whole) and torch.equal(gathered[1], 10 * whole)
        # The last four rows of slice i are also the halo of slice i+1: its holder's gradient comes on top.
        for grad, first, factor in zip(halo_grads, (1.0, 0.0), (1, 10)):
            for part, i in zip(grad.split(n), slices):
                after = None if i == 2 * size - 1 else min(i + 1, 2 * size - 2 - i)
                want = torch.full((n,), first)
                want[n - h :] += 0 if after is None else factor * (after + 1.0)
                assert torch.equal(part[:, 0, 0], want)
        ranks_sum = size * (size + 1) // 2
        for factor, grad, added in zip((1, 10), gather_grads, added_grads):
            assert torch.equal(grad, ranks_sum * factor * own)
            assert torch.equal(added, grad + own)
        row_bytes = 2 * 2 * 2 * 4
        neighbours = (rank > 0) + (rank < size - 1)
        assert received["halo"] == 2 * neighbours * h * row_bytes
        assert received["text"] == 3 * (size - 1) * 2 * n * row_bytes


POOLED = dict(summary_tokens=1, layer_pattern="HFSPH")
WITHOUT_ROPE = dict(rotate_far=False, rotate_full_layers=False)
BIASED = dict(qkv_bias=True, qk_norm=False)


def model_on_a_rank(tensor: int, sequence: bool, context: int, memory: MemoryConfig, changes: dict):
    from ksa_model.layers.tensor_parallel import TensorParallel
    from ksa_model.model import Decoder
    from train.distributed import groups

    base = dict(num_kv_heads=4, summary_tokens=2, vocab_multiple=32, layer_pattern="KFSCK", num_layers=5,
                window_chunks=(1, 0, 0, 3, 0), window_tokens=9)  # fmt: skip
    config = small_config(**base | changes)
    world = groups.initialize(
        groups.ParallelConfig(tensor=tensor, sequence=sequence, context=context), torch.device("cpu")
    )
    torch.manual_seed(0)
    pack = pack_of(summary_tokens=config.summary_tokens)
    tokens, labels = random_text(pack)
    exchange = ContextParallel(world.context_group)
    decoder = Decoder(config, TensorParallel(world.tensor_group, sequence), exchange, memory)
    spread_pooling(decoder)
    spread_biases(decoder)
    if context > 1:
        pack = ShardedLayout(pack, exchange.rank, context)
        tokens, labels = (torch.from_numpy(pack.rows(x.numpy())) for x in (tokens, labels))
    loss = decoder(tokens, labels, pack)
    loss.backward()
    gradients = {}
    for name, p in decoder.named_parameters():
        torch.distributed.all_reduce(p.grad, group=world.context_group)
        if getattr(p, "tensor_model_parallel", False) and tensor > 1:
            shares = [torch.empty_like(p.grad) for _ in range(tensor)]
            torch.distributed.all_gather(shares, p.grad, group=world.tensor_group)
            gradients[name] = torch.cat(shares, p.partition_dim)
        else:
            gradients[name] = p.grad
    total = loss.detach().clone()
    torch.distributed.all_reduce(total, group=world.context_group)
    return total, gradients


@pytest.fixture(scope="module")
def one_rank():
    return {
        name: run_on_ranks(1, model_on_a_rank, 1, False, 1, MemoryConfig(), changes)[0]
        for name, changes in (("summaries", {}), ("pooled", POOLED), ("without RoPE", WITHOUT_ROPE), ("biased", BIASED))
    }


@pytest.mark.parametrize("tensor, sequence, context, memory", [
    (1, False, 2, MemoryConfig()), (1, False, 4, MemoryConfig("full")),
    (2, True, 2, MemoryConfig(mlp_rows=20)), (2, False, 2, MemoryConfig("selective")),
    (2, True, 2, MemoryConfig("selective", offload=True, mlp_rows=20)),
])  # fmt: skip
def test_loss_and_gradients_match_one_rank(tensor, sequence, context, memory, one_rank):
    found = run_on_ranks(tensor * context, model_on_a_rank, tensor, sequence, context, memory, {})
    assert_like_one_rank(found, one_rank["summaries"])


@pytest.mark.parametrize("tensor, sequence, context, memory", [
    (1, False, 2, MemoryConfig()), (1, False, 4, MemoryConfig("selective")), (2, True, 2, MemoryConfig("full")),
])  # fmt: skip
def test_pooled_chunks_match_one_rank(tensor, sequence, context, memory, one_rank):
    found = run_on_ranks(tensor * context, model_on_a_rank, tensor, sequence, context, memory, POOLED)
    assert_like_one_rank(found, one_rank["pooled"])


@pytest.mark.parametrize("tensor, sequence, context, memory", [
    (1, False, 2, MemoryConfig("selective")), (1, False, 4, MemoryConfig()), (2, True, 2, MemoryConfig("full")),
])  # fmt: skip
def test_far_keys_without_rope_match_one_rank(tensor, sequence, context, memory, one_rank):
    found = run_on_ranks(tensor * context, model_on_a_rank, tensor, sequence, context, memory, WITHOUT_ROPE)
    assert_like_one_rank(found, one_rank["without RoPE"])


@pytest.mark.parametrize("tensor, sequence, context, memory", [
    (1, False, 2, MemoryConfig()), (2, True, 2, MemoryConfig("selective", mlp_rows=20)),
])  # fmt: skip
def test_biases_match_one_rank(tensor, sequence, context, memory, one_rank):
    found = run_on_ranks(tensor * context, model_on_a_rank, tensor, sequence, context, memory, BIASED)
    assert_like_one_rank(found, one_rank["biased"])


def assert_like_one_rank(found, one_rank):
    for loss, gradients in found:
        torch.testing.assert_close(loss, one_rank[0], rtol=1e-6, atol=1e-5)
        for name, want in one_rank[1].items():
            torch.testing.assert_close(gradients[name], want, rtol=1e-4, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}")


def bytes_on_a_rank(num_text: int, size: int, head_dim: int):
    """Bytes a rank receives in the forward pass of one layer's exchange: KSA, and gathering text keys."""
    from train.distributed import groups

    world = groups.initialize(groups.ParallelConfig(context=size), torch.device("cpu"))
    context, kv_heads, k, window = ContextParallel(world.context_group), 8, 8, 128
    text = torch.zeros(num_text // size, kv_heads, head_dim, dtype=torch.bfloat16)
    summary = torch.zeros(num_text // size // k, kv_heads, head_dim, dtype=torch.bfloat16)
    Halo(context, window * k).start(text, text).wait()
    Gather(context, "summaries").start(summary, summary).wait()
    Gather(context, "text").start(text, text).wait()
    return dict(context.received_bytes)


def test_a_ksa_layer_exchanges_a_fifth_at_most():
    """k=8, CP=4, 131,072 tokens, 32 query and 8 key heads. Bytes are linear in the head dimension: 4 stands for 128."""
    tokens, size, head_dim = 131_072, 4, 4
    # Ulysses sends queries, keys, values and outputs through all-to-all: (P-1)/P of this rank's rows of each.
    ulysses = (2 * 32 + 2 * 8) * head_dim * 2 * (tokens // size) * (size - 1) // size
    for received in run_on_ranks(size, bytes_on_a_rank, tokens, size, head_dim):
        ksa = received["halo"] + received["summaries"]
        assert received["text"] == 2 * 8 * head_dim * 2 * tokens * (size - 1) // size
        assert 5 * ksa <= min(ulysses, received["text"])
