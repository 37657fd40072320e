"""Tokenizers: SentencePiece models, trained here or given, and Hugging Face tokenizer.json files.

A model trained here is lossless: `decode(encode(text))` returns every text exactly, because text is not normalised,
unknown characters fall back to their UTF-8 bytes and white space is kept. U+2581 needs special care: SentencePiece
writes a space as U+2581 and would decode a real U+2581 as a space, so that character is always encoded as three bytes.
"""

from __future__ import annotations

import codecs
import hashlib
import io
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.config import DataConfig
from data_pipeline.errors import DataError, library_errors
from data_pipeline.packing.order import mix64
from data_pipeline.store.files import atomic_write, build_once, check_regular, write_json
from data_pipeline.store.remote import is_remote
from data_pipeline.text.cut import PIECE_CHARACTERS, cut_text
from data_pipeline.text.end_token import END_IDS, NAMED_END, describe
from data_pipeline.text.hf_tokenizer import HuggingFaceTokenizer

SPACE_SYMBOL = "\u2581"
TRAINING_CHARACTERS = 8_000_000
"""Characters of text that a tokenizer is trained on. Training needs 15 (bpe) to 26 (unigram) times as many bytes."""
CHUNK_CHARACTERS = 32768
"""Long documents are encoded in sections of about this size, cut after a newline."""
_MIN_VOCAB = 260
_MAX_VOCAB = 2**31
_TRAINING_LINE = 4096
_IDENTITY = b"\x0a\x08identity"  # in a model file: the name of the rule that leaves text as it is
_AWKWARD = ("a", " a  b \t\r\n ", "\ufb01 \u2460 A\u030a \u3000\u200b\ufeff", SPACE_SYMBOL, "<0x41></s><unk>")
_TRAINING_THREADS = 2  # a constant: unigram sums floats per thread, and the model must not depend on the machine


