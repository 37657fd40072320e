"""Tokenizers: SentencePiece models, trained here to lose nothing or brought along, and Hugging Face tokenizer.json.

    python -m data_pipeline.tokenizer train source=jsonl path=corpus.jsonl vocab_size=32768 out=my.model
    python -m data_pipeline.tokenizer info tokenizer=my.model
    python -m data_pipeline.tokenizer encode tokenizer=my.model text="..."     (without text: standard input)

With a model trained here every text comes back exactly from `decode(encode(text))`: the text is not normalised, unknown
characters fall back to their UTF-8 bytes, white space is kept. One character needs help: SentencePiece writes a space
as U+2581 inside and would decode a real U+2581 as a space, so that character is always encoded as its three bytes.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from data_pipeline.errors import DataError
from data_pipeline.order import mix64
from data_pipeline.storage import aside

SPACE_SYMBOL = "\u2581"
TRAINING_CHARACTERS = 8_000_000
"""Characters of text that training looks at; its memory is 15 (bpe) to 26 (unigram) times that."""
_TRAINING_LINE = 4096
_TRAINING_THREADS = 2  # a constant, for unigram sums floats per thread and the model must not depend on the machine
CHUNK_CHARACTERS = 32768
"""Long documents are encoded in chunks of about this size, cut after a newline."""


PIECE_CHARACTERS = 1 << 19
"""Longer documents are read and encoded in pieces of about this size, so that memory does not grow with them."""
_HF_END_TOKENS = (
    "<|endoftext|>",
    "<|end_of_text|>",
    "</s>",
    "<eos>",
    "<|eos|>",
    "<\uff5cend\u2581of\u2581sentence\uff5c>",
)


def cut_text(parts: Iterable[str]) -> Iterator[str]:
    """Cut a text, given in parts of any size, into pieces of `PIECE_CHARACTERS` to twice that (the last is shorter).

    A piece ends after the first newline beyond `PIECE_CHARACTERS`; where there is none, after the last space, or else
    anywhere. The pieces depend on the text alone, not on its parts.
    """
    buffer = ""
    for part in parts:
        for at in range(0, len(part), PIECE_CHARACTERS):
            buffer += part[at : at + PIECE_CHARACTERS]
            while len(buffer) >= 2 * PIECE_CHARACTERS:
                end = buffer.find("\n", PIECE_CHARACTERS, 2 * PIECE_CHARACTERS) + 1
                end = end or buffer.rfind(" ", PIECE_CHARACTERS, 2 * PIECE_CHARACTERS) + 1 or 2 * PIECE_CHARACTERS
                yield buffer[:end]
                buffer = buffer[end:]
    if len(buffer) > PIECE_CHARACTERS and (end := buffer.find("\n", PIECE_CHARACTERS) + 1):
        yield buffer[:end]
        buffer = buffer[end:]
    if buffer:
        yield buffer


def train_tokenizer(texts: Iterable[str], model_path: str | Path, vocab_size: int, tokenizer_type: str = "bpe") -> None:
    """Train a lossless tokenizer and write its model; the same texts give the same bytes.

    Looks at `TRAINING_CHARACTERS` characters at most: lines drawn evenly from all texts, in one pass, bounded memory.
    Digits are split, newline and tab are tokens of their own; id 0 is `<unk>` (never produced), id 1 is `</s>`.

    Args:
        texts: the documents of the training split.
        model_path: file to write.
        vocab_size: number of pieces, at least 260 (bytes, specials, newline, tab) plus the characters of the corpus.
        tokenizer_type: `bpe` or `unigram`.

    Raises:
        DataError: there is no text, or `vocab_size` is more than the text supports or less than it needs.
    """
    import sentencepiece

    lines = _sample_lines(texts, TRAINING_CHARACTERS)
    if not lines:
        raise DataError("a tokenizer cannot be trained: the training split holds no text; set data.tokenizer")
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=model,
            vocab_size=vocab_size,
            model_type=tokenizer_type,
            normalization_rule_name="identity",
            byte_fallback=True,
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            user_defined_symbols=["\n", "\t"],
            max_sentence_length=8 * _TRAINING_LINE,
            num_threads=_TRAINING_THREADS,
            unk_id=0,
            eos_id=1,
            bos_id=-1,
            pad_id=-1,
            minloglevel=3,
        )
    except RuntimeError as error:
        raise DataError(_explain(str(error), vocab_size, sum(map(len, lines)))) from error
    with aside(Path(model_path)) as file:
        file.write(model.getvalue())


class Tokenizer:
    """A SentencePiece model or a Hugging Face tokenizer.json (told by its content), ready to use from several threads.

    Attributes:
        vocab_size: number of ids.
        eos_id: the token that ends a document.
        fingerprint: sha256 (hex) of the file.

    Raises:
        DataError: the file is missing, is no tokenizer, or has no token that ends a document.
    """

    def __init__(self, path: str | Path) -> None:
        try:
            content = Path(path).read_bytes()
        except OSError as error:
            raise DataError(f"{path}: cannot be used as a SentencePiece model or tokenizer.json ({error})") from error
        self.fingerprint = hashlib.sha256(content).hexdigest()
        is_json = content.lstrip()[:1] == b"{"
        self._model: _SentencePiece | _HuggingFace = (_HuggingFace if is_json else _SentencePiece)(path, content)
        self.kind = self._model.kind
        self.vocab_size: int = self._model.vocab_size
        self.eos_id: int = self._model.eos_id

    def encode(self, text: str) -> np.ndarray:
        """Token ids of a text, int32 [num_tokens], without an end token.

        A long text is encoded in the pieces of `cut_text`. With a BPE model trained here the ids are bit for bit those
        of the whole text where pieces end after a newline, because no token reaches across one; after a space, or with
        another tokenizer, the ids where two pieces meet may differ, and not the text.
        """
        if len(text) <= PIECE_CHARACTERS:
            return self._model.encode(text)
        return np.concatenate([self._model.encode(piece) for piece in cut_text((text,))])

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of token ids; end tokens vanish, and bytes that form no character become U+FFFD."""
        return self._model.decode([int(token) for token in ids])

    def token(self, token_id: int) -> str:
        """How the tokenizer itself writes one of its tokens."""
        return self._model.token(token_id)


