"""Llama, Mistral, Qwen2 and windows of Qwen3: the logits of transformers on every layout, and out to the same class."""

import dataclasses
import json

import pytest
import torch

transformers = pytest.importorskip("transformers")
from safetensors.torch import load_file, save_file  # noqa: E402

from ksa_model.layout.sequence import ShardedLayout  # noqa: E402
from tests.ksa_model.ops.attention.test_joint import make_layout  # noqa: E402
from tests.ksa_model.test_model import small_config  # noqa: E402
from tests.ranks import run_on_ranks  # noqa: E402
from tests.train.hf.interop import QWEN, TOKENS, add_tokenizer, imported, make_run, our_logits, run_command  # noqa: E402
from tests.train.hf.test_interop import SCALED, assert_same_files, train_config  # noqa: E402
from train import export as export_command  # noqa: E402
from train import import_hf as import_command  # noqa: E402
from train.hf import export, import_weights  # noqa: E402

SHAPE = {key: value for key, value in QWEN.items() if key != "head_dim"}
LONG = torch.randint(0, 61, (64,), generator=torch.Generator().manual_seed(6)).tolist()
# Class, its configuration besides SHAPE, and what this project makes of it.
MODELS = {
    "Llama": ("Llama", dict(), dict(layer_pattern="F", head_dim=8, qk_norm=False)),
    "Llama, tied, wide heads": ("Llama", dict(tie_word_embeddings=True, head_dim=16), dict(head_dim=16)),
    "Mistral": ("Mistral", dict(sliding_window=9, head_dim=16), dict(layer_pattern="S", window_tokens=9)),
    "Qwen2": ("Qwen2", dict(), dict(layer_pattern="F", qkv_bias=True, qk_norm=False, head_dim=8)),
    "Qwen2, tied, windows above": (
        "Qwen2",
        dict(use_sliding_window=True, sliding_window=9, max_window_layers=1, tie_word_embeddings=True),
        dict(layer_pattern="FSSS", window_tokens=9, qkv_bias=True),
    ),
    "Qwen3, windows": (
        "Qwen3",
        dict(use_sliding_window=True, sliding_window=9, max_window_layers=0, head_dim=16),
        dict(layer_pattern="S", window_tokens=9, qk_norm=True),
    ),
}  # fmt: skip


def make(directory, name, **changes):
    """A model of transformers with random weights, saved; norms and biases are random too, so that a lost one shows."""
    torch.manual_seed(5)
    config = getattr(transformers, f"{name}Config")(**(SHAPE | changes))
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p)) if p.ndim == 1 else p.mul_(4)
    model.save_pretrained(directory)
    return model


def change_config(directory, *removed, **changes):
    path = directory / "config.json"
    held = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in held.items() if key not in removed}))
    return held


def out_again(directory, tmp_path, capsys):
    """The model that comes back from transformers after an import and an export, and the two config.json."""
    code, said = run_command(import_command, directory, f"out={tmp_path}/run", capsys=capsys)
    assert code == 0, said
    code, said = run_command(export_command, tmp_path / "run", f"out={tmp_path}/out", "dtype=fp32", capsys=capsys)
    assert code == 0, said
    assert not (tmp_path / "out/modeling_ksa.py").exists()
    assert_same_files(directory, tmp_path / "out")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    return again, *(json.loads((path / "config.json").read_text()) for path in (directory, tmp_path / "out"))