def train_tokenizer(texts: Iterable[str], model_path: str | Path, vocab_size: int, tokenizer_type: str = "bpe") -> None:
    """Train a lossless tokenizer and write its model. The same texts give the same bytes.

    Trains on at most `TRAINING_CHARACTERS` characters: lines drawn evenly from all texts in one pass. Digits are split;
    newline and tab are tokens of their own; id 0 is `<unk>` (never produced), id 1 is `</s>`.

    Args:
        texts: the documents of the training split.
        model_path: file to write.
        vocab_size: number of tokens: at least 260 (bytes, specials, newline, tab) plus the characters of the corpus.
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
    except (RuntimeError, ValueError, OverflowError) as error:
        raise DataError(_explain(" ".join(str(error).split()), vocab_size, sum(map(len, lines)))) from error
    with atomic_write(Path(model_path)) as file:
        file.write(model.getvalue())


def check_trained(config: DataConfig) -> None:
    """Raise DataError where `config` names the end token of a tokenizer that is trained here, which has its own."""
    if config.end_token is not None and config.tokenizer is None:
        raise DataError(
            f"data.end_token={config.end_token!r} names a token of data.tokenizer, which is not set; set it, or leave "
            f"data.end_token null: a tokenizer that is trained here ends documents with </s>"
        )


def train_tokenizer_once(directory: Path, texts: Callable[[], Iterable[str]], config: DataConfig) -> str:
    """Train a tokenizer in `directory` by `config` on `texts()`, or find it there; returns the path of the model."""

    check_trained(config)

    def build(target: Path) -> None:
        train_tokenizer(texts(), target / "tokenizer.model", config.vocab_size, config.tokenizer_type)
        write_json(target / "finished.json", {"vocab_size": config.vocab_size})

    build_once(directory, "finished.json", build)
    return str(directory / "tokenizer.model")


class Tokenizer:
    """A SentencePiece model or a Hugging Face tokenizer.json, distinguished by content. Safe to use from threads.

    Attributes:
        kind: `SentencePiece` or `Hugging Face`.
        vocab_size: number of token ids.
        eos_id: the token that ends a document; `data_pipeline.text.end_token` says which one that is.
        lossless: whether it is a model as `train_tokenizer` makes it, which gives every text back.
        unknown_id: the token that stands for characters which the vocabulary cannot spell, or None.
        fingerprint: sha256 (hex) of the file.
        description: what stands beside the file about it, see `data_pipeline.text.end_token.describe`.

    Raises:
        DataError: the file is missing, is not a tokenizer, or has no token that ends a document.
    """

    def __init__(self, path: str | Path, end_token: str | None = None) -> None:
        """`end_token` is `data.end_token`: the token that ends a document, where it is named."""
        if is_remote(str(path)):
            raise DataError(f"{path}: a tokenizer is read from a local file; copy it from there")
        if os.path.isdir(path):
            raise DataError(f"{path}: is a directory; {_file_inside(Path(path))}")
        try:
            check_regular(os.stat(path).st_mode, str(path))
            content = Path(path).read_bytes()
        except OSError as error:
            advice = (
                "; name a file of this machine: nothing is downloaded" if isinstance(error, FileNotFoundError) else ""
            )
            raise DataError(
                f"{path}: cannot be used as a SentencePiece model or tokenizer.json ({error}){advice}"
            ) from error
        self.fingerprint = hashlib.sha256(content).hexdigest()
        self._path = path
        self.description = describe(path, end_token)
        is_json = content.removeprefix(codecs.BOM_UTF8).lstrip()[:1] == b"{"
        what = "Hugging Face tokenizer.json" if is_json else "SentencePiece model"
        advice = "it may be damaged or of another kind; the file of a Hugging Face tokenizer is tokenizer.json"
        with library_errors(f"{path}: cannot be used as a {what}", advice):
            kind = HuggingFaceTokenizer if is_json else _SentencePiece
            self._model: HuggingFaceTokenizer | _SentencePiece = kind(path, content, self.description)
        self.kind = self._model.kind
        self.vocab_size: int = self._model.vocab_size
        self.eos_id: int = self._model.eos_id
        self.unknown_id: int | None = self._model.unknown_id
        if self.vocab_size > _MAX_VOCAB:
            raise DataError(f"{path}: has the token id {self.vocab_size - 1}; ids are at most {_MAX_VOCAB - 1}")
        self.lossless: bool = self._model.lossless

    @property
    def identity(self) -> dict[str, Any]:
        """What tells apart two uses of one file: the end token, where it is not the one that the file alone gives."""
        return {} if self.eos_id == self._model.usual_end else {"end_token": self.eos_id}

    def encode(self, text: str) -> np.ndarray:
        """Token ids of a text, int32 [num_tokens], without an end token.

        A long text is encoded in the pieces of `cut_text`. With a BPE model trained here, the ids are those of the
        whole text if pieces end after a newline, because no token contains one. If a piece ends after a space, or with
        other tokenizers, ids at the cut may differ. The decoded text does not, unless `joins` is false.

        Raises:
            DataError: the tokenizer cannot encode the text, for example because it has no token for unknown characters.
        """
        if len(text) <= PIECE_CHARACTERS:
            return self._encode(text)
        return np.concatenate([self._encode(piece) for piece in cut_text((text,))])

    def _encode(self, text: str) -> np.ndarray:
        with library_errors(
            f"{self._path}: cannot encode a text that begins with {text[:40]!r}",
            "name a tokenizer that knows bytes or has an unknown token",
        ):
            return self._model.encode(text)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of token ids. End tokens are dropped; bytes that form no character become U+FFFD."""
        return self._model.decode(ids.tolist() if isinstance(ids, np.ndarray) else [int(token) for token in ids])

    def token(self, token_id: int) -> str:
        """The tokenizer's own spelling of a token."""
        return self._model.token(token_id)

    @cached_property
    def vocabulary(self) -> list[str]:
        """The tokenizer's own spelling of every token id; empty for an id that it does not use."""
        return self._model.vocabulary()

    @property
    def vocabulary_sha256(self) -> str:
        """sha256 (hex) of the tokens and their ids: equal for two files that hold the same vocabulary."""
        return hashlib.sha256(json.dumps(self.vocabulary).encode()).hexdigest()

    @cached_property
    def ends(self) -> tuple[int, ...]:
        """The tokens that may end a generated text: `eos_id` first, then those that stand beside the file."""
        own = self.description.get("eos_token")
        named = [self.vocabulary.index(own)] if own in self.vocabulary else []
        listed = [end for end in self.description.get(END_IDS, ()) if end < self.vocab_size]
        return tuple(dict.fromkeys([self.eos_id, *named, *listed]))

    @cached_property
    def joins(self) -> bool:
        """Whether pieces of a text that are encoded one by one decode to the text.

        False for a tokenizer that puts a space before every text ("dummy prefix"): each piece after the first gets one.
        """
        return self.decode([*self.encode("a"), *self.encode("a")]) == "aa"


