"""Recall during training: times, curves and thresholds against computations by hand, from whole and damaged records."""

import json

import pytest

from tests.train.report.runs import probe_record, report_record, write_records
from train.report.page import write_report
from train.report.recall import cost, curve, keys_of, probed, reached, remarks, training_time
from train.report.records import read_run


def run_of(tmp_path, records, **config):
    return read_run(write_records(tmp_path / "r", records, **config), "r")


def seconds(run):
    return [p.gpu_seconds for p in probed(run)]


def test_gpu_seconds_are_those_of_the_steps_before(tmp_path):
    records = [
        report_record(10, 2.0, 4),
        probe_record(15, 0.2),  # between two reports
        report_record(20, 1.0, 4),
        probe_record(20, 0.3),
        probe_record(22, 0.4),  # after the last one
    ]
    run = run_of(tmp_path, records)
    assert seconds(run) == pytest.approx([4 * (10 * 2 + 5 * 1), 4 * (10 * 2 + 10 * 1), 4 * (10 * 2 + 12 * 1)])
    assert training_time(run).seconds == pytest.approx([0, 20, 30])
    assert remarks(run) == []


def test_ranks_may_change_on_a_resume(tmp_path):
    run = run_of(tmp_path, [report_record(10, 2.0, 4), report_record(20, 4.0, 2), probe_record(20, 0.3)])
    assert seconds(run) == pytest.approx([4 * 20 + 2 * 40])


@pytest.mark.parametrize("back_to, kept_seconds", [(10, 10 * 2.0), (5, 10 * 3.0)])  # a report's step, and none
def test_what_ran_again_counts_once(tmp_path, back_to, kept_seconds):
    """The old records are still there, as `metrics.jsonl` has them where they could not be set aside."""
    before = [report_record(10), probe_record(10, 0.1), report_record(20), probe_record(20, 0.9), report_record(30)]
    again = [
        report_record(10, 3.0),
        probe_record(10, 0.2),
        report_record(20, 3.0),
        probe_record(20, 0.3),
        report_record(30, 3.0),
        probe_record(30, 0.4),
    ]
    run = run_of(tmp_path, before + [r for r in again if r["step"] > back_to])
    assert [r["step"] for r in run.records if "loss" in r] == [10, 20, 30]
    assert seconds(run) == pytest.approx([kept_seconds, kept_seconds + 30, kept_seconds + 60])
    first = 0.1 if back_to == 10 else 0.2
    assert [p.scores["length"]["needle", 512] for p in probed(run)] == [first, 0.3, 0.4]


def test_old_records_of_the_same_step_are_replaced(tmp_path):
    records = [report_record(10), probe_record(10, 0.9), report_record(10, 5.0), probe_record(10, 0.2)]
    run = run_of(tmp_path, records)
    assert seconds(run) == [50] and probed(run)[0].scores["length"] == {("needle", 512): 0.2}
    assert cost(run).evaluations == 1


def test_a_report_without_a_time_is_covered_by_the_next(tmp_path):
    run = run_of(tmp_path, [report_record(10, None), report_record(20, 3.0), probe_record(20, 0.5)])
    assert seconds(run) == [60]


def test_runs_of_older_versions_count_the_ranks_of_one_model(tmp_path):
    records = [report_record(10, 2.0, None), probe_record(10, 0.5)]
    run = run_of(tmp_path, records, parallel={"tensor": 2, "context": 4})
    assert seconds(run) == [8 * 20]
    (remark,) = remarks(run)
    assert "parallel.tensor x parallel.context = 8" in remark


def test_a_run_that_began_at_another_runs_step_counts_from_there(tmp_path):
    run = run_of(tmp_path, [report_record(110), probe_record(110, 0.5), report_record(120)], run={"log_every": 10})
    assert seconds(run) == [20]
    (remark,) = remarks(run)
    assert "from step 100 on" in remark


def test_without_times_there_are_tokens_alone(tmp_path):
    run = run_of(tmp_path, [report_record(10, None), probe_record(10, 0.5)])
    assert seconds(run) == [None] and probed(run)[0].tokens == 5120
    page = write_report([tmp_path / "r"])
    assert {p.name for p in page.parent.glob("recall*")} == {"recall_length_tokens.png", "recall_distance_tokens.png"}
    assert "recorded no step_seconds" in page.read_text() and "unknown" in page.read_text()


