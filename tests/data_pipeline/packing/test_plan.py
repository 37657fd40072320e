from itertools import pairwise

import numpy as np
import pytest

from data_pipeline import DataError, build_plan
from data_pipeline.packing.order import derive_key, permute
from data_pipeline.packing.plan import CONTINUATION, GOES_ON, PackedSamples, pack
from data_pipeline.packing.samples import IGNORE_INDEX
from data_pipeline.store.shards import ShardSet

SPLIT, LAST = CONTINUATION | GOES_ON, CONTINUATION


def rows(packed: PackedSamples):
    """The samples as lists of (doc, offset, start, length, flags)."""
    edges = packed.row_ptr.astype(int)
    return [packed.segments[a:b].tolist() for a, b in pairwise(edges)]


def best_fit_decreasing(sizes, capacity):
    """The textbook: each item, longest first, into the fullest bin that has room. Returns the room left in each bin."""
    room = []
    for size in sorted(sizes, reverse=True):
        fitting = [index for index, left in enumerate(room) if left >= size]
        if not fitting:
            room.append(capacity)
            fitting = [len(room) - 1]
        room[min(fitting, key=lambda index: room[index])] -= size
    return sorted(room)


def test_the_worked_example():
    assert rows(pack(np.array([3, 20, 8, 4]), seq_len=8, alignment=2)) == [
        [(1, 0, 0, 8, GOES_ON)],
        [(1, 8, 0, 8, SPLIT)],
        [(2, 0, 0, 8, 0)],
        [(0, 0, 0, 3, 0), (1, 16, 4, 4, LAST)],
        [(3, 0, 0, 4, 0)],
    ]


def test_best_fit_chooses_the_fullest_sample_with_room():
    # T=10, k=1. 7 leaves room 3, 5 leaves 5, 4 goes to the 5 (room 1), 3 fills the 7, 1 fills the rest.
    assert rows(pack(np.array([5, 7, 3, 4, 2]), seq_len=10, alignment=1)) == [
        [(1, 0, 0, 7, 0), (2, 0, 7, 3, 0)],
        [(0, 0, 0, 5, 0), (3, 0, 5, 4, 0)],
        [(4, 0, 0, 2, 0)],
    ]


def test_equal_lengths_follow_the_given_order():
    assert rows(pack(np.array([4, 4, 4]), 8, 4, order=np.array([2, 0, 1]))) == [
        [(2, 0, 0, 4, 0), (0, 0, 4, 4, 0)],
        [(1, 0, 0, 4, 0)],
    ]


T, K = 32, 8


@pytest.mark.parametrize(
    ("length", "expected"),
    [
        (0, []),
        (1, []),  # predicts nothing
        (2, [[(0, 0, 0, 2, 0)]]),
        (K - 1, [[(0, 0, 0, 7, 0)]]),
        (K, [[(0, 0, 0, 8, 0)]]),
        (K + 1, [[(0, 0, 0, 9, 0)]]),
        (T - 1, [[(0, 0, 0, 31, 0)]]),
        (T, [[(0, 0, 0, 32, 0)]]),
        (T + 1, [[(0, 0, 0, 32, GOES_ON)]]),  # its last token is only a label
        (T + 2, [[(0, 0, 0, 32, GOES_ON)], [(0, 32, 0, 2, LAST)]]),
        (2 * T, [[(0, 0, 0, 32, GOES_ON)], [(0, 32, 0, 32, LAST)]]),
        (2 * T + 1, [[(0, 0, 0, 32, GOES_ON)], [(0, 32, 0, 32, SPLIT)]]),
        (
            3 * T + 5,
            [
                [(0, 0, 0, 32, GOES_ON)],
                [(0, 32, 0, 32, SPLIT)],
                [(0, 64, 0, 32, SPLIT)],
                [(0, 96, 0, 5, LAST)],
            ],
        ),
    ],
)
def test_one_document_of_an_awkward_length(length, expected):
    assert rows(pack(np.array([length]), T, K)) == expected


