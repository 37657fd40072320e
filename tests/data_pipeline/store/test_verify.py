import os
from dataclasses import replace

import pytest

from data_pipeline import DataError
from data_pipeline.text.prepare import prepare


def test_bytes_changed_in_place_are_noticed_at_the_next_open(config):
    data = prepare(config)
    path = data.directory / "train-00000.bin"
    content = bytearray(path.read_bytes())
    content[40] ^= 1
    stamp = path.stat().st_mtime_ns
    path.write_bytes(content)
    os.utime(path, ns=(stamp + 10**9, stamp + 10**9))
    with pytest.raises(DataError, match=r"train-00000.bin: its content has changed: the manifest has sha256"):
        prepare(config)
    os.utime(path, ns=(stamp, stamp))  # a disk that loses bits leaves the time alone
    prepare(config)
    with pytest.raises(DataError, match="its content has changed"):
        prepare(replace(config, verify=True))
    content[40] ^= 1
    path.write_bytes(content)
    assert prepare(replace(config, verify=True)) == data
