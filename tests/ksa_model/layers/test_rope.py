"""Frequencies of RoPE, plain and scaled: against transformers, against their definitions, and what is refused."""

import math

import pytest
import torch

from ksa_model.config import RopeScaling
from ksa_model.layers.rope import inverse_frequencies
from tests.ksa_model.test_model import small_config

YARN = dict(kind="yarn", original_max_positions=4096)


def scaled(head_dim=128, base=1e6, **scaling):
    return small_config(head_dim=head_dim, rope_base=base, rope_scaling=RopeScaling(**scaling) if scaling else None)


@pytest.mark.parametrize("head_dim, base", [(128, 1e6), (64, 1e4), (8, 500.0), (2, 1e4)])
@pytest.mark.parametrize(
    "scaling",
    [
        dict(kind="linear", factor=8),
        dict(YARN, factor=4),
        dict(YARN, factor=40, beta_fast=16.0, beta_slow=2.0, attention_factor=1.25),
        dict(YARN, factor=4, original_max_positions=40),  # no pair turns often enough to be left alone
        dict(YARN, factor=1),
        dict(kind="llama3", factor=8, original_max_positions=8192),
        dict(kind="llama3", factor=32, original_max_positions=512, low_freq_factor=2.0, high_freq_factor=8.0),
    ],
    ids=str,
)
def test_frequencies_are_those_of_transformers(scaling, head_dim, base):
    pytest.importorskip("transformers")
    from transformers import Qwen3Config
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    from ksa_model.hf.configs import exported_config, read_config

    config = scaled(head_dim, base, **scaling)
    written = exported_config(config, 4096, None, "float32")
    theirs = Qwen3Config(rope_parameters=written["rope_parameters"], head_dim=head_dim)
    want, factor = ROPE_INIT_FUNCTIONS[scaling["kind"]](theirs, torch.device("cpu"))
    got, ours = inverse_frequencies(config)
    torch.testing.assert_close(got.float(), want, rtol=2e-6, atol=0)
    assert ours == pytest.approx(factor, rel=1e-12)
    back = read_config(written).config
    assert back.rope_base == base
    assert torch.equal(inverse_frequencies(back)[0], got) and inverse_frequencies(back)[1] == ours


def test_ntk_divides_the_lowest_frequency_and_leaves_the_highest():
    plain, ntk = inverse_frequencies(scaled())[0], inverse_frequencies(scaled(kind="ntk", factor=16))[0]
    ratio = plain / ntk
    assert ratio[0] == 1 and ratio[-1].item() == pytest.approx(16)
    assert (ratio.diff() > 0).all()


def test_yarn_by_hand():
    """d = 8, base 10^4: turns within 6,283 positions are 1000, 100, 10 and 1. Above 32 of them is pair 1.49, down to 1;
    below 1 of them is pair 3.00, up to 3; so pair 2 is half and half, pair 3 is divided."""
    got, factor = inverse_frequencies(scaled(8, 1e4, kind="yarn", factor=4, original_max_positions=6283))
    torch.testing.assert_close(got, torch.tensor([1, 1e-1, 1e-2 * 5 / 8, 1e-3 / 4], dtype=torch.float64))
    assert factor == pytest.approx(0.1 * math.log(4) + 1)
