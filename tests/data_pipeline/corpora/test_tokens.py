import shutil
from dataclasses import replace

import numpy as np
import pytest

from data_pipeline import DataConfig, DataError, Loader, open_data
from tests.data_pipeline.conftest import BUCKET, same_sample, upload


def test_megatron_shards_behind_a_link_to_a_directory(prepared, model_path, tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "link").symlink_to(prepared.directory)
    config = DataConfig(
        source="megatron", path=str(tmp_path / "in"), tokenizer=str(model_path), cache_dir=str(tmp_path / "cache")
    )
    assert len(open_data(config).prefixes["train"]) == len(prepared.train) + len(prepared.validation)


def test_remote_shards_give_the_samples_of_local_ones_bit_for_bit(flaky, uploaded, prepared, tmp_path):
    config = DataConfig(source="shards", path=uploaded, cache_dir=str(tmp_path / "far"), retries=20)
    near = open_data(replace(config, path=str(prepared.directory), cache_dir=str(tmp_path / "near")))
    far = open_data(config)
    for split in ("train", "validation"):
        local, distant = near.samples(split, 128, 8), far.samples(split, 128, 8)
        assert local.fingerprint == distant.fingerprint and local.num_samples == distant.num_samples > 5
        loader = Loader(distant, samples_per_step=2, dp_rank=0, dp_size=1)
        for step in range(local.num_samples):  # two epochs
            assert all(same_sample(local.at(2 * step + j), sample) for j, sample in enumerate(loader.next_step()))
        loader.close()
    assert near.fingerprint == far.fingerprint and near.vocab_size == far.vocab_size
    assert flaky.num_failures > 0


def test_a_server_that_always_fails_is_an_error_that_names_the_url(flaky, uploaded, tmp_path):
    config = DataConfig(source="shards", path=uploaded, cache_dir=str(tmp_path), retries=2)
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
    assert same_sample(loader.next_step()[0], samples.at(0))
    loader.close()
    flaky.fail_every = 1
    with pytest.raises(DataError, match=r"manifest.json cannot be read after 3 attempts"):
        open_data(config)


def test_shards_that_do_not_fit_their_manifest(server, prepared, tmp_path):
    import s3fs

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
            assert one.fingerprint == other.fingerprint and same_sample(one.at(3), other.at(3))
    with pytest.raises(DataError, match=r"no such shard, and no \.idx file there"):
        open_data(replace(config, path=str(tmp_path / "nothing")))
    content = np.fromfile(tmp_path / "tokens.bin", dtype=np.uint16)
    content[7] = 60000
    content.tofile(tmp_path / "tokens.bin")
    with pytest.raises(DataError, match=r"tokens.bin: holds token 60000, but data.tokenizer has 400 tokens"):
        open_data(config)
