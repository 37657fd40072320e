import os
import resource
import struct
from dataclasses import replace

import numpy as np
import pytest

from data_pipeline import DataError
from data_pipeline.store.shards import ShardReader, ShardSet, ShardWriter, token_dtype

DOCUMENTS = [[1, 2, 3], [], [7], [65535, 0, 5, 9]]


def write(prefix, documents, dtype=np.uint16):
    with ShardWriter(prefix, np.dtype(dtype)) as writer:
        for document in documents:
            writer.add(np.array(document, dtype=np.int64))
    return writer.info


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_documents_come_back(tmp_path, dtype):
    info = write(tmp_path / "s", DOCUMENTS, dtype)
    assert (info.name, info.num_documents, info.num_tokens) == ("s", 4, 8)
    assert info.num_bytes == 8 * np.dtype(dtype).itemsize == (tmp_path / "s.bin").stat().st_size
    reader = ShardReader(tmp_path / "s")
    assert reader.dtype == dtype and len(reader) == 4 and reader.lengths.tolist() == [3, 0, 1, 4]
    assert [reader.read(document).tolist() for document in range(4)] == DOCUMENTS
    assert reader.read(3, 1, 2).tolist() == [0, 5]
    with pytest.raises(IndexError):
        reader.read(3, 2, 3)  # would run into what follows


def test_the_index_byte_for_byte(tmp_path):
    write(tmp_path / "s", [[1, 2, 3], [7]])
    expected = (
        b"MMIDIDX\0\0" + (1).to_bytes(8, "little") + b"\x08" + (2).to_bytes(8, "little") + (3).to_bytes(8, "little")
    )
    for width, values in ((4, [3, 1]), (8, [0, 6]), (8, [0, 1, 2])):
        expected += b"".join(value.to_bytes(width, "little") for value in values)
    assert (tmp_path / "s.idx").read_bytes() == expected
    assert (tmp_path / "s.bin").read_bytes() == np.array([1, 2, 3, 7], dtype="<u2").tobytes()


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_megatron_writes_the_same_bytes_and_reads_ours(tmp_path, dtype):
    indexed_dataset = pytest.importorskip("megatron.core.datasets.indexed_dataset")
    torch = pytest.importorskip("torch")
    builder = indexed_dataset.IndexedDatasetBuilder(str(tmp_path / "m.bin"), dtype=dtype)
    for document in DOCUMENTS:
        builder.add_item(torch.tensor(document, dtype=torch.int64))
        builder.end_document()
    builder.finalize(str(tmp_path / "m.idx"))
    write(tmp_path / "s", DOCUMENTS, dtype)
    for ending in ("bin", "idx"):
        assert (tmp_path / f"s.{ending}").read_bytes() == (tmp_path / f"m.{ending}").read_bytes()
    theirs = indexed_dataset.IndexedDataset(str(tmp_path / "s"))
    assert [theirs[number].tolist() for number in range(len(theirs))] == DOCUMENTS
    assert token_dtype(65499) == indexed_dataset.DType.optimal_dtype(65499) == np.uint16
    assert token_dtype(65500) == indexed_dataset.DType.optimal_dtype(65500) == np.int32


def test_documents_of_several_sequences(tmp_path):
    # Megatron may store a document as several sequences; to us it is one run of tokens.
    indexed_dataset = pytest.importorskip("megatron.core.datasets.indexed_dataset")
    torch = pytest.importorskip("torch")
    builder = indexed_dataset.IndexedDatasetBuilder(str(tmp_path / "m.bin"), dtype=np.int32)
    for sequences in ([[1, 2], [3]], [[4, 5, 6]], [[7], [8], [9]]):
        for sequence in sequences:
            builder.add_item(torch.tensor(sequence))
        builder.end_document()
    builder.finalize(str(tmp_path / "m.idx"))
    reader = ShardReader(tmp_path / "m")
    assert [reader.read(document).tolist() for document in range(3)] == [[1, 2, 3], [4, 5, 6], [7, 8, 9]]


def test_an_interrupted_writer_leaves_nothing(tmp_path):
    with pytest.raises(KeyboardInterrupt), ShardWriter(tmp_path / "s", np.dtype(np.uint16)) as writer:
        writer.add(np.array([1]))
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("token", [-1, 65536])
def test_a_token_that_does_not_fit(tmp_path, token):
    with pytest.raises(DataError, match="document 0 has a token outside uint16"):
        write(tmp_path / "s", [[token]])


def test_an_empty_shard(tmp_path):
    write(tmp_path / "s", [])
    assert len(ShardReader(tmp_path / "s")) == 0


