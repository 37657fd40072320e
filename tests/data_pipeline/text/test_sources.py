import bz2
import gzip
import json
import lzma
import os
from collections import Counter

import pytest
import zstandard

from data_pipeline import DataConfig, DataError
from data_pipeline.config import TRAIN, VALIDATION
from data_pipeline.text.sources import Corpus, _list_stdlib
from tests.data_pipeline.conftest import write_corpus


def read(**values):
    corpus = Corpus(DataConfig(**values))
    documents, skipped = [], Counter()
    for piece in corpus.pieces():
        if not piece.is_first:
            documents[-1] = (piece.split, documents[-1][1] + piece.text, piece.name)
        elif piece.skip_reason:
            skipped[piece.skip_reason] += 1
        else:
            documents.append((piece.split, piece.text, piece.name))
    return documents, skipped


def jsonl(path, *lines):
    path.write_bytes(b"".join((line if isinstance(line, bytes) else line.encode()) + b"\n" for line in lines))
    return str(path)


def test_the_standard_library_is_a_document_per_file_with_its_tests_held_out():
    documents, skipped = read()
    names = {split: [name for where, _, name in documents if where == split] for split in (TRAIN, VALIDATION)}
    assert "json/decoder.py" in names[TRAIN] and "argparse.py" in names[TRAIN]
    assert not any("site-packages" in name for _, _, name in documents)
    assert [name for _, _, name in documents] == sorted(name for _, _, name in documents)
    texts = {name: text for _, text, name in documents}
    with open(json.decoder.__file__, "rb") as file:
        assert texts["json/decoder.py"].encode() == file.read()
    if names[VALIDATION] and Corpus(DataConfig()).split_rule.startswith("files"):
        assert all({"test", "tests", "idle_test"} & set(name.split("/")[:-1]) for name in names[VALIDATION])
        assert not any("/test/" in f"/{name}" for name in names[TRAIN])
    assert set(skipped) <= {"empty", "not_utf8"}


def test_a_standard_library_without_tests_holds_out_a_share(tmp_path):
    # Slim container images ship none.
    for name in ("two.py", "one.py", "data.txt"):
        (tmp_path / name).write_text(f"x = '{name}'\n")
    files, rule = _list_stdlib(str(tmp_path), 0.5)
    assert [(file.name, file.split) for file in files] == [("one.py", None), ("two.py", None)]
    assert rule == "documents are held out by a hash of their text, fraction 0.5"
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_one.py").write_text("y = 1\n")
    files, rule = _list_stdlib(str(tmp_path), 0.5)
    assert [(file.name, file.split) for file in files] == [
        ("one.py", TRAIN),
        ("tests/test_one.py", VALIDATION),
        ("two.py", TRAIN),
    ]
    with pytest.raises(DataError, match=r"holds no .py file of the standard library"):
        _list_stdlib(str(tmp_path / "absent"), 0.5)


def test_text_files_in_a_directory(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "two.txt").write_bytes("zwei\r\nä".encode())
    (tmp_path / "one.md").write_bytes(b"one")
    (tmp_path / "empty.txt").write_bytes(b"")
    (tmp_path / ".hidden").write_bytes(b"\xff")
    documents, skipped = read(source="text", path=str(tmp_path), validation_fraction=0.0)
    assert documents == [(TRAIN, "zwei\r\nä", "b/two.txt"), (TRAIN, "one", "one.md")]
    assert skipped == {"empty": 1}


def test_a_glob_chooses_files(tmp_path):
    for name in ("a.txt", "b.txt", "c.bin"):
        (tmp_path / name).write_text(name)
    documents, _ = read(source="text", path=str(tmp_path / "*.txt"), validation_fraction=0.0)
    assert [text for _, text, _ in documents] == ["a.txt", "b.txt"]


