"""The command `python -m data_pipeline.prepare`."""

import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from data_pipeline.text.prepare import prepare
from tests.data_pipeline.conftest import REPOSITORY, assert_same_files


def run(*arguments, **options):
    command = [sys.executable, "-m", "data_pipeline.prepare", *arguments]
    return subprocess.Popen(
        command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options
    )


def test_a_path_that_is_not_utf8(config, tmp_path):
    path = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9 \xc3\xa9.jsonl")
    shutil.copyfile(config.path, path)
    child = run(f"path={path}", "source=jsonl", f"tokenizer={config.tokenizer}", f"out={config.cache_dir}")
    _, err = child.communicate(timeout=120)
    assert child.returncode == 0, err
    data = prepare(replace(config, path=path))
    assert data.manifest["source"]["path"] == path and data.fingerprint == prepare(config).fingerprint
    assert "caf\\udce9 é.jsonl" in (data.directory / "manifest.json").read_text(encoding="utf-8")


def test_a_full_disk_is_one_line_and_nothing_half_written_counts(config, tmp_path):
    straight = prepare(replace(config, shard_mb=0.002, cache_dir=str(tmp_path / "straight")))
    script = (
        "import resource, sys; from data_pipeline.prepare import main\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000)); sys.exit(main(sys.argv[1:]))"
    )  # a write beyond 3000 bytes fails, as on a full disk
    model = tmp_path / "m.model"
    model.write_bytes(Path(config.tokenizer).read_bytes())
    arguments = [f"path={config.path}", "source=jsonl", f"tokenizer={model}", f"out={tmp_path / 'full'}"]
    command = [sys.executable, "-c", script, *arguments, "shard_mb=0.002"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("error: ") == 1
    assert "cannot be built ([Errno 27] File too large); check the disk, or set another cache_dir" in done.stderr
    assert not list((tmp_path / "full").rglob("manifest.json")) and not list((tmp_path / "full").rglob("*.tmp"))
    assert_same_files(prepare(replace(config, shard_mb=0.002, cache_dir=str(tmp_path / "full"))), straight)


def test_the_command_line(config):
    child = run(f"path={config.path}", "source=jsonl", f"tokenizer={config.tokenizer}", f"out={config.cache_dir}")
    out, err = child.communicate(timeout=120)
    assert child.returncode == 0, err
    assert "vocabulary 400" in out and "train" in out and "Warning" not in err
    assert str(prepare(config).directory) in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sorce=jsonl"], "error: sorce is not a configuration key; did you mean source?"),
        (["jsonl"], "error: argument 'jsonl' must have the form key=value; the keys are source, path, "),
        (["vocab_size=many"], "error: vocab_size='many' must be a whole number"),
        (["source=jsonl"], "error: data.source=jsonl needs data.path"),
        (["source=jsonl", "path=/absent/x.jsonl"], "error: data.path=/absent/x.jsonl: no such file or directory"),
        (["tokenizer=/absent/model"], "error: /absent/model: cannot be used as a SentencePiece model"),
    ],
)
def test_the_command_line_refuses_in_one_line(arguments, message):
    child = run(*arguments)
    out, err = child.communicate(timeout=120)
    assert child.returncode == 2 and out == ""
    assert err.startswith(message) and err.count("\n") == 1
