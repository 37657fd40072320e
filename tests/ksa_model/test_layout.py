"""Worked examples, written out by hand, and the ranges against the rule's definition."""

import numpy as np
import pytest
import torch

from ksa_model import layout, reference
from ksa_model.config import ModelConfigError


def test_worked_example_of_the_docstring():
    pack = layout.build(np.array([0, 4]), np.array([3, 1]), 8, chunk_size=2)
    assert pack.chunk_lengths.tolist() == [2, 1, 1, 0]
    assert pack.first_chunks.tolist() == [0, 0, 2, 3]
    assert pack.text_positions.tolist() == [0, 1, 2, 3, 0, 1, 0, 1]
    assert pack.summary_positions.tolist() == [1, 2, 0, 0]
    assert pack.text_is_real.tolist() == [True, True, True, False, True, False, False, False]


def test_worked_example_of_the_rule():
    """k=2, m=1, W=1, six tokens t0..t5 and summaries s0 s1 s2."""
    pack = layout.build(np.array([0]), np.array([6]), 6, chunk_size=2)
    near, far = pack.near_ranges(1), pack.far_ranges(1)
    assert list(zip(near.start.tolist(), near.end.tolist())) == [(0, 1), (0, 2), (0, 3), (0, 4), (2, 5), (2, 6)]
    assert list(zip(far.start.tolist(), far.end.tolist())) == [(0, 0), (0, 0), (0, 0), (0, 0), (0, 1), (0, 1)]
    text, own = reference.summary_sees(pack)
    assert text[1].nonzero().flatten().tolist() == [2, 3]
    assert own[1].nonzero().flatten().tolist() == [1]


def test_summary_positions_with_several_summaries():
    """m=3 over 5 tokens: ends of thirds, rounded down, never below the chunk's first position."""
    pack = layout.build(np.array([0]), np.array([7]), 10, chunk_size=5, summary_tokens=3)
    assert pack.summary_positions.tolist() == [0, 2, 4, 5, 5, 6]


@pytest.mark.parametrize("seed", range(6))
def test_ranges_are_the_rule(seed):
    """Every range, and its order, against the dense masks, on random packs."""
    rng = np.random.default_rng(seed)
    k, m, window = int(rng.integers(1, 7)), int(rng.integers(1, 4)), int(rng.integers(0, 5))
    lengths = rng.integers(1, 30, size=7)
    gaps = rng.integers(0, 3, size=7) * k  # alignment coarser than a chunk leaves chunks of padding
    rows = -(-lengths // k) * k + gaps
    starts = np.concatenate([[0], np.cumsum(rows)[:-1]])
    pack = layout.build(starts, lengths, int(rows.sum()), k, m)
    cases = [
        (pack.near_ranges(window), reference.text_sees_text(pack, "K", window), pack.num_text),
        (pack.far_ranges(window), reference.text_sees_summary(pack, window), pack.num_summary),
        (pack.full_ranges(), reference.text_sees_text(pack, "F"), pack.num_text),
        (pack.sliding_ranges(5), reference.text_sees_text(pack, "S", window_tokens=5), pack.num_text),
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
    pack = layout.build(np.array([0]), np.array([40]), 40, chunk_size=4)
    text = reference.text_sees_text(pack, "K", 2).view(40, 10, 4).any(-1)
    summaries = reference.text_sees_summary(pack, 2)
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
        layout.build(np.array(starts), np.array(lengths), rows, chunk_size=4)


def test_a_million_rows_take_milliseconds_of_work_not_python_loops():
    """100k documents of ten tokens: only vectorised code gets through this in the suite's time."""
    starts = np.arange(100_000) * 16
    pack = layout.build(starts, np.full(100_000, 10), 1_600_000, chunk_size=8)
    assert pack.num_tokens == 1_000_000
    assert pack.far_ranges(0).visible_keys == 100_000 * 2  # two rows of the second chunk see the first one's summary
