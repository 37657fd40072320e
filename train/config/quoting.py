"""Values as a user types them: in the grammar of Hydra's overrides, and for the shell."""

from __future__ import annotations

import re
import shlex
from typing import Any

_PLAIN = re.compile(r"[A-Za-z_./][A-Za-z0-9_./+-]*")  # text that the grammar takes for itself
_NOT_TEXT = {"true", "false", "null", "inf", "nan"}


def quoted(value: Any) -> str:
    """`value` in the grammar of Hydra's overrides: a text stays that text, whatever is in it.

    quoted("runs/a") == "runs/a"; quoted("a,b") == "'a,b'"; quoted("240601") == "'240601'"; quoted(12) == "12"
    """
    if value is None:
        return "null"
    if not isinstance(value, str):
        return str(value).lower() if isinstance(value, bool) else str(value)
    if _PLAIN.fullmatch(value) and value.lower() not in _NOT_TEXT and not re.fullmatch(r"[.\d_+-]+(e.*)?", value):
        return value
    text = value.replace("${", "\\${")  # else OmegaConf would look for a key of that name
    # Within quotes, only a quote is escaped, and the backslashes before it.
    return "'" + re.sub(r"(\\*)('|$)", lambda m: m[1] * 2 + ("\\'" if m[2] else ""), text) + "'"


def unreadable(text: str) -> str:
    """What to say of an override `KEY=VALUE` that the grammar does not take, or nothing where it takes it."""
    from hydra.core.override_parser.overrides_parser import OverridesParser  # takes time, which few callers need
    from hydra.errors import HydraException

    key, equals, value = text.partition("=")
    try:
        OverridesParser.create().parse_override(text)
    except HydraException as error:
        if not equals or not re.fullmatch(r"[~+]*[\w./@]+", key):
            return ""
        if any("\ud800" <= letter <= "\udfff" for letter in text):
            return (
                f"{text!r} holds bytes that are no text in the encoding of this locale; set LC_ALL=C.UTF-8, or rename "
                "what it names"
            )
        if value[:1] in ("[", "{"):
            return f"{text} cannot be read ({' '.join(str(error).split('See https')[0].split())}); correct the list"
        return (
            f"{text}: the value holds a character with a meaning of its own; as text it is written "
            f"{as_text(key, value)}"
        )
    return ""


def as_text(key: str, value: str) -> str:
    """`override`, for a reader: with two pairs of quotes where nothing in `value` needs more."""
    return override(key, value) if set(value) & set("\"'\\$`!") else f"""'{key}="{value}"'"""


def override(key: str, value: Any) -> str:
    """`key=value` as one word for a shell, which gives Hydra that value."""
    return shlex.quote(f"{key}={quoted(value)}")
