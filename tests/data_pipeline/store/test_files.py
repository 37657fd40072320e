import subprocess
import sys

import pytest

from data_pipeline.store.files import build_once
from tests.data_pipeline.conftest import REPOSITORY


def test_a_process_that_finds_another_building_waits_for_it(tmp_path):
    target = tmp_path / "work"
    script = (
        "import sys; from pathlib import Path; from data_pipeline.store.files import build_once, write_json\n"
        "def build(directory):\n"
        "    print('building', flush=True); sys.stdin.readline(); write_json(directory / 'done', {})\n"
        f"build_once(Path({str(target)!r}), 'done', build)"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", script], cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert child.stdout.readline() == "building\n"
    waited = []

    def on_wait():
        waited.append(True)
        child.stdin.write("\n")
        child.stdin.flush()

    build_once(target, "done", lambda directory: pytest.fail("built twice"), on_wait)
    child.communicate(timeout=60)
    assert waited == [True] and child.returncode == 0
