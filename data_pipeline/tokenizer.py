"""Train, describe or try a tokenizer: a SentencePiece model or a Hugging Face tokenizer.json.

    python -m data_pipeline.tokenizer train source=jsonl path=corpus.jsonl vocab_size=32768 out=my.model
    python -m data_pipeline.tokenizer info tokenizer=my.model
    python -m data_pipeline.tokenizer encode tokenizer=my.model text="..."     (without text: standard input)

A model trained here is lossless: `decode(encode(text))` returns every text exactly, because text is not normalised,
unknown characters fall back to their UTF-8 bytes and white space is kept. U+2581, which SentencePiece writes for a
space, is always encoded as its three bytes.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from data_pipeline import cli
from data_pipeline.config import RAW, TRAIN
from data_pipeline.errors import DataError
from data_pipeline.store.remote import is_remote
from data_pipeline.text.sources import Corpus
from data_pipeline.text.tokenizer import Tokenizer, train_tokenizer
from data_pipeline.values import expand_home

VERBS = ("train", "info", "encode")


def _command(arguments: Sequence[str]) -> None:
    verb, *rest = arguments
    if verb not in VERBS:
        raise DataError(f"{verb!r}: the commands are {', '.join(VERBS)}")
    if verb == "train":
        _train(rest)
        return
    config, extra = cli.parse(rest, {"text": ""})
    if config.tokenizer is None:
        raise DataError(f"{verb} needs tokenizer=FILE")
    if verb == "info":
        _print_info(config.tokenizer, config.end_token)
        return
    tokenizer = Tokenizer(config.tokenizer, config.end_token)
    ids = tokenizer.encode(_decode_utf8(extra["text"]) or _decode_utf8(sys.stdin.buffer.read()))
    for token_id in ids.tolist():
        print(f"{token_id}\t{tokenizer.token(token_id)!r}")


def _train(arguments: Sequence[str]) -> None:
    config, extra = cli.parse(arguments, {"out": ""})
    extra["out"] = expand_home(extra["out"])
    if not extra["out"] or config.source not in RAW:
        raise DataError(f"train needs out=FILE.model and a source of text ({', '.join(RAW)})")
    corpus = Corpus(config)
    texts = (piece.text for piece in corpus.pieces() if piece.split == TRAIN)
    with _writable(extra["out"]):
        train_tokenizer(texts, extra["out"], config.vocab_size, config.tokenizer_type)
    _print_info(extra["out"])


@contextmanager
def _writable(path: str) -> Iterator[None]:
    """Make the directory of an output file and check that it can be written, before training takes an hour."""
    if is_remote(path):
        raise DataError(f"out={path}: is written to a local file; copy it from there")
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        if Path(path).is_dir():
            raise IsADirectoryError("it is a directory")
        if not os.access(Path(path).parent, os.W_OK):
            raise PermissionError("its directory is read-only")
        yield
    except OSError as error:
        raise DataError(f"out={path}: cannot be written ({error}); name a file in another directory") from error


def _decode_utf8(given: str | bytes) -> str:
    """Text from the command line (a byte that is not UTF-8 is half a surrogate pair there) or from standard input."""
    data = given if isinstance(given, bytes) else given.encode(errors="surrogateescape")
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        origin = "standard input" if isinstance(given, bytes) else "text"
        byte = f"byte {data[error.start]:#04x} at {error.start}"
        raise DataError(f"{origin}: is not UTF-8 ({byte}); convert it, for example with iconv") from error


def _print_info(path: str, end_token: str | None = None) -> None:
    tokenizer = Tokenizer(path, end_token)
    print(f"{path}: {tokenizer.kind}, {tokenizer.vocab_size} tokens, sha256 {tokenizer.fingerprint}")
    print(f"sha256 of the vocabulary {tokenizer.vocabulary_sha256}")
    print(f"a document ends with {tokenizer.eos_id} {tokenizer.token(tokenizer.eos_id)!r}")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    return cli.run(__doc__ or "", _command, arguments)


if __name__ == "__main__":
    sys.exit(main())
