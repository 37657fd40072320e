"""In from Qwen3 and published KSA checkpoints, out to transformers: logits, tokens and bits."""

import json
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
import torch

transformers = pytest.importorskip("transformers")
from safetensors import safe_open  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

from ksa_model.config import ModelConfig, RopeScaling  # noqa: E402
from ksa_model.decoding.generate import Sampling, generate  # noqa: E402
from ksa_model.layers.tensor_parallel import TensorParallel  # noqa: E402
from ksa_model.model import Decoder  # noqa: E402
from tests.ksa_model.test_model import small_config  # noqa: E402
from tests.ranks import run_on_ranks  # noqa: E402
from tests.train.hf.interop import (  # noqa: E402
    PUBLISHED,
    TOKENS,
    add_tokenizer,
    imported,
    make_qwen,
    make_run,
    our_logits,
    run_command,
    spread,
)
from train import export as export_command  # noqa: E402
from train import import_hf as import_command  # noqa: E402
from train.checkpoint import loading  # noqa: E402
from train.config.conversion import from_mapping  # noqa: E402
from train.hf import export, import_weights  # noqa: E402

# -- Qwen3 ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_qwen3_comes_in_and_goes_out_unchanged(world, tmp_path, capsys, tied):
    theirs = make_qwen(tmp_path / "qwen", tied)
    want = theirs(torch.tensor([TOKENS])).logits[0]
    got = our_logits(imported(world, tmp_path / "qwen"), TOKENS)
    assert want.std() > 0.1
    torch.testing.assert_close(got, want, rtol=0, atol=1e-4)
    code, said = run_command(import_command, tmp_path / "qwen", f"out={tmp_path}/run", capsys=capsys)
    assert code == 0, said
    code, said = run_command(export_command, tmp_path / "run", f"out={tmp_path}/out", "dtype=fp32", capsys=capsys)
    assert code == 0, said
    assert not (tmp_path / "out/modeling_ksa.py").exists()
    assert_same_files(tmp_path / "qwen", tmp_path / "out")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(again) is transformers.Qwen3ForCausalLM
    assert torch.equal(again(torch.tensor([TOKENS])).logits[0], want)


# Positions of the checkpoint: 16 times 16, most of which TOKENS reach.
SCALED = {
    "linear": dict(rope_type="linear", factor=4.0),
    "yarn": dict(rope_type="yarn", factor=16.0, original_max_position_embeddings=16),
    "yarn, its own": dict(rope_type="yarn", factor=16.0, original_max_position_embeddings=16, beta_fast=4.0,
                          beta_slow=0.5, attention_factor=1.5),
    "llama3": dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                   original_max_position_embeddings=16),
}  # fmt: skip


@pytest.mark.parametrize("scaling", SCALED.values(), ids=SCALED)
def test_qwen3_with_scaled_positions_comes_in_and_goes_out(world, tmp_path, capsys, scaling):
    theirs = make_qwen(tmp_path / "qwen", tied=True, rope_scaling=dict(scaling))
    want = theirs(torch.tensor([TOKENS])).logits[0]
    got = our_logits(imported(world, tmp_path / "qwen"), TOKENS)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-4)
    plain = our_logits(imported(world, tmp_path / "qwen", rope_scaling=None), TOKENS)
    assert (plain - want).abs().max() > 0.1, "positions that nobody scales would pass as well"
    code, said = run_command(import_command, tmp_path / "qwen", f"out={tmp_path}/run", capsys=capsys)
    assert code == 0, said
    code, said = run_command(export_command, tmp_path / "run", f"out={tmp_path}/out", "dtype=fp32", capsys=capsys)
    assert code == 0, said
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(again) is transformers.Qwen3ForCausalLM
    torch.testing.assert_close(again(torch.tensor([TOKENS])).logits[0], want, rtol=0, atol=1e-6)


