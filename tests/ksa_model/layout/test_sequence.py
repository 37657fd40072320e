"""Worked examples written out by hand, key ranges against the dense definition of the rule, and shards of a sample."""

import numpy as np
import pytest
import torch

from ksa_model.config import ModelConfigError, check_context_parallel
from ksa_model.layout.ranges import KeyRanges
from ksa_model.layout.sequence import ShardedLayout, build_layout
from ksa_model.ops.attention import reference
from tests.ksa_model.ops.attention.test_joint import make_layout


def test_worked_example_of_the_docstring():
    pack = build_layout(np.array([0, 4]), np.array([3, 1]), 8, chunk_size=2)
    assert pack.chunk_lengths.tolist() == [2, 1, 1, 0]
    assert pack.first_chunks.tolist() == [0, 0, 2, 3]
    assert pack.text_positions.tolist() == [0, 1, 2, 3, 0, 1, 0, 1]
    assert pack.summary_positions.tolist() == [1, 2, 0, 0]
    assert pack.text_is_real.tolist() == [True, True, True, False, True, False, False, False]


def test_worked_example_of_the_rule():
    """k=2, m=1, W=1, six tokens t0..t5 and summaries s0 s1 s2."""
    pack = build_layout(np.array([0]), np.array([6]), 6, chunk_size=2)
    near, far = pack.near_ranges(1), pack.far_ranges(1)
    assert list(zip(near.start.tolist(), near.end.tolist())) == [(0, 1), (0, 2), (0, 3), (0, 4), (2, 5), (2, 6)]
    assert list(zip(far.start.tolist(), far.end.tolist())) == [(0, 0), (0, 0), (0, 0), (0, 0), (0, 1), (0, 1)]
    text, own = reference.summary_masks(pack)
    assert text[1].nonzero().flatten().tolist() == [2, 3]
    assert own[1].nonzero().flatten().tolist() == [1]


def test_summary_positions_with_several_summaries():
    """m=3 over 5 tokens: ends of thirds, rounded down, never below the chunk's first position."""
    pack = build_layout(np.array([0]), np.array([7]), 10, chunk_size=5, summary_tokens=3)
    assert pack.summary_positions.tolist() == [0, 2, 4, 5, 5, 6]


