"""Remote data against a real S3-compatible server that now and then drops connections and answers 500."""

import json
import os
import threading
from dataclasses import replace
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest

from data_pipeline import DataConfig, DataError, open_data
from data_pipeline.store import remote
from data_pipeline.store.remote import RemoteObject, find_remote, open_remote, stamp_of
from data_pipeline.text.sources import Corpus
from tests.data_pipeline.conftest import BUCKET

s3fs = pytest.importorskip("s3fs")


def test_no_bucket_and_nobody_listening(server, uploaded, tmp_path, monkeypatch):
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
    for use, path in ((config, uploaded), (raw, f"s3://{BUCKET}/raw.jsonl")):
        with pytest.raises(DataError, match=r"cannot be read after 2 attempts \(.*Connect") as error:
            open_data(replace(use, path=path))
        assert path in str(error.value) and "\n" not in str(error.value)
    s3fs.S3FileSystem.clear_instance_cache()


def test_a_remote_file_reads_like_a_local_one(flaky, big_file):
    file, data = big_file
    with open_remote(file) as stream:
        assert stream.read(10) == data[:10]
        stream.seek(-5, os.SEEK_END)
        assert stream.read() == data[-5:]
        stream.seek(3)
        assert stream.read() == data[3:]
    assert flaky.num_failures > 0


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
