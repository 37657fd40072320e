"""Checkpoints whose files disagree: the choice of transformers, or a refusal that names the file."""

import json
import shutil

import pytest
import torch

transformers = pytest.importorskip("transformers")
from safetensors.torch import load_file, save_file  # noqa: E402

from tests.ksa_model.test_model import small_config  # noqa: E402
from tests.train.hf.interop import TOKENS, imported, make_qwen, make_run, our_logits, run_command  # noqa: E402
from train import export as export_command  # noqa: E402
from train import generate  # noqa: E402
from train import import_hf as import_command  # noqa: E402
from train.config.errors import ConfigError  # noqa: E402
from train.distributed.signals import BAD_INPUT  # noqa: E402
from train.hf import import_weights  # noqa: E402

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
UP = "model.layers.1.mlp.up_proj.weight"


def change_config(directory, **changes):
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def split(directory, *parts, stem="part"):
    """Spread tensors over files with an index; returns the index."""
    weight_map = {}
    for number, tensors in enumerate(parts):
        save_file(tensors, directory / f"{stem}-{number}.safetensors")
        weight_map |= dict.fromkeys(tensors, f"{stem}-{number}.safetensors")
    path = directory / "model.safetensors.index.json"
    path.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return path


def refused(directory, tmp_path, capsys, *words):
    """What every way in says about a checkpoint, in one line."""
    code, said = run_command(import_command, directory, f"out={tmp_path}/run", *words, capsys=capsys)
    assert code == BAD_INPUT and len(said.strip().splitlines()) == 1, said
    assert not (tmp_path / "run").exists()
    return said


def test_one_file_comes_before_an_index(world, tmp_path):
    """As in transformers, where both are there: the index is that of an earlier checkpoint."""
    make_qwen(tmp_path / "qwen", tied=False)
    stale = {name: torch.zeros_like(t) for name, t in load_file(tmp_path / "qwen/model.safetensors").items()}
    split(tmp_path / "qwen", stale)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "qwen").eval()
    want = theirs(torch.tensor([TOKENS])).logits[0].detach()
    assert want.std() > 0.1
    torch.testing.assert_close(our_logits(imported(world, tmp_path / "qwen"), TOKENS), want, rtol=0, atol=1e-4)


@pytest.mark.parametrize("what", ["twice", "unlisted", "text", "list", "number", "missing file", "elsewhere"])
def test_an_index_that_does_not_fit_its_files_is_refused(tmp_path, capsys, what):
    directory = tmp_path / "qwen"
    make_qwen(directory, tied=False)
    tensors = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    first = {name: t for name, t in tensors.items() if "layers.0" in name}
    second = {name: t for name, t in tensors.items() if "layers.0" not in name}
    index = split(directory, first, second)
    content = json.loads(index.read_text())
    if what == "twice":
        save_file(first | {UP: torch.zeros_like(tensors[UP])}, directory / "part-0.safetensors")
    elif what == "unlisted":
        del content["weight_map"]["model.layers.0.mlp.up_proj.weight"]
    elif what == "missing file":
        (directory / "part-1.safetensors").unlink()
    else:
        wrong = {"text": "part-0.safetensors", "list": ["part-0.safetensors"], "number": {UP: 3},
                 "elsewhere": {UP: "../x.safetensors"}}  # fmt: skip
        content["weight_map"] = wrong[what]
    index.write_text(json.dumps(content))
    expected = {
        "twice": f"part-0.safetensors holds {UP}, which the index places in part-1.safetensors",
        "unlisted": "part-0.safetensors holds model.layers.0.mlp.up_proj.weight, which the index does not list",
        "missing file": "part-1.safetensors is missing, the index names it",
        "elsewhere": "names '../x.safetensors', which is no file of tensors beside it",
    }.get(what, "model.safetensors.index.json: weight_map must name a file for each tensor")
    assert expected in refused(directory, tmp_path, capsys)


@pytest.mark.parametrize("rows", [151 + 9, 151 - 9])
@pytest.mark.parametrize("tied", [True, False])
def test_a_resized_embedding_is_refused(world, tmp_path, capsys, rows, tied):
    """transformers refuses it too; cut to the vocabulary of config.json it would lose the new tokens silently."""
    directory = tmp_path / "qwen"
    make_qwen(directory, tied=tied)
    tensors = load_file(directory / "model.safetensors")
    for name in (EMBEDDING,) if tied else (EMBEDDING, HEAD):
        tensors[name] = torch.randn(rows, 32)
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    with pytest.raises(RuntimeError, match=r"size mismatch|mismatched"):
        transformers.AutoModelForCausalLM.from_pretrained(directory)
    said = refused(directory, tmp_path, capsys)
    assert f"{EMBEDDING} has {rows} rows, and config.json has 151" in said or "is of shape" in said
    if rows > 151:
        assert f"{directory}/model.safetensors: " in said and f"set vocab_size={rows} there" in said
        change_config(directory, vocab_size=rows)
        code, said = run_command(import_command, directory, f"out={tmp_path}/run", capsys=capsys)
        assert code == 0, said


