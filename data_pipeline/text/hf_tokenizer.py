"""Hugging Face tokenizer.json files; `data_pipeline.text.tokenizer` opens them."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.errors import DataError
from data_pipeline.text.end_token import END_TOKENS, choose_end


class HuggingFaceTokenizer:
    """A tokenizer.json. Text that looks like a special token is text: a document cannot end itself.

    The library treats such text as text only before its model sees it. A model whose own vocabulary holds a special
    token, such as `</s>` in a Unigram model, can still find it in a text. Such a text is encoded again by a twin whose
    vocabulary spells its special tokens in another way, with the same ids for everything else.
    """

    kind = "Hugging Face"
    lossless = False  # some are; nothing in the file says so

    def __init__(self, path: str | Path, content: bytes, description: Mapping[str, Any]) -> None:
        try:
            import tokenizers  # noqa: F401
        except ImportError as error:
            raise DataError(
                f"{path}: a tokenizer.json needs the package `tokenizers`: pip install 'ksa-train[hf]' ({error})"
            ) from error
        self._path = path
        self._model = self._load(content.decode("utf-8-sig"))
        self._held: dict[str, Any] = json.loads(content.decode("utf-8-sig"))
        tokens: dict[str, int] = self._model.get_vocab(with_added_tokens=True)
        self.vocab_size: int = max(tokens.values(), default=-1) + 1
        self.eos_id: int = choose_end(path, tokens, description)
        self.usual_end: int | None = next((tokens[token] for token in END_TOKENS if token in tokens), None)
        self._make_special(self._model.id_to_token(self.eos_id))
        kind = self._held["model"]
        unknown = kind.get("unk_id") if kind.get("type") == "Unigram" else tokens.get(kind.get("unk_token") or "")
        self.unknown_id: int | None = unknown
        own = self._model.get_vocab(with_added_tokens=False)
        special = [token["content"] for token in self._held.get("added_tokens") or [] if token.get("special")]
        end = self._model.id_to_token(self.eos_id)
        self._spelled = {token: own[token] for token in {*special, end} if token in own and own[token] != unknown}
        self._spelled_ids = np.array(sorted(self._spelled.values()), dtype=np.int32)

    def encode(self, text: str) -> np.ndarray:
        """Token ids of a text, int32 [num_tokens]."""
        ids = np.array(self._model.encode(text, add_special_tokens=False).ids, dtype=np.int32)
        if self._spelled_ids.size and np.isin(ids, self._spelled_ids).any():
            return np.array(self._twin.encode(text, add_special_tokens=False).ids, dtype=np.int32)
        return ids

    def decode(self, ids: list[int]) -> str:
        """The text of token ids, without special tokens."""
        return self._model.decode(ids, skip_special_tokens=True)

    def token(self, token_id: int) -> str:
        """The spelling of a token."""
        return self._model.id_to_token(token_id) or ""

    def vocabulary(self) -> list[str]:
        """The spelling of every id."""
        spelled = [""] * self.vocab_size
        for token, token_id in self._model.get_vocab(with_added_tokens=True).items():
            spelled[token_id] = token
        return spelled

    def _load(self, text: str) -> Any:
        import tokenizers

        try:
            model = tokenizers.Tokenizer.from_str(text)
        except Exception as error:  # the library's errors have no common class
            raise DataError(f"{self._path}: cannot be used as a Hugging Face tokenizer.json ({error})") from error
        model.encode_special_tokens = True
        model.no_truncation()
        model.no_padding()
        return model

    def _make_special(self, end: str) -> None:
        """Treat the end token as special where the file lists it as an added token that text may spell."""
        plain = [t for t in self._held.get("added_tokens") or [] if t["content"] == end and not t.get("special")]
        for token in plain:
            token["special"] = True
        if plain:
            self._model = self._load(json.dumps(self._held))

    @cached_property
    def _twin(self) -> Any:
        return self._load(json.dumps(_respelled(self._held, self._spelled)))


def _respelled(held: dict[str, Any], tokens: Collection[str]) -> dict[str, Any]:
    """A tokenizer.json whose `tokens` are spelled with two noncharacters around them; all ids stay."""

    def spell(token: str) -> str:
        return f"\ufdd0{token}\ufdd1" if token in tokens else token

    model, vocabulary = dict(held["model"]), held["model"]["vocab"]
    if isinstance(vocabulary, dict):
        model["vocab"] = {spell(token): token_id for token, token_id in vocabulary.items()}
    else:
        model["vocab"] = [[spell(token), score] for token, score in vocabulary]
    if model.get("merges"):
        pairs = [merge.split(" ", 1) if isinstance(merge, str) else merge for merge in model["merges"]]
        # A merge that makes one of the tokens, or continues it, has lost its token.
        model["merges"] = [pair for pair in pairs if not {*pair, "".join(pair)} & {*tokens}]
    added = [token | {"content": spell(token["content"])} for token in held.get("added_tokens") or []]
    return held | {"model": model, "added_tokens": added, "post_processor": None}
