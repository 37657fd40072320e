"""What distinguishes the families, in and out of config.json. tests/train/hf/test_families.py compares logits."""

import pytest

from ksa_model.config import RopeScaling
from ksa_model.hf.configs import exported_config, read_config
from ksa_model.hf.families import FAMILIES, family_of, shortest_pattern
from tests.ksa_model.test_model import small_config

PLAIN = dict(qk_norm=False)
MODELS = {
    "LlamaForCausalLM": [dict(layer_pattern="F", **PLAIN), dict(layer_pattern="FF", tie_embeddings=True, **PLAIN)],
    "MistralForCausalLM": [dict(layer_pattern="S", window_tokens=9, **PLAIN)],
    "Qwen2ForCausalLM": [
        dict(layer_pattern=pattern, qkv_bias=True, **PLAIN) for pattern in ("F", "S", "FSSS", "FFSS", "FFFS")
    ],
    "Qwen3ForCausalLM": [dict(layer_pattern=pattern) for pattern in ("F", "S", "FSSS")],
}


@pytest.mark.parametrize("architecture, changes", [(name, one) for name, all_of in MODELS.items() for one in all_of])
@pytest.mark.parametrize("scaling", [None, RopeScaling("yarn", 8.0, 16, attention_factor=1.25)])
def test_a_model_survives_the_config_of_its_family(architecture, changes, scaling):
    model = small_config(rope_scaling=scaling, norm_eps=1e-5, rope_base=5e5, **changes)
    written = exported_config(model, 128, None, "float32")
    assert written["architectures"] == [architecture]
    spec = read_config(written)
    found = spec.config
    assert (spec.kind, spec.max_positions) == (architecture, 128)
    assert [layer.mixer for layer in found.layers] == [layer.mixer for layer in model.layers]
    for key in ("hidden_size", "num_heads", "num_kv_heads", "head_dim", "ffn_size", "vocab_size", "qk_norm", "qkv_bias",
                "norm_eps", "init_std", "rope_base", "rope_scaling", "tie_embeddings"):  # fmt: skip
        assert getattr(found, key) == getattr(model, key), key
    assert found.window_tokens == model.window_tokens or not model.has_mixer("S")
    named = {key: value for key, value in written.items() if key != "architectures"}
    assert read_config(named) == spec  # by its model_type alone


def test_at_most_one_family_computes_a_model():
    none = []
    for pattern in ("F", "S", "FFSS", "SSSF", "FSFS", "K", "FC", "G"):
        for norm in (True, False):
            for bias in (True, False):
                model = small_config(layer_pattern=pattern, qk_norm=norm, qkv_bias=bias)
                computing = [family for family in FAMILIES if family.computes(model)]
                assert len(computing) <= 1 and family_of(model) is (computing[0] if computing else None)
                none += [pattern] * (not computing)
    assert {pattern: none.count(pattern) for pattern in none} == dict(F=1, S=1, FFSS=2, SSSF=4, FSFS=4, K=4, FC=4, G=4)


@pytest.mark.parametrize(
    "letters, pattern",
    [("F", "F"), ("FFFF", "F"), ("FSFS", "FS"), ("FSSFSS", "FSS"), ("FFS", "FFS"), ("SFSFS", "SFSFS")],
)
def test_the_shortest_pattern(letters, pattern):
    assert shortest_pattern(letters) == pattern