@pytest.mark.parametrize("name, changes, expected", MODELS.values(), ids=MODELS)
def test_a_family_comes_in_and_goes_out_unchanged(world, tmp_path, capsys, name, changes, expected):
    theirs = make(tmp_path / "hf", name, **changes)
    want = theirs(torch.tensor([TOKENS])).logits[0]
    decoder = imported(world, tmp_path / "hf")
    torch.testing.assert_close(our_logits(decoder, TOKENS), want, rtol=0, atol=1e-4)
    assert want.std() > 0.1
    assert {key: getattr(decoder.config, key) for key in expected} == expected
    if "S" in decoder.config.layer_pattern:
        full = our_logits(imported(world, tmp_path / "hf", layer_pattern="F"), TOKENS)
        assert (full - want).abs().max() > 0.1, "windows that nobody reads would pass as well"
    again, before, after = out_again(tmp_path / "hf", tmp_path, capsys)
    assert type(again) is type(theirs)
    assert torch.equal(again(torch.tensor([TOKENS])).logits[0], want)
    free = {"bos_token_id", "eos_token_id", "pad_token_id"}  # of the tokenizer, which there is none of
    kept = before.keys() & after.keys() - free
    assert {key: after[key] for key in kept} == {key: before[key] for key in kept}
    assert {"rms_norm_eps", "rope_parameters", "num_key_value_heads", "max_position_embeddings"} <= kept


@pytest.mark.parametrize("scaling", SCALED.values(), ids=SCALED)
@pytest.mark.parametrize("name", ["Llama", "Mistral", "Qwen2"])
def test_scaled_positions_of_every_family(world, tmp_path, capsys, name, scaling):
    theirs = make(tmp_path / "hf", name, rope_scaling=dict(scaling), **({"head_dim": 16} if name != "Qwen2" else {}))
    want = theirs(torch.tensor([TOKENS])).logits[0]
    torch.testing.assert_close(our_logits(imported(world, tmp_path / "hf"), TOKENS), want, rtol=0, atol=1e-4)
    plain = our_logits(imported(world, tmp_path / "hf", rope_scaling=None), TOKENS)
    assert (plain - want).abs().max() > 0.1, "positions that nobody scales would pass as well"
    # The keys of releases before 5.
    held = change_config(tmp_path / "hf")["rope_parameters"]
    old = {key: value for key, value in held.items() if key != "rope_theta"}
    change_config(tmp_path / "hf", "rope_parameters", rope_theta=held["rope_theta"], rope_scaling=old)
    torch.testing.assert_close(our_logits(imported(world, tmp_path / "hf"), TOKENS), want, rtol=0, atol=1e-4)
    again, _, _ = out_again(tmp_path / "hf", tmp_path, capsys)
    assert type(again) is type(theirs)
    torch.testing.assert_close(again(torch.tensor([TOKENS])).logits[0], want, rtol=0, atol=1e-6)


def test_mistral_without_windows_leaves_as_llama(world, tmp_path, capsys):
    """Both compute the same then."""
    theirs = make(tmp_path / "hf", "Mistral", sliding_window=None)
    want = theirs(torch.tensor([TOKENS])).logits[0]
    torch.testing.assert_close(our_logits(imported(world, tmp_path / "hf"), TOKENS), want, rtol=0, atol=1e-4)
    again, _, _ = out_again(tmp_path / "hf", tmp_path, capsys)
    assert type(again) is transformers.LlamaForCausalLM
    assert torch.equal(again(torch.tensor([TOKENS])).logits[0], want)


