"""Runs and Hugging Face checkpoints for the interop tests: tiny, random, made on the spot."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import yaml

from ksa_model.config import ModelConfig
from ksa_model.layers.tensor_parallel import TensorParallel
from ksa_model.model import Decoder
from tests.ksa_model.ops.attention.test_joint import make_layout
from train.checkpoint import locate, rewrite
from train.checkpoint.storage import CheckpointPath
from train.config.conversion import to_mapping
from train.config.schema import TrainConfig
from train.config.sections import RunConfig
from train.hf import import_weights

QWEN = dict(
    vocab_size=151,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,  # not hidden_size / heads
    rope_theta=12345.0,
    max_position_embeddings=256,
)


def make_qwen(directory: Path, tied: bool, **changes):
    """A Qwen3 model of transformers with random weights, saved; norms are not ones, so that a lost one shows."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(5)
    model = Qwen3ForCausalLM(Qwen3Config(**(QWEN | changes), tie_word_embeddings=tied)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p)) if p.ndim == 1 else p.mul_(4)
    model.save_pretrained(directory)
    return model


def add_tokenizer(directory: Path, corpus: Path, vocab_size: int = 390) -> Path:
    """Give a Hugging Face directory a tokenizer of its own, which is not the one that a run trains on `corpus`."""
    from data_pipeline.text.tokenizer import train_tokenizer

    texts = [json.loads(line)["text"] for line in corpus.read_text().splitlines()]
    train_tokenizer(texts, directory / "tokenizer.model", vocab_size)
    return directory / "tokenizer.model"


def spread(decoder: Decoder) -> Decoder:
    """Logits that depend on what was seen: a model that always says the same would prove nothing."""
    with torch.no_grad():
        for name, p in decoder.named_parameters():
            if p.ndim == 1:
                p.add_(0.1 * torch.randn_like(p))
            elif "embedding" in name:
                p.mul_(20)
            else:
                p.mul_(6)
    return decoder.eval()


def make_run(world, directory: Path, model: ModelConfig, tokenizer: Path | None = None, seq_len: int = 2048, **facts):
    """A run directory whose one checkpoint, of step 7, holds a random model; returns the model. `facts`: state.json."""
    torch.manual_seed(3)
    decoder = spread(Decoder(model, TensorParallel(world.tensor_group)))
    config = TrainConfig(model=model, seq_len=seq_len, run=RunConfig(name=directory.name, root=str(directory.parent)))
    state = {
        "format": locate.FORMAT,
        "step": 7,
        "tokens": 12345,
        "loader": {},
        "contains": ["master"],
        "config": to_mapping(config),
        **facts,
    }
    stored = {
        f"master/{name}": rewrite.StoredTensor(p.shape, torch.float32, p.detach)
        for name, p in decoder.named_parameters()
    }
    rewrite.write(CheckpointPath(directory / "checkpoints"), state, stored, 1)
    (directory / "config.yaml").write_text(yaml.safe_dump(to_mapping(config)))
    if tokenizer is not None:
        (directory / "tokenizer.model").write_bytes(tokenizer.read_bytes())
    (directory / "metrics.jsonl").write_text(json.dumps({"step": 5, "validation_loss": 3.25}) + "\n")
    return decoder


def our_logits(decoder, tokens):
    config = decoder.config
    pack = make_layout([len(tokens)], config.chunk_size, config.summary_tokens, 0)
    rows = torch.zeros(pack.num_text, dtype=torch.long)
    rows[: len(tokens)] = torch.tensor(tokens)
    with torch.no_grad():
        return decoder.logits(rows, pack)[: len(tokens)]


def imported(world, directory, **changes):
    """A bare decoder of this world's layout with the weights of a Hugging Face directory."""
    tensors, source = import_weights.open_source(directory)
    values = {name: getattr(source.config, name) for name in source.config.__dataclass_fields__} | changes
    model = type(source.config)(**values)
    decoder = Decoder(model, TensorParallel(world.tensor_group)).eval()
    import_weights.load_model(decoder, import_weights.Weights(tensors, source, model), world)
    return decoder


def run_command(module, *arguments, capsys):
    capsys.readouterr()
    code = module.main([str(a) for a in arguments])
    said = capsys.readouterr()
    return code, said.out + said.err


TOKENS = torch.randint(0, 61, (45,), generator=torch.Generator().manual_seed(1)).tolist()


PUBLISHED = dict(
    architectures=["Qwen3ForCausalLM"],
    model_type="qwen3",
    vocab_size=62,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=8,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    rms_norm_eps=1e-6,
    rope_theta=10000.0,
    max_position_embeddings=512,
    tie_word_embeddings=False,
    use_summary_attention=True,
    summary_chunk_size=4,
    summary_token_num=1,
    summary_token_begin=61,
    summary_sliding_chunk_num="([1]*3+[300])*2",
    summary_chunk_position_ids_type="origin",
    summary_token_position_ids_type="last_chunk_slice_right",
    summary_independent_parameters=True,
    mix_coeff=1,
)
