"""target=ssh: the generated script and command line, and exit codes that are final."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest

from launch import ssh
from launch.agent import FINAL
from launch.errors import LaunchError
from tests.launch.conftest import NASTY, ROOT, nasty_launch, put_on_path, words_of


def test_the_script_is_quoted_and_the_remote_command_contains_no_user_text(tmp_path):
    launch = nasty_launch(["target=ssh", "launch.hosts=[node1,node2]", "ranks_per_node=2"], tmp_path)
    (tmp_path / "bin").mkdir()
    fake = tmp_path / "bin/python"  # prints its arguments
    fake.write_text('#!/bin/bash\nprintf "%s\\0" "$NOTE" "$@"\n')
    fake.chmod(0o755)
    settings = dataclasses.replace(launch.settings, python=str(fake))
    script = ssh.rank_script(dataclasses.replace(launch, settings=settings))
    assert words_of(script, tmp_path, "") == [NASTY, "-m", "train", f"data.text_key={NASTY}"]
    assert ssh.hostfile(launch) == "node1 slots=2\nnode2 slots=2\n"
    line = ssh.command(dataclasses.replace(launch, directory=Path("/work")), Path("/work/runs/plain"))
    assert not any("pwned" in word for word in line)
    with pytest.raises(LaunchError, match="remote shells"):
        ssh.command(launch, tmp_path / NASTY)


@pytest.mark.parametrize("code", FINAL)
def test_a_final_exit_code_is_not_tried_again(code, tmp_path, monkeypatch):
    attempts = tmp_path / "attempts"
    put_on_path(tmp_path / "bin", monkeypatch, ssh="", pdsh="", python=f"echo started >> {attempts}; exit {code}")
    arguments = ["target=ssh", "launch.hosts=[node1]", "launch.check=false", f"launch.python={tmp_path / 'bin/python'}"]
    done = subprocess.run(
        [sys.executable, "-m", "launch", *arguments, "--", f"run.root={tmp_path}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, attempts.read_text()) == (code, "started\n"), done.stderr