def test_what_a_config_lacks_is_what_transformers_takes(tmp_path):
    for name, lacking in [
        ("Llama", ["num_key_value_heads", "head_dim", "max_position_embeddings"]),
        ("Mistral", ["num_key_value_heads", "sliding_window", "head_dim", "max_position_embeddings"]),
        ("Qwen2", ["num_key_value_heads", "max_window_layers", "sliding_window", "layer_types", "rms_norm_eps"]),
        ("Qwen3", ["num_key_value_heads", "max_window_layers", "sliding_window", "layer_types", "head_dim"]),
    ]:
        directory = tmp_path / name
        shape = dict(num_attention_heads=32, num_key_value_heads=32, hidden_size=64, num_hidden_layers=30)
        make(directory, name, **shape)
        change_config(directory, *lacking, **({"use_sliding_window": True} if "Qwen" in name else {}))
        theirs = transformers.AutoConfig.from_pretrained(directory)
        spec = import_weights.open_source(directory)[1]
        ours = spec.config
        assert (ours.num_kv_heads, ours.norm_eps) == (theirs.num_key_value_heads, theirs.rms_norm_eps)
        assert ours.head_dim == (getattr(theirs, "head_dim", None) or 2), name
        assert spec.max_positions == theirs.max_position_embeddings
        types = getattr(theirs, "layer_types", None) or ["sliding_attention" if name == "Mistral" else "full_attention"]
        letters = ours.layer_pattern * (30 // len(ours.layer_pattern))
        assert letters == "".join(kind[0].upper() for kind in types) * (30 // len(types))
        assert ours.window_tokens == (4096 if "S" in letters else 1024)


def logits_on_a_rank(location, root, tensor, context, zero):
    """Rows of this rank and their logits, by the engine of a run that begins with `location`."""
    from train import build
    from train.distributed import groups

    config = train_config(location, root, zero)
    parallel = dataclasses.replace(config.parallel, tensor=tensor, context=context)
    config = dataclasses.replace(config, parallel=parallel)
    world = groups.initialize(config.parallel, torch.device("cpu"))
    engine = build.build_engine(config, world)
    said = import_weights.initialise(engine, world, config)
    pack, tokens = make_layout([len(LONG)], config.model.chunk_size, 1, 0), torch.tensor(LONG)
    rows = torch.arange(len(LONG))
    if context > 1:
        pack = ShardedLayout(pack, world.context_group.rank(), context)
        tokens, rows = (torch.from_numpy(pack.rows(x.numpy())) for x in (tokens, rows))
    with torch.no_grad():
        logits = engine(tokens, tokens, pack, lambda model, given, labels, layout: model.logits(given, layout))
    return said, rows, logits


@pytest.mark.parametrize("ranks, tensor, context, zero", [(2, 2, 1, 1), (2, 1, 2, 1), (2, 1, 1, 3)])
@pytest.mark.parametrize("which", ["Llama", "Mistral", "Qwen2, tied, windows above"])
def test_every_layout_computes_the_logits_of_transformers(tmp_path, which, ranks, tensor, context, zero):
    name, changes, _ = MODELS[which]
    theirs = make(tmp_path / "hf", name, **changes)
    want = theirs(torch.tensor([LONG])).logits[0].detach()
    seen = set()
    for said, rows, logits in run_on_ranks(
        ranks, logits_on_a_rank, f"hf:{tmp_path}/hf", str(tmp_path), tensor, context, zero
    ):
        assert f"{name}ForCausalLM" in said
        torch.testing.assert_close(logits, want[rows], rtol=0, atol=1e-4)
        seen |= set(rows.tolist())
    assert len(seen) == len(LONG)


def test_new_summary_biases_are_copies(tmp_path):
    make(tmp_path / "hf", "Qwen2")
    tensors, source = import_weights.open_source(tmp_path / "hf")
    model = dataclasses.replace(source.config, layer_pattern="KKKF")
    weights = import_weights.Weights(tensors, source, model)
    held = load_file(tmp_path / "hf/model.safetensors")
    for ours, theirs in [("query", "q"), ("key", "k"), ("value", "v")]:
        want = held[f"model.layers.1.self_attn.{theirs}_proj.bias"]
        assert want.abs().max() > 0.1
        assert torch.equal(weights.whole(f"blocks.1.attention.summary_{ours}.bias"), want)
        assert torch.equal(weights.whole(f"blocks.1.attention.{ours}.bias"), want)


def test_a_run_goes_on_from_qwen2(tmp_path, corpus):
    """Two tensor ranks, a hybrid pattern: biases are trained and saved, and the run goes on with them."""
    from tests.train.runs import run_training

    make(tmp_path / "hf", "Qwen2", vocab_size=512, num_hidden_layers=2, head_dim=16)
    add_tokenizer(tmp_path / "hf", corpus)
    changes = dict(
        model__hidden_size=32, model__num_layers=2, model__num_kv_heads=2, model__head_dim=16, model__ffn_size=48,
        model__vocab_size=512, model__layer_pattern="KF", model__qk_norm=False, model__qkv_bias=True,
        init_from=f"hf:{tmp_path}/hf", run__steps=3, run__stop_at_step=2, parallel__tensor=2,
    )  # fmt: skip
    run_on_ranks(2, run_training, str(corpus), str(tmp_path), changes)
    held = load_file(tmp_path / "hf/model.safetensors")
    tensors = import_weights.RunTensors(export.open_run(tmp_path / "default").checkpoint)
    for name in ("q_proj", "k_proj_summary", "v_proj"):
        name = f"model.layers.0.self_attn.{name}.bias"
        got, want = tensors.read(name, (0,), tensors.shape(name)), held[name.replace("_summary", "")]
        assert 0 < (got - want).abs().max() < 0.1, name
    more = run_on_ranks(
        1, run_training, str(corpus), str(tmp_path), changes | dict(run__stop_at_step=None, parallel__tensor=1)
    )
    assert more[0][-1]["step"] == 3


# -- our own models, and what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes, name",
    [
        (dict(layer_pattern="F", qk_norm=False), "Llama"),
        (dict(layer_pattern="F", qk_norm=False, num_heads=6, head_dim=16), None),  # 32 features for 6 heads
        (dict(layer_pattern="S", qk_norm=False), "Mistral"),
        (dict(layer_pattern="F", qk_norm=False, qkv_bias=True), "Qwen2"),
        (dict(layer_pattern="FFSS", qk_norm=False, qkv_bias=True), "Qwen2"),
        (dict(layer_pattern="FSSS"), "Qwen3"),
        (dict(layer_pattern="SSSF"), None),
        (dict(layer_pattern="SSSF", qk_norm=False), None),
        (dict(layer_pattern="FSSS", qk_norm=False), None),
        (dict(layer_pattern="F", qkv_bias=True), None),
        (dict(layer_pattern="F", qk_norm=False, rotate_full_layers=False), None),
        (dict(layer_pattern="S", qk_norm=False, rotate_full_layers=False), "Mistral"),
        (dict(layer_pattern="C", qk_norm=False), None),
    ],
    ids=str,
)
def test_the_class_of_an_export_computes_our_model(world, tmp_path, capsys, changes, name):
    decoder = make_run(world, tmp_path / "run", small_config(**changes))
    code, said = run_command(export_command, tmp_path / "run", f"out={tmp_path}/out", "dtype=fp32", capsys=capsys)
    assert code == 0, said
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=name is None)
    assert type(theirs).__name__ == f"{name or 'Ksa'}ForCausalLM"
    with torch.no_grad():
        got = theirs.eval()(torch.tensor([TOKENS])).logits[0]
    torch.testing.assert_close(got, our_logits(decoder, TOKENS), rtol=0, atol=1e-4)
    back = imported(world, tmp_path / "out", vocab_multiple=16)
    assert torch.equal(our_logits(back, TOKENS), our_logits(decoder, TOKENS))