def test_a_glob_that_matches_directories_alone_chooses_the_files_in_them(tmp_path):
    """Spark writes a directory `day=1.parquet` of files; a pattern that matches files takes these alone."""
    for name in ("day=2.text/part-0", "day=1.text/part-1", "day=1.text/.part-1.crc", "other/part-2"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    documents, _ = read(source="text", path=str(tmp_path / "*.text"), validation_fraction=0.0)
    assert [text for _, text, _ in documents] == ["day=1.text/part-1", "day=2.text/part-0"]
    (tmp_path / "day=3.text").write_text("a file")
    documents, _ = read(source="text", path=str(tmp_path / "*.text"), validation_fraction=0.0)
    assert [text for _, text, _ in documents] == ["a file"]


COMPRESSIONS = [
    (".jsonl", bytes),
    (".jsonl.gz", gzip.compress),
    (".jsonl.bz2", bz2.compress),
    (".jsonl.xz", lzma.compress),
    (".jsonl.zst", zstandard.compress),
]


@pytest.mark.parametrize(("ending", "compress"), COMPRESSIONS)
def test_compressed_jsonl_also_in_several_frames(tmp_path, ending, compress):
    lines = [json.dumps({"text": f"text {number} é"}).encode() + b"\n" for number in range(100)]
    path = tmp_path / f"data{ending}"
    path.write_bytes(compress(b"".join(lines[:50])) + compress(b"".join(lines[50:])))
    expected = [f"text {number} é" for number in range(100)]
    assert Corpus(DataConfig(source="jsonl", path=str(path))).num_bytes == path.stat().st_size
    for given in (path, tmp_path):
        documents, _ = read(source="jsonl", path=str(given), validation_fraction=0.0)
        assert [text for _, text, _ in documents] == expected
    assert documents[7][2] == f"data{ending}:8"


@pytest.mark.parametrize(("ending", "compress"), COMPRESSIONS[1:])
def test_a_truncated_file_is_an_error_and_not_a_shorter_corpus(tmp_path, ending, compress):
    write_corpus(tmp_path / "plain", 300)
    path = tmp_path / f"data{ending}"
    data = compress((tmp_path / "plain").read_bytes())
    path.write_bytes(data[: len(data) * 2 // 3])
    with pytest.raises(DataError, match="cannot be read to its end") as error:
        read(source="jsonl", path=str(path))
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("[1, 2]", ":3: is not a JSON object but of type list"),
        ('"text"', ":3: is not a JSON object but of type str"),
        ('{"text": ', ":3: is not a JSON object (Expecting value in column 9)"),
        ("[" * 100_000, ":3: is not a JSON object ("),
        ('{"body": "x", "id": 1}', ":3: lacks the key 'text' (its keys: body, id); set data.text_key"),
        ("{}", ":3: lacks the key 'text' (its keys: none)"),
        ('{"text": 7}', ":3: the value of 'text' is not a text but of type int"),
        (b'{"text": "a\xff"}', ":3: is not UTF-8 (byte 0xff in column 12)"),
        ('{"text": "ab\\ud800"}', ":3: the text holds half a surrogate pair at character 2"),
    ],
)
def test_a_bad_line_is_named_by_file_and_number(tmp_path, line, message):
    path = jsonl(tmp_path / "data.jsonl", '{"text": "good"}', "", line, '{"text": "good"}')
    with pytest.raises(DataError) as error:
        read(source="jsonl", path=path)
    assert str(error.value).startswith(path + message)
    assert "\n" not in str(error.value)


def test_another_text_key_blank_lines_and_empty_texts(tmp_path):
    path = jsonl(tmp_path / "data.jsonl", '{"body": "a"}', "", "  ", '{"body": ""}', '{"body": "\\ud83d\\ude00"}')
    documents, skipped = read(source="jsonl", path=path, text_key="body", validation_fraction=0.0)
    assert [(text, name) for _, text, name in documents] == [("a", "data.jsonl:1"), ("😀", "data.jsonl:5")]
    assert skipped == {"empty": 1}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda root: root / "absent.jsonl", "no such file or directory, and no file matches it as a glob"),
        (lambda root: root / "*.jsonl", "no such file or directory, and no file matches it as a glob"),
        (lambda root: root, "no .jsonl/.ndjson/.json file in this directory"),
        (lambda root: root / "void.txt", "is empty (0 bytes in 1 file)"),
        (lambda root: "nosuchprotocol://bucket/x", "cannot be read (ValueError: Protocol not known"),
    ],
)
def test_nothing_to_read(tmp_path, make, message):
    (tmp_path / "void.txt").write_bytes(b"")
    path = str(make(tmp_path))
    with pytest.raises(DataError) as error:
        Corpus(DataConfig(source="jsonl", path=path))
    assert str(error.value).startswith(f"data.path={path}: ") and message in str(error.value)


def test_text_that_is_not_utf8_names_the_line(tmp_path):
    (tmp_path / "latin.txt").write_bytes(b"one\ntwo\ncaf\xe9\n")
    with pytest.raises(DataError, match=r"latin.txt:3: is not UTF-8 \(byte 0xe9\)"):
        read(source="text", path=str(tmp_path))


def test_held_out_documents_are_chosen_by_their_text_alone(tmp_path):
    texts = write_corpus(tmp_path / "a.jsonl", 2000)
    first, _ = read(source="jsonl", path=str(tmp_path / "a.jsonl"), validation_fraction=0.1)
    held_out = {text for split, text, _ in first if split == VALIDATION}
    assert 150 < len(held_out) < 250
    jsonl(tmp_path / "b.jsonl", *(json.dumps({"text": text}) for text in reversed(texts[500:] + texts[500:])))
    second, _ = read(source="jsonl", path=str(tmp_path / "b.jsonl"), validation_fraction=0.1)
    assert {text for split, text, _ in second if split == VALIDATION} == held_out & set(texts[500:])
    assert not held_out & {text for split, text, _ in second if split == TRAIN}


def test_files_named_for_validation_are_not_trained_on(tmp_path):
    jsonl(tmp_path / "a.jsonl", '{"text": "a"}')
    held_out = jsonl(tmp_path / "b.jsonl", '{"text": "b"}')
    documents, _ = read(source="jsonl", path=str(tmp_path), validation_path=held_out)
    assert documents == [(TRAIN, "a", "a.jsonl:1"), (VALIDATION, "b", "b.jsonl:1")]
    with pytest.raises(DataError, match=r"all its files are also in data.validation_path"):
        Corpus(DataConfig(source="jsonl", path=held_out, validation_path=str(tmp_path)))


