"""Reading can resume at any document in every kind of file, and memory does not grow with a document."""

import bz2
import gzip
import json
import subprocess
import sys

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from data_pipeline import DataConfig, DataError
from data_pipeline.text import readers
from data_pipeline.text.prepare import prepare
from data_pipeline.text.readers import Position
from data_pipeline.text.sources import Corpus
from tests.data_pipeline.conftest import REPOSITORY

TEXTS = [f"document {number}\n" + "é x\t" * (number * 7 % 40) for number in range(40)] + ["", "end 😀"]


def write_jsonl(path, compress=bytes, texts=TEXTS):
    lines = [json.dumps({"id": number, "text": text}).encode() + b"\n" for number, text in enumerate(texts)]
    path.write_bytes(compress(b"".join(lines)))


def write_parquet(path, texts=TEXTS, rows_per_group=7, column="text"):
    table = pyarrow.table({"id": list(range(len(texts))), column: texts})
    pyarrow.parquet.write_table(table, path, row_group_size=rows_per_group)


def corpus_of(kind, root):
    """A corpus of two files (or as many as documents) that holds TEXTS twice."""
    if kind == "text":
        for number, text in enumerate(TEXTS * 2):
            (root / f"{number:03d}.txt").write_text(text, encoding="utf-8")
        return Corpus(DataConfig(source="text", path=str(root)))
    endings = {"plain": (".jsonl", bytes), "gz": (".jsonl.gz", gzip.compress), "bz2": (".jsonl.bz2", bz2.compress)}
    endings["zst"] = (".jsonl.zst", zstandard.compress)
    for name in ("a", "b"):
        if kind == "parquet":
            write_parquet(root / f"{name}.parquet")
        elif kind == "hf":
            write_parquet(root / f"{name}.parquet")
        else:
            ending, compress = endings[kind]
            write_jsonl(root / (name + ending), compress)
    source = kind if kind in ("parquet", "hf") else "jsonl"
    return Corpus(DataConfig(source=source, path=str(root)))


@pytest.mark.parametrize("kind", ["text", "plain", "gz", "bz2", "zst", "parquet", "hf"])
def test_reading_goes_on_at_every_document(tmp_path, kind):
    if kind == "hf":
        pytest.importorskip("datasets")
    corpus = corpus_of(kind, tmp_path)
    pieces = list(corpus.pieces())
    assert [piece.text for piece in pieces] == TEXTS * 2
    assert sum(piece.skip_reason == "empty" for piece in pieces) == 2
    for number in range(0, len(pieces), 3 if kind != "hf" else 17):
        rest = [(piece.text, piece.split, piece.end) for piece in corpus.pieces(pieces[number].end)]
        assert rest == [(piece.text, piece.split, piece.end) for piece in pieces[number + 1 :]]
    if kind != "hf":
        assert sum(piece.num_bytes_read for piece in pieces) == corpus.num_bytes


