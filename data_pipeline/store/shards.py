"""Token shards in Megatron's `.bin`/`.idx` format (MMIDIDX, version 1), written and read without Megatron.

`PREFIX.bin` holds the tokens of all documents back to back. `PREFIX.idx`, little endian:

    9 bytes  "MMIDIDX\\0\\0"        8 bytes  version = 1         1 byte  dtype code (4 = int32, 8 = uint16)
    8 bytes  number of sequences S  8 bytes  D + 1 for D documents
    int32[S] tokens per sequence    int64[S] byte offset of each sequence in the .bin
    int64[D + 1] the sequence at which each document starts, and S

The writer stores one sequence per document (several where it has 2**31 tokens or more); the reader accepts any number.
"""

from __future__ import annotations

import hashlib
import struct
from array import array
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from data_pipeline.errors import DataError
from data_pipeline.store.cache import BlockCache
from data_pipeline.store.files import atomic_write
from data_pipeline.store.mapped import MappedFile
from data_pipeline.store.remote import find_remote

_MAGIC = b"MMIDIDX\x00\x00"
_VERSION = 1
_HEADER = struct.Struct("<9sQBQQ")
_DTYPE_OF_CODE: dict[int, np.dtype] = {
    1: np.dtype(np.uint8),
    2: np.dtype(np.int8),
    3: np.dtype(np.int16),
    4: np.dtype(np.int32),
    5: np.dtype(np.int64),
    8: np.dtype(np.uint16),
}
_CODE_OF_DTYPE = {dtype: code for code, dtype in _DTYPE_OF_CODE.items()}
_MAX_SEQUENCE_TOKENS = 2**31 - 1
_UINT16_VOCAB = 65500  # Megatron's own limit, kept so that both choose the same dtype


def token_dtype(vocab_size: int) -> np.dtype:
    """The dtype in which a vocabulary's tokens are stored: uint16 if they fit, else int32."""
    return np.dtype(np.uint16 if vocab_size < _UINT16_VOCAB else np.int32)


@dataclass(frozen=True)
class ShardInfo:
    """A finished shard as the manifest lists it. `num_bytes` is the size of the `.bin` file; hashes are in hex."""

    name: str
    num_documents: int
    num_tokens: int
    num_bytes: int
    sha256_bin: str
    sha256_idx: str