def test_corpora_that_agree_in_names_sizes_and_times_are_told_apart_by_content(tmp_path):
    # As two reproducible archives unpack.
    for name, text in (("one", "a"), ("two", "b"), ("copy", "a")):
        (tmp_path / name).mkdir()
        for number in range(3):
            (tmp_path / name / f"{number}.txt").write_text(f"same beginning {text * 9000} same end")
            os.utime(tmp_path / name / f"{number}.txt", (0, 0))
    one, two, copy = (Corpus(DataConfig(source="text", path=str(tmp_path / n))) for n in ("one", "two", "copy"))
    assert one.identity() != two.identity() and one.identity() == copy.identity()
    (tmp_path / "two" / "1.txt").unlink()
    with pytest.raises(DataError, match=r"two/1.txt: cannot be read"):
        two.identity()


def test_a_corpus_of_many_files_is_told_by_a_bounded_number(tmp_path, monkeypatch):
    monkeypatch.setattr("data_pipeline.text.sources._HASHED_FILES", 4)
    for number in range(9):
        (tmp_path / f"{number}.txt").write_text("text")
    corpus = Corpus(DataConfig(source="text", path=str(tmp_path)))
    opened = []
    monkeypatch.setattr(
        "builtins.open", lambda path, *args, real=open, **more: opened.append(path) or real(path, *args, **more)
    )
    corpus.identity()
    assert [os.path.basename(path) for path in opened] == ["0.txt", "3.txt", "6.txt"]


def test_a_file_of_time_zero_can_be_read(tmp_path):
    (tmp_path / "a.txt").write_text("old")
    os.utime(tmp_path / "a.txt", (0, 0))
    assert [text for _, text, _ in read(source="text", path=str(tmp_path), validation_fraction=0.0)[0]] == ["old"]


def test_links_to_directories_are_followed_once(tmp_path):
    for name in ("in/sub", "elsewhere/deep", "in/.kept"):
        (tmp_path / name).mkdir(parents=True)
    jsonl(tmp_path / "in" / "sub" / "a.jsonl", '{"text": "a"}')
    jsonl(tmp_path / "elsewhere" / "deep" / "b.jsonl", '{"text": "b"}')
    jsonl(tmp_path / "in" / ".kept" / "c.jsonl", '{"text": "c"}')
    (tmp_path / "in" / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "in" / "shown").symlink_to(tmp_path / "in" / ".kept")
    (tmp_path / "in" / "sub" / "up").symlink_to(tmp_path / "in")
    (tmp_path / "elsewhere" / "again").symlink_to(tmp_path / "elsewhere" / "deep")
    documents, _ = read(source="jsonl", path=str(tmp_path / "in"), validation_fraction=0.0)
    assert [(text, name) for _, text, name in documents] == [
        ("b", "link/again/b.jsonl:1"),
        ("c", "shown/c.jsonl:1"),
        ("a", "sub/a.jsonl:1"),
    ]
    documents, _ = read(source="text", path=str(tmp_path / "in"), validation_fraction=0.0)
    assert len(documents) == 3


def test_endings_are_known_in_any_case(tmp_path):
    jsonl(tmp_path / "A.JSONL", '{"text": "a"}')
    (tmp_path / "b.Jsonl.GZ").write_bytes(gzip.compress(b'{"text": "b"}\n'))
    documents, _ = read(source="jsonl", path=str(tmp_path), validation_fraction=0.0)
    assert [text for _, text, _ in documents] == ["a", "b"]


@pytest.mark.parametrize("block_bytes", [2, 1 << 20])
def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path, monkeypatch, block_bytes):
    monkeypatch.setattr("data_pipeline.text.readers._BLOCK_BYTES", block_bytes)
    (tmp_path / "a.txt").write_bytes("\ufeffone \ufeff two".encode())
    (tmp_path / "b.txt").write_bytes("\ufeff".encode())
    documents, skipped = read(source="text", path=str(tmp_path), validation_fraction=0.0)
    assert [text for _, text, _ in documents] == ["one \ufeff two"] and skipped == {"empty": 1}


@pytest.mark.parametrize("long_line", [10, 16, 19, 1 << 20])
def test_a_byte_order_mark_before_jsonl_is_skipped_and_reading_goes_on_after_it(tmp_path, monkeypatch, long_line):
    monkeypatch.setattr("data_pipeline.text.readers.LONG_LINE_BYTES", long_line)
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "one"}\n{"text": "two"}\n\n{"text": "three"}\n')
    corpus = Corpus(DataConfig(source="jsonl", path=str(path)))
    pieces = list(corpus.pieces())
    assert [piece.text for piece in pieces] == ["one", "two", "three"]
    for number, piece in enumerate(pieces):
        assert [later.text for later in corpus.pieces(piece.end)] == ["one", "two", "three"][number + 1 :]
