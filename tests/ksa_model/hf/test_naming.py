"""The origin of every parameter of an imported model, and what a checkpoint with other tensors is refused with."""

import dataclasses

import pytest

from ksa_model.config import ModelConfigError
from ksa_model.hf.configs import CheckpointSpec
from ksa_model.hf.naming import Origin, exported_shapes, hf_name, origins
from tests.ksa_model.test_model import small_config

EMBEDDING = "model.embed_tokens.weight"


def spec(config, **fields):
    return CheckpointSpec("a checkpoint", config, 64, **fields)


def test_every_parameter_has_its_own_name():
    for pattern in ("KKKF", "GGGF", "HPHF"):
        names = [hf_name(name) for name in small_config(layer_pattern=pattern).parameter_shapes()]
        assert len(set(names)) == len(names)
    assert hf_name("blocks.3.attention.summary_query.weight") == "model.layers.3.self_attn.q_proj_summary.weight"


def test_exports_have_no_vocabulary_padding():
    shapes = exported_shapes(small_config())  # 61 tokens, padded to 64 rows
    assert shapes["embedding.weight"] == (EMBEDDING, (61, 32)) and shapes["head.weight"] == ("lm_head.weight", (61, 32))


def test_an_export_has_the_tensor_of_every_parameter():
    config = small_config()
    available = {name for name, _ in exported_shapes(config).values()}
    for name, origin in origins(spec(config), config, available, None).items():
        padded = 61 if name in ("embedding.weight", "head.weight") else None
        assert origin == Origin(((1.0, hf_name(name)),), rows=padded)


def test_missing_summary_parameters_are_copies():
    config = small_config()
    available = {name for name, _ in exported_shapes(config).values() if "summary" not in name}
    query, base = "blocks.0.attention.summary_query.weight", "model.layers.0.self_attn.q_proj.weight"
    found = origins(spec(config), config, available, None)
    assert found[query] == Origin(((1.0, base),))
    assert found["summary_embedding"] == Origin(((1.0, EMBEDDING),), mean_rows=61)
    assert origins(spec(config), config, available, 7)["summary_embedding"].repeated_row == 7
    assert origins(spec(config, summary_row=60), config, available, None)["summary_embedding"].first_row == 60


def test_annealed_summary_projections_are_mixed_where_no_norm_comes_before():
    config = small_config(qk_norm=False)
    available = {name for name, _ in exported_shapes(small_config()).values()}
    without_norms = {name for name in available if "q_norm" not in name and "k_norm" not in name}
    found = origins(spec(config, summary_share=0.25), config, without_norms, None)
    own, base = (f"model.layers.0.self_attn.k_proj{suffix}.weight" for suffix in ("_summary", ""))
    assert found["blocks.0.attention.summary_key.weight"].terms == ((0.25, own), (0.75, base))
    for share, folded in ((0.25, ((1.0, own),)), (1.0, ((1.0, own),)), (0.0, ((0.0, own), (1.0, base)))):
        normed = spec(small_config(), summary_share=share)
        found = origins(normed, small_config(), available, None)
        for name in ("key", "value"):  # one weight mixes both, so the values are not mixed here either
            terms = found[f"blocks.0.attention.summary_{name}.weight"].terms
            assert terms == tuple((weight, tensor.replace("k_", f"{name[0]}_")) for weight, tensor in folded)
        assert normed.mix_coeff == (share or 1.0)
        assert normed.mix_coeff_in(small_config(independent_qkv=False)) == 1.0


def test_tensors_that_do_not_fit_are_named():
    config = small_config()
    available = {name for name, _ in exported_shapes(config).values()}
    with pytest.raises(ModelConfigError, match=r"lacks lm_head.weight, which a checkpoint with this shape must have"):
        origins(spec(config), config, available - {"lm_head.weight"}, None)
    with pytest.raises(
        ModelConfigError, match=r"has model.a, model.b, model.c and 1 more tensors, which a checkpoint with"
    ):
        origins(spec(config), config, available | {f"model.{name}" for name in "abcd"}, None)
    tied = dataclasses.replace(config, tie_embeddings=True)  # the head then repeats the embedding
    assert "head.weight" not in origins(spec(tied), tied, available, None)
