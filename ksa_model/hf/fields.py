"""Typed reading of a config.json: a missing value, or one of another type or out of range, is named in one line."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ksa_model.config import MAX_INT32, ModelConfigError

_REQUIRED: Any = object()


class Fields:
    """The values of a config.json by key.

    Every method raises `ModelConfigError` that names the key, its value and what it must be. A key that is missing has
    the default; without one it is required. null counts as missing where `null` is true.
    """

    def __init__(self, values: Mapping[str, Any], place: str = "config.json"):
        self.values, self._place = values, place

    def integer(
        self, key: str, default: Any = _REQUIRED, least: int = 1, most: int = MAX_INT32, null: bool = False
    ) -> Any:
        """A whole number from `least` to `most`, or the default."""
        value, given = self._get(key, default, null)
        if given and (isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most):
            raise self._wrong(key, value, f"a whole number from {least} to {most}")
        return value

    def number(
        self, key: str, default: Any = _REQUIRED, least: float = -math.inf, null: bool = False, most: float = math.inf
    ) -> Any:
        """A finite number from `least` to `most` as float, or the default."""
        value, given = self._get(key, default, null)
        if not given:
            return value
        number = math.nan if isinstance(value, bool) or not isinstance(value, (int, float)) else _float(value)
        if not (math.isfinite(number) and least <= number <= most):
            wanted = "a finite number" if least == -math.inf else f"a finite number of at least {least:g}"
            wanted += "" if most == math.inf else f" and at most {most:g}"
            raise self._wrong(key, value, wanted)
        return number

    def flag(self, key: str, default: Any = _REQUIRED, null: bool = False) -> Any:
        """true or false, or the default."""
        value, given = self._get(key, default, null)
        if given and not isinstance(value, bool):
            raise self._wrong(key, value, "true or false")
        return value

    def text(self, key: str, default: Any = _REQUIRED, null: bool = False) -> Any:
        """A text, or the default."""
        value, given = self._get(key, default, null)
        if given and not isinstance(value, str):
            raise self._wrong(key, value, "a text")
        return value

    def group(self, key: str) -> dict[str, Any]:
        """An object; empty where it is missing or null."""
        value, given = self._get(key, {}, True)
        if given and not isinstance(value, Mapping):
            raise self._wrong(key, value, "an object")
        return dict(value)

    def _get(self, key: str, default: Any, null: bool) -> tuple[Any, bool]:
        """The value of a key, and whether it was given."""
        if key in self.values and not (null and self.values[key] is None):
            return self.values[key], True
        if default is _REQUIRED:
            raise ModelConfigError(f"{self._place} lacks {key}")
        return default, False

    def _wrong(self, key: str, value: Any, wanted: str) -> ModelConfigError:
        shown = repr(value)
        shown = shown if len(shown) <= 80 else shown[:77] + "..."
        return ModelConfigError(f"{self._place} has {key}={shown}, which must be {wanted}; correct it")


def _float(value: float) -> float:
    try:
        return float(value)
    except OverflowError:  # a whole number of hundreds of digits
        return math.inf
