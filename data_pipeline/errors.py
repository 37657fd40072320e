"""The one error of the data pipeline."""

from __future__ import annotations


class DataError(ValueError):
    """Bad input. The message is one line: the value, where it comes from (key, file, line) and what to do about it."""
