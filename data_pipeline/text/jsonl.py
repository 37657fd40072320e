"""The text of one JSONL line: parsed at once, or in a stream where the line is too long to be held in memory.

A line that has the key of the text twice is an error in both: a stream has already returned the first value when it
reads the second.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator, Sequence
from typing import Any

from data_pipeline.errors import DataError


class NullText(Exception):
    """The text of a line is null. `stream_line` raises it, because it yields parts of a text."""


def parse_line(line: bytes, text_key: str, location: str) -> str | None:
    """The text of one line; None where it is null.

    Args:
        line: a JSON object.
        text_key: the key of the text.
        location: file and line, for messages.

    Raises:
        DataError: the line is not a JSON object in UTF-8 with exactly one value of `text_key`, a string or null.
    """
    try:
        # Objects become tuples of (key, value): a dict would drop repeated keys.
        decoded = line.decode().rstrip()
        try:
            items = json.loads(decoded, object_pairs_hook=tuple)
        except ValueError as error:
            if isinstance(error, json.JSONDecodeError):
                raise
            # Python refuses integers of more than 4300 digits. Numbers beside the text do not matter.
            items = json.loads(decoded, object_pairs_hook=tuple, parse_int=len)
    except UnicodeDecodeError as error:
        column = f"byte {line[error.start]:#04x} in column {error.start + 1}"
        raise DataError(f"{location}: is not UTF-8 ({column})") from error
    except (ValueError, RecursionError) as error:
        detail = f"{error.msg} in column {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)
        raise DataError(f"{location}: is not a JSON object ({detail}){_layout_advice(error, line)}") from error
    if isinstance(items, list):
        raise _is_array(location)
    if not isinstance(items, tuple):
        raise DataError(f"{location}: is not a JSON object but of type {type(items).__name__}")
    texts = [value for key, value in items if key == text_key]
    if not texts:
        raise _missing_key(location, text_key, [key for key, _ in items])
    if len(texts) > 1:
        raise _repeated_key(location, text_key)
    text = texts[0]
    if text is None:
        return None
    if not isinstance(text, str):
        kind = "dict" if isinstance(text, tuple) else type(text).__name__
        raise DataError(f"{location}: the value of {text_key!r} is not a text but of type {kind}")
    _check_surrogates(text, 0, location)
    return text


def stream_line(blocks: Iterator[bytes], text_key: str, location: str) -> Iterator[str]:
    """The text of one line that comes in blocks, as consecutive parts. Memory does not grow with the line.

    Other values are skipped by their brackets and quotes, and not checked further. Args and errors as `parse_line`, and
    `NullText` where the text is null.
    """
    scanner = _Scanner(blocks, location)
    if scanner.peek() == "[":
        raise _is_array(location)
    if scanner.peek() != "{":
        raise scanner.error("is not a JSON object")
    scanner.at += 1
    keys: list[str] = []
    found = is_null = False
    while scanner.peek() != "}":
        if keys:
            scanner.expect(",")
        scanner.expect('"')
        key = "".join(scanner.string_parts())
        keys.append(key[:80])
        scanner.expect(":")
        if key != text_key:
            scanner.skip_value()
            continue
        if found:
            raise _repeated_key(location, text_key)
        found = True
        if scanner.peek() == "n" and scanner.scalar() == "null":
            is_null = True
            continue
        if scanner.peek() != '"':
            raise DataError(f"{location}: the value of {text_key!r} is not a text")
        scanner.at += 1
        num_characters = 0
        for part in scanner.string_parts():
            _check_surrogates(part, num_characters, location)
            num_characters += len(part)
            yield part
    scanner.at += 1
    if scanner.peek():
        raise scanner.error("goes on after its JSON object")
    if not found:
        raise _missing_key(location, text_key, keys)
    if is_null:
        raise NullText


def _one_a_line(items: str) -> str:
    return f"data.source=jsonl reads one object a line, which `jq -c '{items}' FILE` writes"


def _is_array(location: str) -> DataError:
    return DataError(f"{location}: is not a JSON object but of type list; {_one_a_line('.[]')}")


def _layout_advice(error: Exception, line: bytes) -> str:
    """What to do about a line that is a part of a JSON array or object, or more than one object."""
    if not isinstance(error, json.JSONDecodeError):
        return ""
    if line.lstrip().startswith(b"["):
        return f": a JSON array begins here; {_one_a_line('.[]')}"
    if error.msg.startswith("Extra data"):
        return f": the line goes on after its object; {_one_a_line('.')}"
    ends_inside = error.pos >= len(error.doc) or error.msg.startswith("Unterminated string")
    if line.lstrip().startswith(b"{") and ends_inside:
        return f": the line ends inside its object, so it is cut or printed on several lines; {_one_a_line('.')}"
    return ""


def _missing_key(location: str, text_key: str, keys: Sequence[str]) -> DataError:
    shown = ", ".join(sorted(keys)[:8]) or "none"
    return DataError(f"{location}: lacks the key {text_key!r} (its keys: {shown}); set data.text_key")


def _repeated_key(location: str, text_key: str) -> DataError:
    return DataError(f"{location}: has the key {text_key!r} more than once; keep one of its values")


def _check_surrogates(text: str, offset: int, location: str) -> None:
    # JSON can spell half of a surrogate pair ("\ud800"), which is no character and has no UTF-8.
    try:
        text.encode()
    except UnicodeEncodeError as error:
        at = offset + error.start
        raise DataError(f"{location}: the text holds half a surrogate pair at character {at}") from error


class _Scanner:
    """A cursor `at` in the part of a line that has been read, `buffer`."""

    _SPACE = re.compile(r"[ \t\r\n]*")
    # Whole units of a string: plain characters, escapes, and both halves of a surrogate pair together.
    _STRING = re.compile(
        r'[^"\\]*(?:(?:\\[^u]|\\u(?![dD][89abAB]).{4}|\\u[dD][89abAB]..(?:\\u.{4}|(?=[^\\]|\\[^u])))[^"\\]*)*',
        re.DOTALL,
    )
    _SCALAR = re.compile(r"[^,\]} \t\r\n]*")
    _BRACKET_OR_QUOTE = re.compile(r'["\[\]{}]')

    def __init__(self, blocks: Iterator[bytes], location: str) -> None:
        self._blocks, self._location = blocks, location
        self._decoder: Any = codecs.getincrementaldecoder("utf-8")("strict")
        self.buffer, self.at = "", 0

    def error(self, problem: str) -> DataError:
        return DataError(f"{self._location}: {problem}; the line is not a JSON object")

    def fill(self) -> bool:
        """Read the next block; False when there is none."""
        block = next(self._blocks, None)
        try:
            more = self._decoder.decode(block or b"", final=block is None)
        except UnicodeDecodeError as error:
            byte = error.object[error.start]
            raise DataError(f"{self._location}: is not UTF-8 (byte {byte:#04x})") from error
        self.buffer, self.at = self.buffer[self.at :] + more, 0
        return block is not None

    def peek(self) -> str:
        """The next character that is not white space, "" at the end of the line."""
        while True:
            self.at = self._end_of(self._SPACE)
            if self.at < len(self.buffer):
                return self.buffer[self.at]
            if not self.fill():
                return ""

    def expect(self, character: str) -> None:
        found = self.peek()
        if found != character:
            raise self.error(f"has {found!r} where {character!r} belongs")
        self.at += 1

    def string_parts(self) -> Iterator[str]:
        """The decoded parts of a string whose opening quote has been passed; passes the closing quote."""
        while True:
            end = self._end_of(self._STRING)
            raw, self.at = self.buffer[self.at : end], end
            if raw:
                yield self._decoded(raw)
            if self.buffer.startswith('"', self.at):
                self.at += 1
                return
            if not self.fill():
                if self.buffer:  # an escape without its end
                    self._decoded(self.buffer)
                raise self.error("has a text without an end")

    def scalar(self) -> str:
        """The spelling of a number or of true, false or null; passes it."""
        while True:
            end = self._end_of(self._SCALAR)
            if end < len(self.buffer) or not self.fill():
                end = self._end_of(self._SCALAR)
                value, self.at = self.buffer[self.at : end], end
                return value

    def skip_value(self) -> None:
        depth = 0
        first = self.peek()
        if first and first not in '"[{':
            while True:
                self.at = self._end_of(self._SCALAR)
                if self.at < len(self.buffer) or not self.fill():
                    return
        while True:
            match = self._BRACKET_OR_QUOTE.search(self.buffer, self.at)
            if match is None:
                self.at = len(self.buffer)
                if not self.fill():
                    raise self.error("ends inside a value")
                continue
            self.at = match.end()
            if match[0] == '"':
                for _ in self.string_parts():
                    pass
            else:
                depth += 1 if match[0] in "[{" else -1
            if depth == 0:
                return

    def _end_of(self, pattern: re.Pattern[str]) -> int:
        match = pattern.match(self.buffer, self.at)
        return match.end() if match else self.at

    def _decoded(self, raw: str) -> str:
        try:
            return json.loads(f'"{raw}"')
        except ValueError as error:
            raise self.error(f"has a text that cannot be decoded ({error.args[0].split(':')[0]})") from error
