"""Files of exports and imports: shards, facts, tokenizers, and checkpoints that are refused."""

import json
from pathlib import Path

import pytest
import torch

transformers = pytest.importorskip("transformers")
from safetensors.torch import load_file, save_file  # noqa: E402

from tests.ksa_model.test_model import small_config  # noqa: E402
from tests.train.hf.interop import PUBLISHED, make_qwen, make_run, run_command  # noqa: E402
from train import export as export_command  # noqa: E402
from train import import_hf as import_command  # noqa: E402
from train.config.errors import ConfigError  # noqa: E402
from train.distributed.signals import BAD_INPUT  # noqa: E402
from train.hf import export, import_weights  # noqa: E402
from train.hf import files as hf_files  # noqa: E402


def test_shards_and_facts(world, tmp_path, capsys, monkeypatch):
    make_run(world, tmp_path / "run", small_config())
    monkeypatch.setattr(hf_files, "SHARD_BYTES", 20_000)
    monkeypatch.setattr(hf_files.write_safetensors, "__defaults__", (lambda _: None, 20_000))
    for form in ("hf", "safetensors"):
        code, said = run_command(
            export_command,
            tmp_path / "run",
            f"out={tmp_path}/{form}",
            f"format={form}",
            "dtype=fp32",
            "step=7",
            capsys=capsys,
        )
        assert code == 0, said
        files = sorted((tmp_path / form).glob("model-*.safetensors"))
        assert len(files) > 3 and all(f.stat().st_size < 30_000 for f in files)
        index = json.loads((tmp_path / form / "model.safetensors.index.json").read_text())
        held = {name: t for file in files for name, t in load_file(file).items()}
        assert index["weight_map"].keys() == held.keys()
        assert index["metadata"]["total_size"] == sum(t.numel() * 4 for t in held.values())
    assert {"blocks.0.attention.query.weight", "summary_embedding"} <= held.keys()
    assert held["embedding.weight"].shape == (61, 32)  # without vocabulary padding
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", trust_remote_code=True)
    card = (tmp_path / "hf/README.md").read_text()
    for fact in ("12,345", "optimizer steps | 7", "3.2500", "KKKF", "trust_remote_code=True"):
        assert fact in card


def test_one_tensor_is_in_memory_at_a_time(tmp_path):
    """64 tensors of 4 MB go out while no more than a few of them ever exist."""
    import tracemalloc

    alive, most = [0], [0]

    def read():
        import weakref

        tensor = torch.ones(1 << 20)
        alive[0] += 1
        most[0] = max(most[0], alive[0])
        weakref.finalize(tensor, lambda: alive.__setitem__(0, alive[0] - 1))
        return tensor

    tracemalloc.start()
    tensors = [(f"t{i}", (1 << 20,), read) for i in range(64)]
    paths = hf_files.write_safetensors(tmp_path, tensors, torch.float32, shard_bytes=1 << 25)
    assert len(paths) == 8 and most[0] <= 2
    assert tracemalloc.get_traced_memory()[1] < 40 << 20
    tracemalloc.stop()


# -- tokenizers -------------------------------------------------------------------------------------------------------

TEXTS = ["def main(argv):\n\treturn 0  # \u2581 is no space </s> <unk>\n", "caf\u00e9 \U0001f600 1234", " a  b ", ""]


@pytest.fixture(scope="module")
def sentencepiece_model(tmp_path_factory, corpus):
    from data_pipeline.text.tokenizer import train_tokenizer

    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    texts = [json.loads(line)["text"] for line in corpus.read_text().splitlines()]
    train_tokenizer(texts, path, 400)
    return path


