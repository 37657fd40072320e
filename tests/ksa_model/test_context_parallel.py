"""Context parallelism: slices and ranges by arithmetic, then losses and gradients of real ranks against one."""

import numpy as np
import pytest
import torch

from ksa_model import layout
from ksa_model.collectives import ContextParallel, Gather, Halo
from ksa_model.config import ModelConfigError
from ksa_model.memory import MemoryConfig
from tests.ksa_model.test_kernels import make_layout
from tests.ksa_model.test_model import random_text, small_config
from tests.ranks import run_on_ranks

# 64 chunks of 4: documents that end inside a slice, one that spans all ranks, one-token ones, padding in between.
PACK = ([3, 140, 1, 30, 70], 4, 2, 1)


def pack_of(total_rows=256):
    whole = make_layout(*PACK)
    starts = np.flatnonzero((np.arange(whole.num_chunks) == whole.first_chunks) & (whole.chunk_lengths > 0)) * 4
    return layout.build(starts, np.array(PACK[0]), total_rows, 4, 2)


def test_worked_example():
    whole = layout.build(np.array([0]), np.array([16]), 16, chunk_size=2)
    first, second = layout.ShardedLayout(whole, 0, 2), layout.ShardedLayout(whole, 1, 2)
    assert first.text_positions.tolist() == [0, 1, 2, 3, 12, 13, 14, 15]
    assert second.text_positions.tolist() == [4, 5, 6, 7, 8, 9, 10, 11]
    near = first.near_ranges(1)
    assert near.start.tolist() == [0, 0, 0, 0, 10, 10, 12, 12]
    assert near.end.tolist() == [1, 2, 3, 4, 13, 14, 15, 16]
    # Row 12 of the sample stands at 4; of its keys 10 and 11 come from elsewhere, 12 is its own.
    own = first.own(near)
    assert own.start.tolist() == [0, 0, 0, 0, 4, 4, 4, 4]
    assert own.end.tolist() == [1, 2, 3, 4, 5, 6, 7, 8]
    # W=1: two halo rows before each slice, 10 and 11 at 2 and 3 of the buffer.
    halo = first.in_halo(near, 2)
    assert halo.start.tolist() == [2, 2, 2, 2, 2, 2, 4, 4]
    assert halo.end.tolist() == [2, 2, 2, 2, 4, 4, 4, 4]
    before = first.before_own(first.full_ranges())
    assert (before.end - before.start).tolist() == [0] * 4 + [12] * 4
    assert first.far_ranges(1).end.tolist() == [0, 0, 0, 0, 5, 5, 6, 6]


@pytest.mark.parametrize("size", [1, 2, 4])
def test_shards_partition_the_sample(size):
    whole = pack_of()
    shards = [layout.ShardedLayout(whole, rank, size) for rank in range(size)]
    rows = np.concatenate([shard.rows(np.arange(256)) for shard in shards])
    assert sorted(rows.tolist()) == list(range(256))
    assert sum(shard.num_tokens for shard in shards) == whole.num_tokens
    for mixer in "KFSC":
        assert sum(s.visible_keys(mixer, 2, 7) for s in shards) == whole.visible_keys(mixer, 2, 7)
    if size == 1:  # nothing is elsewhere
        return
    for shard in shards:
        for ranges, elsewhere in (
            (shard.near_ranges(2), shard.in_halo(shard.near_ranges(2), 8)),
            (shard.sliding_ranges(7), shard.in_halo(shard.sliding_ranges(7), 6)),
            (shard.full_ranges(), shard.before_own(shard.full_ranges())),
        ):
            assert shard.own(ranges).visible_keys + elsewhere.visible_keys == ranges.visible_keys
            for some in (ranges, shard.own(ranges), elsewhere):
                assert (np.diff(some.start) >= 0).all() and (np.diff(some.end) >= 0).all()


def test_impossible_slices_are_refused():
    with pytest.raises(ModelConfigError, match=r"does not divide into 2 x parallel\.context=3 slices"):
        layout.check_context_parallel(256, 4, 0, 3)
    with pytest.raises(ModelConfigError, match=r"use parallel\.context=2 or less"):
        layout.check_context_parallel(256, 4, 60, 4)


def exchange_on_a_rank(size: int):
    from train import parallel

    world = parallel.initialize(parallel.ParallelConfig(context=size), torch.device("cpu"))
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


def model_on_a_rank(tensor: int, sequence: bool, context: int, memory: MemoryConfig):
    from ksa_model.model import Decoder
    from ksa_model.tensor_parallel import TensorParallel
    from train import parallel

    config = small_config(num_kv_heads=4, summary_tokens=2, vocab_multiple=32, layer_pattern="KFSCK", num_layers=5,
                          window_chunks=(1, 0, 0, 3, 0), window_tokens=9)  # fmt: skip
    world = parallel.initialize(
        parallel.ParallelConfig(tensor=tensor, sequence=sequence, context=context), torch.device("cpu")
    )
    torch.manual_seed(0)
    pack = pack_of()
    tokens, labels = random_text(pack)
    exchange = ContextParallel(world.context_group)
    decoder = Decoder(config, TensorParallel(world.tensor_group, sequence), exchange, memory)
    if context > 1:
        pack = layout.ShardedLayout(pack, exchange.rank, context)
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
    return run_on_ranks(1, model_on_a_rank, 1, False, 1, MemoryConfig())[0]


@pytest.mark.parametrize("tensor, sequence, context, memory", [
    (1, False, 2, MemoryConfig()), (1, False, 4, MemoryConfig("full")),
    (2, True, 2, MemoryConfig(mlp_rows=20)), (2, False, 2, MemoryConfig("selective")),
    (2, True, 2, MemoryConfig("selective", offload=True, mlp_rows=20)),
])  # fmt: skip
def test_loss_and_gradients_match_one_rank(tensor, sequence, context, memory, one_rank):
    for loss, gradients in run_on_ranks(tensor * context, model_on_a_rank, tensor, sequence, context, memory):
        torch.testing.assert_close(loss, one_rank[0], rtol=1e-6, atol=1e-5)
        for name, want in one_rank[1].items():
            torch.testing.assert_close(gradients[name], want, rtol=1e-4, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}")


def bytes_on_a_rank(num_text: int, size: int, head_dim: int):
    """Bytes a rank receives in the forward pass of one layer's exchange: KSA, and gathering text keys."""
    from train import parallel

    world = parallel.initialize(parallel.ParallelConfig(context=size), torch.device("cpu"))
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


def test_a_window_longer_than_a_slice_is_named():
    whole = make_layout([64], 4, 1, 0)
    shard = layout.ShardedLayout(whole, 0, 2)
    with pytest.raises(ModelConfigError, match="a window of 20 rows is longer than a context-parallel slice of 16"):
        shard.in_halo(shard.near_ranges(5), 20)
