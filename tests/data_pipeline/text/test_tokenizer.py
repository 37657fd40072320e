import json
import random

import numpy as np
import pytest
import sentencepiece

from data_pipeline import DataConfig, DataError, Tokenizer, open_data
from data_pipeline.store.shards import ShardSet
from data_pipeline.text.prepare import prepare
from data_pipeline.text.tokenizer import CHUNK_CHARACTERS, SPACE_SYMBOL, _sample_lines, train_tokenizer
from tests.data_pipeline.conftest import write_corpus

NASTY = {
    "nothing": "",
    "one space": " ",
    "spaces": "     \n  \n ",
    "tabs": "\t\tx\t \t",
    "line ends": "\r\n\r\r\n\n\ra\rb\r\n",
    "empty lines": "\n\n\n\n",
    "nul": "\0a\0\0b\0",
    "controls": "".join(map(chr, range(32))) + "\x7f\x85\u2028\u2029\x1c",
    "space symbol": f"{SPACE_SYMBOL}a{SPACE_SYMBOL}{SPACE_SYMBOL} b {SPACE_SYMBOL}\n{SPACE_SYMBOL}",
    "only space symbols": SPACE_SYMBOL * 5,
    "specials as text": "<s></s><unk><pad><0x41><0xE2>",
    "composed and not": "é e\u0301 ﬁ Å A\u030a ① \uff46\uff55\uff4c\uff4c",
    "marks": "\ufeffbom\ufffe\uffff\ufffd\u200b\u200d\u00a0\u3000\u202e",
    "emoji": "👩‍👩‍👧‍👦🏳️‍🌈",
    "digits": "1234567890 ٣٤٥ ५६",
    "long word": "x" * 5000,
}


@pytest.mark.parametrize("text", NASTY.values(), ids=NASTY.keys())
def test_any_text_comes_back_exactly(model_path, text):
    tokenizer = Tokenizer(model_path)
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_every_character_of_unicode_comes_back_exactly(model_path):
    tokenizer = Tokenizer(model_path)
    for plane in range(17):
        codes = [code for code in range(plane << 16, (plane + 1) << 16) if not 0xD800 <= code < 0xE000]
        text = "".join(map(chr, codes))
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_random_mixtures_come_back_exactly_and_end_tokens_are_never_produced(model_path):
    tokenizer = Tokenizer(model_path)
    rng = random.Random(0)
    alphabet = [*"ab  \n\t\r\0é", SPACE_SYMBOL, "<", "/s>", "😀", "attention"]
    for _ in range(500):
        text = "".join(rng.choices(alphabet, k=rng.randrange(40)))
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert tokenizer.eos_id not in ids and 0 not in ids


def test_long_documents_are_encoded_in_chunks_with_the_same_ids(model_path):
    rng = random.Random(1)
    line = ["", "  ", " a = b", "attention window\t", "  \u00e9 x", "\r"]
    text = "\n".join(rng.choice(line) for _ in range(40_000)) + " end"
    assert len(text) > 4 * CHUNK_CHARACTERS
    whole = sentencepiece.SentencePieceProcessor(model_file=str(model_path)).encode(text)
    ids = Tokenizer(model_path).encode(text)
    assert ids.dtype == np.int32 and ids.tolist() == whole


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_training_gives_the_same_bytes_twice(tmp_path, kind):
    texts = write_corpus(tmp_path / "corpus.jsonl", 300)
    for name in ("a", "b"):
        train_tokenizer(iter(texts), tmp_path / name, 330, kind)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    tokenizer = Tokenizer(tmp_path / "a")
    assert tokenizer.vocab_size == 330 and tokenizer.eos_id == 1
    assert all(tokenizer.decode(tokenizer.encode(text)) == text for text in [*texts[:20], *NASTY.values()])


def test_training_text_is_bounded_and_drawn_from_the_whole_corpus():
    texts = ["\n".join(f"{document} {line}" for line in range(100)) for document in range(1000)]
    lines = _sample_lines(iter(texts), 50_000)
    assert 49_000 < sum(map(len, lines)) <= 50_000
    documents = [int(line.split()[0]) for line in lines]
    assert documents == sorted(documents)
    assert 0.4 < sum(document < 500 for document in documents) / len(documents) < 0.6
    assert _sample_lines(["ab\n\ncd" + SPACE_SYMBOL + "e"], 100) == ["ab", "cd", "e"]
    assert max(map(len, _sample_lines(["x" * 10_000], 10**6))) == 4096


