import subprocess
import sys

from tests.data_pipeline.conftest import REPOSITORY


def test_importing_the_package_is_light():
    heavy = ("torch", "sentencepiece", "fsspec", "pyarrow")
    script = f"import sys, data_pipeline; print([name for name in {heavy} if name in sys.modules])"
    command = [sys.executable, "-c", script]
    assert subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout == "[]\n"
