"""Runs as their files describe them: numbers against computations by hand."""

import json

import pytest

from tests.train.report.runs import write_run
from train.report.records import CONTEXT, find_runs, flops_per_sample, pareto, read_run, smoothed


def test_numbers_are_those_of_the_model(sweep):
    runs, left_out = find_runs([sweep])
    assert [r.model.chunk_size for r in runs] == [2, 4, 8, 16] and left_out == []
    run = runs[2]
    # One full layer keeps every token; three KSA layers keep (4+1) chunks of 8, and a summary of each before.
    rows = CONTEXT + 3 * (5 * 8 + CONTEXT // 8 - 4)
    assert run.cache_bytes == rows * 2 * 2 * 32 * 2  # keys and values, 2 heads of 32, bf16
    assert run.window == 40
    # By hand at 512 tokens: t, in chunk c = t // 8, sees 8*min(c, 4) + t % 8 + 1 as text and max(0, c - 4) summaries.
    ksa = sum(8 * min(t // 8, 4) + t % 8 + 1 + max(0, t // 8 - 4) for t in range(512))
    full = 512 * 513 // 2
    assert run.visible_keys == pytest.approx((3 * ksa + full) / 4 / 512)
    assert run.final_loss == pytest.approx(3 + 0.08 + 3 * 0.9**40 + 0.5)
    assert run.tokens_per_second == pytest.approx(1021.5)  # median of 1003..1040


def test_without_held_out_loss_the_last_tenth_counts(tmp_path):
    run = read_run(write_run(tmp_path / "r", held_out=False), "r")
    assert run.final_loss == pytest.approx(sum(3.08 + 3 * 0.9**s for s in (37, 38, 39, 40)) / 4)


def test_smoothing_and_front():
    assert smoothed([5.0] * 100) == pytest.approx([5.0] * 100)
    assert smoothed([1.0, 2.0]) == [1.0, 2.0]  # too few to smooth
    line = [3.0 - 0.01 * i for i in range(200)]
    assert smoothed(line) == pytest.approx(line)  # no lag behind a falling loss
    noisy = [x + (-1) ** i for i, x in enumerate(line)]
    assert max(abs(a - b) for a, b in zip(smoothed(noisy)[20:180], line[20:180])) < 0.15
    assert pareto([(1, 5), (2, 6), (3, 4), (3, 3), (9, 9)]) == [0, 3]


def test_flops_count_follows_the_length(sweep):
    model = read_run(sweep / "chunk_size=8", "x").model
    short, long = (flops_per_sample(model, n) for n in (4096, 8192))
    assert 2 * short < long < 4 * short  # between linear and quadratic


def test_damaged_lines_are_counted_and_the_lines_after_them_kept(tmp_path):
    directory = write_run(tmp_path / "r", steps=3, of=3, held_out=False)
    path = directory / "metrics.jsonl"
    first, second, third = path.read_text().splitlines()
    path.write_text(f"{first}\n{second[:20]}\n{third}\n" + json.dumps([1]) + "\n")
    run = read_run(directory, "r")
    assert [record["step"] for record in run.records] == [1, 3]
    assert run.remarks == ("2 lines of metrics.jsonl are damaged and left out",)
