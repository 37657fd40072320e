import json
import os
import random
from pathlib import Path

import numpy as np
import pytest

from data_pipeline import DataConfig
from data_pipeline.store import remote
from data_pipeline.store.cache import BLOCK_BYTES
from data_pipeline.text.prepare import prepare
from data_pipeline.text.tokenizer import train_tokenizer

REPOSITORY = Path(__file__).parents[2]
BUCKET = "corpus-bucket"
WORDS = "attention summary chunk window token layer model tensor rank shard plan order sample loader pack index".split()


def write_corpus(path: Path, num_documents: int, seed: int = 0, mean_words: int = 60) -> list[str]:
    """A JSONL file of seeded texts of very different lengths; returns the texts."""
    rng = random.Random(seed)
    texts = []
    for number in range(num_documents):
        num_words = int(rng.expovariate(1 / mean_words)) + 1
        words = [rng.choice(WORDS) + rng.choice(["", "\n", "s", "ed", "()", " = 1"]) for _ in range(num_words)]
        texts.append(f"# document {number}\n" + " ".join(words))
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return texts


def blocks_of(content, sizes):
    """Text or bytes in consecutive blocks of the given sizes."""
    at = 0
    while at < len(content):
        size = next(sizes)
        yield content[at : at + size]
        at += size


def same_sample(one, other):
    names = ("tokens", "labels", "doc_starts", "doc_lengths", "continuation")
    return one.index == other.index and all(np.array_equal(getattr(one, n), getattr(other, n)) for n in names)


def assert_same_files(again, straight):
    assert again.manifest == straight.manifest
    names = {path.name for path in straight.directory.iterdir()}
    assert {path.name for path in again.directory.iterdir()} - {"progress.json"} == names
    for name in names:
        assert (again.directory / name).read_bytes() == (straight.directory / name).read_bytes()


def upload(server, local, name):
    """Copy a local file or directory to the bucket without failures; returns its URL."""
    import s3fs

    failing, server.fail_every = server.fail_every, 0
    s3fs.S3FileSystem().put(str(local), f"{BUCKET}/{name}", recursive=Path(local).is_dir())
    server.fail_every = failing
    return f"s3://{BUCKET}/{name}"


@pytest.fixture(scope="session")
def model_path(tmp_path_factory):
    """A small BPE model."""
    path = tmp_path_factory.mktemp("tokenizer") / "small.model"
    texts = write_corpus(path.with_suffix(".jsonl"), 200)
    train_tokenizer(texts, path, 400)
    return path


@pytest.fixture(scope="session")
def prepared(tmp_path_factory, model_path):
    """A prepared corpus of 300 documents."""
    root = tmp_path_factory.mktemp("prepared")
    write_corpus(root / "corpus.jsonl", 300, seed=1)
    return prepare(
        DataConfig(
            source="jsonl",
            path=str(root / "corpus.jsonl"),
            tokenizer=str(model_path),
            cache_dir=str(root / "cache"),
            validation_fraction=0.1,
        )
    )


@pytest.fixture
def config(tmp_path, model_path):
    """A corpus of 100 documents that is not prepared yet."""
    write_corpus(tmp_path / "corpus.jsonl", 100, seed=2)
    return DataConfig(
        source="jsonl",
        path=str(tmp_path / "corpus.jsonl"),
        tokenizer=str(model_path),
        cache_dir=str(tmp_path / "cache"),
    )


@pytest.fixture(scope="module")
def server():
    """An S3-compatible server with a bucket."""
    s3fs = pytest.importorskip("s3fs")
    pytest.importorskip("moto")
    from tests.data_pipeline.s3 import FlakyS3

    server = FlakyS3()
    before = dict(os.environ)
    os.environ.update(
        AWS_ACCESS_KEY_ID="test", AWS_SECRET_ACCESS_KEY="test", AWS_DEFAULT_REGION="us-east-1", AWS_MAX_ATTEMPTS="1"
    )
    os.environ["AWS_ENDPOINT_URL"] = server.url
    s3fs.S3FileSystem.clear_instance_cache()
    s3fs.S3FileSystem().makedirs(BUCKET, exist_ok=True)  # the servers of a process share their files
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


@pytest.fixture(scope="module")
def uploaded(server, prepared):
    """The URL of the prepared corpus on the server."""
    return upload(server, prepared.directory, "prepared")


@pytest.fixture
def big_file(server):
    """A remote file of ten blocks, and its content."""
    import s3fs

    data = np.random.default_rng(0).integers(0, 256, 9 * BLOCK_BYTES + 1234, dtype=np.uint8).tobytes()
    s3fs.S3FileSystem().pipe(f"{BUCKET}/big", data)
    return remote.find_remote(f"s3://{BUCKET}/big", 20), data