class _SentencePiece:
    kind = "SentencePiece"

    def __init__(self, path: str | Path, content: bytes, description: Mapping[str, Any]) -> None:
        import sentencepiece

        self._model = sentencepiece.SentencePieceProcessor(model_proto=content)
        self.vocab_size: int = self._model.vocab_size()
        if not self.vocab_size:
            raise DataError(f"{path}: cannot be used as a SentencePiece model (it holds no pieces)")
        self.eos_id: int = self._end(path, description)
        own: int = self._model.eos_id()
        self.usual_end: int | None = own if own >= 0 else None
        unknown = self._model.unk_id()
        self.unknown_id: int | None = unknown if unknown >= 0 else None
        self._splits_exactly = self._newline_stands_alone()
        space_symbol = [self._model.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE_SYMBOL.encode()]
        has_bytes = all(self._model.is_byte(piece) for piece in space_symbol)
        self._space_symbol = np.array(space_symbol, dtype=np.int32) if has_bytes and self._splits_exactly else None
        unchanged = self._space_symbol is not None and _IDENTITY in content
        self.lossless = unchanged and all(self.decode(self.encode(text).tolist()) == text for text in _AWKWARD)

    def encode(self, text: str) -> np.ndarray:
        # Sections cut after a newline are several times faster on megabytes. For BPE the ids are the same; unigram may
        # break a tie differently at a cut.
        if not self._splits_exactly:
            return self._model.encode_as_numpy(text)
        parts: list[np.ndarray] = []
        for number, run in enumerate(text.split(SPACE_SYMBOL) if self._space_symbol is not None else (text,)):
            if number and self._space_symbol is not None:
                parts.append(self._space_symbol)
            parts.extend(self._model.encode_as_numpy(section) for section in _sections(run))
        return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int32)

    def decode(self, ids: list[int]) -> str:
        return self._model.decode(ids)

    def token(self, token_id: int) -> str:
        return self._model.id_to_piece(token_id)

    def vocabulary(self) -> list[str]:
        return [self._model.id_to_piece(piece) for piece in range(self.vocab_size)]

    def _end(self, path: str | Path, description: Mapping[str, Any]) -> int:
        """The piece that ends a document: the named one, or the model's own, or that of tokenizer_config.json."""
        own: int = self._model.eos_id()
        named = description.get(NAMED_END)
        token = named or (description.get("eos_token") if own < 0 else None)
        if token is None:
            if own < 0:
                raise DataError(
                    f"{path}: the tokenizer has no end-of-sentence token, which must end every document; name one of "
                    f"its tokens with data.end_token"
                )
            return own
        piece = self._model.piece_to_id(token)
        key = "data.end_token" if named else "tokenizer_config.json: eos_token"
        if self._model.id_to_piece(piece) != token or self._model.is_unknown(piece):
            raise DataError(f"{path}: {key}={token!r} is not one of its tokens; name one of them with data.end_token")
        if piece in self._model.encode(f"a{token}b{token}"):
            raise DataError(
                f"{path}: {key}={token!r} is a token that text can spell, so a document could end itself; name a "
                f"control symbol with data.end_token"
            )
        return piece

    def _newline_stands_alone(self) -> bool:
        """Whether the ids stay the same when a text is cut after a newline: true of BPE models trained here."""
        newline = self._model.piece_to_id("\n")
        pieces = (self._model.id_to_piece(piece) for piece in range(self.vocab_size))
        return self._model.encode("\n") == [newline] and all(piece == "\n" or "\n" not in piece for piece in pieces)


