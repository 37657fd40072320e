import json
import random

import pytest

from data_pipeline import DataError
from data_pipeline.text.jsonl import NullText, parse_line, stream_line
from tests.data_pipeline.conftest import blocks_of


def test_a_long_line_gives_what_json_gives_wherever_it_is_cut():
    rng = random.Random(3)
    alphabet = ['"', "\\", "\n", "\t", "é", "😀", "a", "/", "\u2581", "\0", "{", "]", " "]
    for round_number in range(300):
        text = "".join(rng.choices(alphabet, k=rng.randrange(60)))
        before, after = {"n": [1, {"x": 'a"]}'}], "s": "\\"}, {"last": None, "f": -1.5e3, "o": {}}
        value = {**before, "text": text, **after}
        line = json.dumps(value, ensure_ascii=bool(round_number % 2)).encode() + b"\n"
        sizes = iter(lambda: rng.randrange(1, 9), None)
        assert "".join(stream_line(blocks_of(line, sizes), "text", "p")) == text == parse_line(line, "text", "p")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "a\xff"}', "is not UTF-8 (byte 0xff)"),
        (b'{"text": "abc', "has a text without an end"),
        (b'{"text": "a\\qb"}', "has a text that cannot be decoded"),
        (b'{"text": "a\\ud83d"}', "half a surrogate pair at character 1"),
        (b'{"text": "a\\ud83dx"}', "half a surrogate pair"),
        (b'{"text": 7}', "the value of 'text' is not a text"),
        (b'{"body": "x", "id": [1]}', "lacks the key 'text' (its keys: body, id)"),
        (b"[1]", "is not a JSON object"),
        (b'{"text": "a"} x', "goes on after its JSON object"),
        (b'{"text" "a"}', "has '\"' where ':' belongs"),
        (b'{"id": [1, "text": "a"', "ends inside a value"),
    ],
)
def test_a_bad_long_line_is_named(line, message):
    for size in (1, 4, 100):
        with pytest.raises(DataError) as error:
            list(stream_line(blocks_of(line, iter(lambda size=size: size, None)), "text", "f:3"))
        assert str(error.value).startswith("f:3: ") and message in str(error.value)


@pytest.mark.parametrize("values", [('"a"', '"b"'), ('"a"', "7"), ('"a"', '"a"')])
def test_the_key_of_the_text_may_not_be_repeated(values):
    line = f'{{"id": 1, "text": {values[0]}, "\\u0074ext": {values[1]}}}'.encode()
    for read in (parse_line, lambda *arguments: "".join(stream_line(iter([line]), *arguments[1:]))):
        with pytest.raises(DataError, match=r"^f:3: has the key 'text' more than once; keep one of its values$"):
            read(line, "text", "f:3")


def test_other_keys_may_be_repeated():
    line = b'{"id": 1, "text": "a", "id": {"text": "b"}, "meta": {"x": 1, "x": [2, {"text": 3}]}}'
    for size in (1, 5, 200):
        blocks = blocks_of(line, iter(lambda size=size: size, None))
        assert parse_line(line, "text", "p") == "a" == "".join(stream_line(blocks, "text", "p"))


def test_what_is_no_object_is_named_with_its_json_type():
    for line, kind in ((b'{"text": {"a": 1}}', "dict"), (b'{"text": [1]}', "list")):
        with pytest.raises(DataError, match=f"the value of 'text' is not a text but of type {kind}"):
            parse_line(line, "text", "p")


@pytest.mark.parametrize("line", ['{"text": null}', '{"text":null,"id":1}', '{"id": null, "text" : null }\n'])
def test_null_is_no_text(line):
    assert parse_line(line.encode(), "text", "p") is None
    for size in (1, 3, 100):
        with pytest.raises(NullText):
            list(stream_line(blocks_of(line.encode(), iter(lambda size=size: size, None)), "text", "p"))


@pytest.mark.parametrize("value", ["nul", "nullx", "NaN", "true", "[null]"])
def test_what_is_like_null_is_named(value):
    for read in (parse_line, lambda line, *rest: list(stream_line(iter([line]), *rest))):
        with pytest.raises(DataError, match=r"^f:3: "):
            read(f'{{"text": {value}}}'.encode(), "text", "f:3")


@pytest.mark.parametrize(
    ("line", "items"),
    [
        ("[", ".[]"),
        ('[{"text": "a"},', ".[]"),
        ('[{"text": "a"}]', ".[]"),
        ("{", "."),
        ('{"text": "a",', "."),
        ('{"text": "a', "."),
        ('{"text": "a"} {"text": "b"}', "."),
    ],
)
def test_json_of_another_layout_is_named_with_the_command_that_converts_it(line, items):
    with pytest.raises(DataError, match=r"^f:1: is not a JSON object") as error:
        parse_line(line.encode(), "text", "f:1")
    assert f"data.source=jsonl reads one object a line, which `jq -c '{items}' FILE` writes" in str(error.value)
    assert "\n" not in str(error.value)


def test_numbers_of_any_size_beside_the_text():
    """Python refuses integers of more than 4300 digits; pyarrow and ujson refuse smaller ones."""
    line = '{"id": 10254939386542155531, "n": [%s, NaN, 1e999], "text": "kept"}' % ("9" * 5000)
    assert parse_line(line.encode(), "text", "f:1") == "kept"
    assert "".join(stream_line(iter([line.encode()]), "text", "f:1")) == "kept"
    with pytest.raises(DataError, match="is not a text but of type int"):
        parse_line(b'{"text": %s}' % (b"9" * 5000), "text", "f:1")
