"""Every parallel layout trains the same model: losses, gradient norms and final weights against one rank.

A covering subset runs by default; the whole matrix (tensor x sequence x context x ZeRO for products of up to four
ranks, data parallel filling up, and some of eight) with `pytest tests/train/test_layouts.py --whole-matrix`.
"""

import itertools

import pytest
import torch

from tests.ranks import run_on_ranks
from tests.train.runs import losses, newest_tensors, run_training

# tensor, sequence, context, data, zero
SUBSET = [
    (2, False, 1, 1, 1),
    (1, False, 2, 1, 2),
    (1, False, 1, 2, 0),
    (1, False, 4, 1, 1),
    (2, True, 2, 1, 3),
    (2, True, 1, 2, 2),
    (1, False, 2, 2, 3),
    (4, True, 1, 1, 1),
]


def whole_matrix():
    for tensor, sequence, context, zero in itertools.product((1, 2, 4), (False, True), (1, 2, 4), (0, 1, 2, 3)):
        if (sequence and tensor == 1) or tensor * context > 4:
            continue
        for data in {1, 4 // (tensor * context)}:
            yield tensor, sequence, context, data, zero
    yield from ((2, True, 2, 2, zero) for zero in (0, 1, 2, 3))
    yield from [(4, True, 2, 1, 1), (2, False, 4, 1, 2), (1, False, 4, 2, 3)]


def name(layout) -> str:
    tensor, sequence, context, data, zero = layout
    return f"TP{tensor}{'+SP' if sequence else ''} CP{context} DP{data} ZeRO-{zero}"


def pytest_generate_tests(metafunc):
    if "layout" in metafunc.fixturenames:
        layouts = list(whole_matrix()) if metafunc.config.getoption("--whole-matrix") else SUBSET
        metafunc.parametrize("layout", layouts, ids=name)


# Documents that end inside slices, one longer than the sample, ranks without any label; the last context rank's halo
# comes from itself. AdamW divides a gradient by its own size, so where a gradient is rounding noise it would move the
# weight by a full step of random sign; a larger eps keeps the comparison to what the layouts decide.
CHANGES = dict(memory__recompute="full", optim__eps=1e-5)


@pytest.fixture(scope="module")
def one_rank(corpus, tmp_path_factory):
    root = tmp_path_factory.mktemp("one")
    (records,) = run_on_ranks(1, run_training, str(corpus), str(root), CHANGES)
    return records, newest_tensors(root / "default")


def test_reproduces_one_rank(layout, corpus, tmp_path, one_rank):
    tensor, sequence, context, data, zero = layout
    changes = CHANGES | dict(
        parallel__tensor=tensor, parallel__sequence=sequence, parallel__context=context, parallel__zero=zero
    )
    records, tensors = one_rank
    got = run_on_ranks(tensor * context * data, run_training, str(corpus), str(tmp_path), changes)[0]
    compared = 0
    for mine, want in zip(got, records, strict=True):
        assert mine.keys() == want.keys()
        for key in ("loss", "grad_norm", "validation_loss"):
            if key in want:
                assert mine[key] == pytest.approx(want[key], rel=1e-5), (key, mine["step"])
                compared += 1
        assert mine["tokens"] == want["tokens"]
    assert compared == 11
    mine_tensors = newest_tensors(tmp_path / "default")
    assert mine_tensors.keys() == tensors.keys()
    for key, want in tensors.items():
        if key.startswith("master/"):
            difference = (mine_tensors[key] - want).norm() / want.norm()
            assert difference < 1e-5, (key, float(difference))


# Warm-up and decay that fit into the steps: a rate that jumps would let rounding grow beyond the tolerance.
GATED = CHANGES | dict(model__layer_pattern="GKGF", optim__warmup_steps=2, optim__decay_steps=3)
POOLED = GATED | dict(model__layer_pattern="HPHF")


@pytest.fixture(scope="module")
def gated_one_rank(corpus, tmp_path_factory):
    root = tmp_path_factory.mktemp("gated")
    (records,) = run_on_ranks(1, run_training, str(corpus), str(root), GATED)
    return records, newest_tensors(root / "default")


@pytest.fixture(scope="module")
def pooled_one_rank(corpus, tmp_path_factory):
    root = tmp_path_factory.mktemp("pooled")
    (records,) = run_on_ranks(1, run_training, str(corpus), str(root), POOLED)
    return records, newest_tensors(root / "default")


@pytest.mark.parametrize("tensor, sequence, data, zero", [(2, True, 1, 1), (1, False, 2, 3), (2, False, 2, 2)], ids=str)
def test_gated_delta_nets_reproduce_one_rank(tensor, sequence, data, zero, corpus, tmp_path, gated_one_rank):
    changes = GATED | dict(parallel__tensor=tensor, parallel__sequence=sequence, parallel__zero=zero)
    got = run_on_ranks(tensor * data, run_training, str(corpus), str(tmp_path), changes)[0]
    assert_like_one_rank(got, newest_tensors(tmp_path / "default"), *gated_one_rank)


@pytest.mark.parametrize("tensor, sequence, context, data, zero", [(2, True, 2, 1, 1), (1, False, 4, 1, 3)], ids=str)
def test_pooled_chunks_reproduce_one_rank(tensor, sequence, context, data, zero, corpus, tmp_path, pooled_one_rank):
    """The last steps go on from a checkpoint of another layout."""
    layout = dict(parallel__tensor=tensor, parallel__sequence=sequence, parallel__context=context, parallel__zero=zero)
    arguments = run_training, str(corpus), str(tmp_path)
    run_on_ranks(tensor * context * data, *arguments, POOLED | layout | dict(run__stop_at_step=3))
    (got,) = run_on_ranks(1, *arguments, POOLED)
    assert_like_one_rank(got, newest_tensors(tmp_path / "default"), *pooled_one_rank)


def assert_like_one_rank(got, mine_tensors, records, tensors):
    for key in ("loss", "grad_norm", "validation_loss"):
        mine = {record["step"]: record[key] for record in got if key in record}
        wanted = {record["step"]: record[key] for record in records if key in record}
        if key == "validation_loss":  # a run that stopped half-way has validated there as well
            mine = {step: mine[step] for step in wanted}
        assert wanted and mine == pytest.approx(wanted, rel=1e-5), key
    assert mine_tensors.keys() == tensors.keys()
    for key, want in tensors.items():
        if key.startswith("master/"):
            assert (mine_tensors[key] - want).norm() / want.norm() < 1e-5, key
    assert losses(records)[-1] < losses(records)[0] - 0.2


def test_gated_delta_nets_in_bf16(corpus, tmp_path, gated_one_rank):
    changes = GATED | dict(run__precision="bf16", parallel__zero=1)
    (records,) = run_on_ranks(1, run_training, str(corpus), str(tmp_path), changes)
    assert losses(records) == pytest.approx(losses(gated_one_rank[0]), rel=0.01)
    before, after = gated_one_rank[1], newest_tensors(tmp_path / "default")
    # No products take these weights, so that their gradients have a way of their own. bf16 has two or three digits.
    for key in ("convolution", "decay_rate", "step_bias"):
        name = f"exp_avg_sq/blocks.0.attention.{key}"
        assert (after[name] - before[name]).norm() < 0.2 * before[name].norm(), key


def test_losses_fall(one_rank):
    values = [r["loss"] for r in one_rank[0] if "loss" in r]
    assert values[-1] < values[0] - 0.2


def test_every_weight_moves(corpus, tmp_path, one_rank):
    """A parameter that the optimizer never reaches would keep its initial value on every layout alike."""
    run_on_ranks(1, run_training, str(corpus), str(tmp_path), dict(run__steps=1, optim__warmup_steps=0))
    first, last = newest_tensors(tmp_path / "default"), one_rank[1]
    for key in first:
        assert not torch.equal(first[key], last[key]), key


@pytest.mark.parametrize("ranks, parallel", [
    (1, dict()),
    (2, dict(tensor=2, sequence=True)),
    (2, dict(context=2, zero=2)),
    (2, dict(zero=3)),
], ids=str)  # fmt: skip
def test_little_memory(ranks, parallel, corpus, tmp_path, one_rank):
    """Attention kept, all of it in host memory, the MLP in slices: the engine's gradients are those of keeping all."""
    changes = CHANGES | dict(memory__recompute="selective", memory__offload=True, memory__mlp_rows=48)
    changes |= {f"parallel__{key}": value for key, value in parallel.items()}
    got = run_on_ranks(ranks, run_training, str(corpus), str(tmp_path), changes)[0]
    for mine, want in zip(got, one_rank[0], strict=True):
        for key in ("loss", "grad_norm", "validation_loss"):
            if key in want:
                assert mine[key] == pytest.approx(want[key], rel=1e-5), (key, mine["step"])


@pytest.mark.parametrize("zero", [1, 2, 3])
def test_optimizer_in_host_memory(zero, corpus, tmp_path, one_rank):
    changes = CHANGES | dict(parallel__zero=zero, parallel__offload="optimizer")
    got = run_on_ranks(2, run_training, str(corpus), str(tmp_path), changes)[0]
    for mine, want in zip(got, one_rank[0], strict=True):
        for key in ("loss", "grad_norm"):
            if key in want:
                assert mine[key] == pytest.approx(want[key], rel=1e-5), (key, mine["step"])
