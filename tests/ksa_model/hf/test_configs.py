"""Reading config.json: patterns are parsed and never evaluated, and the layers of published checkpoints."""

import math

import pytest

from ksa_model.config import ModelConfigError, RopeScaling
from ksa_model.hf.configs import exported_config, parse_pattern, read_config
from tests.ksa_model.test_model import small_config
from tests.train.hf.interop import PUBLISHED


def test_patterns_are_parsed_not_evaluated():
    assert parse_pattern("([128]*3+[16768])*9", "key", 36) == ([128] * 3 + [16768]) * 9
    assert parse_pattern("([128]*3+[1024]*1)*6", "key", 24) == ([128] * 3 + [1024]) * 6
    assert parse_pattern("[1, 2, 3]", "key", 3) == [1, 2, 3] and parse_pattern(7, "key", 2) == [7, 7]
    assert parse_pattern("2*([1]+(2,))", "key", 4) == [1, 2, 1, 2]
    for bad in (
        "__import__('os').system('true')", "[1]*10**9", "[[1]*9999]*9999*9999",
        "[x for x in [1]]", "[1.5]*3", "[1]-[1]",
        "(" * 500 + "[1]" + ")" * 500, "[True]*3", "[-1]*3", "",
    ):  # fmt: skip
        with pytest.raises(ModelConfigError, match="key"):
            parse_pattern(bad, "key", 3)
    with pytest.raises(ModelConfigError, match="has 3 layers, and num_hidden_layers=4"):
        parse_pattern([1, 2, 3], "key", 4)


@pytest.mark.parametrize(
    "keys, expected",
    [
        (dict(), ("KKKF", 1, True)),
        (dict(summary_sliding_chunk_num=1, summary_layer_freq="([1]*3+[0])*2"), ("KKKF", 1, False)),
        (dict(summary_sliding_chunk_num="([1]*3+[100])*2"), ("K", (1, 1, 1, 100), True)),
        (dict(summary_sliding_chunk_num=[1, 300, 1, 1, 1, 1, 1, 1]), ("KFKKKKKK", 1, True)),
        (dict(summary_sliding_chunk_num=0), ("K", 0, True)),
    ],
)
def test_published_patterns(keys, expected):
    found = read_config(PUBLISHED | keys).config
    pattern, windows, updates = expected
    assert (
        found.layers
        == type(found)(
            **{name: getattr(found, name) for name in found.__dataclass_fields__}
            | dict(
                layer_pattern=pattern * (len(windows) if pattern == "K" and isinstance(windows, tuple) else 1),
                window_chunks=windows,
                full_layers_update_summaries=updates,
            )
        ).layers
    )


@pytest.mark.parametrize("far, full", [(True, True), (True, False), (False, True), (False, False)])
def test_what_is_rotated_survives_an_export(far, full):
    for pattern in ("KKKF", "K", "KSCF", "F"):
        config = small_config(layer_pattern=pattern, rotate_far=far, rotate_full_layers=full)
        written = exported_config(config, 64, None, "float32")
        if pattern == "F" and full:  # nothing is far there, and Qwen3 rotates its full layers
            assert written["model_type"] == "qwen3" and "rotate_full_layers" not in written
            continue
        assert written["architectures"] == ["KsaForCausalLM"]
        found = read_config(written).config
        assert (found.rotate_far, found.rotate_full_layers) == (far, full)


def test_exports_without_the_keys_of_rotation_rotate_everything():
    written = exported_config(small_config(), 64, None, "float32")
    older = {key: value for key, value in written.items() if not key.startswith("rotate_")}
    assert len(older) == len(written) - 2
    assert read_config(older) == read_config(written)
    pytest.importorskip("transformers")
    from ksa_model.hf.modeling_ksa import KsaConfig

    for values in (older, written):
        loaded = KsaConfig.from_dict(values)
        assert loaded.rotate_far is True and loaded.rotate_full_layers is True
    changed = KsaConfig.from_dict(written | dict(rotate_far=False, rotate_full_layers=False))
    assert (changed.to_dict()["rotate_far"], changed.to_dict()["rotate_full_layers"]) == (False, False)


@pytest.mark.parametrize(
    "rope, message",
    [
        (dict(rope_type="dynamic", factor=2.0), "supported are rope_type default, linear, yarn, llama3"),
        (dict(type="longrope", short_factor=[1.0]), "'longrope'"),
        (dict(rope_type="default", partial_rotary_factor=0.5), "for all features of a head"),
        (dict(full_attention=dict(rope_type="default")), "the same in every layer"),
        (dict(rope_type="yarn", factor=2.0, truncate=False), r"\{'truncate': False\} for rope_type='yarn'"),
        (dict(rope_type="linear"), "without a factor"),
    ],
    ids=str,
)
def test_checkpoints_with_other_positions_are_refused(rope, message):
    written = exported_config(small_config(layer_pattern="F"), 64, None, "float32")
    with pytest.raises(ModelConfigError, match=message):
        read_config(written | {"rope_parameters": rope})


def test_checkpoints_of_earlier_releases_are_read():
    """The keys of transformers 4: `rope_theta` beside `rope_scaling`, whose kind may be called `type`."""
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
