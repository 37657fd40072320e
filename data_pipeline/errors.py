"""The one error of the data pipeline."""

from __future__ import annotations


class DataError(ValueError):
    """Bad input. The message is one line that names the value, the place it came from and a way out."""
