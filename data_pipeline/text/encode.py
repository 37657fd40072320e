"""Pieces of documents to tokens: encoded on all cores, returned in order."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from data_pipeline.errors import DataError
from data_pipeline.text.sources import Piece
from data_pipeline.text.tokenizer import Tokenizer

_BATCH_CHARACTERS = 1 << 18


class Encoded(NamedTuple):
    """An encoded piece: `tokens` int [num_tokens], from `num_bytes` bytes of text in UTF-8.

    `is_exact`: the tokens decode to the text; `num_unknown`: how many of them stand for characters that the vocabulary
    cannot spell. Both are found out where `encode_all` is asked to compare.
    """

    piece: Piece
    tokens: np.ndarray
    num_bytes: int
    is_exact: bool = True
    num_unknown: int = 0


def num_cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def encode_all(
    pieces: Iterator[Piece],
    tokenizer: Tokenizer,
    dtype: np.dtype,
    workers: int | None = None,
    compare: bool = False,
) -> Iterator[Encoded]:
    """Yield the encoded pieces in order. The last piece of a document ends with the end token.

    Threads are as fast as processes here, because the tokenizers release the interpreter lock while they encode, and a
    trainer with threads need not be forked. Only a few batches are in memory.

    Args:
        pieces: what to encode.
        tokenizer: encodes them.
        dtype: of the tokens, int [num_tokens].
        workers: threads; None: one per core.
        compare: decode the tokens again and compare them with the text.
    """
    workers = workers or num_cores()
    end = np.array([tokenizer.eos_id], dtype=dtype)

    def encode(batch: list[Piece]) -> list[Encoded]:
        result = []
        for piece in batch:
            try:
                ids = tokenizer.encode(piece.text)
            except DataError as error:
                raise DataError(f"{piece.name}: {error}") from error
            exact, unknown = True, 0
            if compare:
                exact = (piece.is_first or tokenizer.joins) and tokenizer.decode(ids) == piece.text
                unknown = 0 if tokenizer.unknown_id is None else int((ids == tokenizer.unknown_id).sum())
            tokens = ids.astype(dtype)
            if piece.is_last and piece.skip_reason is None:
                tokens = np.concatenate([tokens, end])
            result.append(Encoded(piece, tokens, len(piece.text.encode()), exact, unknown))
        return result

    pending: deque[Future[list[Encoded]]] = deque()
    with ThreadPoolExecutor(workers, "encode") as pool:
        try:
            for batch in _batches(pieces):
                pending.append(pool.submit(encode, batch))
                if len(pending) > workers + 2:
                    yield from pending.popleft().result()
            while pending:
                yield from pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()


def _batches(pieces: Iterator[Piece]) -> Iterator[list[Piece]]:
    batch: list[Piece] = []
    size = 0
    for piece in pieces:
        batch.append(piece)
        size += len(piece.text)
        if size >= _BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
