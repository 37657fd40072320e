import dataclasses

import pytest

from data_pipeline import DataConfig, DataError
from tests.data_pipeline.conftest import REPOSITORY


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"source": "paquet"}, "data.source='paquet' must be one of stdlib, text, jsonl"),
        ({"source": "text"}, "data.source=text needs data.path: a file, a directory or a glob"),
        ({"path": "a.txt"}, "data.path='a.txt' has no meaning for data.source=stdlib"),
        ({"tokenizer_type": "word"}, "data.tokenizer_type='word' must be one of bpe, unigram"),
        ({"vocab_size": "4096"}, "data.vocab_size='4096' must be a whole number"),
        ({"vocab_size": True}, "data.vocab_size=True must be a whole number"),
        ({"vocab_size": 0}, "data.vocab_size=0 must be at least 1"),
        ({"seed": -1}, "data.seed=-1 must be between 0 and 2**63 - 1"),
        ({"prefetch_samples": 0}, "data.prefetch_samples=0 must be at least 1"),
        ({"validation_fraction": 1.0}, "data.validation_fraction=1.0 must be a number from 0 up to"),
        ({"validation_fraction": float("nan")}, "data.validation_fraction=nan must be"),
        ({"cache_dir": ""}, "data.cache_dir='' must be a non-empty text"),
        ({"tokenizer": 3}, "data.tokenizer=3 must be a path or null"),
        ({"tasks": 5}, "data.tasks=5 must be a list of needle"),
        ({"tasks": "needle"}, "data.tasks='needle' must be a list of needle"),
        ({"tasks": [["needle"]]}, "data.tasks=[['needle']] must be a list of needle"),
        ({"probe_tokens": 5}, "data.probe_tokens=5 must be two lengths, least and most, or null"),
        ({"probe_tokens": [9, 8]}, "data.probe_tokens=[9, 8] must be two lengths, least and most, or null"),
    ],
)
def test_bad_values_are_named(values, message):
    with pytest.raises(DataError) as error:
        DataConfig(**values)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_the_defaults_are_valid_and_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        DataConfig().seed = 1


@pytest.mark.parametrize(
    ("source", "name", "value", "way_out"),
    [
        ("stdlib", "path", "a.txt", "set data.source to text or jsonl"),
        ("synthetic", "validation_path", "a.txt", "set data.source to text or jsonl"),
        ("hf", "validation_path", "b", "hold out documents with data.validation_fraction"),
        ("shards", "validation_path", "b", "prepare the shards again with it"),
        ("shards", "validation_fraction", 0.0, "prepare the shards again with it"),
        ("shards", "max_document_tokens", 9, "prepare the shards again with it"),
        ("megatron", "max_document_tokens", 9, "a mixture's data.stages choose documents by max_tokens"),
        ("mixture", "text_key", "body", "set it on the corpora of data.corpora"),
        ("mixture", "split", "test", "set it on the corpora of data.corpora"),
        ("mixture", "probe_tokens", [8, 9], "set it on the corpora of data.corpora"),
    ],
)
def test_settings_that_a_source_does_not_look_at_are_refused(source, name, value, way_out):
    needed = {"path": "a", "tokenizer": "t"} if source in ("hf", "shards", "megatron") else {}
    if source == "mixture":
        needed["corpora"] = [{"name": "a", "source": "stdlib"}]
    DataConfig(source=source, **needed)
    with pytest.raises(DataError, match=rf"data\.{name}=.* has no meaning for data.source={source}: .*{way_out}"):
        DataConfig(source=source, **needed, **{name: value})


def test_a_limit_of_documents_holds_for_the_texts_of_a_mixture():
    corpora = [{"name": "a", "source": "stdlib"}, {"name": "b", "source": "shards", "path": "b"}]
    assert DataConfig(source="mixture", corpora=corpora, max_document_tokens=9).max_document_tokens == 9


def test_every_configuration_file_of_data_is_accepted():
    yaml = pytest.importorskip("yaml")
    base = yaml.safe_load((REPOSITORY / "configs" / "data" / "_base.yaml").read_text())
    needed = {"path": "a", "tokenizer": "t", "corpora": [{"name": "a", "source": "stdlib"}]}
    for path in (REPOSITORY / "configs" / "data").glob("[a-z]*.yaml"):
        values = base | yaml.safe_load(path.read_text())
        values.pop("defaults", None)
        wanted = {"mixture": ["corpora"], "stdlib": [], "synthetic": []}.get(values["source"], ["path", "tokenizer"])
        DataConfig(**values | {name: needed[name] for name in wanted})