class _SentencePiece:
    kind = "SentencePiece"

    def __init__(self, path: str | Path, content: bytes) -> None:
        import sentencepiece

        try:
            self._model = sentencepiece.SentencePieceProcessor(model_proto=content)
        except RuntimeError as error:
            raise DataError(f"{path}: cannot be used as a SentencePiece model ({error})") from error
        self.vocab_size: int = self._model.vocab_size()
        if not self.vocab_size:
            raise DataError(f"{path}: cannot be used as a SentencePiece model (it holds no pieces)")
        self.eos_id: int = self._model.eos_id()
        if self.eos_id < 0:
            raise DataError(f"{path}: the tokenizer has no end-of-sentence token, which must end every document")
        self._splits_exactly = self._newline_stands_alone()
        space_symbol = [self._model.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE_SYMBOL.encode()]
        has_bytes = all(self._model.is_byte(piece) for piece in space_symbol)
        self._space_symbol = np.array(space_symbol, dtype=np.int32) if has_bytes and self._splits_exactly else None

    def encode(self, text: str) -> np.ndarray:
        # Chunks cut after a newline are several times faster on megabytes. For BPE the ids are the same; unigram may
        # break a tie differently at a cut.
        if not self._splits_exactly:
            return self._model.encode_as_numpy(text)
        parts: list[np.ndarray] = []
        for number, run in enumerate(text.split(SPACE_SYMBOL) if self._space_symbol is not None else (text,)):
            if number and self._space_symbol is not None:
                parts.append(self._space_symbol)
            parts.extend(self._model.encode_as_numpy(chunk) for chunk in _chunks(run))
        return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int32)

    def decode(self, ids: list[int]) -> str:
        return self._model.decode(ids)

    def token(self, token_id: int) -> str:
        return self._model.id_to_piece(token_id)

    def _newline_stands_alone(self) -> bool:
        """Whether cutting a text after a newline changes nothing: true of models trained here, not of all others."""
        newline = self._model.piece_to_id("\n")
        pieces = (self._model.id_to_piece(piece) for piece in range(self.vocab_size))
        return self._model.encode("\n") == [newline] and all(piece == "\n" or "\n" not in piece for piece in pieces)