@pytest.mark.parametrize(
    ("texts", "vocab_size", "message"),
    [
        (
            ["hello world"] * 9,
            4096,
            "vocab_size=4096 is more than the corpus supports: its 99 characters of training text",
        ),
        (["hello world"] * 9, 100, "vocab_size=100 is less than the corpus needs for its characters alone; set data"),
        (["", "\n"], 400, "a tokenizer cannot be trained: the training split holds no text"),
    ],
)
def test_impossible_vocabularies(tmp_path, texts, vocab_size, message):
    with pytest.raises(DataError) as error:
        train_tokenizer(texts, tmp_path / "model", vocab_size)
    assert message in str(error.value) and "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


def test_the_largest_vocabulary_that_the_error_names_works(tmp_path):
    with pytest.raises(DataError) as error:
        train_tokenizer(["hello world"] * 9, tmp_path / "model", 4096)
    size = int(str(error.value).split("data.vocab_size=")[1].split()[0])
    train_tokenizer(["hello world"] * 9, tmp_path / "model", size)
    assert Tokenizer(tmp_path / "model").vocab_size == size


def test_files_that_are_no_model(tmp_path):
    (tmp_path / "noise").write_bytes(bytes(range(256)))
    (tmp_path / "empty").write_bytes(b"")
    for name in ("noise", "empty", "absent"):
        with pytest.raises(DataError, match=f"{name}: cannot be used as a SentencePiece model"):
            Tokenizer(tmp_path / name)


def test_a_directory_and_a_name_of_the_hub_are_answered(tmp_path):
    with pytest.raises(DataError, match=r"is a directory; it holds neither tokenizer\.json nor tokenizer\.model"):
        Tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"")
    with pytest.raises(DataError, match=r"is a directory; name the file in it: .*/tokenizer.model$"):
        Tokenizer(tmp_path)
    with pytest.raises(DataError, match=r"Qwen/Qwen3-0.6B: .* name a file of this machine: nothing is downloaded$"):
        Tokenizer("Qwen/Qwen3-0.6B")


def test_a_foreign_model_is_used_as_it_is(tmp_path):
    # Default settings: normalises, adds a space in front, has no newline token. Nothing may be cut for such a model.
    texts = write_corpus(tmp_path / "corpus.jsonl", 300)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_prefix=str(tmp_path / "plain"), vocab_size=80, minloglevel=3
    )
    text = "attention\nwindow " * 5000
    expected = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "plain.model")).encode(text)
    assert Tokenizer(tmp_path / "plain.model").encode(text).tolist() == expected


def test_a_model_without_an_end_token_is_refused(tmp_path):
    texts = write_corpus(tmp_path / "corpus.jsonl", 300)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_prefix=str(tmp_path / "m"), vocab_size=80, eos_id=-1, minloglevel=3
    )
    with pytest.raises(DataError, match="no end-of-sentence token"):
        Tokenizer(tmp_path / "m.model")


@pytest.fixture(scope="module")
def json_path(tmp_path_factory):
    """A byte-level BPE tokenizer.json."""
    tokenizers = pytest.importorskip("tokenizers")
    root = tmp_path_factory.mktemp("json")
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    model.train_from_iterator(write_corpus(root / "c.jsonl", 200), trainer)
    model.save(str(root / "tokenizer.json"))
    return root / "tokenizer.json"


@pytest.mark.parametrize("text", NASTY.values(), ids=NASTY.keys())
def test_a_hugging_face_tokenizer_can_be_used_instead(json_path, text):
    tokenizer = Tokenizer(json_path)
    assert tokenizer.decode(tokenizer.encode(text)) == text and tokenizer.encode(text).dtype == np.int32


def test_a_hugging_face_tokenizer_in_prepare(json_path, tmp_path):
    tokenizer = Tokenizer(json_path)
    assert tokenizer.kind == "Hugging Face" and tokenizer.vocab_size == 400
    assert tokenizer.token(tokenizer.eos_id) == "<|endoftext|>"
    ids = tokenizer.encode("a<|endoftext|>b")  # a document cannot end itself
    assert tokenizer.eos_id not in ids and tokenizer.decode(ids) == "a<|endoftext|>b"
    write_corpus(tmp_path / "c.jsonl", 50)
    config = DataConfig(
        source="jsonl", path=str(tmp_path / "c.jsonl"), tokenizer=str(json_path), cache_dir=str(tmp_path)
    )
    data = prepare(config)
    assert data.vocab_size == 400 and data.manifest["tokenizer"]["kind"] == "Hugging Face"
    shards = ShardSet(data.train)
    assert all(shards.read(i, int(n) - 1, 1)[0] == tokenizer.eos_id for i, n in enumerate(shards.lengths))


