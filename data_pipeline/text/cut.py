"""Long texts are cut into pieces, so that no reader or tokenizer holds a whole document."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

PIECE_CHARACTERS = 1 << 19
"""Longer documents are read and encoded in pieces of about this size. Part of every fingerprint of prepared data."""


def cut_text(parts: Iterable[str]) -> Iterator[str]:
    """Cut a text, given in parts of any size, into pieces of `PIECE_CHARACTERS` to twice that (the last is shorter).

    A piece ends after its first newline beyond `PIECE_CHARACTERS`; without one, after its last space; without one, at
    twice `PIECE_CHARACTERS`. The pieces depend on the text alone, not on its parts.
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
