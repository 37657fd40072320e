"""Small real runs for the tests: a corpus of standard-library modules, a model of a few thousand parameters."""

from __future__ import annotations

import json
import sysconfig
from pathlib import Path
from typing import Any

import torch

BASE: dict[str, Any] = {
    "seq_len": 256,
    "model": dict(
        hidden_size=32,
        num_layers=4,
        num_heads=4,
        num_kv_heads=4,
        head_dim=8,
        ffn_size=64,
        layer_pattern="KSCF",
        chunk_size=4,
        window_chunks=2,
        window_tokens=12,
        vocab_multiple=32,
        tie_embeddings=False,
    ),
    "data": dict(source="jsonl", vocab_size=400, validation_fraction=0.1),
    "optim": dict(lr=1e-2, warmup_steps=2, decay_steps=5),
    "run": dict(steps=5, samples_per_step=4, log_every=1, eval_every=100, eval_samples=2, device="cpu"),
    "checkpoint": dict(every_steps=100),
    "logging": dict(wandb="off", progress=False),
}


def write_corpus(path: Path) -> Path:
    """Sixty documents of very unequal length."""
    modules = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))[:60]
    with open(path, "w", encoding="utf-8") as file:
        for i, module in enumerate(modules):
            text = module.read_text(encoding="utf-8", errors="ignore")[: 40 + 311 * (i % 17)]
            file.write(json.dumps({"text": text}) + "\n")
    return path


def make_config(corpus: Path, root: Path, **changes: Any):
    """`changes` are dotted keys with dots as double underscores: `run__steps=20`."""
    from train.config.conversion import from_mapping
    from train.config.schema import TrainConfig

    values = {key: dict(value) if isinstance(value, dict) else value for key, value in BASE.items()}
    values["data"].update(path=str(corpus), cache_dir=str(corpus.parent / "cache"))
    values["run"]["root"] = str(root)
    for key, value in changes.items():
        section, _, name = key.partition("__")
        if name:
            values.setdefault(section, {})[name] = value
        else:
            values[key] = value
    return from_mapping(TrainConfig, values)


def run_training(corpus: str, root: str, changes: dict[str, Any]) -> list[dict[str, Any]]:
    """Train on this rank; returns the records of metrics.jsonl as they stand afterwards."""
    from train.logs.metrics import read_records
    from train.trainer import train

    config = make_config(Path(corpus), Path(root), **changes)
    result = train(config)
    return read_records(result.directory / "metrics.jsonl")


def losses(records: list[dict[str, Any]]) -> list[float]:
    return [r["loss"] for r in records if "loss" in r]


def newest_tensors(run_directory: Path) -> dict[str, torch.Tensor]:
    """The weights and moments of the newest checkpoint, whole, read by DCP itself and without any process group."""
    import torch.distributed.checkpoint as dcp

    from train.checkpoint import storage

    newest = storage.finished(run_directory / "checkpoints")[-1]
    metadata = dcp.FileSystemReader(newest).read_metadata().state_dict_metadata
    tensors = {name: torch.empty(entry.size, dtype=entry.properties.dtype) for name, entry in metadata.items()}
    tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(("rng/", "optimizer/"))}
    dcp.load(tensors, checkpoint_id=newest, no_dist=True)
    return tensors