REFUSED = {
    "Llama": [
        (dict(attention_bias=True), "attention_bias=True, and this project supports only False: the output projection"),
        (dict(mlp_bias=True), "mlp_bias=True: biases in the MLP"),
        (dict(hidden_act="gelu"), "hidden_act='gelu', and this project supports only 'silu'"),
        (dict(partial_rotary_factor=0.5), "for all features of a head"),
        (dict(rope_parameters=dict(rope_type="dynamic", factor=2.0)), "supported are rope_type default, linear"),
        (dict(final_logit_softcapping=30.0), "final_logit_softcapping=30.0: a soft-cap on logits"),
        (dict(num_local_experts=8), "num_local_experts=8: experts"),
        (dict(layer_norm_eps=1e-5), "layer_norm_eps=1e-05: a LayerNorm"),
        (dict(num_key_value_heads=3), "model.num_heads=4 is not a multiple of model.num_kv_heads=3"),
        (dict(num_attention_heads=5, head_dim=None), "hidden_size=32, which num_attention_heads=5 does not divide"),
        (dict(sliding_window=9), "sliding_window=9, and LlamaForCausalLM has no windows; set it to null"),
        (dict(model_type="mistral"), "architectures=LlamaForCausalLM and model_type=mistral"),
        (dict(architectures=["LlamaForSequenceClassification"]), "architectures=LlamaForSequenceClassification"),
    ],
    "Mistral": [
        (dict(sliding_window="9"), "sliding_window='9', which must be a whole number"),
        (dict(use_sliding_window=False), "every layer of MistralForCausalLM has a window with sliding_window=9"),
        (dict(layer_types=["full_attention"] * 4), "every layer of MistralForCausalLM has a window"),
    ],
    "Qwen2": [
        (dict(layer_types=["sliding_attention"] * 4), "which contradict each other"),
        (dict(layer_types=["full_attention"] * 3), "must be a list of 4 names, each one of full_attention"),
        (dict(layer_types=["full_attention"] * 3 + ["linear_attention"]), "must be a list of 4 names"),
        (dict(use_sliding_window="true"), "use_sliding_window='true', which must be true or false"),
        (dict(use_sliding_window=True, sliding_window=9, layer_types=None, max_window_layers="2"), "max_window_layers"),
    ],
}


