"""Every stream of a compressed file is read or the file is named; what is not text is named by its content."""

import bz2
import gzip
import io
import json
import lzma
import sys
import tarfile
import zipfile

import pytest
import zstandard

from data_pipeline import DataConfig, DataError, open_data
from data_pipeline.text import compressed
from data_pipeline.text.prepare import prepare
from data_pipeline.text.sources import Corpus

COMPRESS = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}
COMPRESS[".zst"] = zstandard.ZstdCompressor(write_checksum=True).compress
PADDED = (".gz", ".bz2", ".xz")


def lines(start, stop):
    return b"".join(json.dumps({"text": f"document {number} " * 9}).encode() + b"\n" for number in range(start, stop))


def streams(ending, count=10):
    return [COMPRESS[ending](lines(6 * number, 6 * number + 6)) for number in range(count)]


def texts_of(path, source="jsonl", **values):
    return [piece.text for piece in Corpus(DataConfig(source=source, path=str(path), **values)).pieces()]


def error_of(path, source="jsonl"):
    with pytest.raises(DataError) as error:
        texts_of(path, source)
    assert str(error.value).startswith(str(path)) and "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("ending", COMPRESS)
def test_any_flipped_bit_of_a_later_stream_is_an_error(tmp_path, ending):
    path = tmp_path / f"a.jsonl{ending}"
    parts = streams(ending)
    path.write_bytes(b"".join(parts))
    wanted = texts_of(path)
    assert len(wanted) == 60
    for byte in range(len(parts[3])):
        bad = bytearray(parts[3])
        bad[byte] ^= 1 << byte % 8
        path.write_bytes(b"".join([*parts[:3], bad, *parts[4:]]))
        try:
            assert texts_of(path) == wanted  # bits that carry nothing, such as the time in the header of gzip
        except DataError as error:
            assert str(error).startswith(f"{path}: cannot be read to its end (stream 4, at byte ")


@pytest.mark.parametrize("ending", COMPRESS)
def test_cut_and_trailing_bytes_are_errors_and_padding_is_not(tmp_path, ending):
    path = tmp_path / f"a.jsonl{ending}"
    parts = streams(ending)
    path.write_bytes(b"".join(parts))
    wanted = texts_of(path)
    for length in range(sum(map(len, parts[:4])) + 1, sum(map(len, parts[:5]))):
        path.write_bytes(b"".join(parts)[:length])
        assert "cannot be read to its end (the file ends inside stream 5, at byte" in error_of(path)
    path.write_bytes(b"".join(parts) + b"garbage")
    assert "(stream 11, at byte" in error_of(path)
    path.write_bytes(b"".join([*parts[:3], bytes(4), *parts[3:], bytes(64)]))
    if ending in PADDED:
        assert texts_of(path) == wanted
    else:
        assert "(stream 4, at byte" in error_of(path)
    path.write_bytes(b"".join(parts) + bytes(3 << 20))  # a download into a file of full size that stopped
    assert "cannot be read to its end" in error_of(path)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / f"a.jsonl{ending}").write_bytes(b"")
    (tmp_path / "b" / "b.jsonl").write_bytes(lines(0, 1))
    with pytest.raises(DataError, match=rf"a.jsonl{ending}: cannot be read to its end \(it has 0 bytes"):
        texts_of(tmp_path / "b")


@pytest.mark.parametrize("ending", COMPRESS)
def test_small_reads_and_long_streams_give_the_same_text(tmp_path, ending, monkeypatch):
    content = lines(0, 40_000)
    path = tmp_path / f"a{ending}"
    path.write_bytes(COMPRESS[ending](content[:1_000_000]) + COMPRESS[ending](content[1_000_000:]))
    assert "".join(texts_of(path, "text")).encode() == content
    monkeypatch.setattr(compressed, "_BLOCK_BYTES", 1000)
    monkeypatch.setattr(compressed, "_ZSTD_BLOCK_BYTES", 7)
    assert "".join(texts_of(path, "text")).encode() == content