@pytest.mark.parametrize("seed", range(6))
def test_ranges_are_the_rule(seed):
    """The ranges of every mixer, and that they are ordered, against dense masks on random packs."""
    rng = np.random.default_rng(seed)
    k, m, window = int(rng.integers(1, 7)), int(rng.integers(1, 4)), int(rng.integers(0, 5))
    lengths = rng.integers(1, 30, size=7)
    gaps = rng.integers(0, 3, size=7) * k  # coarse alignment leaves chunks of padding
    rows = -(-lengths // k) * k + gaps
    starts = np.concatenate([[0], np.cumsum(rows)[:-1]])
    pack = build_layout(starts, lengths, int(rows.sum()), k, m)
    cases = [
        (pack.near_ranges(window), reference.text_to_text_mask(pack, "K", window), pack.num_text),
        (pack.far_ranges(window), reference.text_to_summary_mask(pack, window), pack.num_summary),
        (pack.full_ranges(), reference.text_to_text_mask(pack, "F"), pack.num_text),
        (pack.sliding_ranges(5), reference.text_to_text_mask(pack, "S", 5), pack.num_text),
    ]
    for ranges, mask, num_keys in cases:
        column = torch.arange(num_keys)
        start, end = ranges.tensors(torch.device("cpu"))
        assert torch.equal((column >= start[:, None]) & (column < end[:, None]), mask)
        assert (np.diff(ranges.start) >= 0).all() and (np.diff(ranges.end) >= 0).all()
        assert ranges.visible_keys == mask.sum()
        covered = torch.zeros_like(mask)
        for block in ranges.blocks(16):
            covered[block.rows, block.keys] = True
            assert block.full == bool(mask[block.rows, block.keys].all())
        assert not (mask & ~covered).any()


def test_each_past_chunk_is_seen_exactly_once():
    pack = build_layout(np.array([0]), np.array([40]), 40, chunk_size=4)
    text = reference.text_to_text_mask(pack, "K", 2).view(40, 10, 4).any(-1)
    summaries = reference.text_to_summary_mask(pack, 2)
    past = torch.arange(10)[None, :] <= (torch.arange(40) // 4)[:, None]
    assert torch.equal(text ^ summaries, past)


@pytest.mark.parametrize(
    "starts, lengths, rows, message",
    [
        ([0], [9], 10, "a pack of 10 rows is not a multiple of chunk_size=4"),
        ([2], [3], 8, r"document 0 \(start 2, length 3\) does not start on a multiple of chunk_size=4"),
        ([0], [0], 8, r"document 0 \(start 0, length 0\) is empty"),
        ([-8], [10], 16, r"document 0 \(start -8, length 10\) begins before the pack of 16 rows"),
        ([0, 4], [4, 5], 8, r"document 1 \(start 4, length 5\) ends beyond the pack of 8 rows"),
        ([0, 4], [5, 2], 8, r"document 1 \(start 4, length 2\) begins before its predecessor's last chunk ends"),
    ],
)
def test_bad_documents_are_named(starts, lengths, rows, message):
    with pytest.raises(ModelConfigError, match=message):
        build_layout(np.array(starts), np.array(lengths), rows, chunk_size=4)


def test_a_million_tokens_need_no_python_loop():
    """100k documents of ten tokens: only vectorised code handles this in the time of a test."""
    starts = np.arange(100_000) * 16
    pack = build_layout(starts, np.full(100_000, 10), 1_600_000, chunk_size=8)
    assert pack.num_tokens == 1_000_000
    assert pack.far_ranges(0).visible_keys == 100_000 * 2  # two rows of the second chunk see the first one's summary


# -- context-parallel shards -------------------------------------------------------------------------------------------

# 64 chunks of 4: documents that end inside a slice, that span all ranks, that have one token; with padding between.
PACK = ([3, 140, 1, 30, 70], 4, 2, 1)


def pack_of(total_rows=256, summary_tokens=2):
    whole = make_layout(*PACK)
    starts = np.flatnonzero((np.arange(whole.num_chunks) == whole.first_chunks) & (whole.chunk_lengths > 0)) * 4
    return build_layout(starts, np.array(PACK[0]), total_rows, 4, summary_tokens)


def test_worked_example_of_a_shard():
    whole = build_layout(np.array([0]), np.array([16]), 16, chunk_size=2)
    first, second = ShardedLayout(whole, 0, 2), ShardedLayout(whole, 1, 2)
    assert first.text_positions.tolist() == [0, 1, 2, 3, 12, 13, 14, 15]
    assert second.text_positions.tolist() == [4, 5, 6, 7, 8, 9, 10, 11]
    near = first.near_ranges(1)
    assert near.start.tolist() == [0, 0, 0, 0, 10, 10, 12, 12]
    assert near.end.tolist() == [1, 2, 3, 4, 13, 14, 15, 16]
    # Row 12 of the sample is local row 4. Its keys 10 and 11 are remote, key 12 is local.
    local = first.local_keys(near)
    assert local.start.tolist() == [0, 0, 0, 0, 4, 4, 4, 4]
    assert local.end.tolist() == [1, 2, 3, 4, 5, 6, 7, 8]
    # W=1: two halo rows before each slice. Rows 10 and 11 are rows 2 and 3 of the halo.
    halo = first.halo_keys(near, 2)
    assert halo.start.tolist() == [2, 2, 2, 2, 2, 2, 4, 4]
    assert halo.end.tolist() == [2, 2, 2, 2, 4, 4, 4, 4]
    prefix = first.remote_prefix(first.full_ranges())
    assert (prefix.end - prefix.start).tolist() == [0] * 4 + [12] * 4
    assert first.far_ranges(1).end.tolist() == [0, 0, 0, 0, 5, 5, 6, 6]


@pytest.mark.parametrize("size", [1, 2, 4])
def test_shards_partition_the_sample(size):
    whole = pack_of()
    shards = [ShardedLayout(whole, rank, size) for rank in range(size)]
    rows = np.concatenate([shard.rows(np.arange(256)) for shard in shards])
    assert sorted(rows.tolist()) == list(range(256))
    assert sum(shard.num_tokens for shard in shards) == whole.num_tokens
    for mixer in "KFSC":
        assert sum(s.visible_keys(mixer, 2, 7) for s in shards) == whole.visible_keys(mixer, 2, 7)
    if size == 1:  # nothing is remote
        return
    for shard in shards:
        for ranges, remote in (
            (shard.near_ranges(2), shard.halo_keys(shard.near_ranges(2), 8)),
            (shard.sliding_ranges(7), shard.halo_keys(shard.sliding_ranges(7), 6)),
            (shard.full_ranges(), shard.remote_prefix(shard.full_ranges())),
        ):
            assert shard.local_keys(ranges).visible_keys + remote.visible_keys == ranges.visible_keys
            for some in (ranges, shard.local_keys(ranges), remote):
                assert (np.diff(some.start) >= 0).all() and (np.diff(some.end) >= 0).all()


def test_samples_that_do_not_divide_into_slices_are_refused():
    with pytest.raises(ModelConfigError, match=r"does not divide into 2 x parallel\.context=3 slices"):
        check_context_parallel(256, 4, 0, 3)
    with pytest.raises(ModelConfigError, match=r"use parallel\.context=2 or less"):
        check_context_parallel(256, 4, 60, 4)


def test_a_window_longer_than_a_slice_is_named():
    whole = make_layout([64], 4, 1, 0)
    shard = ShardedLayout(whole, 0, 2)
    with pytest.raises(ModelConfigError, match="a window of 20 rows is longer than a context-parallel slice of 16"):
        shard.halo_keys(shard.near_ranges(5), 20)


def test_derived_ranges_belong_to_the_object_they_came_from():
    """Python reuses the address, and so the `id`, of a freed object; a cache must not take the new one for it."""
    shard = ShardedLayout(make_layout([64], 4, 1, 0), 1, 2)
    row = shard.rows(np.arange(64))
    for back in range(8):
        ranges = KeyRanges(np.maximum(row - back, 0), row + 1)
        assert shard.local_keys(ranges).visible_keys + shard.remote_prefix(ranges).visible_keys == ranges.visible_keys
        assert shard.halo_keys(ranges, 8).visible_keys == shard.remote_prefix(ranges).visible_keys == back * (back + 1)
        assert shard.local_keys(ranges) is shard.local_keys(ranges)
        del ranges
