"""Pipes, sockets, devices and the "folder" keys of object stores are left out or named. Nothing waits for them."""

import os
import signal
import socket

import pytest

from data_pipeline import DataConfig, DataError, open_data
from data_pipeline.text.readers import InputFile, open_input
from data_pipeline.text.sources import Corpus
from data_pipeline.text.tokenizer import Tokenizer
from tests.data_pipeline.conftest import BUCKET


@pytest.fixture(autouse=True)
def no_hang():
    def hang(*_):
        raise AssertionError("waits for a special file")

    before = signal.signal(signal.SIGALRM, hang)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture
def corpus(tmp_path):
    """A directory with one JSONL file, a pipe and a socket."""
    root = tmp_path / "in"
    root.mkdir()
    (root / "a.jsonl").write_text('{"text": "inside"}\n')
    os.mkfifo(root / "pipe.jsonl")
    with socket.socket(socket.AF_UNIX) as one:
        directory = os.getcwd()
        os.chdir(root)  # the path of a socket has at most 107 bytes
        one.bind("socket.jsonl")
        os.chdir(directory)
        (root / "link.jsonl").symlink_to("pipe.jsonl")
        yield root


@pytest.mark.parametrize("source", ["text", "jsonl"])
def test_special_files_of_a_directory_are_left_out(corpus, source, tmp_path, model_path):
    for path in (corpus, corpus / "*"):
        opened = Corpus(DataConfig(source=source, path=str(path)))
        assert [file.name for file in opened.files] == ["a.jsonl"] and opened.identity()
        assert len(list(opened.pieces())) == 1
    for stream in (False, True):
        config = DataConfig(
            source=source,
            path=str(corpus),
            tokenizer=str(model_path),
            cache_dir=str(tmp_path / "cache"),
            stream=stream,
            validation_fraction=0.0,
        )
        assert open_data(config).samples("train", 64, 8).at(0).doc_lengths.size >= 1


@pytest.mark.parametrize("source", ["text", "jsonl", "parquet"])
def test_a_special_file_that_is_asked_for_is_named(corpus, source):
    for name, kind in (("pipe", "pipe"), ("link", "pipe"), ("socket", "socket")):
        path = f"{corpus}/{name}.jsonl"
        with pytest.raises(DataError, match=rf"^data.path={path}: is a {kind}, not a file; write what it holds"):
            Corpus(DataConfig(source=source, path=path))
        with pytest.raises(DataError, match=rf"^data.validation_path={path}: is a {kind}, not a file"):
            Corpus(DataConfig(source=source, path=str(corpus / "a.jsonl"), validation_path=path))
    for path in ("/dev/zero", "/dev/null"):
        with pytest.raises(DataError, match=rf"^data.path={path}: is a device, not a file"):
            Corpus(DataConfig(source=source, path=path))


def test_a_file_that_becomes_a_pipe_is_named(corpus):
    status = os.stat(corpus / "pipe.jsonl")
    file = InputFile(str(corpus / "pipe.jsonl"), "pipe.jsonl", 0, str(status.st_mtime), None)
    with pytest.raises(DataError, match=r"pipe.jsonl: is a pipe, not a file"), open_input(file, 0):
        pass


def test_a_tokenizer_that_is_no_file_is_named(corpus):
    for path, kind in (
        (corpus / "pipe.jsonl", "pipe, not a file"),
        ("/dev/zero", "device, not a file"),
        (corpus, "directory; it holds neither tokenizer.json nor tokenizer.model: name the file of the tokenizer"),
    ):
        with pytest.raises(DataError, match=rf"^{path}: is a {kind}"):
            Tokenizer(path)


def test_folder_keys_of_an_object_store_are_no_documents(server):
    import s3fs

    system = s3fs.S3FileSystem()
    keys = ["folders/", "folders/sub/", "folders/sub.jsonl/", "marked"]
    for key in keys:
        system.call_s3("put_object", Bucket=BUCKET, Key=key, Body=b"")
    for key in ("folders/a.jsonl", "folders/sub.jsonl/b.jsonl", "folders/sub/c.jsonl", "marked/d.jsonl"):
        system.pipe(f"{BUCKET}/{key}", b'{"text": "inside"}\n')
    for source in ("text", "jsonl"):
        for path, names in (
            ("folders", ["a.jsonl", "sub.jsonl/b.jsonl", "sub/c.jsonl"]),
            ("folders/", ["a.jsonl", "sub.jsonl/b.jsonl", "sub/c.jsonl"]),
            ("folders/sub", ["c.jsonl"]),
            ("folders/sub/", ["c.jsonl"]),
            ("marked", ["d.jsonl"]),
        ):
            corpus = Corpus(DataConfig(source=source, path=f"s3://{BUCKET}/{path}"))
            assert [file.name for file in corpus.files] == names
            assert [piece.skip_reason for piece in corpus.pieces()] == [None] * len(names)
