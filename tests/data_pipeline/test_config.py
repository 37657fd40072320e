import dataclasses

import pytest

from data_pipeline import DataConfig, DataError


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
