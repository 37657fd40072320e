"""Sampling, stop tokens and streaming."""

import pytest
import torch

from ksa_model.config import ModelConfigError
from ksa_model.decoding.generate import Sampling, choose, generate
from tests.ksa_model.decoding.test_cache import model_for


def test_stop_tokens_and_streaming(world):
    decoder = model_for(world)
    free, _ = generate(decoder, [[1, 2], [9]], Sampling(max_tokens=20))
    stop = free[0][6]
    heard = []
    generated, _ = generate(decoder, [[1, 2], [9]], Sampling(max_tokens=20, stop_tokens=(stop,)), heard.append)
    for got, whole in zip(generated, free):
        assert got == (whole[: whole.index(stop)] if stop in whole else whole)
    for i, got in enumerate(generated):
        assert [new[i] for new in heard if new[i] is not None] == got


def test_sampling_matches_its_probabilities():
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.15, 0.05]])).expand(4000, 4)
    random = torch.Generator().manual_seed(0)

    def shares(**settings):
        chosen = choose(logits, Sampling(temperature=1.0, **settings), random)
        return (torch.bincount(chosen, minlength=4) / 4000).tolist()

    assert shares() == pytest.approx([0.5, 0.3, 0.15, 0.05], abs=0.03)
    assert shares(top_k=2) == pytest.approx([0.625, 0.375, 0, 0], abs=0.03)
    assert shares(top_p=0.6) == pytest.approx([0.625, 0.375, 0, 0], abs=0.03)
    assert shares(top_p=0.01) == [1, 0, 0, 0]
    assert choose(logits[:1], Sampling(temperature=0), random).tolist() == [0]


def test_tiny_temperatures_take_the_most_likely_token():
    logits = torch.randn(50, 61, generator=torch.Generator().manual_seed(0)) * 1000
    for temperature in (1e-3, 1e-40, 1e-320):
        sampling = Sampling(temperature=temperature, top_k=5, top_p=0.9)
        assert torch.equal(choose(logits, sampling, torch.Generator().manual_seed(0)), logits.argmax(-1))


def test_bad_settings_are_named():
    with pytest.raises(ModelConfigError, match="top_p=0 above 0"):
        Sampling(top_p=0)
    for temperature in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ModelConfigError, match=f"temperature={temperature} finite and, like top_k=0, not negative"):
            Sampling(temperature=temperature)
