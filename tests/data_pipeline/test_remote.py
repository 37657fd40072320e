"""Remote data against a real S3-compatible server that now and then drops connections and answers 500."""

import gzip
import json
import os
import shutil
import threading
import time
from dataclasses import replace
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from data_pipeline import DataConfig, DataError, Loader, open_data, prepare, remote
from data_pipeline.cache import BLOCK_BYTES, BlockCache
from data_pipeline.remote import RemoteObject, find_remote, open_remote, stamp_of
from data_pipeline.sources import Corpus

from .conftest import write_corpus

s3fs = pytest.importorskip("s3fs")
pytest.importorskip("moto")

BUCKET = "corpus-bucket"


@pytest.fixture(scope="module")
def server():
    from .s3 import FlakyS3

    server = FlakyS3()
    before = dict(os.environ)
    os.environ.update(
        AWS_ACCESS_KEY_ID="test", AWS_SECRET_ACCESS_KEY="test", AWS_DEFAULT_REGION="us-east-1", AWS_MAX_ATTEMPTS="1"
    )
    os.environ["AWS_ENDPOINT_URL"] = server.url
    s3fs.S3FileSystem.clear_instance_cache()
    s3fs.S3FileSystem().mkdir(BUCKET)
    yield server
    server.stop()
    s3fs.S3FileSystem.clear_instance_cache()
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture
def flaky(server, monkeypatch):
    """The server, failing one read in four; pauses between retries are cut short."""
    monkeypatch.setattr(remote, "_FIRST_WAIT_SECONDS", 0.01)
    monkeypatch.setattr(remote, "_LONGEST_WAIT_SECONDS", 0.02)
    server.fail_every, server.num_failures = 4, 0
    yield server
    server.fail_every = 0


def upload(server, local, name):
    failing, server.fail_every = server.fail_every, 0
    s3fs.S3FileSystem().put(str(local), f"{BUCKET}/{name}", recursive=Path(local).is_dir())
    server.fail_every = failing
    return f"s3://{BUCKET}/{name}"


@pytest.fixture(scope="module")
def shards(server, prepared):
    """The prepared corpus, uploaded."""
    return upload(server, prepared.directory, "prepared")


def same(one, other):
    names = ("tokens", "labels", "doc_starts", "doc_lengths", "continuation")
    return one.index == other.index and all(np.array_equal(getattr(one, n), getattr(other, n)) for n in names)


def test_remote_shards_give_the_samples_of_local_ones_bit_for_bit(flaky, shards, prepared, tmp_path):
    config = DataConfig(source="shards", path=shards, cache_dir=str(tmp_path / "far"), retries=20)
    near = open_data(replace(config, path=str(prepared.directory), cache_dir=str(tmp_path / "near")))
    far = open_data(config)
    for split in ("train", "validation"):
        local, distant = near.samples(split, 128, 8), far.samples(split, 128, 8)
        assert local.fingerprint == distant.fingerprint and local.num_samples == distant.num_samples > 5
        loader = Loader(distant, samples_per_step=2, dp_rank=0, dp_size=1)
        for step in range(local.num_samples):  # two epochs
            assert all(same(local.at(2 * step + j), sample) for j, sample in enumerate(loader.next_step()))
        loader.close()
    assert near.fingerprint == far.fingerprint and near.vocab_size == far.vocab_size
    assert flaky.num_failures > 0


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "parquet", "text"])
def test_raw_text_is_prepared_from_there_as_from_here(flaky, model_path, tmp_path, kind):
    root = tmp_path / "in"
    root.mkdir()
    texts = write_corpus(root / "a.jsonl", 400, seed=6)
    source = "jsonl"
    if kind == "jsonl.gz":
        (root / "b.jsonl.gz").write_bytes(gzip.compress((root / "a.jsonl").read_bytes()))
    elif kind == "parquet":
        pyarrow = pytest.importorskip("pyarrow")
        parquet = pytest.importorskip("pyarrow.parquet")
        parquet.write_table(pyarrow.table({"text": texts}), root / "a.parquet", row_group_size=64)
        (root / "a.jsonl").unlink()
        source = "parquet"
    elif kind == "text":
        shutil.rmtree(root)
        root.mkdir()
        for number, text in enumerate(texts[:20]):
            (root / f"{number}.txt").write_text(text)
        source = "text"
    url = upload(flaky, root, f"raw-{kind}")
    config = DataConfig(
        source=source, path=str(root), tokenizer=str(model_path), cache_dir=str(tmp_path / "near"), retries=20
    )
    near, far = prepare(config), prepare(replace(config, path=url, cache_dir=str(tmp_path / "far")))
    assert near.fingerprint == far.fingerprint
    assert near.manifest["splits"] == far.manifest["splits"]
    assert prepare(replace(config, path=url + "/*", cache_dir=str(tmp_path / "glob"))).fingerprint == near.fingerprint
    assert flaky.num_failures > 0


