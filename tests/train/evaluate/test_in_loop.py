"""Probes in the training loop: the same scores on every parallel layout, and those of `train.evaluate`'s scorer."""

import dataclasses
import math

import pytest
import torch

from tests.ranks import run_on_ranks
from tests.train.runs import make_config, run_training
from tests.train.test_layouts import name

PROBES = dict(
    run__probe_every=3,
    run__probe_tasks=["needle", "multikey"],
    run__probe_lengths=[256, 512, 1024],  # below, at and beyond seq_len
    seq_len=512,
    run__probe_samples=3,
    run__steps=4,
    optim__eps=1e-5,
)


def probe_records(records):
    return [(r["step"], r["probes"]) for r in records if "probes" in r]


@pytest.fixture(scope="module")
def one_rank(corpus, tmp_path_factory):
    (records,) = run_on_ranks(1, run_training, str(corpus), str(tmp_path_factory.mktemp("one")), PROBES)
    return records


def test_probes_are_recorded_and_leave_training_alone(one_rank, corpus, tmp_path):
    found = probe_records(one_rank)
    assert [step for step, _ in found] == [3, 4]  # every three steps, and at the end
    for _, scores in found:
        assert set(scores) == {"needle", "multikey"} and set(scores["needle"]) == {"256", "512", "1024"}
        assert scores["needle"]["256"]["answers"] == 3 and scores["multikey"]["512"]["answers"] == 3 * 4
    plain = {key: value for key, value in PROBES.items() if "probe" not in key}
    (without,) = run_on_ranks(1, run_training, str(corpus), str(tmp_path), plain)
    assert [r["loss"] for r in one_rank if "loss" in r] == [r["loss"] for r in without if "loss" in r]
    assert not probe_records(without)


# tensor, sequence, context, data, zero
@pytest.mark.parametrize("layout", [(2, True, 1, 1, 1), (1, False, 2, 1, 2), (1, False, 1, 2, 3)], ids=name)
def test_the_same_on_every_parallel_layout(layout, one_rank, corpus, tmp_path):
    tensor, sequence, context, data, zero = layout
    changes = PROBES | dict(
        parallel__tensor=tensor, parallel__sequence=sequence, parallel__context=context, parallel__zero=zero
    )
    records = run_on_ranks(tensor * context * data, run_training, str(corpus), str(tmp_path), changes)[0]
    assert {r["ranks"] for r in records if "loss" in r} == {tensor * context * data}
    for (_, here), (_, there) in zip(probe_records(records), probe_records(one_rank), strict=True):
        for task, by_length in here.items():
            for length, scores in by_length.items():
                expected = there[task][length]
                assert scores["answers"] == expected["answers"]
                # Rounding may decide between two equally likely tokens: one answer token in six.
                tolerance = 2 / (6 * scores["answers"])
                assert math.isclose(scores["token_accuracy"], expected["token_accuracy"], abs_tol=tolerance)


def test_the_scorer_agrees(corpus, tmp_path, world):
    """The same weights asked by `train.evaluate`'s scorer: the same answers are right."""
    from data_pipeline import Tokenizer, open_data
    from ksa_model.layers.tensor_parallel import TensorParallel
    from ksa_model.model import Decoder
    from train.build import with_vocabulary
    from train.evaluate import in_loop
    from train.evaluate.probes import Scorer

    config = make_config(corpus, tmp_path, **PROBES)
    data = open_data(config.data)
    tokenizer = Tokenizer(data.tokenizer_path)
    model_config = with_vocabulary(config.model, data.vocab_size)
    torch.manual_seed(1)
    model = Decoder(model_config, TensorParallel(world.tensor_group)).eval()
    with torch.no_grad():
        model.embedding.weight[: tokenizer.vocab_size].mul_(5)
        model.head.weight.copy_(model.embedding.weight)  # a model that repeats tokens answers some right
    probes = in_loop.InLoopProbes(dataclasses.replace(config, model=model_config), tokenizer, world)
    found = probes.score(lambda tokens, labels, layout, objective: objective(model, tokens, labels, layout))["probes"]
    scorer = Scorer(model, tokenizer, torch.device("cpu"), rows=2048)
    some = 0.0
    for task in ("multikey",):
        for length in (256, 512, 1024):
            expected = scorer.score(task, length, 3, in_loop.SEED, 1)
            assert found[task][str(length)] == expected
            some += expected["token_accuracy"]
    assert some > 0
