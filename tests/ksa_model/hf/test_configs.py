"""config.json in our words: patterns parsed without being evaluated, published layers, refusals."""

import pytest

from ksa_model.config import ModelConfigError
from ksa_model.hf.configs import parse_pattern, read_config
from tests.train.interop import PUBLISHED


def test_patterns_are_parsed_not_evaluated():
    assert parse_pattern("([128]*3+[16768])*9", "key", 36) == ([128] * 3 + [16768]) * 9
    assert parse_pattern("([128]*3+[1024]*1)*6", "key", 24) == ([128] * 3 + [1024]) * 6
    assert parse_pattern("[1, 2, 3]", "key", 3) == [1, 2, 3] and parse_pattern(7, "key", 2) == [7, 7]
    assert parse_pattern("2*([1]+(2,))", "key", 4) == [1, 2, 1, 2]
    for bad in (
        "__import__('os').system('true')", "[1]*10**9", "[[1]*9999]*9999*9999",
        "[x for x in [1]]", "[1.5]*3", "[1]-[1]",
        "(" * 500 + "[1]" + ")" * 500, "[True]*3", "[-1]*3", "",
    ):  # fmt: skip
        with pytest.raises(ModelConfigError, match="key"):
            parse_pattern(bad, "key", 3)
    with pytest.raises(ModelConfigError, match="names 3 layers, num_hidden_layers=4"):
        parse_pattern([1, 2, 3], "key", 4)


@pytest.mark.parametrize(
    "keys, expected",
    [
        (dict(), ("KKKF", 1, True)),
        (dict(summary_sliding_chunk_num=1, summary_layer_freq="([1]*3+[0])*2"), ("KKKF", 1, False)),
        (dict(summary_sliding_chunk_num="([1]*3+[100])*2"), ("K", (1, 1, 1, 100), True)),
        (dict(summary_sliding_chunk_num=[1, 300, 1, 1, 1, 1, 1, 1]), ("KFKKKKKK", 1, True)),
        (dict(summary_sliding_chunk_num=0), ("K", 0, True)),
    ],
)
def test_published_patterns(keys, expected):
    found = read_config(PUBLISHED | keys).config
    pattern, windows, updates = expected
    assert (
        found.layers
        == type(found)(
            **{name: getattr(found, name) for name in found.__dataclass_fields__}
            | dict(
                layer_pattern=pattern * (len(windows) if pattern == "K" and isinstance(windows, tuple) else 1),
                window_chunks=windows,
                full_layers_update_summaries=updates,
            )
        ).layers
    )
