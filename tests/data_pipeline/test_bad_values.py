"""Every command answers every bad value with one line, exit code 2 and no traceback."""

import importlib
import json
import os
import signal
import subprocess
import sys
import time

import pytest

from data_pipeline.text.tokenizer import train_tokenizer
from tests.data_pipeline.conftest import REPOSITORY, write_corpus

LONG = "x" * 300
PATHS = [
    LONG,
    "é" * 200,
    "x/" * 3000,
    "foo://x",
    "s3://",
    "http://",
    "[",
    "${oc.env:NONE}",
    "absent/file",
    "file://" + LONG,
]
NO_WHOLE = ["x", "", "1.5", "1e3", "nan", "true", "0x10", "²", "null"]
NO_SIZE = ["-1", "0", "nan", "inf", "1e400", "1e308", "true", "x", ""]
RAW = ["source=jsonl", "path=a.jsonl", "tokenizer=t.model"]
MIXTURE = ["source=mixture", "tokenizer=t.model"]
ONE = "corpora=[{name: a, source: jsonl, path: a.jsonl}]"


def cases():
    for path in PATHS:
        for source in ("text", "jsonl", "parquet"):
            yield "prepare", [f"source={source}", f"path={path}", "tokenizer=t.model", "retries=0"]
        for source in ("shards", "megatron"):
            yield "inspect", [f"source={source}", f"path={path}", "tokenizer=t.model", "retries=0"]
        yield "prepare", [*RAW, f"validation_path={path}", "retries=0"]
        yield "prepare", ["source=jsonl", "path=a.jsonl", f"tokenizer={path}"]
        yield "tokenizer", ["info", f"tokenizer={path}"]
        yield "inspect", ["source=mixture", f"corpora=[{{name: a, source: shards, path: {json.dumps(path)}}}]"]
    for path in (LONG, "é" * 200, "x/" * 3000, "foo://x", "a.jsonl/x", "/proc/none/x"):
        yield "prepare", [*RAW, f"out={path}"]
        yield "inspect", [*RAW, f"cache_dir={path}"]
        yield "inspect", [*RAW, "seq_len=64", f"picture={path}"]
        yield "tokenizer", ["train", "source=jsonl", "path=a.jsonl", "vocab_size=300", f"out={path}"]
    for value in NO_WHOLE:
        for key in ("vocab_size", "seed", "prefetch_samples", "retries", "seq_len", "alignment", "sample", "rows"):
            yield "inspect", [*RAW, f"{key}={value}"]
    for value in ("-1", "0", "10" * 20):
        for key in ("seq_len", "alignment", "vocab_size"):
            yield "inspect", [*RAW, f"{key}={value}"]
    for value in NO_SIZE:
        for key in ("shard_mb", "cache_gb", "slab_mb"):
            yield "inspect", [*RAW, f"{key}={value}"]
    for value in ("1", "-1", "nan", "x", "1e400"):
        yield "prepare", [*RAW, f"validation_fraction={value}"]
    for value in ("5e-324", "1e-5", "0.001", "0", "-1", "nan"):
        corpora = "corpora=[{name: a, source: jsonl, path: a.jsonl}, {name: b, source: jsonl, path: a.jsonl}]"
        yield "inspect", [*MIXTURE, "seq_len=64", corpora, f"temperature={value}"]
    for weight in ("1e308", "0", "-1", ".nan", ".inf", "x"):
        yield "inspect", [*MIXTURE, f"corpora=[{{name: a, source: jsonl, path: a.jsonl, weight: {weight}}}]"]
        draws = f"[{{corpus: a, weight: {weight}}}]"
        yield "inspect", [*MIXTURE, ONE, f"stages=[{{seq_len: 64, samples: 9, draws: {draws}}}]"]
    for corpora in (
        "[{}]",
        "{}",
        "7",
        "[7]",
        "[{name: a}]",
        "[&a [*a]]",
        "!!python/object:os.system x",
        "[",
        "[{name: 7}]",
    ):
        yield "inspect", [*MIXTURE, f"corpora={corpora}"]
        yield "inspect", [*MIXTURE, ONE, f"stages={corpora}"]
    for number in ("10" * 20, "0", "-1", "1.5", "x"):
        yield "inspect", [*MIXTURE, ONE, "seq_len=64", f"stages=[{{seq_len: 64, samples: {number}}}]"]
        yield "inspect", [*MIXTURE, ONE, "seq_len=64", f"stages=[{{seq_len: {number}, samples: 9}}]"]
    yield "inspect", [*RAW, f"seq_len={8 * 10**12}"]
    for size in ("1", "2", "259", "10" * 20, "-1"):
        yield "tokenizer", ["train", "source=jsonl", "path=a.jsonl", f"vocab_size={size}", "out=new.model"]
    for words in (["none"], ["info"], ["encode"], ["train"], ["=x"], ["info", "tokenizer=a.jsonl"]):
        yield "tokenizer", words
    for words in (
        ["source"],
        ["=5"],
        ["source=none"],
        ["source=jsonl"],
        ["text_key=no", *RAW],
        ["source=hf", "path=.", "subset=none"],
    ):
        yield "prepare", words


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    root = tmp_path_factory.mktemp("bad")
    texts = write_corpus(root / "a.jsonl", 60)
    train_tokenizer(texts, root / "t.model", 400)
    return root


