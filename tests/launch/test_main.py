"""The command `python -m launch`: exit codes, dry runs, and status of what is not there."""

import subprocess
import sys
from pathlib import Path

import pytest

from launch.settings import CONFIGS
from tests import commands
from tests.launch.conftest import SLURM, python


def test_exit_codes_and_dry_run():
    """2 for bad input; a dry run prints the job and leaves nothing behind."""
    wrong = python("launch", "target=slurm")
    assert (wrong.returncode, wrong.stdout) == (2, "") and wrong.stderr.startswith("error: target=slurm needs")
    dry = python("launch", *SLURM, "launch.dry_run=true", "--", "run.name=never-started")
    assert dry.returncode == 0 and "#!/bin/bash" in dry.stdout and "parameters" in dry.stderr
    assert not Path("runs/never-started").exists()


@pytest.mark.parametrize("target", [SLURM, ["target=local"], ["target=kubernetes", "launch.image=i"]])
def test_dry_run_without_the_check_needs_no_torch(target):
    code = "import sys, launch.__main__ as m; m.main(sys.argv[1:]); sys.exit('torch' in sys.modules)"
    line = [sys.executable, "-c", code, *target, "launch.dry_run=true", "launch.check=false"]
    done = subprocess.run(line, cwd=CONFIGS.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("names", ["run.root={file} run.name=a", "run.root={folder} run.name=file"])
def test_a_run_directory_that_cannot_be_created(names, tmp_path):
    (tmp_path / "file").touch()
    overrides = names.format(file=tmp_path / "file", folder=tmp_path).split()
    code, _, err = commands.run("launch", "target=local", "launch.check=false", "--", *overrides)
    message = err.splitlines()[-1]
    assert code == 2
    assert message.startswith(f"error: {tmp_path}/file") and "choose another run.root or run.name" in message


def test_status_of_a_run_that_is_not_there(tmp_path):
    done = python("launch", "status", str(tmp_path / "nothing"))
    assert done.returncode == 2 and done.stderr.startswith("error:")
