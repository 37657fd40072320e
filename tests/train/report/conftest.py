from pathlib import Path

import pytest

from tests.train.report.runs import write_run


@pytest.fixture
def sweep(tmp_path) -> Path:
    for k in (2, 4, 8, 16):
        write_run(tmp_path / f"k/chunk_size={k}", chunk_size=k)
    return tmp_path / "k"