def test_ntk_leaves_as_a_larger_base(world, tmp_path, capsys):
    config = small_config(layer_pattern="F", rope_scaling=RopeScaling("ntk", 8.0))
    decoder = make_run(world, tmp_path / "run", config)
    code, said = run_command(export_command, tmp_path / "run", f"out={tmp_path}/out", "dtype=fp32", capsys=capsys)
    assert code == 0, said
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(theirs(torch.tensor([TOKENS])).logits[0], our_logits(decoder, TOKENS), rtol=0, atol=1e-4)


def test_settings_that_fit_are_overrides_that_hydra_reads(tmp_path, capsys):
    from hydra.core.override_parser.overrides_parser import OverridesParser

    make_qwen(tmp_path / "qwen", tied=True, rope_scaling=dict(SCALED["yarn"]))
    code, said = run_command(import_command, tmp_path / "qwen", capsys=capsys)
    assert code == 0, said
    parsed = OverridesParser.create().parse_overrides(shlex.split(said))
    values = {o.key_or_group.removeprefix("model."): o.value() for o in parsed}
    model = from_mapping(ModelConfig, values, "model.")
    assert model == import_weights.open_source(tmp_path / "qwen")[1].config


def assert_same_files(one, other):
    before, after = load_file(one / "model.safetensors"), load_file(other / "model.safetensors")
    assert before.keys() == after.keys()
    for name in before:
        assert torch.equal(before[name], after[name]), name


def train_config(location, root, zero, precision="fp32", **changes):
    from tests.train.runs import make_config

    _, source = import_weights.open_source(location.removeprefix("hf:"))
    model = {name: getattr(source.config, name) for name in source.config.__dataclass_fields__} | changes
    config = make_config(Path("corpus.jsonl"), Path(root), init_from=location, parallel__zero=zero)
    import dataclasses

    run = dataclasses.replace(config.run, precision=precision)
    return dataclasses.replace(config, model=type(source.config)(**model), run=run)


def initialise_on_a_rank(location, root, tensor, zero, precision, changes=None):
    """Build an engine, fill it from `location`, save it as a run's checkpoint; returns this rank's logits."""
    import dataclasses

    from train import build
    from train.checkpoint import storage
    from train.checkpoint.manager import Checkpoints, Progress
    from train.checkpoint.storage import CheckpointPath
    from train.config.conversion import to_mapping
    from train.config.sections import CheckpointConfig
    from train.distributed import groups

    config = train_config(location, root, zero, precision, **(changes or {}))
    config = dataclasses.replace(config, parallel=dataclasses.replace(config.parallel, tensor=tensor))
    world = groups.initialize(config.parallel, torch.device("cpu"))
    engine = build.build_engine(config, world)
    said = import_weights.initialise(engine, world, config)
    run = Path(root) / config.run.name
    saver = Checkpoints(CheckpointPath(run / "checkpoints"), engine, world, CheckpointConfig(), log=print)
    saver.save_last(Progress(0, 0, {}), {"config": to_mapping(config)})
    if world.is_main:
        import yaml

        (run / "config.yaml").write_text(yaml.safe_dump(to_mapping(config)))
    logits = None if zero == 3 else our_logits(engine.module, TOKENS)
    assert storage.finished(run / "checkpoints")
    return said, logits


@pytest.mark.parametrize(
    "ranks, tensor, zero, precision", [(2, 2, 1, "fp32"), (2, 1, 3, "fp32"), (4, 2, 2, "bf16"), (2, 1, 0, "fp32")]
)
def test_every_layout_begins_with_the_same_weights(tmp_path, capsys, ranks, tensor, zero, precision):
    theirs = make_qwen(tmp_path / "qwen", tied=False)
    arguments = f"hf:{tmp_path}/qwen", str(tmp_path), tensor, zero, precision
    want = theirs(torch.tensor([TOKENS])).logits[0].detach()
    for said, logits in run_on_ranks(ranks, initialise_on_a_rank, *arguments):
        assert "Qwen3ForCausalLM" in said
        if logits is not None and precision == "fp32":
            torch.testing.assert_close(logits, want, rtol=0, atol=1e-4)
        elif logits is not None:  # the weights that compute have followed
            assert (logits.float() - want).norm() < 0.1 * want.norm()
    code, said = run_command(export_command, tmp_path / "default", f"out={tmp_path}/out", "dtype=fp32", capsys=capsys)
    assert code == 0, said
    assert_same_files(tmp_path / "qwen", tmp_path / "out")