class ShardWriter:
    """Writes one shard; a context manager. The files get their names when the block ends without error, `.idx` last.

    Args:
        prefix: path of the shard without `.bin` / `.idx`.
        dtype: integer dtype of the stored tokens, see `token_dtype`.
        max_document_tokens: longer documents are dropped; None: all are kept.

    Attributes:
        info: the finished shard; None until the block has ended.
    """

    def __init__(self, prefix: str | Path, dtype: np.dtype, max_document_tokens: int | None = None) -> None:
        self._prefix = Path(prefix)
        self._dtype = np.dtype(dtype)
        self._max_document_tokens = max_document_tokens
        self._is_dropped = False  # the document that is not closed yet
        self._sequences = array("i")
        self._bounds = array("q", [0])
        self._open_tokens = 0
        self._num_tokens = 0
        self._digest = self._digest_before = hashlib.sha256()
        self._files = ExitStack()
        self.info: ShardInfo | None = None

    def __enter__(self) -> ShardWriter:
        self._bin = self._files.enter_context(atomic_write(_bin_path(self._prefix)))
        return self

    def add(self, tokens: np.ndarray) -> None:
        """Append one document, int [num_tokens]. Raises DataError when a token does not fit the dtype."""
        self.append(tokens)
        self.end_document()

    def append(self, tokens: np.ndarray) -> None:
        """Append tokens, int [num_tokens], to the document that `end_document` will close."""
        if self._is_dropped:
            return
        limits = np.iinfo(self._dtype)
        if tokens.size and (int(tokens.min()) < limits.min or int(tokens.max()) > limits.max):
            raise DataError(f"{self._prefix}: document {len(self._bounds) - 1} has a token outside {self._dtype}")
        if not self._open_tokens:
            self._digest_before = self._digest.copy()
        data = np.ascontiguousarray(tokens, dtype=self._dtype).data
        self._bin.write(data)
        self._digest.update(data)
        self._open_tokens += tokens.size
        if self._max_document_tokens is not None and self._open_tokens > self._max_document_tokens:
            self._bin.flush()
            self._bin.truncate(self.num_bytes)
            self._bin.seek(self.num_bytes)
            self._digest = self._digest_before
            self._open_tokens, self._is_dropped = 0, True

    def end_document(self) -> int | None:
        """Close the document and return its number of tokens; None if it was too long and is dropped."""
        if self._is_dropped:
            self._is_dropped = False
            return None
        length = self._open_tokens
        for start in range(0, max(length, 1), _MAX_SEQUENCE_TOKENS):
            self._sequences.append(min(length - start, _MAX_SEQUENCE_TOKENS))
        self._bounds.append(len(self._sequences))
        self._num_tokens += length
        self._open_tokens = 0
        return length

    def remove(self) -> None:
        """Delete the files of a finished shard."""
        for path in (_idx_path(self._prefix), _bin_path(self._prefix)):
            path.unlink(missing_ok=True)

    @property
    def num_bytes(self) -> int:
        """Bytes of all closed documents in the `.bin` file."""
        return self._num_tokens * self._dtype.itemsize

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._files.__exit__(kind, error, trace)
        if error is not None:
            return
        index = self._index_bytes()
        with atomic_write(_idx_path(self._prefix)) as file:
            file.write(index)
        self.info = ShardInfo(
            name=self._prefix.name,
            num_documents=len(self._bounds) - 1,
            num_tokens=self._num_tokens,
            num_bytes=self.num_bytes,
            sha256_bin=self._digest.hexdigest(),
            sha256_idx=hashlib.sha256(index).hexdigest(),
        )

    def _index_bytes(self) -> bytes:
        lengths = np.array(self._sequences, dtype="<i4")
        ends = np.cumsum(lengths, dtype="<i8") * self._dtype.itemsize
        starts = np.concatenate([np.zeros(1, dtype="<i8"), ends])[: lengths.size]
        documents = np.array(self._bounds, dtype="<i8")
        header = _HEADER.pack(_MAGIC, _VERSION, _CODE_OF_DTYPE[self._dtype], lengths.size, documents.size)
        return b"".join((header, lengths.tobytes(), starts.tobytes(), documents.tobytes()))


class _ShardReaderBase:
    """The documents of a shard; `_slice` of a subclass reads the tokens.

    Attributes:
        name: path or URL without `.bin` / `.idx`.
        lengths: int64 [num_documents], tokens per document.
        dtype: dtype of the stored tokens.
    """

    def __init__(self, index_file: Path, idx_name: str) -> None:
        self.name = idx_name.removesuffix(".idx")
        self.dtype, sizes, pointers, documents = _read_index(index_file, idx_name)
        # Sequences are stored back to back, so every document is one range of tokens.
        ends = np.cumsum(sizes, dtype=np.int64)
        if not np.array_equal(pointers, (ends - sizes) * self.dtype.itemsize):
            raise DataError(f"{idx_name}: its byte offsets are not those of its lengths; the file is damaged")
        bounds = np.concatenate([np.zeros(1, dtype=np.int64), ends])[documents]
        self._starts = bounds[:-1]
        self.lengths = np.diff(bounds)
        self._num_tokens = int(ends[-1]) if ends.size else 0

    def __len__(self) -> int:
        return self.lengths.size

    def read(self, document: int, offset: int = 0, length: int | None = None) -> np.ndarray:
        """Tokens `offset : offset + length` of a document (length None: to its end), as a read-only array."""
        return self._slice(*self._range(document, offset, length))

    def read_range(self, start: int, stop: int) -> np.ndarray:
        """Tokens `start : stop` of the whole shard."""
        return self._slice(start, stop)

    def read_checked(self, document: int, offset: int, length: int, vocab_size: int) -> np.ndarray:
        """`read`, and raise DataError if a token is not in `range(vocab_size)`."""
        start, stop = self._range(document, offset, length)
        tokens = self._slice(start, stop)
        self.check_ids(tokens, start, vocab_size)
        return tokens

    def check_ids(self, tokens: np.ndarray, start: int, vocab_size: int) -> None:
        """Raise DataError if one of `tokens`, which stand from token `start` of the shard on, is no id."""
        if not tokens.size or 0 <= int(tokens.min()) <= int(tokens.max()) < vocab_size:
            return
        at = int(np.argmax((tokens < 0) | (tokens >= vocab_size)))
        # Empty documents begin where the next one does: the last that begins there has the token.
        document = int(np.searchsorted(self._starts, start + at, side="right")) - 1
        raise DataError(
            f"{self.name}.bin: holds token {int(tokens[at])}, but data.tokenizer has {vocab_size} tokens (document "
            f"{document}, token {start + at - int(self._starts[document])} of it, from 0); name the tokenizer that the "
            f"shards were made with, or write the shard again"
        )

    def prefetch(self, document: int, offset: int, length: int) -> None:
        """Start to fetch tokens that will be read soon. Does nothing for local shards."""

    def _range(self, document: int, offset: int, length: int | None) -> tuple[int, int]:
        total = int(self.lengths[document])
        length = total - offset if length is None else length
        if offset < 0 or length < 0 or offset + length > total:
            raise IndexError(f"document {document} of a shard has {total} tokens, asked for {offset}+{length}")
        start = int(self._starts[document]) + offset
        return start, start + length

    def _slice(self, start: int, stop: int) -> np.ndarray:
        raise NotImplementedError

    def _check_size(self, bin_name: str, idx_name: str, found: int) -> None:
        expected = self._num_tokens * self.dtype.itemsize
        if found != expected:
            raise DataError(
                f"{bin_name}: has {found} bytes, but {idx_name.rpartition('/')[2]} describes {self._num_tokens} tokens "
                f"of {self.dtype}, that is {expected} bytes; the two files do not belong together or one is damaged"
            )