def test_parquet_nulls_are_counted_and_bad_tables_named(tmp_path):
    write_parquet(tmp_path / "t.parquet", ["a", None, "", "b"])
    pieces = list(Corpus(DataConfig(source="parquet", path=str(tmp_path))).pieces())
    assert [(piece.text, piece.skip_reason) for piece in pieces] == [
        ("a", None),
        ("", "null"),
        ("", "empty"),
        ("b", None),
    ]

    def message(path, **values):
        with pytest.raises(DataError) as error:
            list(Corpus(DataConfig(source="parquet", path=str(path), **values)).pieces())
        assert "\n" not in str(error.value) and str(path) in str(error.value)
        return str(error.value)

    assert "has no column 'body' (its columns: id, text); set data.text_key" in message(tmp_path, text_key="body")
    assert "the column 'id' is of type int64, not text" in message(tmp_path, text_key="id")
    whole = (tmp_path / "t.parquet").read_bytes()
    (tmp_path / "cut.parquet").write_bytes(whole[: len(whole) // 2])
    assert "cannot be read as a Parquet file" in message(tmp_path / "cut.parquet")
    bad = pyarrow.array([b"ok", b"caf\xe9"], pyarrow.binary()).view(pyarrow.string())
    pyarrow.parquet.write_table(pyarrow.table({"text": bad}), tmp_path / "latin.parquet")
    assert "row 2: is not UTF-8 (byte 0xe9)" in message(tmp_path / "latin.parquet")


@pytest.mark.parametrize("kind", ["dictionary", "large", "dictionary of large", "view", "json"])
def test_text_of_every_layout_is_text(tmp_path, kind):
    texts = ["a", None, "b", "", "a"] * 5
    needed = {"view": "string_view", "json": "json_"}.get(kind, "string")
    if not hasattr(pyarrow, needed):
        pytest.skip(f"needs a pyarrow with {needed}")
    if kind.startswith("dictionary"):
        array = pyarrow.array(texts, pyarrow.large_string() if "large" in kind else None).dictionary_encode()
    else:
        types = {"large": pyarrow.large_string, "view": getattr(pyarrow, "string_view", None)}
        types["json"] = getattr(pyarrow, "json_", None)
        array = pyarrow.array(texts, types[kind]())
    pyarrow.parquet.write_table(pyarrow.table({"text": array}), tmp_path / "t.parquet", row_group_size=7)
    corpus = Corpus(DataConfig(source="parquet", path=str(tmp_path)))
    pieces = list(corpus.pieces())
    assert [piece.text for piece in pieces] == [text or "" for text in texts]
    assert [piece.skip_reason for piece in pieces[:5]] == [None, "null", None, "empty", None]
    assert [piece.text for piece in corpus.pieces(pieces[8].end)] == [piece.text for piece in pieces[9:]]


def test_a_column_that_stands_twice_is_named(tmp_path):
    pyarrow.parquet.write_table(pyarrow.table([["a"], ["b"]], names=["text", "text"]), tmp_path / "t.parquet")
    with pytest.raises(DataError, match=r"t.parquet: has more than one column 'text'; rename the others"):
        list(Corpus(DataConfig(source="parquet", path=str(tmp_path))).pieces())


def test_errors_of_a_hugging_face_stream_are_one_line():
    class LibraryError(Exception):
        pass

    def rows():
        yield {"text": "a"}
        yield {"text": None}
        raise LibraryError("the hub\nis away")

    records = readers.read_hf(rows(), Position(), "text", "owner/name")
    assert [next(records).skip_reason, next(records).skip_reason] == [None, "null"]
    with pytest.raises(DataError, match=r"^owner/name: row 3 cannot be read \(the hub is away\)$"):
        next(records)


def test_nulls_are_counted_and_left_out_in_every_source(tmp_path, monkeypatch, model_path):
    write_jsonl(tmp_path / "a.jsonl", texts=["a", None, "", "b", None])
    write_parquet(tmp_path / "b.parquet", ["a", None, "", "b", None])
    write_parquet(tmp_path / "c.parquet", [None, None])  # a part of a table whose column has no type

    def prepared(name, **values):
        return prepare(
            DataConfig(
                path=str(tmp_path / name),
                tokenizer=str(model_path),
                cache_dir=str(tmp_path / "cache"),
                validation_fraction=0.0,
                **values,
            )
        ).manifest

    table, rows = prepared("b.parquet", source="parquet"), prepared("a.jsonl", source="jsonl")
    assert table["source"]["skipped"] == rows["source"]["skipped"] == {"null": 2, "empty": 1}
    assert table["splits"] == rows["splits"]
    assert prepared("*.parquet", source="parquet")["source"]["skipped"] == {"null": 4, "empty": 1}
    monkeypatch.setattr(readers, "LONG_LINE_BYTES", 8)  # every line is read as a stream
    write_jsonl(tmp_path / "d.jsonl", texts=["a", None, "", "b", None])
    long = prepared("d.jsonl", source="jsonl")
    assert long["splits"] == rows["splits"] and long["source"]["skipped"] == rows["source"]["skipped"]


@pytest.mark.parametrize("groups", [[5, 0, 5], [0, 3, 0, 0, 2], [4, 0]])
def test_empty_row_groups_are_passed_over(tmp_path, groups):
    texts = iter(f"text {number}" for number in range(sum(groups)))
    schema = pyarrow.schema([("text", pyarrow.string())])
    with pyarrow.parquet.ParquetWriter(tmp_path / "t.parquet", schema) as writer:
        for size in groups:
            writer.write_table(pyarrow.table({"text": [next(texts) for _ in range(size)]}, schema=schema))
    assert pyarrow.parquet.ParquetFile(tmp_path / "t.parquet").num_row_groups == len(groups)
    corpus = Corpus(DataConfig(source="parquet", path=str(tmp_path)))
    pieces = list(corpus.pieces())
    assert [piece.text for piece in pieces] == [f"text {number}" for number in range(sum(groups))]
    assert [piece.text for piece in corpus.pieces(pieces[2].end)] == [piece.text for piece in pieces[3:]]


def test_hugging_face_errors_are_one_line(tmp_path):
    pytest.importorskip("datasets")
    write_parquet(tmp_path / "t.parquet", column="body")
    with pytest.raises(DataError, match=r"has no column 'text' \(its columns: id, body\); set data.text_key"):
        list(Corpus(DataConfig(source="hf", path=str(tmp_path))).pieces())
    for values in ({"path": str(tmp_path / "absent")}, {"path": str(tmp_path), "split": "nosuch"}):
        with pytest.raises(DataError, match="cannot be opened") as error:
            Corpus(DataConfig(source="hf", **values))
        assert "\n" not in str(error.value)


def test_long_documents_go_through_in_pieces_with_the_tokens_of_the_whole(tmp_path, monkeypatch, model_path):
    texts = ["short", "line of text\n" * 300, "x" * 700, "", "words " * 500 + "\nend"]
    write_jsonl(tmp_path / "a.jsonl", texts=texts)
    for number, text in enumerate(texts):
        (tmp_path / f"{number}.txt").write_text(text)
    common = {"tokenizer": str(model_path), "validation_fraction": 0.0}
    whole = prepare(DataConfig(source="jsonl", path=str(tmp_path / "a.jsonl"), cache_dir=str(tmp_path / "w"), **common))
    monkeypatch.setattr(readers, "LONG_LINE_BYTES", 200)
    monkeypatch.setattr(readers, "_BLOCK_BYTES", 64)
    for source, path in (("jsonl", "a.jsonl"), ("text", "*.txt")):
        config = DataConfig(source=source, path=str(tmp_path / path), cache_dir=str(tmp_path / source), **common)
        data = prepare(config)
        for ending in ("bin", "idx"):
            one, other = (item.directory / f"train-00000.{ending}" for item in (data, whole))
            assert one.read_bytes() == other.read_bytes()
        assert data.manifest["source"]["skipped"] == {"empty": 1}


MEMORY_SCRIPT = """
import json, sys
from data_pipeline import DataConfig
from data_pipeline.text.prepare import prepare
from data_pipeline.text.readers import Position
data = prepare(DataConfig(source=sys.argv[1], path=sys.argv[2], tokenizer=sys.argv[3], cache_dir=sys.argv[4],
                          validation_fraction=0.0))
# Not getrusage: its peak counts the process that started this one.
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(json.dumps([data.manifest["splits"]["train"], int(peak.split()[1]) * 1024]))
"""


@pytest.mark.parametrize("source", ["text", "jsonl"])
def test_memory_does_not_grow_with_a_document(tmp_path, model_path, source):
    """One document of 10 MB; tests/bench/data.py does the same with 2 GB."""
    line = "attention summary window = chunk(layer)\n"
    peaks = []
    for number, count in enumerate((1 << 13, 1 << 18)):
        path = tmp_path / f"{number}.{source}"
        text = line * count
        path.write_text(text if source == "text" else json.dumps({"text": text}) + "\n")
        command = [sys.executable, "-c", MEMORY_SCRIPT, source, str(path), str(model_path), str(tmp_path / "out")]
        done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
        train, peak = json.loads(done.stdout)
        assert train["documents"] == 1 and train["text_bytes"] == len(text)
        peaks.append(peak)
    assert peaks[1] - peaks[0] < 60e6 < 6 * len(text)