def test_tokenizer_goes_along(world, tmp_path, capsys, sentencepiece_model):
    from data_pipeline import Tokenizer

    make_run(world, tmp_path / "run", small_config(vocab_size=400), sentencepiece_model)
    run_command(export_command, tmp_path / "run", f"out={tmp_path}/out", capsys=capsys)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out", trust_remote_code=True)
    ours = Tokenizer(sentencepiece_model)
    for text in TEXTS:
        ids = ours.encode(text).tolist()
        assert theirs(text)["input_ids"] == ids, text
        assert theirs.decode(ids) == ours.decode(ids) == text
    assert theirs.eos_token_id == ours.eos_id and len(theirs) == 400
    assert theirs.decode([*ours.encode("a").tolist(), ours.eos_id]) == "a</s>"
    assert theirs.decode([*ours.encode("a").tolist(), ours.eos_id], skip_special_tokens=True) == "a"
    batch = theirs(["a b c d", "a"], return_tensors="pt", padding=True, padding_side="left")
    assert batch["attention_mask"].tolist()[1][-1] == 1
    theirs.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again/tokenizer.model").read_bytes() == sentencepiece_model.read_bytes()
    settings = json.loads((tmp_path / "out/generation_config.json").read_text())
    assert settings["eos_token_id"] == ours.eos_id


def test_a_hugging_face_tokenizer_goes_along(world, tmp_path, capsys):
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    from data_pipeline import Tokenizer

    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<|endoftext|>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    made.train_from_iterator(["hello world, hello there"], trainer)
    made.save(str(tmp_path / "tokenizer.json"))
    make_run(world, tmp_path / "run", small_config(vocab_size=400, layer_pattern="F"), tmp_path / "tokenizer.json")
    run_command(export_command, tmp_path / "run", f"out={tmp_path}/out", capsys=capsys)
    theirs, ours = transformers.AutoTokenizer.from_pretrained(tmp_path / "out"), Tokenizer(tmp_path / "tokenizer.json")
    for text in ("hello there", " caf\u00e9\n"):
        assert theirs(text)["input_ids"] == ours.encode(text).tolist()
    assert theirs.eos_token_id == ours.eos_id


# -- bad input --------------------------------------------------------------------------------------------------------


def break_qwen(directory, what):
    file, config = directory / "model.safetensors", directory / "config.json"
    tensors, keys = load_file(file), json.loads(config.read_text())
    name = "model.layers.1.mlp.up_proj.weight"
    if what == "missing":
        del tensors[name]
    elif what == "extra":
        tensors["model.layers.1.self_attn.q_proj.bias"] = torch.zeros(64)
    elif what == "shape":
        tensors[name] = torch.zeros(48, 31)
    elif what == "pickle":
        torch.save(tensors, directory / "pytorch_model.bin")
        file.unlink()
    elif what == "cut short":
        file.write_bytes(file.read_bytes()[:1000])
    elif what == "no config":
        config.unlink()
    else:
        keys |= what
    if what not in ("pickle", "cut short"):
        save_file(tensors, file)
    if what != "no config":
        config.write_text(json.dumps(keys))