def test_a_stream_of_raw_text_is_the_same_from_there(flaky, model_path, tmp_path):
    (tmp_path / "in").mkdir()
    for number in range(3):
        write_corpus(tmp_path / "in" / f"{number}.jsonl", 60, seed=number)
    url = upload(flaky, tmp_path / "in", "stream-in")
    config = DataConfig(
        source="jsonl",
        stream=True,
        path=str(tmp_path / "in"),
        tokenizer=str(model_path),
        cache_dir=str(tmp_path / "near"),
        slab_mb=0.03,
        retries=20,
    )
    near = open_data(config).samples("train", 256, 8)
    far = open_data(replace(config, path=url, cache_dir=str(tmp_path / "far"))).samples("train", 256, 8)
    assert all(same(near.at(index), far.at(index)) for index in range(120))
    assert flaky.num_failures > 0 and near.bookmark(100)["stream"]["slab"] > 2
    flaky.fail_every = 1
    late = open_data(replace(config, path=str(tmp_path / "in"), cache_dir=str(tmp_path / "late")))
    late.corpus.files = tuple(replace(file, path=f"{url}/{file.name}") for file in late.corpus.files)
    late.corpus._config = replace(config, retries=1)
    with pytest.raises(DataError, match=r"stream-in/\d.jsonl cannot be read after 2 attempts"):
        late.samples("train", 256, 8).at(0)


def test_a_server_that_always_fails_is_an_error_that_names_the_place(flaky, shards, tmp_path):
    config = DataConfig(source="shards", path=shards, cache_dir=str(tmp_path), retries=2)
    samples = open_data(replace(config, retries=20)).samples("train", 128, 8)
    flaky.fail_every = 1
    samples._shards._readers[0].bin_file = replace(samples._shards._readers[0].bin_file, retries=2)
    loader = Loader(samples, samples_per_step=1, dp_rank=0, dp_size=1)
    for _ in range(2):  # again and again, never a sample left out
        with pytest.raises(DataError, match=r"train-00000.bin: bytes 0-\d+ cannot be read after 3 attempts") as error:
            loader.next_step()
        assert "\n" not in str(error.value) and loader.state()["next_sample"] == 0
    flaky.fail_every = 0
    loader.load_state(loader.state())
    assert same(loader.next_step()[0], samples.at(0))
    loader.close()
    flaky.fail_every = 1
    with pytest.raises(DataError, match=r"manifest.json cannot be read after 3 attempts"):
        open_data(config)


def test_no_bucket_and_nobody_listening(server, shards, tmp_path, monkeypatch):
    monkeypatch.setattr(remote, "_FIRST_WAIT_SECONDS", 0.01)
    config = DataConfig(source="shards", path="s3://no-such-bucket/x", cache_dir=str(tmp_path), retries=1)
    with pytest.raises(DataError, match=r"s3://no-such-bucket/x/manifest.json cannot be read") as error:
        open_data(config)
    assert "\n" not in str(error.value)
    raw = replace(config, source="jsonl")
    with pytest.raises(DataError, match=r"data.path=s3://no-such-bucket/x: no such file or directory"):
        Corpus(raw)
    s3fs.S3FileSystem.clear_instance_cache()
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    for use, path in ((config, shards), (raw, f"s3://{BUCKET}/raw.jsonl")):
        with pytest.raises(DataError, match=r"cannot be read after 2 attempts \(.*Connect") as error:
            open_data(replace(use, path=path))
        assert path in str(error.value) and "\n" not in str(error.value)
    s3fs.S3FileSystem.clear_instance_cache()