def _sections(text: str) -> Iterator[str]:
    """The text in sections of at least `CHUNK_CHARACTERS` that end after a newline; the last is the rest."""
    start = 0
    while start < len(text):
        newline = text.find("\n", start + CHUNK_CHARACTERS)
        end = len(text) if newline < 0 else newline + 1
        yield text[start:end]
        start = end


def _sample_lines(texts: Iterable[str], max_characters: int) -> list[str]:
    """Lines drawn evenly from all texts, at most `max_characters` in total, in the order of the corpus.

    Each line gets a pseudo-random priority from its number, and the lines of lowest priority are kept. Lines above the
    current limit are dropped at once; the limit is halved whenever twice the wanted characters have been kept.
    """
    kept: list[tuple[int, str]] = []
    num_kept, number, limit = 0, 0, 2**64 - 1
    for text in texts:
        lines = [part for line in re.split(f"[\n{SPACE_SYMBOL}]+", text) for part in _split_line(line)]
        priorities = mix64(np.arange(number, number + len(lines), dtype=np.uint64))
        number += len(lines)
        for index in np.flatnonzero(priorities <= np.uint64(limit)):
            kept.append((int(priorities[index]), lines[index]))
            num_kept += len(lines[index])
        while num_kept > 2 * max_characters:
            limit //= 2
            kept = [entry for entry in kept if entry[0] <= limit]
            num_kept = sum(len(line) for _, line in kept)
    room, chosen = max_characters, set()
    for priority, line in sorted(kept):
        room -= len(line)
        if room < 0:
            break
        chosen.add(priority)
    return [line for priority, line in kept if priority in chosen]


def _split_line(line: str) -> Iterator[str]:
    # SentencePiece skips lines that are too long; it can learn from their parts.
    for start in range(0, len(line), _TRAINING_LINE):
        yield line[start : start + _TRAINING_LINE]


def _explain(error: str, vocab_size: int, num_characters: int) -> str:
    """A message for an error of SentencePiece's trainer."""
    if found := re.search(r"Vocabulary size too high \(\d+\)\. Please set it to a value <= (\d+)", error):
        return (
            f"vocab_size={vocab_size} is more than the corpus supports: its {num_characters} characters of training "
            f"text give at most {found[1]} tokens; set data.vocab_size={found[1]} or less, or add text"
        )
    if found := re.search(r"smaller than required_chars\. \d+ vs (\d+)", error):
        return (
            f"vocab_size={vocab_size} is less than the corpus needs for its characters alone; set data.vocab_size "
            f"above {found[1]}"
        )
    if vocab_size < _MIN_VOCAB:
        return f"vocab_size={vocab_size} must be at least {_MIN_VOCAB}: bytes, special tokens, newline and tab"
    return f"a tokenizer of vocab_size={vocab_size} cannot be trained on {num_characters} characters of text: {error}"


def _file_inside(directory: Path) -> str:
    """What to do about a directory that was given as a tokenizer."""
    found = [directory / name for name in ("tokenizer.json", "tokenizer.model") if (directory / name).is_file()]
    if not found:
        return "it holds neither tokenizer.json nor tokenizer.model: name the file of the tokenizer"
    return f"name the file in it: {found[0]}"
