"""SentencePiece: training a tokenizer that loses nothing, and using one.

Every text comes back exactly from `decode(encode(text))`: the text is not normalised, unknown characters fall back to
their UTF-8 bytes, white space is kept. One character needs help: SentencePiece writes a space as U+2581 inside and
would decode a real U+2581 as a space, so that character is always encoded as its three bytes.
"""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Iterable, Iterator, Sequence
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
    """A SentencePiece model, ready to use from several threads.

    Attributes:
        vocab_size: number of pieces.
        eos_id: the token that ends a document.
        fingerprint: sha256 (hex) of the model file.

    Raises:
        DataError: the file is missing, is no SentencePiece model, or has no end-of-sentence token.
    """

    def __init__(self, path: str | Path) -> None:
        import sentencepiece

        try:
            model = Path(path).read_bytes()
            self._model = sentencepiece.SentencePieceProcessor(model_proto=model)
        except (OSError, RuntimeError) as error:
            raise DataError(f"{path}: cannot be used as a SentencePiece model ({error})") from error
        self.vocab_size: int = self._model.vocab_size()
        if not self.vocab_size:
            raise DataError(f"{path}: cannot be used as a SentencePiece model (it holds no pieces)")
        self.eos_id: int = self._model.eos_id()
        if self.eos_id < 0:
            raise DataError(f"{path}: the tokenizer has no end-of-sentence token, which must end every document")
        self.fingerprint = hashlib.sha256(model).hexdigest()
        self._splits_exactly = self._newline_stands_alone()
        space_symbol = [self._model.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE_SYMBOL.encode()]
        has_bytes = all(self._model.is_byte(piece) for piece in space_symbol)
        self._space_symbol = np.array(space_symbol, dtype=np.int32) if has_bytes and self._splits_exactly else None

    def encode(self, text: str) -> np.ndarray:
        """Token ids of a text, int32 [num_tokens], without an end token.

        Long texts are encoded in chunks cut after a newline: several times faster on megabytes, and for BPE bit for bit
        the same, because no piece reaches across a newline. Unigram may break a tie differently at a cut, which changes
        the ids and not the text.
        """
        if not self._splits_exactly:
            return self._model.encode_as_numpy(text)
        parts: list[np.ndarray] = []
        for number, run in enumerate(text.split(SPACE_SYMBOL) if self._space_symbol is not None else (text,)):
            if number and self._space_symbol is not None:
                parts.append(self._space_symbol)
            parts.extend(self._model.encode_as_numpy(chunk) for chunk in _chunks(run))
        return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int32)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of token ids; end tokens vanish, and bytes that form no character become U+FFFD."""
        return self._model.decode([int(token) for token in ids])

    def _newline_stands_alone(self) -> bool:
        """Whether cutting a text after a newline changes nothing: true of models trained here, not of all others."""
        newline = self._model.piece_to_id("\n")
        pieces = (self._model.id_to_piece(piece) for piece in range(self.vocab_size))
        return self._model.encode("\n") == [newline] and all(piece == "\n" or "\n" not in piece for piece in pieces)


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