class ShardReader(_ShardReaderBase):
    """One local shard, memory-mapped.

    Raises:
        DataError: a file is missing, is not such a file, or the two do not belong together.
    """

    def __init__(self, prefix: str | Path) -> None:
        idx_path, bin_path = _idx_path(Path(prefix)), _bin_path(Path(prefix))
        super().__init__(idx_path, str(idx_path))
        if not bin_path.is_file():
            raise DataError(f"{bin_path}: is missing, although {idx_path.name} is there")
        self._file = MappedFile.open(bin_path)
        self._check_size(str(bin_path), str(idx_path), self._file.num_bytes)
        self._slice(0, 0)  # a file that cannot be mapped is an error now

    def _slice(self, start: int, stop: int) -> np.ndarray:
        return self._file.content[start * self.dtype.itemsize : stop * self.dtype.itemsize].view(self.dtype)


class RemoteShardReader(_ShardReaderBase):
    """Reads a remote shard: the index as a whole, tokens in ranges through a cache.

    Args:
        prefix: URL of the shard without `.bin` / `.idx`.
        cache: stores the index and the blocks that were read.
        retries: of each request.
        sha256_idx: expected hash of the index; None: unknown.

    Raises:
        DataError: as `ShardReader`, or when the files cannot be reached.
    """

    def __init__(self, prefix: str, cache: BlockCache, retries: int, sha256_idx: str | None = None) -> None:
        idx_url = prefix + ".idx"
        super().__init__(cache.whole_file(find_remote(idx_url, retries), sha256_idx), idx_url)
        self._cache = cache
        self.bin_file = find_remote(prefix + ".bin", retries)
        self._check_size(self.bin_file.url, idx_url, self.bin_file.size)

    def prefetch(self, document: int, offset: int, length: int) -> None:
        """Start to fetch tokens `offset : offset + length` of a document."""
        start, stop = self._range(document, offset, length)
        self._cache.prefetch(self.bin_file, [(start * self.dtype.itemsize, stop * self.dtype.itemsize)])

    def _slice(self, start: int, stop: int) -> np.ndarray:
        size = self.dtype.itemsize
        return np.frombuffer(self._cache.read(self.bin_file, start * size, stop * size), dtype=self.dtype)


