"""Means and counts over steps, skipped ones among them, against a plain computation."""

from types import SimpleNamespace

import pytest
import torch

from train.logs.step_sums import StepSums, count


def test_counts_of_micro_batches():
    batches = [
        SimpleNamespace(num_labels=3, layout=SimpleNamespace(num_tokens=5), model_flops=2**60),
        SimpleNamespace(num_labels=0, layout=SimpleNamespace(num_tokens=4), model_flops=1),
    ]
    counts = count(batches)
    assert counts.dtype == torch.float64 and counts.tolist() == [3, 9, float(2**60 + 1)]


def test_means_leave_skipped_steps_out(world):
    sums = StepSums(world, tokens=100)
    steps = [(6.0, 3, 5, 0), (float("nan"), 2, 4, 1), (8.0, 4, 6, 0)]  # summed loss, labels, tokens, skipped
    for loss, labels, tokens, skipped in steps:
        counts = torch.tensor([labels, tokens, 10], dtype=torch.float64)
        sums.add(torch.tensor(loss), counts, torch.tensor(float(skipped)))
    record = sums.read()
    assert record["loss"] == pytest.approx((6 + 8) / (3 + 4)) and record["skipped_steps"] == 1
    assert record["tokens"] == sums.tokens == 100 + 5 + 4 + 6  # those of a skipped step have been seen
    assert record["ranks"] == 1 and record["step_seconds"] > 0
    assert sums.read_parts(torch.tensor([7.0, 14.0]), ["a", "b"]) == {"loss_a": 1.0, "loss_b": 2.0}
    assert sums.read_parts(None, []) == {}


def test_a_period_of_skipped_steps_has_no_loss(world):
    sums = StepSums(world)
    sums.add(torch.tensor(float("inf")), torch.tensor([2, 4, 10], dtype=torch.float64), torch.tensor(1.0))
    record = sums.read()
    assert "loss" not in record and record["skipped_steps"] == 1
    sums.add(torch.tensor(2.0), torch.tensor([2, 4, 10], dtype=torch.float64), torch.tensor(0.0))
    record = sums.read()
    assert record["loss"] == 1.0 and "skipped_steps" not in record and record["tokens"] == 8
