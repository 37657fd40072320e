"""Every malformed value of a config.json ends in one line that names its key."""

import json

import pytest

from ksa_model.config import ModelConfigError, RopeScaling
from ksa_model.hf.configs import exported_config, read_config
from ksa_model.hf.fields import Fields
from tests.ksa_model.test_model import small_config
from tests.train.hf.interop import PUBLISHED

YARN = RopeScaling("yarn", 8.0, 16)
LLAMA = RopeScaling("llama3", 8.0, 16)
SOURCES = {
    "qwen": exported_config(small_config(layer_pattern="F"), 64, None, "float32"),
    "yarn": exported_config(small_config(layer_pattern="F", rope_scaling=YARN), 64, None, "float32"),
    "llama3": exported_config(small_config(layer_pattern="F", rope_scaling=LLAMA), 64, None, "float32"),
    "ksa": exported_config(small_config(window_chunks=(1, 2, 1, 0)), 64, None, "float32"),
    "published": PUBLISHED | dict(summary_layer_freq=0),
}
WRONG = [None, "", "text", "false", "true", "12", [], ["a"], [1.5], {}, {"a": 1}, True, False, 0, -1, 1.5, 2**31,
         10**400, float("nan"), float("inf"), -0.5, [None], [[1]], "8"]  # fmt: skip
NUMBERS = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size")


@pytest.mark.parametrize("source", SOURCES.values(), ids=SOURCES)
def test_any_value_is_read_or_named_in_one_line(source):
    assert read_config(source)
    tried = refused = 0
    for key in [*source, "rope_scaling", "layer_types", "quantization_config", "partial_rotary_factor", "mix_coeff"]:
        for value in WRONG:
            tried += 1
            try:
                read_config(source | {key: value})
            except ModelConfigError as error:
                refused += 1
                assert "\n" not in str(error) and len(str(error)) < 1000
    for group in ("rope_parameters", "rope_scaling"):
        for key in source.get(group) or {}:
            for value in WRONG:
                tried += 1
                try:
                    read_config(source | {group: source[group] | {key: value}})
                except ModelConfigError as error:
                    refused += 1
                    assert "\n" not in str(error)
    assert tried > 400 and refused > tried / 3


@pytest.mark.parametrize("key", NUMBERS)
def test_missing_null_text_and_impossible_numbers(key):
    source = SOURCES["qwen"]
    with pytest.raises(ModelConfigError, match=f"config.json lacks {key}"):
        read_config({name: value for name, value in source.items() if name != key})
    for value in (None, str(source[key]), float(source[key]), 0, -3, 2**31, True, [source[key]]):
        with pytest.raises(ModelConfigError, match=f"config.json has {key}=.* which must be a whole number from"):
            read_config(source | {key: value})


@pytest.mark.parametrize(
    "source, key, value, wanted",
    [
        ("qwen", "tie_word_embeddings", "false", "true or false"),
        ("qwen", "tie_word_embeddings", None, "true or false"),
        ("qwen", "tie_word_embeddings", 0, "true or false"),
        ("qwen", "rms_norm_eps", "1e-6", "a finite number"),
        ("qwen", "rms_norm_eps", float("nan"), "a finite number"),
        ("qwen", "initializer_range", None, "a finite number"),
        ("qwen", "rope_scaling", "yarn", "an object"),
        ("qwen", "rope_parameters", [1], "an object"),
        ("qwen", "max_position_embeddings", None, "a whole number"),
        ("qwen", "max_position_embeddings", "64", "a whole number"),
        ("qwen", "num_key_value_heads", "2", "a whole number"),
        ("qwen", "head_dim", 0, "a whole number"),
        ("qwen", "model_type", 3, "a text"),
        ("qwen", "architectures", "Qwen3ForCausalLM", "a list of names"),
        ("qwen", "architectures", [None], "a list of names"),
        ("ksa", "chunk_size", "8", "a whole number"),
        ("ksa", "window_chunks", [1, "2", 1, 0], "a whole number"),
        ("ksa", "window_chunks", -1, "a whole number"),
        ("ksa", "layer_pattern", 3, "a text"),
        ("ksa", "independent_qkv", "false", "true or false"),
        ("ksa", "qk_norm", 1, "true or false"),
        ("ksa", "rotate_far", "false", "true or false"),
        ("ksa", "rotate_full_layers", 0, "true or false"),
        ("published", "summary_chunk_size", None, "a whole number"),
        ("published", "summary_token_num", "1", "a whole number"),
        ("published", "summary_token_begin", "61", "a whole number"),
        ("published", "mix_coeff", "1", "a finite number"),
        ("published", "mix_coeff", 1.5, "at least 0 and at most 1"),
        ("ksa", "mix_coeff", -0.5, "at least 0 and at most 1"),
        ("published", "summary_independent_parameters", "true", "true or false"),
        ("published", "use_summary_attention", "false", "true or false"),
        ("published", "summary_layer_freq", -1, "a whole number"),
        ("published", "summary_sliding_chunk_num", -1, "from 0 to"),
    ],
)
def test_the_key_is_named(source, key, value, wanted):
    with pytest.raises(ModelConfigError, match=f"{key}=.*{wanted}"):
        read_config(SOURCES[source] | {key: value})


@pytest.mark.parametrize("key", ["summary_chunk_size", "summary_token_num"])
def test_what_a_published_checkpoint_must_have(key):
    with pytest.raises(ModelConfigError, match=f"lacks {key}"):
        read_config({name: value for name, value in PUBLISHED.items() if name != key})


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            dict(summary_token_begin=62),
            "summary_token_begin=62 and summary_token_num=1, which reach beyond vocab_size=62",
        ),
        (dict(layer_types=["full_attention", "sliding_attention"]), "supports only 'full_attention'"),
        (dict(quantization_config={"quant_method": "fp8"}), "only weights that are not quantized"),
        (dict(use_sliding_window="false"), "use_sliding_window='false'"),
    ],
)
def test_what_is_not_computed_here(changes, message):
    with pytest.raises(ModelConfigError, match=message):
        read_config(PUBLISHED | changes)


def test_null_where_transformers_takes_a_default():
    source = SOURCES["qwen"]
    found = read_config(source | dict(num_key_value_heads=None, rope_scaling=None, use_summary_attention=None)).config
    assert found.num_kv_heads == found.num_heads
    assert read_config(source | dict(head_dim=None)).config.head_dim == 128


def test_long_values_are_shortened():
    with pytest.raises(ModelConfigError) as error:
        Fields({"a": "x" * 5000}).integer("a")
    assert len(str(error.value)) < 200


def test_the_file_is_named(tmp_path):
    from train.hf.files import HfError
    from train.hf.import_weights import open_source

    safetensors = pytest.importorskip("safetensors.torch")
    import torch

    safetensors.save_file({"a": torch.ones(1)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(SOURCES["qwen"] | {"hidden_size": "32"}))
    with pytest.raises(HfError, match=rf"{tmp_path}/config.json: config.json has hidden_size='32', which must be"):
        open_source(tmp_path)
    for text in ("[" * 100_000, "3", "", "{"):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(HfError, match=r"config.json (cannot be read as JSON|must hold a JSON object)"):
            open_source(tmp_path)
