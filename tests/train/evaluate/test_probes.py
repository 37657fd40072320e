"""Scores, losses by position and weights of summaries, against plain computations."""

import dataclasses

import numpy as np
import pytest
import torch

from data_pipeline import IGNORE_INDEX, DataConfig, open_data
from data_pipeline.config import TASKS
from data_pipeline.corpora.synthetic import evaluation_probes
from ksa_model.layout.sequence import build_layout
from tests.ksa_model.test_model import build, small_config
from train.batches import batch_maker
from train.evaluate.probes import Scorer, loss_by_position


@pytest.fixture(scope="module")
def probes(tmp_path_factory):
    return open_data(DataConfig(source="synthetic", vocab_size=512, cache_dir=str(tmp_path_factory.mktemp("probes"))))


@pytest.fixture(scope="module")
def model(world, probes):
    config = small_config(layer_pattern="KKKF", vocab_size=probes.vocab_size, window_chunks=2)
    return build(world, config).eval()


def test_an_untrained_model_scores_chance(model, probes, world):
    scorer = Scorer(model, probes.tokenizer, world.device, rows=4096)
    for task in TASKS:
        score = scorer.score(task, 1024, samples=8, seed=0, depths=3)
        assert score["token_accuracy"] < 0.06 and score["exact_match"] == 0, task
        assert score["answers"] == {
            "needle": 24,
            "multikey": 32,
            "multiquery": 128,
            "joint": 64,
            "chain": 32,
            "count": 32,
        }.get(task, 8)


def test_probes_asked_in_packs_are_answered_as_each_alone(model, probes, world):
    asked = [p for task in TASKS for p in evaluation_probes(probes.tokenizer, task, 700, 2, seed=3)]
    together = Scorer(model, probes.tokenizer, world.device, rows=2500).ask(asked)
    alone = []
    for probe in asked:
        size = probe.tokens.size
        pack = build_layout(np.array([0]), np.array([size]), -(-size // 4) * 4, 4)
        tokens = torch.from_numpy(np.pad(probe.tokens, (0, pack.num_text - size)))
        with torch.no_grad():
            said = model.logits(tokens, pack).argmax(-1).numpy()
        for (begin, end), distance in zip(probe.answers, probe.distances):
            alone.append((distance, [said[i - 1] == probe.tokens[i] for i in range(begin, end)]))
    assert [(d, right.tolist()) for d, right in together] == alone


def test_a_model_that_knows_the_answers_is_right(model, probes, world):
    """The score is about the tokens of the answers, each from the row before it."""

    class Knows:
        config = model.config

        def logits(self, tokens, pack, rows):
            return torch.nn.functional.one_hot(tokens[rows + 1], 512).float()

    scorer = Scorer(Knows(), probes.tokenizer, world.device, rows=4096)
    score = scorer.score("multikey", 1024, samples=4, seed=0, depths=1)
    assert score["token_accuracy"] == score["exact_match"] == 1
    assert sum(count for _, _, count in score["by_distance"]) == score["answers"] == 16
    assert all(distance & (distance - 1) == 0 and distance < 1024 for distance, _, _ in score["by_distance"])


def test_loss_by_position_is_that_of_a_plain_computation(model, probes):
    samples = probes.samples("validation", 512, 4)
    packs = [batch_maker(model.config)(samples.at(i)) for i in range(3)]
    labels = [torch.where(p.labels == IGNORE_INDEX, p.tokens.roll(-1), p.labels) for p in packs]
    for pack, own in zip(packs, labels):
        own[pack.layout.num_tokens - 1 :] = IGNORE_INDEX
    packs = [dataclasses.replace(pack, labels=own) for pack, own in zip(packs, labels)]
    got = loss_by_position(model, packs)
    total: dict[int, list[float]] = {}
    with torch.no_grad():
        for pack in packs:
            log_p = model.logits(pack.tokens, pack.layout).log_softmax(-1)
            for row in range(pack.layout.num_tokens - 1):
                bin_ = 0 if row == 0 else 1 << (row.bit_length() - 1)
                total.setdefault(bin_, []).append(-log_p[row, pack.labels[row]].item())
    assert [(b, n) for b, _, n in got["by_position"]] == [(b, len(v)) for b, v in sorted(total.items())]
    for (_, loss, _), values in zip(got["by_position"], (v for _, v in sorted(total.items()))):
        assert loss == pytest.approx(np.mean(values), abs=1e-4)
    assert got["loss"] == pytest.approx(np.mean([x for v in total.values() for x in v]), abs=1e-4)
