"""Key ranges: tiles and causal runs against dense masks."""

import numpy as np
import pytest

from ksa_model.layout.ranges import outside, round_down
from ksa_model.layout.sequence import ShardedLayout
from tests.ksa_model.ops.attention.test_joint import make_layout


def visible(ranges, num_keys):
    """bool [rows, num_keys]"""
    key = np.arange(num_keys)
    return (key >= ranges.start[:, None]) & (key < ranges.end[:, None])


def test_tiles_cover_every_key():
    """Tiles against the ranges that they were cut from, including a remainder of `causal_split`."""
    for lengths, k, context in (([300, 17, 150], 8, 1), ([256], 4, 2), ([5, 247], 4, 2), ([100, 156], 4, 4)):
        pack = make_layout(lengths, k, 1, 0)
        if context > 1:
            pack = ShardedLayout(pack, 1, context)
        keys = pack.num_text * context
        for ranges in (pack.full_ranges(), pack.far_ranges(1), pack.full_ranges().causal_split(16)[1]):
            seen = np.arange(keys)[None] >= ranges.start[:, None]
            seen &= np.arange(keys)[None] < ranges.end[:, None]
            check_tiles(ranges.row_tiles(32), seen)
            check_tiles(ranges.key_tiles(keys, 32), seen.T)


def check_tiles(tiles, seen):
    for i, (lo, hi, full_lo, full_hi) in enumerate(tiles):
        rows = seen[32 * i : 32 * i + 32]
        some = np.flatnonzero(rows.any(0))
        assert (lo, hi) == ((some[0], some[-1] + 1) if len(some) else (0, 0)) or (lo >= hi and not len(some))
        assert full_lo >= full_hi or rows[:, full_lo:full_hi].all()


@pytest.mark.parametrize("lengths, k, m, context", [
    ([300, 17, 150], 8, 1, 1), ([300, 17, 150], 8, 2, 1), ([256], 4, 1, 2), ([100, 156], 4, 1, 4), ([3, 5], 4, 1, 1),
], ids=str)  # fmt: skip
def test_causal_runs_and_the_remainder_are_the_ranges(lengths, k, m, context):
    """Every query-key pair is in exactly one run or in the remainder. Runs may cover padding rows, which attend to
    nothing: the kernels zero those afterwards."""
    pack = make_layout(lengths, k, m, 0)
    if context > 1:
        pack = ShardedLayout(pack, 1, context)
    for ranges, num_keys in ((pack.full_ranges(), pack.num_text), (pack.far_ranges(1), pack.num_summary)):
        runs, rest = ranges.causal_split(4)
        count = visible(rest, num_keys * context).astype(int)
        for run in runs:
            for step in range(run.num_steps):
                rows = slice(run.first_row + step * run.step_rows, run.first_row + (step + 1) * run.step_rows)
                count[rows, run.rectangle_key : run.triangle_key + (step + 1) * run.step_keys] += 1
        real = pack.text_is_real
        assert np.array_equal(count[real], visible(ranges, num_keys * context)[real])
        assert runs or max(lengths) < 16


def test_windows_have_no_causal_runs():
    ranges = make_layout([300], 4, 1, 0).near_ranges(2)
    assert ranges.causal_split(4) == ([], ranges)


def test_round_down_keeps_five_binary_digits():
    assert [round_down(n) for n in (0, 31, 32, 33, 63, 65, 1000)] == [0, 31, 32, 32, 62, 64, 992]


def test_outside():
    assert outside(range(0, 10), [range(6, 8), range(2, 4)]) == [range(0, 2), range(4, 6), range(8, 10)]
    assert outside(range(3, 5), [range(0, 10)]) == [] and outside(range(3, 5), []) == [range(3, 5)]
