"""Special tokens in a text stay text, with every kind of model; texts that do not come back are counted."""

import json

import pytest

from data_pipeline import DataConfig, Tokenizer, open_data
from data_pipeline import prepare as command
from data_pipeline.text.prepare import prepare
from tests.data_pipeline.conftest import write_corpus
from tests.data_pipeline.text.test_end_token import make_json

tokenizers = pytest.importorskip("tokenizers")
from tokenizers import decoders, models, normalizers, pre_tokenizers  # noqa: E402

LETTERS = "abcdefghijklmnopqrstuvwxyz</>\u2581.,"


def unigram(directory, byte_fallback=False, special=True):
    """A Unigram tokenizer.json as T5 and Llama have it: the special tokens stand in its own vocabulary."""
    pieces = [("<unk>", 0.0), ("</s>", 0.0), ("<pad>", 0.0), ("\u2581hello", -3.0), ("\u2581a", -3.5)]
    pieces += [(letter, -8.0 - i / 100) for i, letter in enumerate(LETTERS)]
    if byte_fallback:
        pieces += [(f"<0x{byte:02X}>", -20.0) for byte in range(256)]
    model = tokenizers.Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=byte_fallback))
    model.pre_tokenizer = pre_tokenizers.Metaspace()
    steps = [decoders.ByteFallback()] if byte_fallback else []
    model.decoder = decoders.Sequence([*steps, decoders.Metaspace()])
    if special:
        model.add_special_tokens(["<unk>", "</s>", "<pad>"])
    directory.mkdir(parents=True, exist_ok=True)
    model.save(str(directory / "tokenizer.json"))
    return directory / "tokenizer.json"


@pytest.mark.parametrize("byte_fallback", [False, True])
@pytest.mark.parametrize("special", [False, True])
def test_a_document_cannot_end_itself(tmp_path, byte_fallback, special):
    tokenizer = Tokenizer(unigram(tmp_path, byte_fallback, special))
    for text in ("</s>", "a</s>b", "hello </s> </s> a", "x</s>"):
        ids = tokenizer.encode(text).tolist()
        assert tokenizer.eos_id not in ids and tokenizer.decode(ids) == text
    if special:
        assert 2 not in tokenizer.encode("a<pad>b") and tokenizer.decode(tokenizer.encode("a<pad>b")) == "a<pad>b"
    plain = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    for text in ("hello a", "", "hello, abc", "qu\u00e9 hello"):  # the ids of all other texts stay
        assert tokenizer.encode(text).tolist() == plain.encode(text, add_special_tokens=False).ids


def test_words_and_merges_that_spell_the_end(tmp_path):
    words = tokenizers.Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1, "a": 2, "b": 3}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.save(str(tmp_path / "words.json"))
    assert Tokenizer(tmp_path / "words.json").encode("a </s> b").tolist() == [2, 0, 3]
    letters = {token: i for i, token in enumerate(["<", "/", "s", ">", "</", "s>", "</s>", "a"])}
    merges = [("<", "/"), ("s", ">"), ("</", "s>")]
    tokenizers.Tokenizer(models.BPE(letters, merges)).save(str(tmp_path / "merges.json"))
    assert Tokenizer(tmp_path / "merges.json").encode("a</s>a").tolist() == [7, 4, 5, 7]
    added = tokenizers.Tokenizer(models.BPE({"a": 0, "b": 1}, []))
    added.add_tokens(["</s>"])  # not marked as special
    added.save(str(tmp_path / "added.json"))
    assert 2 not in Tokenizer(tmp_path / "added.json").encode("a</s>b")


def lossy(directory):
    """No unknown token and no bytes; lower case, and white space at the ends goes."""
    letters = {letter: i for i, letter in enumerate("\u2581abcdefghijklmnopqrstuvwxyz")}
    model = tokenizers.Tokenizer(models.BPE(letters | {"</s>": len(letters)}, []))
    model.normalizer = normalizers.Sequence([normalizers.Lowercase(), normalizers.Strip()])
    model.pre_tokenizer, model.decoder = pre_tokenizers.Metaspace(prepend_scheme="never"), decoders.Metaspace()
    directory.mkdir(parents=True, exist_ok=True)
    model.save(str(directory / "tokenizer.json"))
    return directory / "tokenizer.json"


