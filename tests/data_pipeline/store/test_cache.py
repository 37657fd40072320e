import os
import threading
import time
from pathlib import Path

import pytest

from data_pipeline import DataError
from data_pipeline.store.cache import BLOCK_BYTES, BlockCache


def block_files(directory):
    return sorted(path for path in Path(directory).iterdir() if path.name.endswith(".block"))


def test_the_cache_keeps_its_bound_and_what_was_used_last(big_file, tmp_path):
    file, data = big_file
    bound = 5 * (BLOCK_BYTES + 4)
    cache = BlockCache(tmp_path, bound)
    for start, stop in ((0, 10), (BLOCK_BYTES - 5, BLOCK_BYTES + 5), (5, 3 * BLOCK_BYTES), (0, 0), (0, len(data))):
        assert cache.read(file, start, stop) == data[start:stop]
        assert sum(path.stat().st_size for path in block_files(tmp_path)) <= bound
    cache = BlockCache(tmp_path / "lru", bound)
    for number in (0, 1, 2, 3, 0, 4, 0, 5):
        cache.read(file, number * BLOCK_BYTES, number * BLOCK_BYTES + 1)
        time.sleep(0.01)
    before = cache.num_fetched
    cache.read(file, 0, 1)  # used again and again, so it outlived the others
    assert cache.num_fetched == before
    cache.read(file, BLOCK_BYTES, BLOCK_BYTES + 1)
    assert cache.num_fetched == before + 1


def test_processes_share_the_cache_and_fetch_a_block_once(server, big_file, tmp_path):
    file, data = big_file
    caches = [BlockCache(tmp_path, 100 * BLOCK_BYTES) for _ in range(4)]  # as separate as processes: locks are by file
    results = []
    threads = [threading.Thread(target=lambda c=c: results.append(c.read(file, 0, len(data)))) for c in caches]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(result == data for result in results) and len(results) == 4
    assert sum(cache.num_fetched for cache in caches) == 10


def test_damaged_and_half_written_blocks_are_fetched_again(big_file, tmp_path):
    file, data = big_file
    cache = BlockCache(tmp_path, 100 * BLOCK_BYTES)
    cache.read(file, 0, len(data))
    blocks = block_files(tmp_path)
    blocks[0].write_bytes(blocks[0].read_bytes()[:1000])
    damaged = bytearray(blocks[1].read_bytes())
    damaged[77] ^= 4
    blocks[1].write_bytes(damaged)
    again = BlockCache(tmp_path, 100 * BLOCK_BYTES)
    assert again.read(file, 0, len(data)) == data and again.num_fetched == 2


def test_a_full_disk_is_one_line(big_file, tmp_path, monkeypatch):
    file, _ = big_file
    cache = BlockCache(tmp_path, 100 * BLOCK_BYTES)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(DataError, match=r"cache of remote shards cannot be written \(.*No space left") as error:
        cache.read(file, 0, 10)
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)
    assert block_files(tmp_path) == []
    with pytest.raises(DataError, match=r"data.cache_gb=0.001 is less than four blocks"):
        BlockCache(tmp_path, 10**6)