def test_nothing_to_pack():
    assert rows(pack(np.array([], dtype=np.int64), T, K)) == []


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize(("seq_len", "alignment"), [(32, 8), (30, 1), (48, 2), (64, 64), (128, 4), (2, 1)])
def test_exact_best_fit_and_the_rules_on_random_lengths(seed, seq_len, alignment):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(0, [seq_len, 3 * seq_len, 8, seq_len // 2 + 2][seed % 4], size=rng.integers(1, 400))
    order = rng.permutation(lengths.size)
    packed = pack(lengths, seq_len, alignment, order)
    segments = packed.segments

    tails = [n % seq_len for n in lengths.tolist() if n > 1 and n % seq_len > (n >= seq_len)]
    num_full = sum(n // seq_len for n in lengths.tolist() if n > 1)
    expected = best_fit_decreasing([-(-n // alignment) for n in tails], seq_len // alignment)
    room = []
    for row in rows(packed):
        ends = [start + -(-length // alignment) * alignment for _, _, start, length, _ in row]
        starts = [start for _, _, start, _, _ in row]
        assert starts[0] == 0 and starts[1:] == ends[:-1] and ends[-1] <= seq_len  # aligned, no overlap, no hole
        room.append((seq_len - ends[-1]) // alignment)
    assert sorted(room) == sorted(expected + [0] * num_full)

    for doc, length in enumerate(lengths.tolist()):
        pieces = np.sort(segments[segments["doc"] == doc], order="offset")
        if length <= 1:
            assert pieces.size == 0
            continue
        assert pieces.size == 1 or length > seq_len + 1  # nothing that fits is cut
        covered = int(pieces["length"].sum())
        assert covered == length or (covered == length - 1 and covered % seq_len == 0)
        assert pieces["offset"].tolist() == [0, *np.cumsum(pieces["length"])[:-1].tolist()]
        assert (pieces["flags"] & CONTINUATION).astype(bool).tolist() == (pieces["offset"] > 0).tolist()
        goes_on = pieces["offset"] + pieces["length"] < length
        assert (pieces["flags"] & GOES_ON).astype(bool).tolist() == goes_on.tolist()


@pytest.mark.parametrize(("seq_len", "alignment"), [(12, 8), (4, 8), (8, 0), (0, 8), (1, 1), (2**32, 8)])
def test_sizes_that_do_not_fit(seq_len, alignment):
    with pytest.raises(DataError, match=f"seq_len={seq_len} must be a multiple of alignment={alignment}"):
        pack(np.array([5]), seq_len, alignment)


@pytest.mark.parametrize(("seq_len", "alignment"), [(64, 8), (16, 4), (512, 8)])
def test_every_token_and_label_of_a_plan_is_that_of_the_shards(prepared, tmp_path, seq_len, alignment):
    plan = build_plan(prepared.train, seq_len, alignment, seed=3, cache_dir=tmp_path)
    shards = ShardSet(prepared.train)
    order = permute(np.arange(shards.lengths.size), shards.lengths.size, derive_key(3, 1))
    where = rows(pack(shards.lengths, seq_len, alignment, order))
    assert len(where) == plan.num_samples
    seen = [np.zeros(n, dtype=int) for n in shards.lengths]
    targets = [np.zeros(n, dtype=int) for n in shards.lengths]
    for index, row in enumerate(where):
        sample = plan.sample(index)
        tokens, labels = [0] * seq_len, [IGNORE_INDEX] * seq_len
        for doc, offset, start, length, _ in row:
            document = shards.read(doc, 0, int(shards.lengths[doc])).tolist()
            for i in range(length):
                tokens[start + i] = document[offset + i]
                seen[doc][offset + i] += 1
                if offset + i + 1 < len(document):
                    labels[start + i] = document[offset + i + 1]
                    targets[doc][offset + i + 1] += 1
        assert sample.tokens.tolist() == tokens and sample.labels.tolist() == labels
        assert sample.doc_starts.tolist() == [start for _, _, start, _, _ in row]
        assert sample.doc_lengths.tolist() == [length for _, _, _, length, _ in row]
        assert sample.continuation.tolist() == [bool(flags & CONTINUATION) for *_, flags in row]
        assert sample.index == index
        arrays = (sample.tokens, sample.labels, sample.doc_starts, sample.doc_lengths)
        assert all(type(array) is np.ndarray and array.dtype == np.int64 for array in arrays)
        assert sample.continuation.dtype == bool
    # Every token is an input once (or only a label, the last of n*T + 1) and every token but the first a label once.
    for doc, length in enumerate(shards.lengths.tolist()):
        assert targets[doc].tolist() == [0] + [1] * (length - 1)
        assert seen[doc][:-1].tolist() == [1] * (length - 1)
        assert seen[doc][-1] == (0 if length > 1 and length % seq_len == 1 else 1)
    assert plan.statistics["tokens"] == sum(int(counts.sum()) for counts in seen)
    assert plan.statistics["documents_split"] == sum(n > seq_len + 1 for n in shards.lengths.tolist())


def test_a_plan_is_built_once_and_known_by_what_decides_it(prepared, tmp_path):
    plan = build_plan(prepared.train, 64, 8, seed=0, cache_dir=tmp_path)
    built = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    again = build_plan(prepared.train, 64, 8, seed=0, cache_dir=tmp_path)
    assert again.fingerprint == plan.fingerprint and again.num_samples == plan.num_samples
    assert built == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    others = [
        build_plan(prepared.train, 128, 8, seed=0, cache_dir=tmp_path),
        build_plan(prepared.train, 64, 4, seed=0, cache_dir=tmp_path),
        build_plan(prepared.train, 64, 8, seed=1, cache_dir=tmp_path),
        build_plan(prepared.validation, 64, 8, seed=0, cache_dir=tmp_path),
    ]
    assert len({plan.fingerprint, *(other.fingerprint for other in others)}) == 5
    assert (plan.seq_len, plan.alignment, plan.seed) == (64, 8, 0)


def test_half_a_plan_is_built_again(prepared, tmp_path):
    tokens = build_plan(prepared.train, 64, 8, seed=0, cache_dir=tmp_path).sample(3).tokens
    (directory,) = [path for path in tmp_path.iterdir() if path.is_dir()]
    (directory / "plan.json").unlink()  # it is written last, so a killed build lacks it
    (directory / "segments.npy").write_bytes(b"half")
    again = build_plan(prepared.train, 64, 8, seed=0, cache_dir=tmp_path)
    assert np.array_equal(again.sample(3).tokens, tokens)


def test_a_damaged_plan_and_indices_out_of_range(prepared, tmp_path):
    plan = build_plan(prepared.train, 64, 8, seed=0, cache_dir=tmp_path)
    for index in (-1, plan.num_samples):
        with pytest.raises(IndexError, match=f"a plan with {plan.num_samples} samples"):
            plan.sample(index)
    (directory,) = [path for path in tmp_path.iterdir() if path.is_dir()]
    np.save(directory / "row_ptr.npy", np.array([0, 1], dtype=np.uint64))
    with pytest.raises(DataError, match="do not belong together; delete it to build it again"):
        build_plan(prepared.train, 64, 8, seed=0, cache_dir=tmp_path)
    whole = (directory / "segments.npy").read_bytes()
    for end in (0, 5, 100, len(whole) - 1):
        (directory / "segments.npy").write_bytes(whole[:end])
        with pytest.raises(DataError, match=f"{directory}: the plan cannot be read .*; delete it to build it again"):
            build_plan(prepared.train, 64, 8, seed=0, cache_dir=tmp_path)


def test_shards_that_no_manifest_lists(prepared, tmp_path):
    with pytest.raises(DataError, match=r"is not a shard that .*manifest.json lists"):
        build_plan([prepared.directory / "other"], 64, 8, seed=0, cache_dir=tmp_path)
    with pytest.raises(DataError, match=r"seq_len=60 must be a multiple of alignment=8.* multiple is 64"):
        build_plan(prepared.train, 60, 8, seed=0, cache_dir=tmp_path)
    with pytest.raises(DataError, match="nothing to pack"):
        build_plan([], 64, 8, seed=0, cache_dir=tmp_path)
