"""Which token ends a document, and what a copy of a tokenizer takes along."""

import json

import pytest

from data_pipeline import DataConfig, DataError, Tokenizer, open_data
from data_pipeline.store.shards import ShardSet
from data_pipeline.text.end_token import choose_end, copy_tokenizer, describe
from data_pipeline.text.prepare import prepare
from tests.data_pipeline.conftest import upload, write_corpus

tokenizers = pytest.importorskip("tokenizers")
CHAT = "{% for m in messages %}{{ m.content }}<|turn|>{% endfor %}"


def make_json(directory, *special):
    """A byte-level BPE tokenizer.json with the given special tokens, ids 0, 1, ..."""
    directory.mkdir(parents=True, exist_ok=True)
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, special_tokens=list(special), initial_alphabet=alphabet, show_progress=False
    )
    model.train_from_iterator(["hello world, hello there"], trainer)
    model.save(str(directory / "tokenizer.json"))
    return directory / "tokenizer.json"


@pytest.mark.parametrize(
    "beside, named, expected",
    [
        ({}, None, "<|endoftext|>"),
        ({"eos_token": "</s>"}, None, "</s>"),  # the list has both, the tokenizer says which
        ({"eos_token": {"content": "</s>", "lstrip": False}}, None, "</s>"),
        ({"eos_token": "<|turn|>"}, None, "<|endoftext|>"),  # chat models end turns with it, not documents
        ({"eos_token": "<|turn|>"}, "<|turn|>", "<|turn|>"),
        ({"eos_token": None}, None, "<|endoftext|>"),
    ],
)
def test_the_rule(tmp_path, beside, named, expected):
    path = make_json(tmp_path, "<|endoftext|>", "</s>", "<|turn|>")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(beside))
    tokenizer = Tokenizer(path, named)
    assert tokenizer.token(tokenizer.eos_id) == expected


def test_tokens_that_no_list_has_are_read_beside_the_file(tmp_path):
    path = make_json(tmp_path, "<|stop|>", "<|turn|>")
    with pytest.raises(DataError, match=r"none of the tokens that end a document .* name it with data.end_token"):
        Tokenizer(path)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [1, 0]}')
    assert Tokenizer(path).eos_id == 1
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<|stop|>"}')
    assert Tokenizer(path).eos_id == 0
    with pytest.raises(DataError, match=r"data.end_token='<\|no\|>' is not one of its tokens"):
        Tokenizer(path, "<|no|>")
    with pytest.raises(DataError, match="document_end_token"):
        choose_end(path, {"a": 0}, describe(path)) if describe(path, 3) else None


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("tokenizer_config.json", "{", "tokenizer_config.json: cannot be read as JSON"),
        ("tokenizer_config.json", "[]", "tokenizer_config.json: must hold a JSON object"),
        ("tokenizer_config.json", '{"eos_token": 3}', "eos_token=3 must be the text of a token"),
        ("tokenizer_config.json", '{"chat_template": 3}', "chat_template must be a text"),
        ("generation_config.json", '{"eos_token_id": "2"}', r"eos_token_id=\['2'\] must be token ids"),
    ],
)
def test_bad_files_beside_a_tokenizer_are_named(tmp_path, name, content, message):
    path = make_json(tmp_path, "</s>")
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=message):
        Tokenizer(path)


def test_a_named_end_goes_along_with_prepared_data(tmp_path, server):
    path = make_json(tmp_path / "hf", "<|endoftext|>", "<|turn|>")
    (tmp_path / "hf/chat_template.jinja").write_text(CHAT)
    write_corpus(tmp_path / "c.jsonl", 30)
    given = dict(source="jsonl", path=str(tmp_path / "c.jsonl"), tokenizer=str(path), cache_dir=str(tmp_path / "out"))
    usual, named = prepare(DataConfig(**given)), prepare(DataConfig(**given, end_token="<|turn|>"))
    assert usual.directory != named.directory
    for data, end in ((usual, 0), (named, 1)):
        assert data.manifest["tokenizer"]["eos_id"] == Tokenizer(data.tokenizer_path).eos_id == end
        shards = ShardSet(data.train)
        assert all(shards.read(i, int(n) - 1, 1)[0] == end for i, n in enumerate(shards.lengths))
        assert Tokenizer(data.tokenizer_path).description["chat_template"] == CHAT
    shards = dict(source="shards", path=str(named.directory), cache_dir=str(tmp_path / "out"))
    for config in (DataConfig(**shards), DataConfig(**shards, tokenizer=str(path), end_token="<|turn|>")):
        assert open_data(config).tokenizer.eos_id == 1
    remote = DataConfig(
        source="shards", path=upload(server, named.directory, "named-end"), cache_dir=str(tmp_path / "remote")
    )
    opened = open_data(remote)
    assert opened.tokenizer.eos_id == 1 and describe(opened.tokenizer_path)["chat_template"] == CHAT
    with pytest.raises(DataError, match=r"documents end with token 0 .* the tokenizer names 1"):
        open_data(DataConfig(source="shards", path=str(usual.directory), end_token="<|turn|>"))


def test_an_end_token_needs_a_given_tokenizer(tmp_path):
    write_corpus(tmp_path / "c.jsonl", 30)
    for source in (dict(source="jsonl", path=str(tmp_path / "c.jsonl")), dict(source="synthetic")):
        with pytest.raises(DataError, match=r"data.end_token='</s>' names a token of data.tokenizer, which is not set"):
            open_data(DataConfig(**source, end_token="</s>", cache_dir=str(tmp_path / "out")))
    with pytest.raises(DataError, match=r"data.end_token=3 must be a token or null"):
        DataConfig(end_token=3)


def test_a_named_end_of_a_sentencepiece_model(tmp_path):
    import sentencepiece

    texts = write_corpus(tmp_path / "c.jsonl", 300)
    for name, options in (
        ("control", dict(control_symbols=["<end>"])),
        ("plain", dict(user_defined_symbols=["<end>"])),
    ):
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts), model_prefix=str(tmp_path / name), vocab_size=90, eos_id=-1, minloglevel=3,
            **options,
        )  # fmt: skip
    tokenizer = Tokenizer(tmp_path / "control.model", "<end>")
    assert tokenizer.token(tokenizer.eos_id) == "<end>" and tokenizer.eos_id not in tokenizer.encode("a<end>b")
    with pytest.raises(DataError, match="a token that text can spell, so a document could end itself"):
        Tokenizer(tmp_path / "plain.model", "<end>")
    with pytest.raises(DataError, match="is not one of its tokens"):
        Tokenizer(tmp_path / "plain.model", "<no>")


def test_copies_keep_what_stands_beside(tmp_path):
    path = make_json(tmp_path / "one", "</s>")
    copy_tokenizer(path, tmp_path / "plain.model")
    assert not (tmp_path / "tokenizer_config.json").exists()
    (tmp_path / "one/tokenizer_config.json").write_text(json.dumps({"pad_token": "</s>", "chat_template": CHAT}))
    copy_tokenizer(path, tmp_path / "two.model", end_token="</s>")
    copy_tokenizer(tmp_path / "two.model", tmp_path / "two.model")  # onto itself
    assert describe(tmp_path / "two.model") == {
        "pad_token": "</s>",
        "chat_template": CHAT,
        "document_end_token": "</s>",
    }
    assert (tmp_path / "two.model").read_bytes() == path.read_bytes()