def test_another_rotation_than_the_checkpoints_is_noted(tmp_path):
    make_qwen(tmp_path / "qwen", tied=True)
    changes = dict(layer_pattern="KF", rotate_far=False, rotate_full_layers=False, rope_base=500.0)
    arguments = f"hf:{tmp_path}/qwen", str(tmp_path), 1, 1, "fp32", changes
    ((said, _),) = run_on_ranks(1, initialise_on_a_rank, *arguments)
    assert said.endswith(
        "Qwen3ForCausalLM; model.rope_base=500.0 here, 12345.0 there; model.rotate_far=False here, True there; "
        "model.rotate_full_layers=False here, True there"
    )


def test_a_teacher_keeps_the_rotation_of_its_weights(tmp_path):
    import dataclasses

    from train.config.errors import ConfigError
    from train.config.stage import StageConfig

    make_qwen(tmp_path / "qwen", tied=True)
    for far, full, refused in ((False, True, False), (True, False, True)):
        changes = dict(layer_pattern="KF", rotate_far=far, rotate_full_layers=full)
        config = train_config(f"hf:{tmp_path}/qwen", tmp_path, 1, **changes)
        import_weights.check(config)  # all weights are trained
        config = dataclasses.replace(config, stage=StageConfig("distill"))
        if not refused:
            import_weights.check(config)
            continue
        with pytest.raises(ConfigError, match=r"model.rotate_full_layers=false gives .* than hf:.*: set model.rotate_"):
            import_weights.check(config)


def test_training_goes_on_from_qwen3(tmp_path, corpus):
    """The trainer's own way: weights at step 0, and not again where the run resumes."""
    from tests.train.runs import run_training

    make_qwen(tmp_path / "qwen", tied=True, vocab_size=512, num_hidden_layers=2)
    tokenizer = add_tokenizer(tmp_path / "qwen", corpus)
    changes = dict(
        model__hidden_size=32, model__num_layers=2, model__num_kv_heads=2, model__head_dim=16, model__ffn_size=48,
        model__vocab_size=512, model__layer_pattern="KF", model__tie_embeddings=True,
        init_from=f"hf:{tmp_path}/qwen", run__steps=2, run__stop_at_step=1, optim__lr=1e-12,
    )  # fmt: skip
    records = run_on_ranks(2, run_training, str(corpus), str(tmp_path), changes | dict(parallel__tensor=2))[0]
    assert (tmp_path / "default/tokenizer.model").read_bytes() == tokenizer.read_bytes()
    tensors = import_weights.RunTensors(export.open_run(tmp_path / "default").checkpoint)
    held = load_file(tmp_path / "qwen/model.safetensors")
    name = "model.layers.0.self_attn.q_proj"
    for got, want in [(name, name), (f"{name}_summary", None)]:
        if got in [n.removesuffix(".weight") for n in tensors.names()]:
            want = want or name
            torch.testing.assert_close(
                tensors.read(f"{got}.weight", (0, 0), tensors.shape(f"{got}.weight")), held[f"{want}.weight"]
            )
    mean = held["model.embed_tokens.weight"].mean(0, keepdim=True)
    torch.testing.assert_close(tensors.read("model.summary_embedding.weight", (0, 0), (1, 32)), mean)
    more = run_on_ranks(1, run_training, str(corpus), str(tmp_path), changes | dict(run__stop_at_step=None))[0]
    assert len(more) > len(records) and more[0]["loss"] == records[0]["loss"]


