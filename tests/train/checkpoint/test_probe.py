"""Whether the place of checkpoints can be written is known before anything heavy starts."""

import os

import pytest
import torch.distributed as dist

from tests.train.runs import make_config
from train.checkpoint import probe
from train.config.errors import ConfigError
from train.distributed.ranks import Ranks
from train.start import checkpoint_directory


def check(config):
    probe.check_writable(config, checkpoint_directory(config), Ranks(dist.HashStore(), 0, 1, "test"))


def test_probes_leave_nothing_behind(corpus, tmp_path):
    for where in (None, str(tmp_path / "new/place"), f"file://{tmp_path}/other", "memory://bucket"):
        check(make_config(corpus, tmp_path / "runs", checkpoint__dir=where))
    (tmp_path / "runs/default").mkdir(parents=True)
    check(make_config(corpus, tmp_path / "runs"))
    assert [str(p.relative_to(tmp_path)) for p in sorted(tmp_path.rglob("*"))] == ["runs", "runs/default"]
    import fsspec

    assert not fsspec.filesystem("memory").find("/bucket")


@pytest.mark.parametrize("place", ["{}/file", "{}/file/below", "/proc/nowhere/ckpt", "/sys/ckpt", "{}/" + "x" * 300])
def test_places_that_cannot_be_written(corpus, tmp_path, place):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"^checkpoint.dir=\S+: rank 0 on \S+ cannot write below .*every rank can"):
        check(make_config(corpus, tmp_path / "runs", checkpoint__dir=place.format(tmp_path)))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_directory_without_permission(corpus, tmp_path):
    (tmp_path / "shut").mkdir(mode=0o555)
    with pytest.raises(ConfigError, match="Permission denied"):
        check(make_config(corpus, tmp_path / "runs", checkpoint__dir=str(tmp_path / "shut")))


def test_an_object_store_that_refuses(corpus, tmp_path, monkeypatch):
    from fsspec.implementations.memory import MemoryFileSystem

    def denied(*_, **__):
        raise RuntimeError("AccessDenied")

    monkeypatch.setattr(MemoryFileSystem, "_open", denied)
    with pytest.raises(ConfigError, match=r"checkpoint.dir=memory://bucket: .*RuntimeError: AccessDenied"):
        check(make_config(corpus, tmp_path / "runs", checkpoint__dir="memory://bucket"))


class OtherHost(Ranks):
    """Rank 1 of 2 on a host where the main rank's folder is not there."""

    def __init__(self):
        super().__init__(dist.HashStore(), 1, 2, "test")

    def from_main(self, value, what):
        return "/on/the/main/host/.probe-0"


def test_places_that_are_not_shared(corpus, tmp_path):
    config = make_config(corpus, tmp_path / "runs", checkpoint__dir=str(tmp_path))
    with pytest.raises(ConfigError, match=r"rank 1 on \S+ does not write to the same place as rank 0.*all hosts share"):
        probe.check_writable(config, checkpoint_directory(config), OtherHost())
