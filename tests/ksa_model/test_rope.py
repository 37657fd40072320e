"""Frequencies of RoPE, plain and scaled: against transformers, against their definitions, and what is refused."""

import math

import pytest
import torch

from ksa_model.config import ModelConfigError, RopeScaling
from ksa_model.rope import inverse_frequencies
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


@pytest.mark.parametrize(
    "scaling, message",
    [
        (dict(kind="dynamic", factor=2), "kind='dynamic' is not one of linear, ntk, yarn, llama3"),
        (dict(kind="linear", factor=0.5), "factor=0.5 must be at least 1"),
        (dict(kind="linear", factor=math.nan), "factor=nan must be at least 1"),
        (dict(kind="yarn", factor=2), "kind=yarn needs original_max_positions"),
        (dict(kind="llama3", factor=2, original_max_positions=0), "the model was trained on before; it is 0"),
        (dict(kind="ntk", factor=2, beta_fast=16.0), "beta_fast=16.0 has no part in kind=ntk, which reads factor;"),
        (dict(YARN, factor=2, beta_slow=32.0), "beta_slow=32.0 must be above 0 and below model.rope_scaling.beta_fast"),
        (dict(YARN, factor=2, attention_factor=0.0), "attention_factor=0.0 must be above 0"),
        (dict(YARN, factor=2, attention_factor=math.nan), "attention_factor=nan must be above 0 and finite"),
        (dict(YARN, factor=2, attention_factor=math.inf), "attention_factor=inf must be above 0 and finite"),
        (dict(YARN, factor=2, beta_fast=math.inf), "beta_fast=inf, which must be finite"),
        (dict(YARN, factor=2, beta_slow=math.nan), "beta_slow=nan must be above 0"),
        (dict(kind="yarn", factor=2, original_max_positions=2**31), "it is 2147483648 and must be from 1 to"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused(scaling, message):
    with pytest.raises(ModelConfigError, match=message):
        RopeScaling(**scaling)


def test_bases_that_scaling_cannot_work_on_are_refused():
    for base in (1.0, math.nan, math.inf):
        with pytest.raises(ModelConfigError, match=f"rope_base={base} must be above 1 and finite"):
            small_config(rope_base=base)
    with pytest.raises(ModelConfigError, match="head_dim=2 has no other"):
        scaled(2, 1e4, kind="ntk", factor=2)


@pytest.mark.parametrize(
    "rope, message",
    [
        (dict(rope_type="dynamic", factor=2.0), "computed here are rope_type default, linear, yarn, llama3"),
        (dict(type="longrope", short_factor=[1.0]), "'longrope'"),
        (dict(rope_type="default", partial_rotary_factor=0.5), "over the whole head"),
        (dict(full_attention=dict(rope_type="default")), "alike in every layer"),
        (dict(rope_type="yarn", factor=2.0, truncate=False), r"\{'truncate': False\} of rope_type='yarn'"),
        (dict(rope_type="linear"), "lacks its factor"),
    ],
    ids=str,
)
def test_checkpoints_with_other_positions_are_refused(rope, message):
    from ksa_model.hf.configs import exported_config, read_config

    written = exported_config(small_config(layer_pattern="F"), 64, None, "float32")
    with pytest.raises(ModelConfigError, match=message):
        read_config(written | {"rope_parameters": rope})


def test_checkpoints_of_earlier_releases_are_read():
    """Keys of transformers 4: `rope_theta` beside `rope_scaling`, which may say `type`."""
    from ksa_model.hf.configs import exported_config, read_config

    written = exported_config(small_config(layer_pattern="F"), 128, None, "float32")
    del written["rope_parameters"]
    written |= dict(rope_theta=5e5, rope_scaling=dict(type="yarn", factor=4.0, original_max_position_embeddings=32))
    found = read_config(written).config
    assert (found.rope_base, found.rope_scaling) == (5e5, RopeScaling("yarn", 4.0, 32))
    written |= dict(rope_scaling=dict(rope_type="yarn", factor=None, mscale=1.0, mscale_all_dim=0.5),
                    original_max_position_embeddings=32)  # fmt: skip
    found = read_config(written).config.rope_scaling
    log = 0.1 * math.log(4)
    assert (found.factor, found.original_max_positions) == (4.0, 32)
    assert found.attention_factor == pytest.approx((log + 1) / (0.5 * log + 1))