def test_a_head_of_another_size_is_refused(tmp_path, capsys):
    make_qwen(tmp_path / "qwen", tied=False)
    tensors = load_file(tmp_path / "qwen/model.safetensors")
    tensors[HEAD] = torch.randn(160, 32)
    save_file(tensors, tmp_path / "qwen/model.safetensors")
    assert f"{HEAD} has 160 rows, and config.json has 151" in refused(tmp_path / "qwen", tmp_path, capsys)


def test_a_tied_flag_with_a_head_of_its_own_is_refused(world, tmp_path, capsys):
    directory = tmp_path / "qwen"
    theirs = make_qwen(directory, tied=False)
    want = theirs(torch.tensor([TOKENS])).logits[0].detach()
    change_config(directory, tie_word_embeddings=True)
    said = refused(directory, tmp_path, capsys)
    assert f"{directory}/model.safetensors holds {HEAD}, which differs from {EMBEDDING}" in said
    with pytest.raises(ConfigError, match="tie_word_embeddings=true: set it to false"):
        imported(world, directory)
    change_config(directory, tie_word_embeddings=False)
    torch.testing.assert_close(our_logits(imported(world, directory), TOKENS), want, rtol=0, atol=1e-4)


def test_a_head_that_repeats_a_tied_embedding_is_taken(world, tmp_path):
    theirs = make_qwen(tmp_path / "qwen", tied=True)
    tensors = load_file(tmp_path / "qwen/model.safetensors")
    save_file(tensors | {HEAD: tensors[EMBEDDING].clone()}, tmp_path / "qwen/model.safetensors")
    want = theirs(torch.tensor([TOKENS])).logits[0].detach()
    torch.testing.assert_close(our_logits(imported(world, tmp_path / "qwen"), TOKENS), want, rtol=0, atol=1e-4)


def test_an_export_without_a_summary_tensor_is_damaged(world, tmp_path, capsys):
    """It had them all: a copy of the text's projections in the place of a lost one would be silent."""
    make_run(world, tmp_path / "made", small_config())
    run_command(export_command, tmp_path / "made", f"out={tmp_path}/hf", "dtype=fp32", capsys=capsys)
    lost = "model.layers.0.self_attn.k_proj_summary.weight"
    for name in (lost, "model.summary_embedding.weight"):
        directory = tmp_path / name
        shutil.copytree(tmp_path / "hf", directory)
        tensors = load_file(directory / "model.safetensors")
        del tensors[name]
        save_file(tensors, directory / "model.safetensors")
        assert f"the checkpoint lacks {name}" in refused(directory, tmp_path, capsys)


def test_tensors_without_a_place_are_named(world, tmp_path, capsys):
    make_run(world, tmp_path / "made", small_config())
    run_command(export_command, tmp_path / "made", f"out={tmp_path}/hf", "dtype=fp32", capsys=capsys)
    tensors, source = import_weights.open_source(tmp_path / "hf")
    assert import_weights.Weights(tensors, source, source.config).describe_unused() == ""
    plain = small_config(layer_pattern="F")
    said = import_weights.Weights(tensors, source, plain).describe_unused()
    assert said.startswith("; the model has no place for model.layers.0.self_attn.k_proj_summary.weight")
    code, said = run_command(import_command, tmp_path / "hf", f"out={tmp_path}/run", "layer_pattern=F", capsys=capsys)
    assert code == 0 and "the model has no place for" in said


def test_a_pickle_of_other_things_is_refused(tmp_path, capsys):
    make_qwen(tmp_path / "qwen", tied=False)
    (tmp_path / "qwen/model.safetensors").unlink()
    for content in ([1, 2], {"a": 3}, {"model": {"a": torch.ones(1)}}):
        torch.save(content, tmp_path / "qwen/pytorch_model.bin")
        assert "something other than tensors by name" in refused(
            tmp_path / "qwen", tmp_path, capsys, "allow_pickle=true"
        )


@pytest.mark.parametrize("value", ["2", [1, "2"], 1.5, True, {"a": 1}])
def test_a_wrong_end_in_config_json_is_named(world, tmp_path, corpus, value):
    from tests.train.hf.interop import add_tokenizer

    make_qwen(tmp_path / "qwen", tied=False, vocab_size=400)
    add_tokenizer(tmp_path / "qwen", corpus)
    change_config(tmp_path / "qwen", eos_token_id=value)
    with pytest.raises(ConfigError, match=r"config.json: eos_token_id=.* must be token ids"):
        generate.load(tmp_path / "qwen", world, "fp32")
