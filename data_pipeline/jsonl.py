"""One line of a JSONL file to its text: at once, or piece by piece where the line is too long to be held in memory."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from typing import Any

from data_pipeline.errors import DataError


def parse_line(line: bytes, text_key: str, place: str) -> str:
    """The text of one line; DataError naming the place when there is none."""
    try:
        value = json.loads(line.decode().rstrip())
    except UnicodeDecodeError as error:
        raise DataError(f"{place}: is not UTF-8 (byte {line[error.start]:#04x} in column {error.start + 1})") from error
    except (ValueError, RecursionError) as error:
        detail = f"{error.msg} in column {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)
        raise DataError(f"{place}: is not a JSON object ({detail})") from error
    if not isinstance(value, dict):
        raise DataError(f"{place}: is not a JSON object but of type {type(value).__name__}")
    if text_key not in value:
        raise _lacks(place, text_key, list(value))
    text = value[text_key]
    if not isinstance(text, str):
        raise DataError(f"{place}: the value of {text_key!r} is not a text but of type {type(text).__name__}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        # JSON can spell half of a surrogate pair ("\ud800"), which is no character and has no UTF-8.
        raise DataError(f"{place}: the text holds half a surrogate pair at character {error.start}") from error
    return text


def stream_line(blocks: Iterator[bytes], text_key: str, place: str) -> Iterator[str]:
    """The text of one line that comes in blocks, as parts; memory does not grow with the line.

    Differs from `parse_line` in what it does not check: values other than the text are skipped by their brackets, and
    of a repeated key the first counts.
    """
    scanner = _Scanner(blocks, place)
    if scanner.peek() != "{":
        raise scanner.error("is not a JSON object")
    scanner.at += 1
    keys: list[str] = []
    found = False
    while scanner.peek() != "}":
        if keys:
            scanner.expect(",")
        scanner.expect('"')
        key = "".join(scanner.string_parts())
        keys.append(key[:80])
        scanner.expect(":")
        if key == text_key and not found:
            if scanner.peek() != '"':
                raise DataError(f"{place}: the value of {text_key!r} is not a text")
            scanner.at += 1
            found = True
            yield from _whole_characters(scanner.string_parts(), place)
        else:
            scanner.skip_value()
    scanner.at += 1
    if scanner.peek():
        raise scanner.error("goes on after its JSON object")
    if not found:
        raise _lacks(place, text_key, keys)


def _lacks(place: str, text_key: str, keys: list[str]) -> DataError:
    shown = ", ".join(sorted(keys)[:8]) or "none"
    return DataError(f"{place}: lacks the key {text_key!r} (its keys: {shown}); set data.text_key")


class _Scanner:
    """A cursor over the characters of a line that are in memory, and the blocks that are not yet."""

    _SPACE = re.compile(r"[ \t\r\n]*")
    _STRING = re.compile(r'[^"\\]*(?:\\.[^"\\]*)*', re.DOTALL)
    _SCALAR = re.compile(r"[^,\]} \t\r\n]*")
    _MARK = re.compile(r'["\[\]{}]')

    def __init__(self, blocks: Iterator[bytes], place: str) -> None:
        self._blocks, self._place = blocks, place
        self._decoder: Any = codecs.getincrementaldecoder("utf-8")("strict")
        self.buffer, self.at = "", 0

    def error(self, what: str) -> DataError:
        return DataError(f"{self._place}: {what}; the line is not a JSON object")

    def fill(self) -> bool:
        """Bring in the next block; False when there is none."""
        block = next(self._blocks, None)
        try:
            more = self._decoder.decode(block or b"", final=block is None)
        except UnicodeDecodeError as error:
            byte = error.object[error.start]
            raise DataError(f"{self._place}: is not UTF-8 (byte {byte:#04x})") from error
        self.buffer, self.at = self.buffer[self.at :] + more, 0
        return block is not None

    def peek(self) -> str:
        """The next character that is no white space, "" at the end."""
        while True:
            match = self._SPACE.match(self.buffer, self.at)
            self.at = match.end() if match else self.at
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
        """The decoded parts of a string whose opening quote has been taken."""
        while True:
            match = self._STRING.match(self.buffer, self.at)
            end = match.end() if match else self.at
            if end < len(self.buffer) and self.buffer[end] == '"':
                raw, self.at = self.buffer[self.at : end], end + 1
                yield self._decoded(raw)
                return
            # Do not cut inside an escape: the longest are two of six characters, and a run of backslashes is pairs.
            cut = self.buffer.find("\\", max(self.at, end - 12), end)
            cut = end if cut < 0 else cut
            while cut > self.at and self.buffer[cut - 1] == "\\":
                cut -= 1
            raw, self.at = self.buffer[self.at : cut], cut
            if raw:
                yield self._decoded(raw)
            if not self.fill():
                raise self.error("has a text without an end")

    def skip_value(self) -> None:
        depth = 0
        first = self.peek()
        if first and first not in '"[{':
            while True:
                match = self._SCALAR.match(self.buffer, self.at)
                self.at = match.end() if match else self.at
                if self.at < len(self.buffer) or not self.fill():
                    return
        while True:
            match = self._MARK.search(self.buffer, self.at)
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

    def _decoded(self, raw: str) -> str:
        try:
            return json.loads(f'"{raw}"')
        except ValueError as error:
            raise self.error(f"has a text that cannot be decoded ({error.args[0].split(':')[0]})") from error


def _whole_characters(parts: Iterator[str], place: str) -> Iterator[str]:
    # A surrogate pair spelled as two escapes may be cut between them.
    carry, count = "", 0
    for part in parts:
        part = carry + part
        carry = ""
        if part and "\ud800" <= part[-1] < "\udc00":
            part, carry = part[:-1], part[-1]
        if len(part) > 1 and "\ud800" <= part[0] < "\udc00" and "\udc00" <= part[1] < "\ue000":
            part = part[:2].encode("utf-16-le", "surrogatepass").decode("utf-16-le") + part[2:]
        try:
            part.encode()
        except UnicodeEncodeError as error:
            at = count + error.start
            raise DataError(f"{place}: the text holds half a surrogate pair at character {at}") from error
        count += len(part)
        if part:
            yield part
    if carry:
        raise DataError(f"{place}: the text holds half a surrogate pair at character {count}")