@pytest.mark.parametrize(("command", "words"), list(cases()), ids=lambda value: str(value)[:60])
def test_a_bad_value_is_one_line_and_exit_code_2(directory, monkeypatch, capfd, command, words):
    monkeypatch.chdir(directory)
    key = {"prepare": "out=", "inspect": "cache_dir="}.get(command)
    if key is not None and not any(word.startswith(key) for word in words):
        words = [*words, f"{key}made"]
    assert importlib.import_module(f"data_pipeline.{command}").main(words) == 2
    lines = [line for line in capfd.readouterr().err.replace("\r", "\n").split("\n") if line.strip()]
    lines = [line for line in lines if ": encoding" not in line and ": reading" not in line]  # progress bars
    assert len(lines) == 1 and lines[0].startswith("error: ") and "Traceback" not in lines[0]


def command_line(module, *words):
    return [sys.executable, "-m", f"data_pipeline.{module}", *words]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_preparation_with_a_word_and_the_same_command_goes_on(tmp_path, directory, number):
    write_corpus(tmp_path / "big.jsonl", 6000, mean_words=600)
    words = ["source=jsonl", f"path={tmp_path}/big.jsonl", f"tokenizer={directory}/t.model", f"out={tmp_path}/out"]
    command = command_line("prepare", *words, "shard_mb=0.05")
    with subprocess.Popen(
        command, cwd=REPOSITORY, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        deadline = time.monotonic() + 60
        while not list(tmp_path.glob("out/*/progress.json")) and time.monotonic() < deadline:
            time.sleep(0.01)
        process.send_signal(number)
        _, error = process.communicate(timeout=60)
    assert process.returncode == 128 + number and "Traceback" not in error
    assert error.rstrip().endswith(f"stopped by {number.name}; the same command goes on, or begins again")
    assert not list(tmp_path.glob("out/*/*.tmp")) and not list(tmp_path.glob("out/*/manifest.json"))
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0 and "6000 documents" not in done.stderr


def test_a_reader_that_has_enough_ends_a_command_without_a_traceback(directory):
    command = [*command_line("tokenizer", "encode", f"tokenizer={directory}/t.model")]
    text = "attention summary " * 30_000
    with subprocess.Popen(
        command, cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdin and process.stdout and process.stderr
        process.stdin.write(text.encode())
        process.stdin.close()
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == b"" and process.wait() == 128 + signal.SIGPIPE


def test_a_path_that_is_no_utf8_can_be_printed(directory, tmp_path):
    out = os.fsencode(tmp_path) + b"/\xff.model"
    command = command_line("tokenizer", "train", "source=jsonl", f"path={directory}/a.jsonl", "vocab_size=300")
    done = subprocess.run([*command, b"out=" + out], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0 and "\\udcff.model: SentencePiece, 300 tokens" in done.stdout, done.stderr
