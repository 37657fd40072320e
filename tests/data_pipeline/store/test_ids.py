"""No token that the tokenizer does not have is trained on: the error names shard, document and id."""

import os
from dataclasses import replace

import numpy as np
import pytest

from data_pipeline import DataConfig, DataError, open_data
from data_pipeline.config import CorpusConfig
from data_pipeline.store import ids
from data_pipeline.store.shards import ShardReader, ShardSet, ShardWriter
from tests.data_pipeline.conftest import upload

VOCAB = 400
LENGTHS = [700_000, 0, 3, 900_000, 0, 0, 5]


def write_shard(prefix, changes=(), dtype=np.int32):
    """A shard whose token (document, position) is `id` for each of `changes`."""
    rng = np.random.default_rng(0)
    with ShardWriter(prefix, np.dtype(dtype)) as writer:
        for number, length in enumerate(LENGTHS):
            tokens = rng.integers(0, VOCAB, length)
            for document, position, token in changes:
                if document == number:
                    tokens[position] = token
            writer.add(tokens)


@pytest.fixture
def config(tmp_path, model_path):
    return DataConfig(
        source="megatron", path=str(tmp_path / "in"), tokenizer=str(model_path), cache_dir=str(tmp_path / "cache")
    )


@pytest.mark.parametrize(
    ("document", "position", "token"),
    [(3, 555_555, VOCAB), (3, 0, -1), (6, 4, 2**31 - 1), (2, 1, 401), (0, 33_333, -7)],
)
def test_one_id_outside_the_vocabulary_is_named(tmp_path, config, document, position, token):
    (tmp_path / "in").mkdir()
    write_shard(tmp_path / "in" / "a")
    write_shard(tmp_path / "in" / "b", [(document, position, token)])
    place = rf"\(document {document}, token {position} of it"
    wanted = rf"in/b.bin: holds token {token}, but data.tokenizer has {VOCAB} tokens {place}"
    mixture = DataConfig(
        source="mixture",
        tokenizer=config.tokenizer,
        cache_dir=config.cache_dir,
        corpora=(CorpusConfig("m", "megatron", config.path),),
    )
    for one in (config, replace(config, path=str(tmp_path / "in" / "*"), validation_fraction=0.0), mixture):
        for _ in range(2):  # an error is not a record that all is well
            with pytest.raises(DataError, match=wanted):
                open_data(one)
    held_out = replace(config, path=str(tmp_path / "in" / "a"), validation_path=str(tmp_path / "in" / "b"))
    with pytest.raises(DataError, match=wanted):
        open_data(replace(held_out, validation_fraction=0.01))


@pytest.mark.parametrize("dtype", [np.int32, np.uint16])
def test_shards_are_read_once_until_they_change(tmp_path, config, monkeypatch, dtype):
    (tmp_path / "in").mkdir()
    for name in "ab":
        write_shard(tmp_path / "in" / name, dtype=dtype)
    read = []
    chunks = ids._chunks
    monkeypatch.setattr(ids, "_chunks", lambda reader: read.append(reader.name[-1]) or chunks(reader))
    monkeypatch.setattr(ids, "_CHUNK_TOKENS", 100_000)
    data = open_data(config)
    assert read == ["a", "b"] and data.samples("train", 128, 8).num_samples > 5
    open_data(config)
    assert read == ["a", "b"]
    content = np.fromfile(tmp_path / "in" / "b.bin", dtype)
    content[654_321] = VOCAB + 7  # between the ranges that are hashed
    content.tofile(tmp_path / "in" / "b.bin")
    os.utime(tmp_path / "in" / "b.bin", ns=(1, 1))
    with pytest.raises(DataError, match=r"b.bin: holds token 407, .*\(document 0, token 654321 of it"):
        open_data(config)
    assert set(read[2:]) == {"b"}


def test_tokens_of_remote_shards_are_checked_before_they_are_trained_on(server, tmp_path, config):
    (tmp_path / "in").mkdir()
    write_shard(tmp_path / "in" / "a", [(3, 200_000, VOCAB)])
    far = replace(config, path=upload(server, tmp_path / "in", "ids"), validation_fraction=0.0)
    samples = open_data(far).samples("train", 100_000, 8)
    with pytest.raises(DataError, match=rf"/a.bin: holds token {VOCAB}, .*\(document 3, token 200000 of it"):
        for index in range(samples.num_samples):
            samples.at(index)


def test_a_set_of_shards_checks_only_with_a_vocabulary(tmp_path):
    write_shard(tmp_path / "a", [(3, 10, 70_000)])
    assert ShardSet([tmp_path / "a"]).read(3, 10, 1).tolist() == [70_000]
    checked = ShardSet([tmp_path / "a"], ShardReader, VOCAB)
    assert checked.read(3, 0, 10).size == 10 and checked.read(1, 0, 0).size == 0
    with pytest.raises(DataError, match=r"holds token 70000, .*\(document 3, token 10 of it"):
        checked.read(3, 9, 5)
