"""Evaluation: scores, losses and weights against plain computations; the command line."""

import dataclasses
import json
import sys

import numpy as np
import pytest
import torch

from data_pipeline import IGNORE_INDEX, DataConfig, open_data
from data_pipeline.config import TASKS
from data_pipeline.synthetic import evaluation_probes
from ksa_model import layout, reference
from ksa_model.attention import Attention
from ksa_model.insight import summary_weights
from tests.ksa_model.test_kernels import make_layout
from tests.ksa_model.test_model import build, random_text, small_config
from tests.ranks import run_on_ranks
from tests.train.runs import run_training
from train.batches import batch_maker
from train.probes import Scorer, loss_by_position


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
        assert score["answers"] == {"needle": 24, "multikey": 32, "multiquery": 128}.get(task, 8)


def test_probes_asked_in_packs_are_answered_as_each_alone(model, probes, world):
    asked = [p for task in TASKS for p in evaluation_probes(probes.tokenizer, task, 700, 2, seed=3)]
    together = Scorer(model, probes.tokenizer, world.device, rows=2500).ask(asked)
    alone = []
    for probe in asked:
        size = probe.tokens.size
        pack = layout.build(np.array([0]), np.array([size]), -(-size // 4) * 4, 4)
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


@pytest.mark.parametrize("m", [1, 2])
def test_weight_of_summaries_is_that_of_a_dense_softmax(world, m):
    config = small_config(layer_pattern="KSKF", window_chunks=2, summary_tokens=m)
    decoder = build(world, config)
    pack = make_layout([150, 3, 391, 17], 4, m, 3)
    tokens, _ = random_text(pack)
    got = summary_weights(decoder, tokens, pack)
    heads_of = {}

    def mix(attention, heads, where):
        heads_of[attention.layer.index] = heads
        return Attention.mix(attention, heads, where)

    with torch.no_grad():
        decoder.hidden(tokens, pack, mix)
    assert sorted(got) == [0, 2]
    far = reference.text_sees_summary(pack, 2)
    mask = torch.cat([reference.text_sees_text(pack, "K", 2), far], dim=1)
    chunk = torch.arange(pack.num_text) // 4
    back = chunk[:, None] - (torch.arange(pack.num_summary) // m)[None, :]
    for index, found in got.items():
        heads = heads_of[index]
        keys = torch.cat([heads.k, heads.k_summary]).repeat_interleave(2, dim=1)
        scores = torch.einsum("nhd,mhd->hnm", heads.q, keys) * 8**-0.5
        weights = scores.masked_fill(~mask, float("-inf")).softmax(-1).nan_to_num()[:, :, pack.num_text :].mean(0)
        for number in range(found.shape[1]):
            here = far & (back >= 1 << number) & (back < 2 << number)
            assert found[0, number].item() == pytest.approx((weights * here).sum().item(), abs=1e-3)
            assert found[1, number].item() == here.any(1).sum().item()
    assert got[0][1].sum() > 0


def evaluate_on_a_rank(arguments: list[str]) -> tuple[int, str]:
    import contextlib
    import io

    from train import evaluate

    sys.argv = ["evaluate", *arguments]
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        code = evaluate.main()
    return code, said.getvalue()


def export_on_a_rank(arguments: list[str]) -> tuple[int, str]:
    from train import export

    return export.main(arguments), ""


@pytest.fixture(scope="module")
def run(corpus, tmp_path_factory):
    root = tmp_path_factory.mktemp("evaluated")
    (records,) = run_on_ranks(1, run_training, str(corpus), str(root), dict(run__steps=3, model__layer_pattern="KKKF"))
    return root / "default", records


def test_the_command_line_writes_numbers_and_pictures(run, tmp_path):
    directory, _ = run
    arguments = [
        str(directory),
        "tasks=needle,multikey,perplexity,insight",
        "lengths=512,1024",
        "samples=2",
        "depths=3",
    ]
    ((code, said),) = run_on_ranks(1, evaluate_on_a_rank, [*arguments, f"out={tmp_path}"])
    assert code == 0, said
    result = json.loads((tmp_path / "evaluation.json").read_text())
    assert set(result["tasks"]) == {"needle", "multikey"} and result["lengths"] == [512, 1024]
    assert [depth for depth, _ in result["tasks"]["needle"]["512"]["by_depth"]] == [0, 0.5, 1]
    # KKKF of 4 kv heads of 8, k=4, W=2: three layers of 12 text rows and a summary for each older chunk, one of all.
    assert result["cache_bytes"]["512"] == 2 * 2 * 4 * 8 * (3 * (12 + 128 - 2) + 512)
    assert 0 < result["perplexity"]["512"]["loss"] < 7 and set(result["insight"]["1024"]) == {"0", "1", "2"}
    for name in ("needle", "distance", "cache", "summaries"):
        assert (tmp_path / f"{name}.png").stat().st_size > 5000 and f"{name}.png" in said
    assert "cache bytes" in said


def test_held_out_loss_is_the_one_that_training_reported(run, tmp_path):
    directory, records = run
    ((code, _),) = run_on_ranks(
        1, evaluate_on_a_rank, [str(directory), "tasks=perplexity", "lengths=256", "samples=2", f"out={tmp_path}"]
    )
    reported = [r["validation_loss"] for r in records if "validation_loss" in r][-1]
    loss = json.loads((tmp_path / "evaluation.json").read_text())["perplexity"]["256"]["loss"]
    assert code == 0 and loss == pytest.approx(reported, rel=1e-4)


def test_an_exported_model_has_the_scores_of_its_run(run, tmp_path):
    pytest.importorskip("transformers")
    directory, _ = run
    common = ["tasks=multikey", "lengths=512", "samples=4"]
    ((code, said),) = run_on_ranks(1, export_on_a_rank, [str(directory), f"out={tmp_path}/hf", "dtype=fp32"])
    assert code == 0, said
    scores = []
    for place, out in ((directory, "a"), (tmp_path / "hf", "b")):
        ((code, said),) = run_on_ranks(1, evaluate_on_a_rank, [str(place), *common, f"out={tmp_path / out}"])
        assert code == 0, said
        result = json.loads((tmp_path / out / "evaluation.json").read_text())
        scores.append({key: result[key] for key in ("tasks", "cache_bytes", "parameters", "layer_pattern")})
    assert scores[0] == scores[1]


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "usage: python -m train.evaluate RUN_DIRECTORY|HF_DIRECTORY [tasks=...]"),
        (["nowhere"], "nowhere/config.yaml is missing: nowhere is not the directory of a run"),
        (["RUN", "tasks=haystack"], "tasks=haystack: 'haystack' is not one of perplexity, needle"),
        (["RUN", "lengths=510"], "lengths=510 is not a multiple of 4, on which documents start"),
        (["RUN", "length=512"], "length is not a configuration key; did you mean lengths?"),
        (["RUN", "tasks=variables", "lengths=64"], "variables needs"),
    ],
    ids=str,
)
def test_bad_input_is_one_line(run, arguments, message):
    given = [str(run[0]) if a == "RUN" else a for a in arguments]
    ((code, said),) = run_on_ranks(1, evaluate_on_a_rank, given)
    assert code == 2 and said.startswith("error: ") and message in said and said.count("\n") == 1
