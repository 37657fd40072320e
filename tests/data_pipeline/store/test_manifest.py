from dataclasses import replace

import pytest

from data_pipeline import DataError, build_plan, open_data
from data_pipeline.text.prepare import prepare


def test_damaged_results_are_refused(config):
    data = prepare(config)
    (data.directory / "train-00000.bin").write_bytes(b"12")
    with pytest.raises(DataError, match=r"train-00000.bin: has 2 bytes, but train-00000.idx describes"):
        build_plan(data.train, 64, 8, 0, config.cache_dir)
    with pytest.raises(DataError, match=r"train-00000.bin: its content has changed"):
        prepare(config)
    (data.directory / "manifest.json").write_text("{")
    with pytest.raises(DataError, match=r"manifest.json: cannot be read"):
        prepare(config)
    (data.directory / "manifest.json").write_text('{"format": 99}')
    with pytest.raises(DataError, match=r"manifest.json: has format 99, expected 2"):
        prepare(config)
    (data.directory / "manifest.json").write_text('{"format": 2}')
    for use in (config, replace(config, source="shards", path=str(data.directory))):
        with pytest.raises(DataError, match=r"manifest.json: lacks 'tokenizer', so it is damaged; prepare it again"):
            open_data(use)
    with pytest.raises(DataError, match=r"manifest.json: lacks 'tokenizer'"):
        build_plan(data.train, 64, 8, 1, config.cache_dir)
    (data.directory / "manifest.json").unlink()
    for content, message in (("{}", "lacks 'position'"), ('{"position": 7}', "holds a wrong value")):
        (data.directory / "progress.json").write_text(content)
        with pytest.raises(DataError, match=rf"progress.json: {message}.*delete its directory to build it again"):
            prepare(config)
