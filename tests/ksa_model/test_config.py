"""The model configuration: what it counts, and which shapes it refuses with which message."""

import math

import pytest

from ksa_model.config import ModelConfig, ModelConfigError, RopeScaling
from tests.ksa_model.test_model import small_config

YARN = dict(kind="yarn", original_max_positions=4096)


def test_counts():
    config = small_config(vocab_size=64, num_layers=4)
    counts = config.num_parameters()
    assert counts["embedding"] == counts["head"] == 64 * 32
    assert counts["attention"] == 4 * (32 * (32 + 2 * 16) + 32 * 32)
    # k/v of three K layers, q of the two whose summaries a later layer reads; the F layer on top has none
    assert counts["summary"] == 32 + 32 * (2 * 32 + 3 * 2 * 16)
    # the 4B shape of the report: 2.8x and more at 128k
    shape = dict(hidden_size=2560, num_layers=36, num_heads=32, num_kv_heads=8, head_dim=128, ffn_size=9728)
    hybrid, full = ModelConfig(**shape), ModelConfig(**shape, layer_pattern="F")
    assert full.cache_bytes(131_072) == 36 * 2 * 131_072 * 8 * 128 * 2
    assert full.cache_bytes(131_072) / hybrid.cache_bytes(131_072) > 2.8


def test_last_summary_work_is_left_out():
    layers = small_config(layer_pattern="KKKF", num_layers=8).layers
    assert [(x.mixer, x.carries_summaries, x.updates_summaries) for x in layers] == [
        ("K", True, True),
        ("K", True, True),
        ("K", True, True),
        ("F", True, True),
        ("K", True, True),
        ("K", True, True),
        ("K", True, False),
        ("F", False, False),
    ]


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(layer_pattern="KXF"), "model.layer_pattern='KXF' contains 'X'"),
        (dict(layer_pattern="KKF"), "has 3 letters and does not divide model.num_layers=4"),
        (dict(layer_pattern="KPFF"), "'KPFF' has layers that pool each chunk (H or P) beside KSA layers (K)"),
        (
            dict(layer_pattern="HF", summary_tokens=2, chunk_size=8),
            "summary_tokens=1, and for as many far keys model.chunk_size=4",
        ),
        (dict(num_kv_heads=3), "model.num_heads=4 is not a multiple of model.num_kv_heads=3"),
        (dict(window_chunks=(1, 2)), "one for each of the 4 letters"),
        (dict(chunk_size=0), "model.chunk_size=0 must be from 1 to 2147483647"),
        (dict(head_dim=7), "model.head_dim=7 must be even"),
        (dict(init_std=-1.0), "model.init_std=-1.0 must be above 0 and finite"),
        (dict(init_std=float("inf")), "model.init_std=inf must be above 0"),
        (dict(norm_eps=-1.0), "model.norm_eps=-1.0 must be above 0"),
        (dict(norm_eps=float("nan")), "model.norm_eps=nan must be above 0"),
        (dict(window_chunks=10**19), "model.window_chunks=10000000000000000000 must be from 0 to 2147483647 chunks"),
        (dict(window_chunks=(1, 2, 3, -1)), "model.window_chunks=(1, 2, 3, -1) must be from 0 to 2147483647 chunks"),
        (dict(window_chunks=[1]), "model.window_chunks=[1] must be one number, or one for each of the 4 letters"),
        (dict(hidden_size=2**31), "model.hidden_size=2147483648 must be from 1 to 2147483647"),
        (dict(vocab_size=2**31), "model.vocab_size=2147483648 must be from 2 to 2147483647"),
    ],
)
def test_bad_shapes_are_named(changes, message):
    with pytest.raises(ModelConfigError) as error:
        small_config(**changes)
    assert message in str(error.value)


def test_windows_may_be_a_list():
    config = small_config(window_chunks=[1, 2, 3, 4])
    assert config == small_config(window_chunks=(1, 2, 3, 4)) and hash(config)


@pytest.mark.parametrize(
    "scaling, message",
    [
        (dict(kind="dynamic", factor=2), "kind='dynamic' is not one of linear, ntk, yarn, llama3"),
        (dict(kind="linear", factor=0.5), "factor=0.5 must be at least 1"),
        (dict(kind="linear", factor=math.nan), "factor=nan must be at least 1"),
        (dict(kind="yarn", factor=2), "kind=yarn needs original_max_positions"),
        (dict(kind="llama3", factor=2, original_max_positions=0), "in the original training; it is 0"),
        (dict(kind="ntk", factor=2, beta_fast=16.0), "beta_fast=16.0 is not used by kind=ntk, which reads factor;"),
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
def test_bad_rope_scalings_are_named(scaling, message):
    with pytest.raises(ModelConfigError, match=message):
        RopeScaling(**scaling)


def test_bad_rope_bases_are_named():
    for base in (1.0, math.nan, math.inf):
        with pytest.raises(ModelConfigError, match=f"rope_base={base} must be above 1 and finite"):
            small_config(rope_base=base)
    with pytest.raises(ModelConfigError, match="head_dim=2 has no other"):
        small_config(head_dim=2, rope_scaling=RopeScaling("ntk", 2))
