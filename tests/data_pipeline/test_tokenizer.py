"""The command `python -m data_pipeline.tokenizer`."""

import subprocess
import sys

import pytest

from tests.data_pipeline.conftest import REPOSITORY, write_corpus


def run(module, *arguments, stdin=""):
    command = [sys.executable, "-m", f"data_pipeline.{module}", *arguments]
    stdin = stdin if isinstance(stdin, bytes) else stdin.encode()
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, input=stdin)
    return done.returncode, done.stdout.decode(), done.stderr.decode()


@pytest.fixture(scope="module")
def corpus(tmp_path_factory, model_path):
    root = tmp_path_factory.mktemp("inspect")
    write_corpus(root / "c.jsonl", 300, seed=8)
    return [
        "source=jsonl", f"path={root / 'c.jsonl'}", f"tokenizer={model_path}", f"cache_dir={root / 'cache'}"
    ]  # fmt: skip


def test_the_tokenizer_command(corpus, tmp_path):
    model = tmp_path / "own.model"
    code, out, err = run("tokenizer", "train", *corpus[:2], "vocab_size=350", f"out={model}")
    assert code == 0 and "SentencePiece, 350 tokens" in out and "a document ends with 1 '</s>'" in out, err
    code, again, _ = run("tokenizer", "info", f"tokenizer={model}")
    assert code == 0 and again == out
    text = "attention\twindow 12\n"
    code, out, _ = run("tokenizer", "encode", f"tokenizer={model}", stdin=text)
    pieces = [line.split("\t", 1) for line in out.splitlines()]
    assert code == 0 and all(number.isdigit() for number, _ in pieces)
    assert run("tokenizer", "encode", f"tokenizer={model}", f"text={text}")[1] == out
    assert "".join(eval(piece) for _, piece in pieces).replace("\u2581", " ") == text
    assert run("tokenizer", "show")[0] == 2 and run("tokenizer", "train", *corpus[:2])[0] == 2


def test_text_for_the_tokenizer_that_is_not_utf8_is_one_line(model_path):
    for given, origin in (({"stdin": b"caf\xe9"}, "standard input"), ({"text": b"text=caf\xe9"}, "text")):
        arguments = [given["text"]] if "text" in given else []
        code, out, err = run(
            "tokenizer", "encode", f"tokenizer={model_path}", *arguments, stdin=given.get("stdin", b"")
        )
        assert (code, out) == (2, "") and err.startswith(f"error: {origin}: is not UTF-8 (byte 0xe9 at 3)"), err
        assert err.count("\n") == 1


def test_the_directory_of_a_trained_tokenizer_is_made_or_refused_before_training(corpus, tmp_path):
    new = tmp_path / "new" / "own.model"
    code, _, err = run("tokenizer", "train", *corpus[:2], "vocab_size=350", f"out={new}")
    assert code == 0 and new.is_file(), err
    (tmp_path / "file").write_text("")
    # A vocabulary that training refuses: the directory is checked before.
    for out, reason in (("file/own.model", "File exists"), ("new", "it is a directory")):
        code, _, err = run("tokenizer", "train", *corpus[:2], "vocab_size=90000", f"out={tmp_path / out}")
        assert code == 2 and err.startswith(f"error: out={tmp_path / out}: cannot be written") and reason in err, err
        assert err.count("\n") == 1
