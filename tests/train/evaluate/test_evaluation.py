"""`python -m train.evaluate`: what it writes, for runs and for exports, and what it refuses."""

import json
import sys

import pytest

from tests.ranks import run_on_ranks
from tests.train.runs import run_training


def evaluate_on_a_rank(arguments: list[str]) -> tuple[int, str]:
    import contextlib
    import io

    from train.evaluate.__main__ import main

    sys.argv = ["evaluate", *arguments]
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        code = main()
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


def test_scaled_positions_are_recorded_beside_the_results_of_the_run(run):
    directory, _ = run
    arguments = [str(directory), "tasks=perplexity", "lengths=1024", "samples=1"]
    scaling = "{kind: linear, factor: 4}"
    for more in ([], [f"rope_scaling={scaling}"]):
        ((code, said),) = run_on_ranks(1, evaluate_on_a_rank, [*arguments, *more])
        assert code == 0, said
    plain = json.loads((directory / "evaluation.json").read_text())
    scaled = json.loads((directory / "evaluation-linear-4" / "evaluation.json").read_text())
    assert plain["rope_scaling"] is None and scaled["rope_scaling"]["factor"] == 4
    losses = [result["perplexity"]["1024"]["loss"] for result in (plain, scaled)]
    assert losses[0] != losses[1]


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
    for source, out in ((directory, "a"), (tmp_path / "hf", "b")):
        ((code, said),) = run_on_ranks(1, evaluate_on_a_rank, [str(source), *common, f"out={tmp_path / out}"])
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
        (["RUN", "lengths=510"], "lengths=510 is not a multiple of 4, where documents start"),
        (["RUN", "length=512"], "length is not a configuration key; did you mean lengths?"),
        (["RUN", "tasks=variables", "lengths=64"], "variables needs"),
    ],
    ids=str,
)
def test_bad_input_is_one_line(run, arguments, message):
    given = [str(run[0]) if a == "RUN" else a for a in arguments]
    ((code, said),) = run_on_ranks(1, evaluate_on_a_rank, given)
    assert code == 2 and said.startswith("error: ") and message in said and said.count("\n") == 1