class ShardSet:
    """Several shards as one list of documents, numbered consecutively in the order of the shards.

    Args:
        prefixes: paths or URLs of the shards without `.bin` / `.idx`.
        opener: opens one shard.
        vocab_size: `read` raises DataError for a token that is not in `range(vocab_size)`; None: it does not look.

    Attributes:
        lengths: int64 [num_documents], tokens per document.
    """

    def __init__(
        self,
        prefixes: Sequence[str | Path],
        opener: Callable[[Any], _ShardReaderBase] = ShardReader,
        vocab_size: int | None = None,
    ) -> None:
        self._vocab_size = vocab_size
        if opener is ShardReader or len(prefixes) < 2:
            self._readers = [opener(prefix) for prefix in prefixes]
        else:  # opening a remote shard takes several round trips
            with ThreadPoolExecutor(16) as pool:
                self._readers = list(pool.map(opener, prefixes))
        counts = np.array([len(reader) for reader in self._readers], dtype=np.int64)
        self._ends = np.cumsum(counts)
        parts = [reader.lengths for reader in self._readers]
        self.lengths = np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)

    def read(self, document: int, offset: int, length: int) -> np.ndarray:
        """Tokens `offset : offset + length` of a document, as a read-only array."""
        reader, number = self._find(document)
        if self._vocab_size is None:
            return reader.read(number, offset, length)
        return reader.read_checked(number, offset, length, self._vocab_size)

    def prefetch(self, document: int, offset: int, length: int) -> None:
        """Start to fetch tokens that will be read soon, if they are remote."""
        reader, number = self._find(document)
        reader.prefetch(number, offset, length)

    def _find(self, document: int) -> tuple[_ShardReaderBase, int]:
        """The shard that holds a document, and the number of the document in it."""
        shard = int(np.searchsorted(self._ends, document, side="right"))
        return self._readers[shard], document - (int(self._ends[shard - 1]) if shard else 0)


def _read_index(path: Path, name: str) -> tuple[np.dtype, np.ndarray, np.ndarray, np.ndarray]:
    """The dtype, sequence lengths, byte offsets and document bounds of an `.idx` file, after checking each of them.

    Args:
        path: local file.
        name: path or URL, for messages.
    """
    if not path.is_file():
        raise DataError(f"{name}: is missing; a shard is a .bin and an .idx file of the same name")
    size = path.stat().st_size
    with open(path, "rb") as file:
        head = file.read(_HEADER.size)
    if len(head) < _HEADER.size:
        raise DataError(f"{name}: has {size} bytes, too few for the header of an index; the file is damaged")
    magic, version, code, num_sequences, num_bounds = _HEADER.unpack(head)
    if magic != _MAGIC or version != _VERSION:
        raise DataError(f"{name}: is not a Megatron index (MMIDIDX version 1), it starts with {head[:17]!r}")
    if code not in _DTYPE_OF_CODE:
        known = ", ".join(f"{known_code}={dtype}" for known_code, dtype in _DTYPE_OF_CODE.items())
        raise DataError(f"{name}: has token dtype code {code}, known are {known}")
    expected = _HEADER.size + 12 * num_sequences + 8 * num_bounds
    if size != expected or num_bounds < 1:
        raise DataError(
            f"{name}: has {size} bytes, but {num_sequences} sequences and {num_bounds - 1} documents take {expected}; "
            f"the file is damaged"
        )
    raw = np.memmap(path, dtype=np.uint8, mode="r", offset=0)
    at = _HEADER.size
    sizes = np.array(raw[at : at + 4 * num_sequences]).view("<i4").astype(np.int64)
    at += 4 * num_sequences
    pointers = np.array(raw[at : at + 8 * num_sequences]).view("<i8")
    documents = np.array(raw[at + 8 * num_sequences :]).view("<i8")
    if sizes.size and int(sizes.min()) < 0:
        raise DataError(f"{name}: has a negative length; the file is damaged")
    if documents[0] != 0 or documents[-1] != num_sequences or (np.diff(documents) < 0).any():
        raise DataError(f"{name}: its documents do not cover its {num_sequences} sequences in order; it is damaged")
    return _DTYPE_OF_CODE[code], sizes, pointers, documents


def _bin_path(prefix: Path) -> Path:
    return prefix.with_name(prefix.name + ".bin")


def _idx_path(prefix: Path) -> Path:
    return prefix.with_name(prefix.name + ".idx")