def test_an_imported_run_is_inherited(tmp_path, corpus, capsys):
    """What `train.import_hf` writes serves `init_from`, and a stage that trains the summaries alone keeps the rest."""
    from tests.train.runs import run_training

    make_qwen(tmp_path / "qwen", tied=True, vocab_size=512, num_hidden_layers=2)
    tokenizer = add_tokenizer(tmp_path / "qwen", corpus)
    code, said = run_command(import_command, tmp_path / "qwen", f"out={tmp_path}/imported", capsys=capsys)
    assert code == 0, said
    held = load_file(tmp_path / "qwen/model.safetensors")
    changes = dict(
        model__hidden_size=32, model__num_layers=2, model__num_kv_heads=2, model__head_dim=16, model__ffn_size=48,
        model__vocab_size=512, model__layer_pattern="KF", model__tie_embeddings=True, run__steps=2,
        stage__kind="distill",
    )  # fmt: skip
    found = []
    for name, location in [("direct", f"hf:{tmp_path}/qwen"), ("inherited", f"{tmp_path}/imported")]:
        given = changes | dict(init_from=location, run__name=name)
        records = run_on_ranks(1, run_training, str(corpus), str(tmp_path), given)[0]
        run = export.open_run(tmp_path / name)
        tensors = import_weights.RunTensors(run.checkpoint)
        for theirs, tensor in held.items():
            assert torch.equal(tensors.read(theirs, [0] * tensor.ndim, tensor.shape), tensor), theirs
        assert "stage" in run.state["config"]
        assert run.tokenizer is not None and run.tokenizer.read_bytes() == tokenizer.read_bytes()
        found.append(records[0])
    assert all("loss" in record for record in found)


def test_new_summary_parameters_are_copies(world, tmp_path):
    make_qwen(tmp_path / "qwen", tied=True)
    held = load_file(tmp_path / "qwen/model.safetensors")
    tensors, source = import_weights.open_source(tmp_path / "qwen")
    model = small_config(
        hidden_size=32, num_layers=4, head_dim=16, ffn_size=48, vocab_size=151, layer_pattern="KKKF",
        tie_embeddings=True, summary_tokens=2,
    )  # fmt: skip
    weights = import_weights.Weights(tensors, source, model)
    for ours, theirs in [("query", "q"), ("key", "k"), ("value", "v")]:
        want = held[f"model.layers.0.self_attn.{theirs}_proj.weight"]
        assert torch.equal(weights.whole(f"blocks.0.attention.summary_{ours}.weight"), want)
    embedding = held["model.embed_tokens.weight"]
    torch.testing.assert_close(weights.whole("summary_embedding"), embedding.mean(0).expand(2, -1))
    named = import_weights.Weights(tensors, source, model, summary_row=17)
    assert torch.equal(named.whole("summary_embedding"), embedding[17].expand(2, -1))
    padded = weights.whole("embedding.weight")
    assert torch.equal(padded[:151], embedding) and len(padded) == 160 and not padded[151:].any()


# -- our own models in transformers -----------------------------------------------------------------------------------

MODELS = {
    "KKKF": dict(),
    "K tied, m=2": dict(layer_pattern="K", summary_tokens=2, tie_embeddings=True, window_chunks=2),
    "KSCF, shared q/k/v": dict(layer_pattern="KSCF", independent_qkv=False, chunk_size=3, window_chunks=0),
    "KFKS, full layers pass summaries by": dict(
        layer_pattern="KFKS", full_layers_update_summaries=False, window_chunks=(1, 0, 3, 0)
    ),
    "k=1": dict(chunk_size=1, window_chunks=5),
    "no norm of q and k": dict(layer_pattern="F", qk_norm=False),
    "linear": dict(rope_scaling=RopeScaling("linear", 4.0)),
    "ntk": dict(rope_scaling=RopeScaling("ntk", 4.0)),
    "yarn": dict(rope_scaling=RopeScaling("yarn", 8.0, 16), summary_tokens=2),
    "llama3": dict(rope_scaling=RopeScaling("llama3", 8.0, 16)),
    "KKKF, no RoPE far": dict(rotate_far=False, rope_scaling=RopeScaling("yarn", 8.0, 16)),
    "KKKF, no RoPE in full layers": dict(rotate_full_layers=False, qk_norm=False),
    "KKKF, neither": dict(rotate_far=False, rotate_full_layers=False, window_chunks=2),
    "K m=2, no RoPE far": dict(layer_pattern="K", summary_tokens=2, rotate_far=False, window_chunks=0),
    "KSCF, shared q/k/v, no RoPE far": dict(
        layer_pattern="KSCF", independent_qkv=False, chunk_size=3, window_chunks=0, rotate_far=False
    ),
    "KSCF, no RoPE in full layers": dict(layer_pattern="KSCF", chunk_size=3, rotate_full_layers=False),
    "KSCF, neither": dict(layer_pattern="KSCF", chunk_size=3, rotate_far=False, rotate_full_layers=False),
    "FKKS, neither": dict(layer_pattern="FKKS", summary_tokens=2, rotate_far=False, rotate_full_layers=False),
    "F, no RoPE": dict(layer_pattern="F", rotate_full_layers=False, rope_scaling=RopeScaling("yarn", 8.0, 16)),
}