def test_curves_by_length_and_by_distance(tmp_path):
    first, second = probe_record(10, 0.25, 512, 1024), probe_record(20, 0.5, 512, 1024)
    second["probes"]["needle"]["1024"] = {"token_accuracy": 1.0, "by_distance": [[64, 1.0, 18]]}
    second["probes"]["chain"] = {"512": {"token_accuracy": 0.75, "by_distance": []}}
    found = probed(run_of(tmp_path, [report_record(10), first, report_record(20), second]))
    assert keys_of(found, "length") == [("needle", 512), ("needle", 1024), ("chain", 512)]
    assert curve(found, "length", ("needle", 1024), lambda p: p.tokens) == ([5120, 10240], [0.25, 1.0])
    assert curve(found, "length", ("chain", 512), lambda p: p.gpu_seconds) == ([40], [0.75])
    # All lengths together: 6 answers with 0.5 and 18 with 1.
    assert curve(found, "distance", ("needle", 64), lambda p: p.tokens)[1] == pytest.approx([0.25, (3 + 18) / 24])
    assert curve(found, "distance", ("needle", 256), lambda p: p.tokens)[1] == pytest.approx([0.125, 0.25])


@pytest.mark.parametrize(
    "recalls, step",
    [
        ([0.1, 0.5, 0.9], 20),
        ([0.6, 0.4, 0.5], 30),  # fell below once
        ([0.6, 0.7, 0.4], None),  # is below at the end
        ([0.1, 0.2, 0.3], None),
        ([0.9], 10),
    ],
)
def test_threshold_counts_from_where_it_stays(tmp_path, recalls, step):
    records = [x for i, recall in enumerate(recalls, 1) for x in (report_record(10 * i), probe_record(10 * i, recall))]
    first = reached(probed(run_of(tmp_path, records)), ("needle", 512), 0.5)
    assert (first and first.tokens) == (step and 512 * step)
    assert (first and first.gpu_seconds) == (step and 2 * step)


def test_cost_is_a_share_of_probes_and_training(tmp_path):
    records = [report_record(10, 0.15, 8), probe_record(10, 0.5), report_record(20, 0.15, 8), probe_record(20, 0.5)]
    spent = cost(run_of(tmp_path, records))
    assert (spent.evaluations, spent.probe_seconds, spent.training_seconds) == (2, 1.0, pytest.approx(3.0))
    assert spent.share == pytest.approx(0.25)  # of the clock: ranks wait for each other in both


DAMAGED = [
    {"probes": None},
    {"probes": [1]},
    {"probes": {"needle": None}},
    {"probes": {"needle": {"512": None}}},
    {"probes": {"needle": {"long": {"token_accuracy": 0.5}}}},
    {"probes": {"needle": {"512": {"token_accuracy": float("nan"), "by_distance": [[64, float("nan"), 8]]}}}},
    {"probes": {"needle": {"512": {"token_accuracy": None, "by_distance": [[64, 0.5, 0], [64], "x", None]}}}},
    {"probes": {"needle": {"512": {}}}},
]


@pytest.mark.parametrize("damage", DAMAGED, ids=json.dumps)
def test_damaged_probes_are_left_out(tmp_path, damage):
    good = probe_record(10, 0.5)
    records = [report_record(10), good, report_record(20), {"step": 20, "tokens": 10240, **damage}]
    run = run_of(tmp_path, records)
    assert [dict(p.scores["length"]) for p in probed(run)] == [{("needle", 512): 0.5}]
    assert cost(run).evaluations == 1
    page = write_report([tmp_path / "r"]).read_text()
    assert "<td>r</td><td>needle</td><td>512</td><td>0.500</td><td>5,120</td><td>20.0</td><td>-</td><td>-</td>" in page


@pytest.mark.parametrize("key", ["tokens", "probe_seconds"])
def test_missing_numbers_of_probes_do_not_matter(tmp_path, key):
    records = [report_record(10), {k: v for k, v in probe_record(10, 0.95).items() if k != key}]
    run = run_of(tmp_path, records)
    assert seconds(run) == [20]
    page = write_report([tmp_path / "r"])
    shown = "unknown" if key == "tokens" else "5,120"
    assert f"<td>0.950</td><td>{shown}</td><td>20.0</td><td>{shown}</td><td>20.0</td>" in page.read_text()
    assert (page.parent / "recall_length_tokens.png").exists() == (key != "tokens")
    assert ("What the probes cost" in page.read_text()) == (key != "probe_seconds")
