"""A lossless SentencePiece tokenizer for `AutoTokenizer.from_pretrained(..., trust_remote_code=True)`.

It produces the ids of the training data: decoding returns every text exactly, text that looks like a special token is
encoded as text, and no token is added at the beginning or the end.
"""

from __future__ import annotations

import os
import shutil

import sentencepiece
from transformers import PreTrainedTokenizer

SPACE_SYMBOL = "\u2581"  # SentencePiece's symbol for a space; in a text it is encoded as its three bytes


class KsaTokenizer(PreTrainedTokenizer):
    """Encodes with the SentencePiece model in `vocab_file`."""

    vocab_files_names = {"vocab_file": "tokenizer.model"}  # noqa: RUF012
    model_input_names = ["input_ids", "attention_mask"]  # noqa: RUF012

    def __init__(self, vocab_file, eos_token="</s>", unk_token="<unk>", **kwargs):
        self.vocab_file = vocab_file
        self.pieces = sentencepiece.SentencePieceProcessor(model_file=vocab_file)
        symbol = [self.pieces.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE_SYMBOL.encode()]
        self._symbol = symbol if all(self.pieces.is_byte(piece) for piece in symbol) else None
        kwargs = {"pad_token": eos_token, **kwargs, "clean_up_tokenization_spaces": False, "split_special_tokens": True}
        super().__init__(eos_token=eos_token, unk_token=unk_token, **kwargs)

    @property
    def vocab_size(self):
        return self.pieces.vocab_size()

    def get_vocab(self):
        return {self.pieces.id_to_piece(i): i for i in range(self.vocab_size)}

    def _tokenize(self, text, **kwargs):
        if self._symbol is None:
            return self.pieces.encode(text, out_type=str)
        symbol = [self.pieces.id_to_piece(piece) for piece in self._symbol]
        tokens = []
        for number, part in enumerate(text.split(SPACE_SYMBOL)):
            tokens += (symbol if number else []) + self.pieces.encode(part, out_type=str)
        return tokens

    def _convert_token_to_id(self, token):
        return self.pieces.piece_to_id(token)

    def _convert_id_to_token(self, index):
        return self.pieces.id_to_piece(index)

    def convert_tokens_to_string(self, tokens):
        return self.pieces.decode([self.pieces.piece_to_id(token) for token in tokens])

    def _decode(self, token_ids, skip_special_tokens=False, **kwargs):
        ids = [token_ids] if isinstance(token_ids, int) else list(token_ids)
        if skip_special_tokens:
            return self.pieces.decode([i for i in ids if i != self.eos_token_id])
        parts, document = [], []
        for i in ids:
            if i == self.eos_token_id:
                parts += [self.pieces.decode(document), self.eos_token]
                document = []
            else:
                document.append(i)
        return "".join([*parts, self.pieces.decode(document)])

    def build_inputs_with_special_tokens(self, token_ids_0, token_ids_1=None):
        return token_ids_0 + (token_ids_1 or [])

    def save_vocabulary(self, save_directory, filename_prefix=None):
        name = f"{filename_prefix}-tokenizer.model" if filename_prefix else "tokenizer.model"
        path = os.path.join(save_directory, name)
        if os.path.abspath(path) != os.path.abspath(self.vocab_file):
            shutil.copyfile(self.vocab_file, path)
        return (path,)