@pytest.mark.parametrize(
    "what, message",
    [
        ("missing", "the checkpoint lacks model.layers.1.mlp.up_proj.weight"),
        ("extra", "q_proj.bias, which Qwen3ForCausalLM with its configuration does not have"),
        ("shape", "model.layers.1.mlp.up_proj.weight is of shape (48, 31), this model needs (48, 32)"),
        ("pickle", "pytorch_model.bin is a pickle"),
        ("cut short", "cannot be read as safetensors"),
        ("no config", "config.json is missing"),
        (dict(architectures=["Gemma2ForCausalLM"], model_type="gemma2"), "architectures=Gemma2ForCausalLM"),
        (
            dict(architectures=["LlamaForCausalLM"], model_type="llama"),
            "has model.layers.0.self_attn.k_norm.weight, model.layers.0.self_attn.q_norm.weight",
        ),
        (dict(architectures=["Qwen2ForCausalLM"]), "architectures=Qwen2ForCausalLM and model_type=qwen3"),
        (dict(attention_bias=True), "attention_bias=True, and this project supports only False"),
        (dict(rope_parameters=dict(rope_type="dynamic", rope_theta=1e4)), "scales its positions"),
        (PUBLISHED | dict(summary_token_position_ids_type="zeros"), "summary_token_position_ids_type='zeros'"),
        (PUBLISHED | dict(summary_sliding_chunk_num="exit()"), "summary_sliding_chunk_num='exit()' is not a pattern"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_bad_checkpoints_are_named(tmp_path, capsys, what, message):
    make_qwen(tmp_path / "qwen", tied=False)
    break_qwen(tmp_path / "qwen", what)
    code, said = run_command(import_command, tmp_path / "qwen", f"out={tmp_path}/run", capsys=capsys)
    assert code == BAD_INPUT and message in said and len(said.strip().splitlines()) == 1, said
    assert not (tmp_path / "run").exists()


def test_a_pickle_is_read_where_allowed(tmp_path, capsys):
    make_qwen(tmp_path / "qwen", tied=False)
    tensors = load_file(tmp_path / "qwen/model.safetensors")
    break_qwen(tmp_path / "qwen", "pickle")
    code, said = run_command(
        import_command, tmp_path / "qwen", f"out={tmp_path}/run", "allow_pickle=true", capsys=capsys
    )
    assert code == 0, said
    back = import_weights.RunTensors(export.open_run(tmp_path / "run").checkpoint)
    for name, tensor in tensors.items():
        assert torch.equal(back.read(name, [0] * tensor.ndim, tensor.shape), tensor)

    class Evil:
        def __reduce__(self):
            return Path(tmp_path / "ran").touch, ()

    torch.save({"model.norm.weight": Evil()}, tmp_path / "qwen/pytorch_model.bin")
    code, said = run_command(
        import_command, tmp_path / "qwen", f"out={tmp_path}/no", "allow_pickle=true", capsys=capsys
    )
    assert code == BAD_INPUT and "cannot be read as pickled tensors" in said and not (tmp_path / "ran").exists()


def test_bad_commands_are_named(world, tmp_path, capsys):
    make_run(world, tmp_path / "run", small_config())
    make_qwen(tmp_path / "qwen", tied=False)
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").touch()
    run, qwen = tmp_path / "run", tmp_path / "qwen"
    for module, arguments, message in [
        (export_command, [run], "usage:"),
        (export_command, [run, f"out={tmp_path}/full"], "exists and is not an empty directory"),
        (export_command, [run, f"out={tmp_path}/x", "format=gguf"], "format='gguf' is not one of hf, safetensors"),
        (export_command, [run, f"out={tmp_path}/x", "step=8"], "there are: 7"),
        (export_command, [tmp_path, f"out={tmp_path}/x"], "is not the directory of a run"),
        (export_command, [run, f"out={tmp_path}/x", "dtpe=fp32"], "did you mean dtype?"),
        (import_command, [qwen, f"out={run}"], "is not empty"),
        (import_command, [qwen, f"out={tmp_path}/x", "hidden_size=64"], "hidden_size is 32, not 64"),
        (import_command, [qwen, f"out={tmp_path}/x", "layer_pattern=KF", "summary_from=no such"], "is neither mean"),
        (import_command, [qwen, f"out={tmp_path}/x", "tie_embeddings=true"], "has an output head of its own"),
    ]:
        code, said = run_command(module, *arguments, capsys=capsys)
        assert code == BAD_INPUT and message in said and len(said.strip().splitlines()) == 1, said
    assert not (tmp_path / "x").exists()
    with pytest.raises(ConfigError, match="no directory of a Hugging Face checkpoint"):
        import_weights.open_source(tmp_path / "nowhere")


@pytest.mark.parametrize("pattern, named", [
    ("GKGF", "has gated delta net layers (G),"),
    ("HPHF", "has learned pooling layers (H) and mean pooling layers (P),"),
])  # fmt: skip
def test_baselines_leave_as_their_own_weights_alone(pattern, named, world, tmp_path, capsys):
    decoder = make_run(world, tmp_path / "run", small_config(layer_pattern=pattern))
    code, said = run_command(export_command, tmp_path / "run", f"out={tmp_path}/hf", capsys=capsys)
    assert code == BAD_INPUT and named in said
    assert "use format=safetensors to export weights" in said and not (tmp_path / "hf").exists()
    arguments = f"out={tmp_path}/weights", "format=safetensors", "dtype=fp32"
    code, said = run_command(export_command, tmp_path / "run", *arguments, capsys=capsys)
    assert code == 0, said
    held = load_file(tmp_path / "weights/model.safetensors")
    for name, p in decoder.named_parameters():
        assert torch.equal(held[name], p[:61] if name in ("embedding.weight", "head.weight") else p), name