class _HuggingFace:
    kind = "Hugging Face"

    def __init__(self, path: str | Path, content: bytes) -> None:
        try:
            import tokenizers
        except ImportError as error:
            raise DataError(
                f"{path}: a tokenizer.json needs the package `tokenizers`: pip install 'ksa-train[hf]' ({error})"
            ) from error
        try:
            self._model = tokenizers.Tokenizer.from_str(content.decode())
        except Exception as error:  # its errors share no class of their own
            raise DataError(f"{path}: cannot be used as a Hugging Face tokenizer.json ({error})") from error
        # Text that looks like a special token is text: a document must not be able to end itself.
        self._model.encode_special_tokens = True
        self._model.no_truncation()
        self._model.no_padding()
        self.vocab_size: int = max(self._model.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        ends = [self._model.token_to_id(token) for token in _HF_END_TOKENS]
        if all(end is None for end in ends):
            raise DataError(
                f"{path}: the tokenizer has none of the tokens that end a document ({', '.join(_HF_END_TOKENS)})"
            )
        self.eos_id: int = next(end for end in ends if end is not None)

    def encode(self, text: str) -> np.ndarray:
        return np.array(self._model.encode(text, add_special_tokens=False).ids, dtype=np.int32)

    def decode(self, ids: list[int]) -> str:
        return self._model.decode(ids, skip_special_tokens=True)

    def token(self, token_id: int) -> str:
        return self._model.id_to_token(token_id) or ""


def _chunks(text: str) -> Iterator[str]:
    """The text in pieces of at least `CHUNK_CHARACTERS` that end after a newline (the last one as it comes)."""
    start = 0
    while start < len(text):
        newline = text.find("\n", start + CHUNK_CHARACTERS)
        end = len(text) if newline < 0 else newline + 1
        yield text[start:end]
        start = end


def _sample_lines(texts: Iterable[str], max_characters: int) -> list[str]:
    """Lines drawn evenly from all texts, `max_characters` in all at most, in the order of the corpus.

    Each line gets a pseudo-random rank from its number; the lines of lowest rank are kept. A rank above the current
    limit is dropped at once, and the limit halves whenever twice the wanted amount has gathered.
    """
    kept: list[tuple[int, str]] = []
    gathered, number, limit = 0, 0, 2**64 - 1
    for text in texts:
        lines = [part for line in re.split(f"[\n{SPACE_SYMBOL}]+", text) for part in _cut(line)]
        ranks = mix64(np.arange(number, number + len(lines), dtype=np.uint64))
        number += len(lines)
        for index in np.flatnonzero(ranks <= np.uint64(limit)):
            kept.append((int(ranks[index]), lines[index]))
            gathered += len(lines[index])
        while gathered > 2 * max_characters:
            limit //= 2
            kept = [entry for entry in kept if entry[0] <= limit]
            gathered = sum(len(line) for _, line in kept)
    room, allowed = max_characters, set()
    for rank, line in sorted(kept):
        room -= len(line)
        if room < 0:
            break
        allowed.add(rank)
    return [line for rank, line in kept if rank in allowed]


def _cut(line: str) -> Iterator[str]:
    # Training skips lines that are too long; shorter pieces of them still teach.
    for start in range(0, len(line), _TRAINING_LINE):
        yield line[start : start + _TRAINING_LINE]


def _explain(error: str, vocab_size: int, num_characters: int) -> str:
    if found := re.search(r"Vocabulary size too high \(\d+\)\. Please set it to a value <= (\d+)", error):
        most = f"vocab_size={vocab_size} is more than the corpus supports: its {num_characters} characters of training"
        return f"{most} text give at most {found[1]} pieces; set data.vocab_size={found[1]} or less, or add text"
    if found := re.search(r"smaller than required_chars\. \d+ vs (\d+)", error):
        least = f"vocab_size={vocab_size} is less than the corpus needs for its characters alone"
        return f"{least}; set data.vocab_size above {found[1]}"
    return f"a tokenizer of vocab_size={vocab_size} cannot be trained on {num_characters} characters of text: {error}"


def _command(arguments: Sequence[str]) -> None:
    from data_pipeline import cli
    from data_pipeline.config import RAW
    from data_pipeline.sources import TRAIN, Corpus

    verb, *rest = arguments
    if verb == "train":
        config, extra = cli.parse(rest, {"out": ""})
        if not extra["out"] or config.source not in RAW:
            raise DataError(f"train needs out=FILE.model and a source of text ({', '.join(RAW)})")
        corpus = Corpus(config)
        texts = (piece.text for piece in corpus.pieces() if piece.split == TRAIN)
        with _writable(extra["out"]):
            train_tokenizer(texts, extra["out"], config.vocab_size, config.tokenizer_type)
        _print_info(extra["out"])
        return
    config, extra = cli.parse(rest, {"text": ""})
    if verb not in ("info", "encode") or config.tokenizer is None:
        raise DataError(f"{verb!r}: the commands are train, info and encode; the last two need tokenizer=FILE")
    if verb == "info":
        _print_info(config.tokenizer)
        return
    tokenizer = Tokenizer(config.tokenizer)
    ids = tokenizer.encode(_utf8(extra["text"]) or _utf8(sys.stdin.buffer.read()))
    for token_id in ids.tolist():
        print(f"{token_id}\t{tokenizer.token(token_id)!r}")


@contextmanager
def _writable(path: str) -> Iterator[None]:
    """Make the directory of a file that is to be written, and refuse a place where that is not possible: training comes
    first, and may take an hour."""
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        if Path(path).is_dir():
            raise IsADirectoryError("it is a directory")
        if not os.access(Path(path).parent, os.W_OK):
            raise PermissionError("its directory is read-only")
        yield
    except OSError as error:
        raise DataError(f"out={path}: cannot be written ({error}); name a file in another directory") from error


def _utf8(given: str | bytes) -> str:
    """Text from the command line (where a byte that is not UTF-8 is half a surrogate pair) or standard input."""
    data = given if isinstance(given, bytes) else given.encode(errors="surrogateescape")
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        place = "standard input" if isinstance(given, bytes) else "text"
        byte = f"byte {data[error.start]:#04x} at {error.start}"
        raise DataError(f"{place}: is not UTF-8 ({byte}); convert it, for example with iconv") from error


def _print_info(path: str) -> None:
    tokenizer = Tokenizer(path)
    print(f"{path}: {tokenizer.kind}, {tokenizer.vocab_size} tokens, sha256 {tokenizer.fingerprint}")
    print(f"a document ends with {tokenizer.eos_id} {tokenizer.token(tokenizer.eos_id)!r}")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    from data_pipeline import cli

    return cli.run(__doc__ or "", _command, arguments)


if __name__ == "__main__":
    # The package has imported this module under its own name already; that one does the work.
    from data_pipeline.tokenizer import main as run

    sys.exit(run())
