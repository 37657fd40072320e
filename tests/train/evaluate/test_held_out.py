"""The validation loss is a mean over tokens: one over batches would give short documents too much weight."""

import dataclasses

import pytest
import torch

from data_pipeline import open_data
from data_pipeline.packing.samples import IGNORE_INDEX
from tests.train.runs import make_config
from train.evaluate.held_out import HeldOut


def test_the_mean_is_over_tokens(corpus, tmp_path, world):
    config = make_config(corpus, tmp_path, seq_len=512)
    data = open_data(config.data)
    model = dataclasses.replace(config.model, vocab_size=data.vocab_size)
    held_out = HeldOut(data.samples("validation", 512, model.chunk_size), model, world, num_samples=8)
    counts = []

    def loss_sum(tokens, labels, layout):
        """The n-th batch has a loss of n for each of its labels."""
        counts.append(int((labels != IGNORE_INDEX).sum()))
        return torch.tensor(float(len(counts) * counts[-1]))

    found = held_out.loss(loss_sum)
    by_token = sum(n * count for n, count in enumerate(counts, 1)) / sum(counts)
    by_batch = sum(range(1, len(counts) + 1)) / len(counts)
    assert found == pytest.approx(by_token) and abs(by_token - by_batch) > 1e-3