def flip(path, at, value):
    data = bytearray(path.read_bytes())
    data[at] = value
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda p: (p / "s.bin").write_bytes((p / "s.bin").read_bytes()[:-2]),
            "s.bin: has 14 bytes, but s.idx describes 8",
        ),
        (lambda p: (p / "s.bin").write_bytes(bytes(18)), "s.bin: has 18 bytes, but s.idx describes 8 tokens of uint16"),
        (lambda p: (p / "s.bin").unlink(), "s.bin: is missing, although s.idx is there"),
        (lambda p: (p / "s.idx").unlink(), "s.idx: is missing"),
        (lambda p: (p / "s.idx").write_bytes(b""), "s.idx: has 0 bytes, too few for the header"),
        (lambda p: (p / "s.idx").write_bytes((p / "s.idx").read_bytes()[:-1]), "s.idx: has 121 bytes, but 4 sequences"),
        (lambda p: flip(p / "s.idx", 0, 0), "s.idx: is not a Megatron index (MMIDIDX version 1)"),
        (lambda p: flip(p / "s.idx", 9, 2), "s.idx: is not a Megatron index (MMIDIDX version 1)"),
        (lambda p: flip(p / "s.idx", 17, 99), "s.idx: has token dtype code 99, known are 1=uint8"),
        (lambda p: flip(p / "s.idx", 17, 4), "s.idx: its byte offsets are not those of its lengths"),
        (lambda p: flip(p / "s.idx", 34, 4), "s.idx: its byte offsets are not those of its lengths"),
        (lambda p: flip(p / "s.idx", 37, 128), "s.idx: has a negative length"),
        (lambda p: flip(p / "s.idx", 82, 9), "s.idx: its documents do not cover its 4 sequences in order"),
        (lambda p: flip(p / "s.idx", 98, 0), "s.idx: its documents do not cover its 4 sequences in order"),
    ],
)
def test_damage_is_named(tmp_path, damage, message):
    write(tmp_path / "s", DOCUMENTS)
    damage(tmp_path)
    with pytest.raises(DataError) as error:
        ShardReader(tmp_path / "s")
    assert message in str(error.value) and "\n" not in str(error.value)


def test_shards_are_numbered_through(tmp_path):
    write(tmp_path / "a", [[1], [2, 3]])
    write(tmp_path / "b", [])
    write(tmp_path / "c", [[4, 5, 6]])
    shards = ShardSet([tmp_path / "a", tmp_path / "b", tmp_path / "c"])
    assert shards.lengths.tolist() == [1, 2, 3]
    assert [shards.read(document, 0, 1).tolist() for document in range(3)] == [[1], [2], [4]]
    assert shards.read(2, 1, 2).tolist() == [5, 6]


def test_documents_beyond_the_limit_leave_no_trace(tmp_path):
    kept = [[1, 2, 3], [], [4]]
    with ShardWriter(tmp_path / "s", np.dtype(np.uint16), max_document_tokens=3) as writer:
        lengths = []
        for parts in ([[1, 2], [3]], [[9, 9], [9, 9], [9]], [[]], [[8] * 4], [[4]]):
            for part in parts:
                writer.append(np.array(part, dtype=np.int64))
            lengths.append(writer.end_document())
    assert lengths == [3, None, 0, None, 1]
    assert writer.info == replace(write(tmp_path / "t", kept), name="s")
    assert (tmp_path / "s.bin").read_bytes() == (tmp_path / "t.bin").read_bytes()


def test_more_shards_than_files_may_be_open(tmp_path):
    """A memory-mapped file holds a descriptor, and `ulimit -n` is 1024 on many machines."""
    for number in (0, 1):
        with ShardWriter(tmp_path / f"shard-{number}", np.dtype(np.uint16)) as writer:
            writer.add(np.array([number, number + 1]))
    for number in range(2, 600):  # links: to write as many files takes long
        for ending in (".bin", ".idx"):
            (tmp_path / f"shard-{number}{ending}").symlink_to(f"shard-{number % 2}{ending}")
    prefixes = [tmp_path / f"shard-{number}" for number in range(600)]
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 400, before[1]))
    try:
        shards = ShardSet(prefixes)
        for document in (0, 599, 300, 0, *range(0, 600, 7)):
            assert shards.read(document, 0, 2).tolist() == [document % 2, document % 2 + 1]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_offsets_beyond_what_32_bits_hold(tmp_path):
    """Two documents of 1.5e9 tokens: their sum, and their bytes, are more than 2**31 and 2**32."""
    prefix, length = tmp_path / "shard", 1_500_000_000
    with open(tmp_path / "shard.bin", "wb") as file:
        file.seek(2 * (2 * length - 3))  # the rest is a hole
        file.write(np.array([7, 9, 11], dtype=np.uint16).tobytes())
    header = struct.pack("<9sQBQQ", b"MMIDIDX", 1, 8, 2, 3)
    arrays = np.full(2, length, "<i4"), np.array([0, 2 * length], "<i8"), np.arange(3, dtype="<i8")
    (tmp_path / "shard.idx").write_bytes(header + b"".join(array.tobytes() for array in arrays))
    reader = ShardReader(prefix)
    assert reader.lengths.tolist() == [length, length]
    assert reader.read(1, length - 3).tolist() == [7, 9, 11]
    assert ShardSet([prefix, prefix]).read(3, length - 1, 1).tolist() == [11]


def test_a_shard_that_is_replaced_is_not_read_as_the_one_before(tmp_path):
    prefix = tmp_path / "shard"
    for token in (1, 2):
        with ShardWriter(prefix, np.dtype(np.uint16)) as writer:
            writer.add(np.full(4, token))
        assert ShardReader(prefix).read(0).tolist() == [token] * 4
