"""One directory of checkpoints belongs to one run, from before its first checkpoint on."""

import json
import os
import threading

import pytest

from tests.data_pipeline.s3 import FlakyS3
from train.checkpoint import owner
from train.checkpoint.storage import CheckpointError, CheckpointPath

CONTENDERS = 8


@pytest.fixture
def s3(monkeypatch, tmp_path):
    """A directory of an S3 server of its own."""
    import boto3
    import fsspec

    server = FlakyS3()
    for name, value in (
        ("AWS_ACCESS_KEY_ID", "x"), ("AWS_SECRET_ACCESS_KEY", "x"), ("AWS_DEFAULT_REGION", "us-east-1"),
        ("AWS_ENDPOINT_URL", server.url),
    ):  # fmt: skip
        monkeypatch.setenv(name, value)
    fsspec.filesystem("s3").clear_instance_cache()
    boto3.client("s3", endpoint_url=server.url).create_bucket(Bucket="shelf")
    yield f"s3://shelf{tmp_path}/a"
    server.stop()
    fsspec.filesystem("s3").clear_instance_cache()


@pytest.fixture(params=["local", "memory", "s3"])
def own(request, tmp_path):
    if request.param == "s3":
        return CheckpointPath(request.getfixturevalue("s3"))
    return CheckpointPath(tmp_path / "disk/a" if request.param == "local" else f"memory://{tmp_path}/a")


def finish_checkpoint(own):
    (own / "step-00000005").make()
    (own / "step-00000005" / "manifest.json").write(b"{}")


def test_the_second_run_is_refused_until_there_is_a_checkpoint(own, tmp_path):
    first, second = tmp_path / "runs/a", tmp_path / "others/a"
    owner.claim(own, first)
    written = (own / owner.OWNER).read()
    assert json.loads(written)["run_directory"] == str(first)
    with pytest.raises(CheckpointError, match=rf"belongs to the run in {first} on .*choose another run.name"):
        owner.claim(own, second)
    owner.claim(own, first)  # killed before its first save, and started again
    assert (own / owner.OWNER).read() == written and list(own.entries()) == [owner.OWNER]
    finish_checkpoint(own)
    owner.claim(own, second)  # now the configurations in the checkpoints decide
    assert (own / owner.OWNER).read() == written


def test_an_object_store_creates_the_file_only_where_there_is_none(s3, tmp_path, monkeypatch):
    """One conditional request, so that nothing can happen between a look and a write."""
    own = CheckpointPath(s3)
    monkeypatch.setattr(CheckpointPath, "write", lambda path, content: pytest.fail("written without a condition"))
    owner.claim(own, tmp_path / "runs/a")
    with pytest.raises(CheckpointError, match="belongs to the run in"):
        owner.claim(own, tmp_path / "others/a")


@pytest.mark.parametrize("has_links", [True, False])
def test_of_several_at_the_same_moment_one_passes(tmp_path, monkeypatch, has_links):
    if not has_links:
        monkeypatch.setattr(os, "link", lambda *paths: (_ for _ in ()).throw(PermissionError("no hard links here")))
    own, gate, passed = CheckpointPath(tmp_path / "disk/a"), threading.Barrier(CONTENDERS), []

    def contend(number):
        gate.wait()
        try:
            owner.claim(own, tmp_path / f"runs-{number}/a")
            passed.append(number)
        except CheckpointError:
            pass

    threads = [threading.Thread(target=contend, args=(number,)) for number in range(CONTENDERS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(passed) == 1 and list(own.entries()) == [owner.OWNER]


def test_a_run_that_moves_keeps_its_id_and_one_whose_directory_is_lost_gets_it_back(tmp_path):
    first = tmp_path / "a"
    first.mkdir()
    known = owner.run_id(first)
    owner.note_run_id(first)
    first.rename(tmp_path / "b")
    assert owner.run_id(tmp_path / "b") == known == owner.run_id(first) != owner.run_id(tmp_path / "c")