@pytest.mark.parametrize("ending", [".bz2", ".xz"])
def test_a_stream_of_raw_text_ends_at_a_damaged_stream(tmp_path, model_path, ending):
    parts = streams(ending)
    bad = bytearray(parts[3])
    bad[len(bad) // 2] ^= 1
    path = tmp_path / f"a.jsonl{ending}"
    path.write_bytes(b"".join([*parts[:3], bad, *parts[4:]]))
    data = open_data(
        DataConfig(source="jsonl", path=str(path), tokenizer=str(model_path), cache_dir=str(tmp_path), stream=True)
    )
    with pytest.raises(DataError, match=r"cannot be read to its end \(stream 4, at byte"):
        data.samples("train", 64, 8).at(0)
    config = DataConfig(source="jsonl", path=str(path), tokenizer=str(model_path), cache_dir=str(tmp_path / "prepared"))
    with pytest.raises(DataError, match=r"cannot be read to its end \(stream 4, at byte"):
        prepare(config)


@pytest.mark.parametrize("ending", COMPRESS)
@pytest.mark.parametrize("name", ["a.jsonl{}?token=x&b=.txt", "A.JSONL{}", "a", "a.jsonl"])
def test_compression_shows_in_the_content_where_the_name_does_not_say_it(tmp_path, ending, name):
    path = tmp_path / name.format(ending.upper())
    path.write_bytes(COMPRESS[ending](lines(0, 5)))
    wanted = [json.loads(line)["text"] for line in lines(0, 5).splitlines()]
    corpus = Corpus(DataConfig(source="jsonl", path=str(path)))
    pieces = list(corpus.pieces())
    assert [piece.text for piece in pieces] == wanted
    assert [piece.text for piece in corpus.pieces(pieces[2].end)] == wanted[3:]


@pytest.mark.parametrize("ending", COMPRESS)
def test_a_name_that_the_content_contradicts_is_named(tmp_path, ending):
    path = tmp_path / f"a.jsonl{ending}"
    path.write_bytes(lines(0, 3))
    assert f"its name ends with {ending}, but it is something that begins with b'{{\"text\":'" in error_of(path)
    other = ".gz" if ending != ".gz" else ".zst"
    path.write_bytes(COMPRESS[other](lines(0, 3)))
    assert f"its name ends with {ending}, but it is a file compressed with" in error_of(path)


@pytest.mark.parametrize("window_log", [28, 30, 31])
def test_zstd_with_a_long_window(tmp_path, window_log, monkeypatch):
    parameters = zstandard.ZstdCompressionParameters.from_level(1, window_log=window_log, enable_ldm=False, hash_log=10)
    compressor = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(zstandard.compress(lines(0, 3)) + compressor.compress(lines(3, 6)) + compressor.flush())
    assert len(texts_of(path)) == 6
    monkeypatch.setitem(sys.modules, "zstandard", None)  # without the extra `hf`
    assert "its zstd window is larger than 128 MiB; pip install zstandard" in error_of(path)
    path.write_bytes(COMPRESS[".zst"](lines(0, 3)))
    assert len(texts_of(path)) == 3


def archives():
    tar, archive = io.BytesIO(), io.BytesIO()
    with tarfile.open(fileobj=tar, mode="w") as file:
        entry = tarfile.TarInfo("a.txt")
        entry.size = 5
        file.addfile(entry, io.BytesIO(b"hello"))
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("a.txt", "hello")
    yield "tar archive", tar.getvalue()
    yield "zip archive", archive.getvalue()
    yield "PDF document", b"%PDF-1.4\n1 0 obj\n"
    yield "Parquet file", b"PAR1\x15\x04\x15"
    yield "compressed with gzip", gzip.compress(b"inside", mtime=0)


@pytest.mark.parametrize(("kind", "content"), list(archives()), ids=[kind for kind, _ in archives()])
def test_what_is_not_text_is_named(tmp_path, kind, content):
    for name, data in (("a.txt", content), ("a.tar.gz", gzip.compress(content)), ("a.xz", lzma.compress(content))):
        if kind == "compressed with gzip" and name == "a.txt":
            continue
        (tmp_path / name).write_bytes(data)
        for source in ("text", "jsonl"):
            message = error_of(tmp_path / name, source)
            assert kind in message and "not text; unpack or convert it" in message


def test_what_is_not_text_is_named_before_other_files_are_read(tmp_path, model_path, monkeypatch):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.txt").write_text("text")
    for stream in (False, True):
        config = DataConfig(
            source="text",
            path=str(tmp_path / "in"),
            tokenizer=str(model_path),
            cache_dir=str(tmp_path / "cache"),
            stream=stream,
        )
        monkeypatch.setattr(Corpus, "pieces", lambda *_: pytest.fail("reads a file"))
        for kind, content in archives():
            (tmp_path / "in" / "b").write_bytes(gzip.compress(content) if "gzip" in kind else content)
            with pytest.raises(DataError, match=f"in/b: is .*{kind}.*not text; unpack or convert it"):
                open_data(config)


def test_a_nul_byte_is_not_text(tmp_path):
    path = tmp_path / "a.txt"
    for text, line in (
        ("hello".encode("utf-16-le"), 1),
        (b"line\nline\n" + bytes(9), 3),
        (b"a" * 3_000_000 + b"\0", 1),
    ):
        path.write_bytes(text)
        assert f"{path}:{line}: holds a NUL byte" in error_of(path, "text")
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "a\\u0000b"}\n')
    assert texts_of(tmp_path / "a.jsonl") == ["a\0b"]  # an escape is a choice