@pytest.mark.parametrize("changes", MODELS.values(), ids=MODELS)
def test_transformers_computes_our_model(world, tmp_path, capsys, changes):
    config = small_config(**changes)
    decoder = make_run(world, tmp_path / "run", config)
    code, said = run_command(export_command, tmp_path / "run", f"out={tmp_path}/out", "dtype=fp32", capsys=capsys)
    assert code == 0, said
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True).eval()
    assert type(theirs).__name__ == "KsaForCausalLM" and theirs.dtype == torch.float32
    generator = torch.Generator().manual_seed(2)
    k = config.chunk_size
    prompts = [torch.randint(0, 61, (n,), generator=generator).tolist() for n in sorted({1, k, k + 1, 6 * k + 2, 33})]
    with torch.no_grad():
        for prompt in prompts:
            got = theirs(torch.tensor([prompt])).logits[0]
            torch.testing.assert_close(got, our_logits(decoder, prompt), rtol=0, atol=1e-4)
        tokens, mask = padded(prompts)
        got = theirs(tokens, attention_mask=mask).logits
        right = theirs(
            *(torch.stack([x.roll(len(p)) for x, p in zip(both, prompts)]) for both in (tokens, mask))
        ).logits
    for row, other, prompt in zip(got, right, prompts):
        want = our_logits(decoder, prompt)
        torch.testing.assert_close(row[-len(prompt) :], want, rtol=0, atol=1e-4)
        torch.testing.assert_close(other[: len(prompt)], want, rtol=0, atol=1e-4)
    want, _ = generate(decoder, prompts, Sampling(max_tokens=40))
    settings = dict(max_new_tokens=40, do_sample=False, pad_token_id=0)
    said = theirs.generate(tokens, attention_mask=mask, **settings)
    assert said[:, tokens.shape[1] :].tolist() == want
    slow = theirs.generate(tokens[-1:], use_cache=False, **settings)
    assert slow[0, tokens.shape[1] :].tolist() == want[-1]
    assert len({token for one in want for token in one}) >= 4, "a model that repeats itself would prove nothing"