def test_shards_that_do_not_fit_their_manifest(server, prepared, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(prepared.directory, copy)
    content = bytearray((copy / "train-00000.bin").read_bytes())
    content[100] ^= 1
    (copy / "train-00000.bin").write_bytes(content)
    url = upload(server, copy, "altered")
    config = DataConfig(source="shards", path=url, cache_dir=str(tmp_path / "cache"), verify=True)
    with pytest.raises(DataError, match=r"altered/train-00000.bin: its content has changed"):
        open_data(config).samples("train", 128, 8)
    with pytest.raises(DataError, match=r"copy/train-00000.bin: its content has changed"):
        open_data(replace(config, path=str(copy), verify=False))
    s3fs.S3FileSystem().pipe(f"{BUCKET}/altered/train-00000.bin", bytes(content[:-2]))
    with pytest.raises(DataError, match=r"altered/train-00000.bin: has \d+ bytes, but train-00000.idx describes"):
        open_data(replace(config, cache_dir=str(tmp_path / "other"))).samples("train", 128, 8)
    s3fs.S3FileSystem().pipe(f"{BUCKET}/altered/train-00000.idx", b"x" * 1000)
    with pytest.raises(DataError, match=r"altered/train-00000.idx: has sha256 .* but its manifest says"):
        open_data(replace(config, cache_dir=str(tmp_path / "third"))).samples("train", 128, 8)


def test_megatron_files_are_used_as_they_are_here_and_there(flaky, prepared, tmp_path, model_path):
    for ending in ("bin", "idx"):
        shutil.copyfile(prepared.directory / f"train-00000.{ending}", tmp_path / f"tokens.{ending}")
    url = upload(flaky, tmp_path / "tokens.bin", "mega/tokens.bin")
    upload(flaky, tmp_path / "tokens.idx", "mega/tokens.idx")
    config = DataConfig(
        source="megatron",
        path=str(tmp_path / "tokens"),
        tokenizer=str(model_path),
        cache_dir=str(tmp_path / "cache"),
        validation_fraction=0.2,
        retries=20,
    )
    near = open_data(config)
    train, held_out = near.lengths("train"), near.lengths("validation")
    assert ((train > 0) ^ (held_out > 0)).all() and 0.1 < (held_out > 0).mean() < 0.3
    for path in (url, url[: -len("/tokens.bin")], f"s3://{BUCKET}/mega/*"):
        far = open_data(replace(config, path=path, cache_dir=str(tmp_path / "far")))
        for split in ("train", "validation"):
            one, other = near.samples(split, 128, 8), far.samples(split, 128, 8)
            assert one.fingerprint == other.fingerprint and same(one.at(3), other.at(3))
    with pytest.raises(DataError, match=r"no such shard, and no \.idx file there"):
        open_data(replace(config, path=str(tmp_path / "nothing")))
    content = np.fromfile(tmp_path / "tokens.bin", dtype=np.uint16)
    content[7] = 60000
    content.tofile(tmp_path / "tokens.bin")
    with pytest.raises(DataError, match=r"tokens.bin: holds token 60000, but data.tokenizer has 400 tokens"):
        open_data(config)


@pytest.fixture
def big_file(server):
    data = np.random.default_rng(0).integers(0, 256, 9 * BLOCK_BYTES + 1234, dtype=np.uint8).tobytes()
    s3fs.S3FileSystem().pipe(f"{BUCKET}/big", data)
    return find_remote(f"s3://{BUCKET}/big", 20), data


def test_a_remote_file_reads_like_a_local_one(flaky, big_file):
    file, data = big_file
    with open_remote(file) as stream:
        assert stream.read(10) == data[:10]
        stream.seek(-5, os.SEEK_END)
        assert stream.read() == data[-5:]
        stream.seek(3)
        assert stream.read() == data[3:]
    assert flaky.num_failures > 0


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


def test_a_short_answer_is_not_taken_for_the_range(server, big_file):
    file, data = big_file
    longer = RemoteObject(file.url, file.size + 10, file.stamp, 1)
    with pytest.raises(DataError, match=r"big: bytes \d+-\d+ cannot be read after 2 attempts \(OSError: got \d+ of 20"):
        longer.read(file.size - 10, file.size + 10)
    assert json.dumps(file.stamp) and file.read(5, 9) == data[5:9]


@pytest.fixture
def plain_server(tmp_path):
    """A web server that sends `Last-Modified` and no ETag."""
    (tmp_path / "served").mkdir()

    class Handler(SimpleHTTPRequestHandler):
        def __init__(self, *arguments):
            super().__init__(*arguments, directory=str(tmp_path / "served"))

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield tmp_path / "served", f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_an_object_that_changes_on_a_server_without_etags_gets_another_stamp(plain_server):
    folder, url = plain_server
    stamps = []
    for second in (10, 20):
        (folder / "a").write_bytes(b"12345")
        os.utime(folder / "a", (second, second))
        stamps.append(find_remote(f"{url}/a", 0).stamp)
    assert "" not in stamps and stamps[0] != stamps[1]


@pytest.mark.parametrize(
    ("info", "stamp"),
    [
        ({"mtime": 0.0}, "0.0"),
        ({"ETag": "", "Last-Modified": "Thu, 01 Jan 1970 00:00:10 GMT"}, "Thu, 01 Jan 1970 00:00:10 GMT"),
        ({"Content-MD5": "x", "Last-Modified": "y"}, "x"),
        ({"Digest": "x", "Last-Modified": "y"}, "x"),
        ({"ETag": "e", "LastModified": "y"}, "e"),
        ({"mtime": None, "size": 3}, ""),
    ],
)
def test_what_tells_the_version_of_a_file(info, stamp):
    assert stamp_of(info) == stamp
