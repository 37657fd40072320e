import hashlib

import numpy as np
import pytest

from data_pipeline.packing.order import derive_key, mix64, permute


def test_mix64_is_splitmix64():
    # The first outputs of the published generator with state 0, which adds its constant before it mixes.
    state = np.array([0, 0x9E3779B97F4A7C15], dtype=np.uint64)
    assert [hex(value) for value in mix64(state).tolist()] == ["0xe220a8397b1dcdaf", "0x6e789e6aa1b965f4"]


@pytest.mark.parametrize("size", [1, 2, 3, 7, 63, 64, 65, 127, 128, 129, 1000, 4096, 65537])
def test_a_permutation_hits_every_index_once(size):
    result = permute(np.arange(size), size, key=size)
    assert np.array_equal(np.sort(result), np.arange(size))


def test_one_element_alone_equals_that_element_of_the_whole():
    whole = permute(np.arange(777), 777, key=5)
    assert [int(permute(np.array([i]), 777, key=5)[0]) for i in range(777)] == whole.tolist()


def test_the_order_is_frozen():
    # A change here reorders every run that is resumed: raise the plan's algorithm version with it.
    digest = hashlib.sha256()
    for size in (1, 5, 64, 1000, 100_003):
        for key in (0, 1, derive_key(7, 2, 3)):
            digest.update(permute(np.arange(size), size, key).astype("<i8").tobytes())
    assert digest.hexdigest() == "a87216b66f506dc2b9bbae61bc693a4f82df4db52384bf82ca25aa75ad049986"
    assert permute(np.arange(8), 8, key=0).tolist() == [5, 6, 2, 3, 7, 4, 0, 1]
    assert derive_key(1, 2, 3) == 15020427595393229491


def test_huge_ranges_need_no_memory():
    size = 10**12 + 39
    indices = np.array([0, 1, size // 2, size - 1])
    result = permute(indices, size, key=3)
    assert len(set(result.tolist())) == 4
    assert (result >= 0).all() and (result < size).all()


def test_every_position_is_about_equally_likely():
    size, keys = 20, 2000
    counts = np.zeros((size, size), dtype=int)
    for key in range(keys):
        counts[np.arange(size), permute(np.arange(size), size, derive_key(key))] += 1
    expected = keys / size
    chi_square = ((counts - expected) ** 2 / expected).sum()
    degrees = (size - 1) ** 2
    assert abs(chi_square - degrees) < 6 * (2 * degrees) ** 0.5


def test_keys_depend_on_every_part_and_its_position():
    keys = {derive_key(*parts) for parts in [(0,), (0, 0), (1,), (0, 1), (1, 0), (2**63 - 1,), (1, 2, 3), (3, 2, 1)]}
    assert len(keys) == 8


def test_out_of_range():
    with pytest.raises(ValueError, match=r"range\(4\)"):
        permute(np.array([4]), 4, key=0)
    with pytest.raises(ValueError, match="at least 1"):
        permute(np.array([], dtype=np.int64), 0, key=0)