def padded(prompts):
    """Left padding, as decoders are asked for in batches."""
    width = max(map(len, prompts))
    tokens = torch.tensor([[0] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    return tokens, mask


@pytest.mark.parametrize("rotates", [True, False], ids=["", "no RoPE far and in full layers"])
def test_generation_of_every_kind(world, tmp_path, capsys, rotates):
    """Beams reorder the cache; a second turn feeds several new columns to it; it is as small as ours."""
    config = small_config(num_layers=8, rotate_far=rotates, rotate_full_layers=rotates)
    decoder = make_run(world, tmp_path / "run", config)
    run_command(export_command, tmp_path / "run", f"out={tmp_path}/out", "dtype=fp32", capsys=capsys)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True).eval()
    prompt = torch.tensor([[5, 9, 11, 2, 7]])
    settings = dict(max_new_tokens=20, do_sample=False, pad_token_id=0, num_beams=3)
    blocks = torch.randint(0, 61, (1, 1100), generator=torch.Generator().manual_seed(4))  # several of query rows
    with torch.no_grad():
        torch.testing.assert_close(theirs(blocks).logits[0], our_logits(decoder, blocks[0].tolist()), rtol=0, atol=1e-4)
    beams = theirs.generate(prompt, **settings)
    assert torch.equal(beams, theirs.generate(prompt, use_cache=False, **settings))
    with torch.no_grad():
        first = theirs(prompt)
        rest = theirs(
            torch.tensor([[3, 4, 5, 6, 7, 8]]), past_key_values=getattr(first, "cache", None) or first.past_key_values
        ).logits[0]
    torch.testing.assert_close(rest, our_logits(decoder, [5, 9, 11, 2, 7, 3, 4, 5, 6, 7, 8])[5:], rtol=0, atol=1e-4)
    held = theirs.generate(prompt, max_new_tokens=400, do_sample=False, return_dict_in_generate=True)
    cache = getattr(held, "cache", None) or held.past_key_values
    ours = generate(decoder, prompt.tolist(), Sampling(max_tokens=400))[1].allocated_bytes
    assert ours * 0.9 < cache.bytes() < ours * 1.15
    loss = theirs(prompt, labels=prompt).loss
    want = torch.nn.functional.cross_entropy(our_logits(decoder, prompt[0].tolist())[:-1], prompt[0, 1:])
    torch.testing.assert_close(loss, want)


@pytest.mark.parametrize("qk_norm", [True, False])
def test_an_export_amid_annealing_computes_what_the_run_computes(world, tmp_path, capsys, qk_norm):
    decoder = make_run(world, tmp_path / "run", small_config(qk_norm=qk_norm), own_share=0.4)
    run_command(export_command, tmp_path / "run", f"out={tmp_path}/out", "dtype=fp32", capsys=capsys)
    assert json.loads((tmp_path / "out/config.json").read_text()).get("mix_coeff") == (0.4 if qk_norm else None)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True).eval()
    whole = our_logits(decoder, TOKENS)
    decoder.anneal(0.4)
    want = our_logits(decoder, TOKENS)
    assert (whole - want).abs().max() > 0.1
    torch.testing.assert_close(theirs(torch.tensor([TOKENS])).logits[0], want, rtol=0, atol=1e-4)
    settings = dict(max_new_tokens=40, do_sample=False, pad_token_id=0)
    said = theirs.generate(torch.tensor([TOKENS[:9]]), **settings)[0, 9:].tolist()
    assert said == generate(decoder, [TOKENS[:9]], Sampling(max_tokens=40))[0][0]
    back = imported(world, tmp_path / "out")
    torch.testing.assert_close(our_logits(back, TOKENS), want, rtol=0, atol=1e-5)
    arguments = f"out={tmp_path}/weights", "format=safetensors", "dtype=fp32"
    run_command(export_command, tmp_path / "run", *arguments, capsys=capsys)
    held = load_file(tmp_path / "weights/model.safetensors")
    own = decoder.blocks[0].attention.summary_key.weight
    assert torch.equal(held["blocks.0.attention.summary_key.weight"], own) == qk_norm
    with safe_open(tmp_path / "weights/model.safetensors", "pt") as file:
        assert file.metadata().get("mix_coeff") == ("0.4" if qk_norm else None)


@pytest.mark.parametrize("changes", [dict(), dict(rotate_far=False), dict(rotate_full_layers=False)], ids=str)
def test_an_export_comes_back(world, tmp_path, capsys, changes):
    decoder = make_run(world, tmp_path / "run", small_config(window_chunks=(1, 2, 1, 0), **changes))
    for name, arguments in [("one", []), ("bf16", ["dtype=bf16"])]:
        run_command(
            export_command, tmp_path / "run", f"out={tmp_path}/{name}", *(arguments or ["dtype=fp32"]), capsys=capsys
        )
    back = imported(world, tmp_path / "one", vocab_multiple=16)
    for (name, p), (_, want) in zip(back.named_parameters(), decoder.named_parameters(), strict=True):
        if "embedding.weight" in name or "head" in name:
            p, want = p[:61], want[:61]
        assert torch.equal(p, want), name
    assert torch.equal(our_logits(back, TOKENS), our_logits(decoder, TOKENS))
    code, said = run_command(
        import_command, tmp_path / "one", f"out={tmp_path}/back", "vocab_multiple=16", capsys=capsys
    )
    assert code == 0, said
    assert export.open_run(tmp_path / "back").config.model == decoder.config
    half = load_file(tmp_path / "bf16/model.safetensors")
    assert half["model.norm.weight"].dtype == torch.bfloat16
    assert torch.equal(half["model.norm.weight"], decoder.norm.weight.bfloat16())


