"""Plain values to dataclasses and back."""

from dataclasses import dataclass, field

import pytest

from train.config.conversion import (
    all_keys,
    defaults,
    flatten,
    from_mapping,
    from_text,
    from_words,
    to_mapping,
    unknown_key,
)
from train.config.errors import ConfigError


@dataclass(frozen=True)
class Inner:
    rate: float = 1e-3
    pair: tuple[float, float] = (0.5, 1.0)


@dataclass(frozen=True)
class Outer:
    steps: int
    inner: Inner = field(default_factory=Inner)
    name: str | None = None
    windows: int | tuple[int, ...] = 4
    quick: bool = False
    spans: tuple[tuple[int, int], ...] = ()
    further: Inner | None = None


def test_there_and_back():
    config = Outer(3, Inner(2.0), "a", (1, 2), True, ((0, 4),), Inner())
    assert from_mapping(Outer, to_mapping(config)) == config
    assert to_mapping(config)["spans"] == [[0, 4]]


@pytest.mark.parametrize(
    "values, message",
    [
        ({}, "steps must be given"),
        ({"steps": "3"}, "steps='3' must be a whole number"),
        ({"steps": True}, "steps=True must be a whole number"),
        ({"steps": 3.0}, "steps=3.0 must be a whole number"),
        ({"steps": 1, "quick": 1}, "quick=1 must be true or false"),
        ({"steps": 1, "name": 3}, "name=3 must be a string"),
        ({"steps": 1, "name": 20240601}, """two pairs of quotes: 'name="20240601"'$"""),
        ({"steps": 1, "name": True}, """two pairs of quotes: 'name="true"'$"""),
        ({"steps": 1, "inner": {"rate": float("nan")}}, "inner.rate=nan must be a number, and finite"),
        ({"steps": 1, "inner": 3}, "inner=3 must be a group of keys"),
        ({"steps": 1, "inner": {"rate": "x"}}, "inner.rate='x' must be a number"),
        ({"steps": 1, "inner": {"rate": True}}, "inner.rate=True must be a number"),
        ({"steps": 1, "inner": {"pair": [1]}}, r"inner.pair=\[1\] must be a list of 2 values"),
        ({"steps": 1, "inner": {"rat": 1}}, "inner.rat is not a configuration key; did you mean inner.rate?"),
        (
            {"steps": 1, "inner": {"zzzzzzzzzzzzz": 1}},
            "inner.zzzzzzzzzzzzz is .*; the keys there are inner.pair",
        ),
        ({"steps": 1, "windows": "x"}, "windows='x' must be a whole number"),
        ({"steps": 1, "windows": [1, "x"]}, r"windows\[1\]='x' must be a whole number"),
        ({"steps": 1, "spans": [[1, 2, 3]]}, r"spans\[0\]=\[1, 2, 3\] must be a list of 2 values"),
    ],
)
def test_a_wrong_value_is_named(values, message):
    with pytest.raises(ConfigError, match=message):
        from_mapping(Outer, values)


def test_numbers_that_yaml_reads_as_text():
    assert from_mapping(Inner, {"rate": "1e-3", "pair": [1, "2e0"]}) == Inner(0.001, (1.0, 2.0))


@pytest.mark.parametrize(
    "hint, text, value",
    [
        (str, "null", "null"),
        (str | None, "null", None),
        (int | None, "", None),
        (int, "7", 7),
        (int, "1" + "0" * 400, 10**400),
        (float, "1e-3", 0.001),
        (bool, "True", True),
        (tuple[str, ...], "a,b", ("a", "b")),
        (tuple[str, ...], '["a,b", 1]', ("a,b", "1")),
        (tuple[int, ...], "[1, 2]", (1, 2)),
        (int | tuple[int, ...], "[1,2]", (1, 2)),
        (int | tuple[int, ...], "3", 3),
        (Inner | None, "{rate: 2, pair: [1, 2]}", Inner(2.0, (1.0, 2.0))),
    ],
)
def test_texts_are_read_by_their_type(hint, text, value):
    assert from_text(hint, text, "key", ConfigError) == value


@pytest.mark.parametrize(
    "words, message",
    [
        (["rate"], "argument 'rate' must have the form key=value; the keys are rate, pair"),
        (["rats=1"], "rats is not a configuration key; did you mean rate?"),
        (["rate=["], r"rate='\[' must be a number"),
        (["pair=[1,2"], r"pair='\[1,2' must be a list such as \[A,B\]"),
        (["pair=1"], r"pair=\[1.0\] must be a list of 2 values"),
    ],
)
def test_a_wrong_word_is_named(words, message):
    with pytest.raises(ConfigError, match=message):
        from_words(Inner, words)


def test_keys_and_defaults():
    assert all_keys(Inner, "inner.") == ["inner.rate", "inner.pair"]
    assert flatten(defaults(Outer)) == {
        "inner.rate": 1e-3,
        "inner.pair": [0.5, 1.0],
        "name": None,
        "windows": 4,
        "quick": False,
        "spans": [],
        "further": None,
    }


def test_a_key_that_moved():
    assert "did you mean memory.recompute?" in str(unknown_key("run.recompute", ["run.precision"]))