@pytest.mark.parametrize(
    "name, changes, message", [(name, *one) for name, all_of in REFUSED.items() for one in all_of], ids=str
)
def test_what_is_not_computed_is_refused_by_name(tmp_path, capsys, name, changes, message):
    make(tmp_path / "hf", name, **({"sliding_window": 9} if name == "Mistral" else {}))
    change_config(tmp_path / "hf", **changes)
    code, said = run_command(import_command, tmp_path / "hf", f"out={tmp_path}/run", capsys=capsys)
    assert code == 2 and message in said and len(said.strip().splitlines()) == 1, said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name, added, lost", [
    ("Llama", "model.layers.0.self_attn.o_proj.bias", None),
    ("Llama", "model.layers.0.mlp.up_proj.bias", None),
    ("Llama", "model.layers.0.self_attn.q_proj.bias", None),
    ("Mistral", "model.layers.2.input_layernorm.bias", None),
    ("Qwen2", "model.layers.0.self_attn.o_proj.bias", None),
    ("Qwen2", None, "model.layers.3.self_attn.k_proj.bias"),
    ("Qwen2", "model.layers.3.self_attn.q_norm.weight", None),
])  # fmt: skip
def test_tensors_of_other_models_are_named(tmp_path, capsys, name, added, lost):
    make(tmp_path / "hf", name)
    tensors = load_file(tmp_path / "hf/model.safetensors")
    changed = {n: t for n, t in tensors.items() if n != lost} | ({added: torch.ones(8)} if added else {})
    save_file(changed, tmp_path / "hf/model.safetensors")
    code, said = run_command(import_command, tmp_path / "hf", f"out={tmp_path}/run", capsys=capsys)
    assert code == 2 and len(said.strip().splitlines()) == 1, said
    assert f"has {added}" in said if added else f"lacks {lost}" in said


def test_biases_are_part_of_the_shape(tmp_path, capsys):
    make(tmp_path / "hf", "Qwen2")
    code, said = run_command(import_command, tmp_path / "hf", f"out={tmp_path}/run", "qkv_bias=false", capsys=capsys)
    assert code == 2 and "qkv_bias is True, not False; set model.qkv_bias=true" in said
    code, said = run_command(import_command, tmp_path / "hf", capsys=capsys)
    assert code == 0 and "model.qkv_bias=true" in said and "model.qk_norm=false" in said