# -- published KSA checkpoints ----------------------------------------------------------------------------------------


def publish(world, directory, mix=1.0, own_row=True, **changes):
    """Our model under the published names and keys, as such a checkpoint would hold it; returns the model."""
    from ksa_model.hf.naming import hf_name

    directory.mkdir()
    torch.manual_seed(3)
    decoder = spread(Decoder(small_config(num_layers=8, independent_qkv=mix > 0), TensorParallel(world.tensor_group)))
    tensors = {hf_name(name): p.detach().clone() for name, p in decoder.named_parameters()}
    summary = tensors.pop("model.summary_embedding.weight")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = torch.cat([tensors[name][:61], torch.randn(1, 32)])
    if own_row:
        tensors["summary_embedding.weight"] = summary
    else:
        tensors["model.embed_tokens.weight"][61] = summary[0]
    if 0 < mix < 1:
        decoder.anneal(mix)  # `tests/ksa_model/objectives/test_annealing.py` compares this with the published rule
    for layer in (6, 7):  # they keep projections that nobody reads
        tensors[f"model.layers.{layer}.self_attn.q_proj_summary.weight"] = torch.randn(32, 32)
    save_file({name: t.contiguous() for name, t in tensors.items()}, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(PUBLISHED | dict(mix_coeff=mix) | changes))
    return decoder


@pytest.mark.parametrize("mix, own_row", [(1.0, True), (0.25, True), (0, False)])
def test_published_names_and_keys(world, tmp_path, mix, own_row):
    decoder = publish(world, tmp_path / "published", mix, own_row)
    _, source = import_weights.open_source(tmp_path / "published")
    found = source.config
    assert (found.layer_pattern, found.window_chunks, found.chunk_size, found.vocab_size) == ("KKKF", 1, 4, 61)
    assert found.independent_qkv == (mix > 0) and found.full_layers_update_summaries
    back = imported(world, tmp_path / "published")
    torch.testing.assert_close(our_logits(back, TOKENS[:40]), our_logits(decoder, TOKENS[:40]), rtol=0, atol=1e-4)


def test_a_published_checkpoint_amid_annealing_is_computed_and_not_trained(world, tmp_path, corpus, capsys):
    from tests.train.runs import make_config
    from train.config.errors import ConfigError
    from train.start import find_start

    decoder = publish(world, tmp_path / "published", 0.25)
    code, said = run_command(import_command, tmp_path / "published", f"out={tmp_path}/run", capsys=capsys)
    assert code == 0 and "from the middle of annealing (mix_coeff=0.25), so no run can begin with it" in said
    run = export.open_run(tmp_path / "run")
    back = Decoder(run.config.model, decoder.tp).eval()
    loading.load_weights(run.checkpoint, back, world)
    back.anneal(run.state["own_share"])
    torch.testing.assert_close(our_logits(back, TOKENS), our_logits(decoder, TOKENS), rtol=0, atol=1e-4)

    def config(**changes):
        config = make_config(corpus, tmp_path / "runs", **changes)
        return replace(config, model=run.config.model, data=replace(config.data, tokenizer=None))

    for changes, message in (
        (dict(init_from=f"hf:{tmp_path}/published"), r"mix_coeff=0.25: it is from the middle of annealing"),
        (dict(init_from=str(tmp_path / "run")), r"with 0.25 of their own projections .* stage.kind=scratch cannot"),
        (dict(resume=str(tmp_path / "run")), r"imported from the middle of annealing \(mix_coeff=0.25\)"),
    ):
        with pytest.raises(ConfigError, match=message):
            find_start(config(**changes))
    (tmp_path / "published/config.json").write_text(json.dumps(PUBLISHED | dict(mix_coeff=1)))
    find_start(config(init_from=f"hf:{tmp_path}/published"))  # as the message says