def test_json_files_that_are_no_tokenizer(tmp_path, json_path):
    (tmp_path / "a.json").write_text("{}")
    with pytest.raises(DataError, match=r"a.json: cannot be used as a Hugging Face tokenizer.json"):
        Tokenizer(tmp_path / "a.json")
    (tmp_path / "b.json").write_text(json_path.read_text().replace("<|endoftext|>", "<|other|>"))
    with pytest.raises(DataError, match=r"b.json: the tokenizer has none of the tokens that end a document"):
        Tokenizer(tmp_path / "b.json")


def hugging_face_models():
    """(name, tokenizer.json, message) of tokenizers that the library refuses, panics on, or cannot encode with."""
    tokenizers = pytest.importorskip("tokenizers")
    models = tokenizers.models

    def of(model):
        tokenizer = tokenizers.Tokenizer(model)
        tokenizer.add_special_tokens(["</s>"])
        return json.loads(tokenizer.to_str())

    words = {"a": 0, "b": 1, "</s>": 2}
    known = of(models.WordLevel(words, unk_token="[UNK]"))
    no_word = r"x.jsonl:1: .*tokenizer.(json|model): cannot encode a text that begins with 'attention"
    yield "a word that is unknown", known, no_word
    yield "unigram", of(models.Unigram([("a", -1.0), ("</s>", -2.0)], unk_id=None)), no_word
    yield "word piece", of(models.WordPiece({"a": 0, "</s>": 1}, unk_token="[UNK]")), no_word
    yield "bpe", of(models.BPE({"a": 0, "</s>": 1}, [], unk_token="[UNK]")), no_word
    large = {**known, "model": {**known["model"], "vocab": {"a": 4_000_000_000, "</s>": 2}}}
    yield "an id of 32 bits", large, r"has the token id 4000000000; ids are at most 2147483647"
    for name, part in (
        ("normalizer", {"type": "Precompiled", "precompiled_charsmap": "AAAA"}),  # the library panics
        ("pre_tokenizer", {"type": "Split", "pattern": {"Regex": "(?<=a"}, "behavior": "Isolated", "invert": False}),
        ("decoder", {"type": "None"}),
        ("added_tokens", [{"id": -1}]),
    ):
        yield f"a bad {name}", {**known, name: part}, r"cannot be used as a Hugging Face tokenizer.json \("


def test_errors_of_tokenizer_libraries_are_one_line(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"text": "attention"}\n')
    for name, content, message in hugging_face_models():
        path = tmp_path / "tokenizer.json"
        path.write_text(json.dumps(content))
        for stream in (False, True):
            with pytest.raises(DataError, match=message) as error:
                data = open_data(
                    DataConfig(
                        source="jsonl",
                        path=str(tmp_path / "x.jsonl"),
                        tokenizer=str(path),
                        cache_dir=str(tmp_path / "cache"),
                        validation_fraction=0.0,
                        stream=stream,
                    )
                )
                data.samples("train", 64, 8).at(0)
            assert "\n" not in str(error.value), name


def test_a_damaged_model_is_named_or_works(tmp_path, model_path):
    content = model_path.read_bytes()
    path = tmp_path / "bad.model"
    damaged = [b"", bytes(99), b"text", b"[1]", b"\xff\xfe{", content[: len(content) // 2], content[:-1], content * 2]
    for at in range(0, len(content), 61):
        damaged.append(content[:at] + bytes([content[at] ^ 16]) + content[at + 1 :])
    for number, data in enumerate(damaged):
        path.write_bytes(data)
        try:
            tokenizer = Tokenizer(path)
            tokenizer.decode(tokenizer.encode("attention \u2581 é\n"))
            assert number >= 8  # a flipped bit may change a score
        except DataError as error:
            assert str(error).startswith(f"{path}: ") and "\n" not in str(error)


def test_a_tokenizer_json_with_a_byte_order_mark(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0, "</s>": 1}, []))
    (tmp_path / "tokenizer.json").write_bytes(b"\xef\xbb\xbf" + tokenizer.to_str().encode())
    assert Tokenizer(tmp_path / "tokenizer.json").encode("aa").tolist() == [0, 0]
