"""What stands beside a tokenizer file, and which token ends a document.

A tokenizer.json does not say which token ends a text: tokenizer_config.json and generation_config.json beside it do.
Copies of a tokenizer (prepared corpora, run directories, imports) take those facts along in one tokenizer_config.json.

The token that ends a document is the first of:

1. the one that `data.end_token` names, or named when the copy was made;
2. the `eos_token` of tokenizer_config.json, where it is one of `END_TOKENS`;
3. the first of `END_TOKENS` that the tokenizer has;
4. the `eos_token` of tokenizer_config.json, whatever it is: many chat models name the end of a turn there;
5. the first `eos_token_id` of generation_config.json.

A SentencePiece model has an end token of its own, which only 1 replaces.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data_pipeline.errors import DataError
from data_pipeline.store.files import atomic_write

END_TOKENS = (
    "<|endoftext|>",
    "<|end_of_text|>",
    "</s>",
    "<eos>",
    "<|eos|>",
    "<\uff5cend\u2581of\u2581sentence\uff5c>",
)
DESCRIPTION, TEMPLATE, GENERATION = "tokenizer_config.json", "chat_template.jinja", "generation_config.json"
NAMED_END, END_IDS = "document_end_token", "document_end_ids"
_SPECIAL = ("bos_token", "eos_token", "pad_token", "unk_token")


def describe(path: str | Path, end_token: str | None = None) -> dict[str, Any]:
    """The facts beside a tokenizer file: special tokens, `chat_template`, the named end token (`NAMED_END`), and the
    ids that generation_config.json names (`END_IDS`). Empty where nothing stands there.

    Raises:
        DataError: one of the files is not a JSON object, or holds a value of the wrong type.
    """
    directory = Path(path).parent
    held = _json(directory / DESCRIPTION)
    found: dict[str, Any] = {}
    for key in _SPECIAL:
        token = held.get(key)
        if isinstance(token, Mapping):  # an added token with its options
            token = token.get("content")
        if token is not None:
            found[key] = _text(token, directory / DESCRIPTION, key)
    template: Any = held.get("chat_template")
    if (directory / TEMPLATE).is_file():
        template = _read(directory / TEMPLATE)
    if template is not None:
        if not isinstance(template, (str, list)):  # a list holds several, by name
            raise DataError(f"{directory / DESCRIPTION}: chat_template must be a text or a list of them")
        found["chat_template"] = template
    ends = held.get(END_IDS, _json(directory / GENERATION).get("eos_token_id"))
    ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
    if not all(isinstance(end, int) and not isinstance(end, bool) and end >= 0 for end in ends):
        raise DataError(f"{directory / GENERATION}: eos_token_id={ends!r} must be token ids; correct or remove it")
    if ends:
        found[END_IDS] = ends
    named = end_token or held.get(NAMED_END)
    if named is not None:
        found[NAMED_END] = _text(named, directory / DESCRIPTION, NAMED_END)
    return found


def choose_end(path: str | Path, tokens: Mapping[str, int], description: Mapping[str, Any]) -> int:
    """The id of the token that ends a document, by the rule of this module.

    Args:
        path: of the tokenizer, for messages.
        tokens: its vocabulary, added tokens included.
        description: see `describe`.

    Raises:
        DataError: the named token is not in the vocabulary, or none of the rules gives one.
    """
    named, own = description.get(NAMED_END), description.get("eos_token")
    if named is not None and named not in tokens:
        raise DataError(f"{path}: data.end_token={named!r} is not one of its tokens; name one of them")
    for token in (named, own if own in END_TOKENS else None, *END_TOKENS, own):
        if token is not None and token in tokens:
            return tokens[token]
    ids = set(tokens.values())
    for end in description.get(END_IDS, ()):
        if end in ids:
            return end
    raise DataError(
        f"{path}: the tokenizer has none of the tokens that end a document ({', '.join(END_TOKENS)}), and no "
        f"{DESCRIPTION} or {GENERATION} beside it names one; name it with data.end_token"
    )


def copy_tokenizer(
    path: str | Path, target: Path, description: Mapping[str, Any] | None = None, end_token: str | None = None
) -> None:
    """Write a copy of a tokenizer file to `target`, and its description beside it, each completely or not at all.

    `description` replaces what stands beside `path`; `end_token` is `data.end_token`.
    """
    content = Path(path).read_bytes()
    facts = describe(path, end_token) if description is None else dict(description)
    beside = target.parent / DESCRIPTION
    if facts:
        with atomic_write(beside) as file:
            file.write((json.dumps(facts, indent=2, ensure_ascii=False) + "\n").encode())
    else:
        beside.unlink(missing_ok=True)
    with atomic_write(target) as file:
        file.write(content)


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        held = json.loads(_read(path))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: cannot be read as JSON ({error}); copy it again, or remove it") from error
    if not isinstance(held, dict):
        raise DataError(f"{path}: must hold a JSON object; copy it again, or remove it")
    return held


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read ({error}); copy it again, or remove it") from error


def _text(value: Any, path: Path, key: str) -> str:
    if not isinstance(value, str) or not value:
        raise DataError(f"{path}: {key}={value!r} must be the text of a token; correct it, or remove the file")
    return value