def corpus_of(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return DataConfig(source="jsonl", path=str(path), validation_fraction=0.0, cache_dir=str(path.parent / "out"))


@pytest.mark.parametrize(
    "make, expected",
    [
        (lossy, {"documents": 4}),
        (unigram, {"documents": 4, "unknown_tokens": 3}),
        (lambda directory: make_json(directory, "</s>"), {}),
    ],
    ids=["drops", "unknown", "exact"],
)
def test_prepare_counts_what_does_not_come_back(tmp_path, capsys, make, expected):
    import dataclasses

    texts = ["hello a", "Hello", "two\nlines", "\u4e2d", " ends ", "abc"]
    config = dataclasses.replace(corpus_of(tmp_path / "c.jsonl", texts), tokenizer=str(make(tmp_path / "hf")))
    data = prepare(config)
    tokenizer = Tokenizer(config.tokenizer)
    changed = [text for text in texts if tokenizer.decode(tokenizer.encode(text)) != text]
    found = data.manifest["tokenizer"]["inexact"]
    assert found.get("documents", 0) == len(changed) == expected.get("documents", 0)
    unknown = sum(int((tokenizer.encode(text) == tokenizer.unknown_id).sum()) for text in texts)
    assert found.get("unknown_tokens", 0) == unknown == expected.get("unknown_tokens", 0)
    words = [
        f"source=jsonl path={tmp_path}/c.jsonl validation_fraction=0 tokenizer={config.tokenizer} out={tmp_path}/o"
    ]
    assert command.main(words[0].split()) == 0
    assert (f"changed: {len(changed)} documents do not come back" in capsys.readouterr().out) == bool(changed)
    assert any("do not come back" in line for line in open_data(config).report()) == bool(changed)


def test_counts_survive_an_interruption(tmp_path, monkeypatch):
    from data_pipeline.text import prepare as module

    texts = [("hello" if i % 3 else "\u4e2d") + " a" * 40 for i in range(200)]
    config = corpus_of(tmp_path / "c.jsonl", texts)
    given = dict(tokenizer=str(unigram(tmp_path / "hf")), shard_mb=0.002)
    import dataclasses

    whole = prepare(dataclasses.replace(config, **given, cache_dir=str(tmp_path / "whole")))
    commits = []
    commit = module._ShardOutput.commit

    def stop(self):
        commit(self)
        commits.append(1)
        if len(commits) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(module._ShardOutput, "commit", stop)
    with pytest.raises(KeyboardInterrupt):
        prepare(dataclasses.replace(config, **given))
    monkeypatch.setattr(module._ShardOutput, "commit", commit)
    resumed = prepare(dataclasses.replace(config, **given))
    assert resumed.manifest["tokenizer"]["inexact"] == whole.manifest["tokenizer"]["inexact"]
    assert resumed.fingerprint == whole.fingerprint


def test_only_models_trained_here_are_known_to_lose_nothing(tmp_path, model_path):
    import sentencepiece

    from data_pipeline.text.tokenizer import train_tokenizer

    texts = write_corpus(tmp_path / "c.jsonl", 300)
    train_tokenizer(texts, tmp_path / "unigram.model", 330, "unigram")
    assert Tokenizer(model_path).lossless and Tokenizer(tmp_path / "unigram.model").lossless
    own = dict(byte_fallback=True, add_dummy_prefix=False, remove_extra_whitespaces=False, split_digits=True,
               allow_whitespace_only_pieces=True, user_defined_symbols=["\n", "\t"], normalization_rule_name="identity",
               unk_id=0, eos_id=1, bos_id=-1, pad_id=-1)  # fmt: skip
    for change in (
        dict(normalization_rule_name="nfkc"),
        dict(add_dummy_prefix=True),
        dict(remove_extra_whitespaces=True),
        dict(byte_fallback=False),
    ):
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts), model_prefix=str(tmp_path / "m"), vocab_size=330, minloglevel=3,
            hard_vocab_limit=False, model_type="unigram", **(own | change),
        )  # fmt: skip
        assert not Tokenizer(tmp_path / "m.model").lossless, change
    assert not Tokenizer(unigram(tmp_path / "hf")).lossless


def test_a_tokenizer_that_is_trained_here_loses_nothing(tmp_path):
    write_corpus(tmp_path / "c.jsonl", 50)
    config = DataConfig(source="jsonl", path=str(tmp_path / "c.jsonl"), vocab_size=330, cache_dir=str(tmp_path / "out"))
    manifest = prepare(config).manifest
    assert manifest["tokenizer"]["inexact"] == {} and manifest["tokenizer"]["description"] == {}


def test_a_long_document_gains_a_space_at_each_cut(tmp_path, monkeypatch):
    """A tokenizer that puts a space before every text puts one before every piece; that is counted."""
    import dataclasses

    from data_pipeline.text.cut import PIECE_CHARACTERS

    path = unigram(tmp_path / "hf", byte_fallback=True)
    assert not Tokenizer(path).joins and Tokenizer(make_json(tmp_path / "bpe", "</s>")).joins
    config = corpus_of(tmp_path / "c.jsonl", ["hello a " * (PIECE_CHARACTERS // 3), "hello"])
    data = prepare(dataclasses.replace(config, tokenizer=str(path)))
    assert data.manifest["tokenizer"]["inexact"] == {"documents": 1}
