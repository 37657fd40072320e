"""Evaluates a trained model: which tasks, at which lengths, and the result as plain values.

Tasks are `perplexity` (by position, on held-out documents), `insight` (the attention weight that text gives to
summaries) and the probes of `data_pipeline.corpora.probe_tasks`. All of them use the training forward, with several
documents at a time.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from data_pipeline import DataConfig, Tokenizer, open_data
from data_pipeline.config import TASKS
from ksa_model.config import RopeScaling
from ksa_model.layers.tensor_parallel import TensorParallel
from ksa_model.model import Decoder
from train.batches import batch_maker
from train.config.errors import ConfigError
from train.config.run_directory import read_config
from train.config.schema import TrainConfig
from train.distributed.groups import World
from train.evaluate import probes
from train.generate import load_run
from train.hf import import_weights, tokenizers

ALL_TASKS = ("perplexity", *TASKS, "insight")


@dataclass(frozen=True)
class EvaluateConfig:
    """What to evaluate, and where to write it."""

    tasks: tuple[str, ...] = ALL_TASKS
    lengths: tuple[int, ...] = ()  # empty: the training length, two and four times that
    samples: int = 16  # probes of each task and length, packs of held-out documents of each length
    depths: int = 5  # positions of the needle, from the beginning of the document to its end
    rows: int = 32768  # text tokens of one forward
    seed: int = 0
    rope_scaling: RopeScaling | None = None  # replaces that of the checkpoint: longer texts without training
    out: str | None = None

    def __post_init__(self) -> None:
        for task in self.tasks:
            if task not in ALL_TASKS:
                raise ConfigError(f"tasks={','.join(self.tasks)}: {task!r} is not one of {', '.join(ALL_TASKS)}")
        for name in ("samples", "depths", "rows"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} must be at least 1")
        if any(length < 1 for length in self.lengths):
            raise ConfigError(f"lengths={','.join(map(str, self.lengths))} must be at least 1")


def evaluate(
    model: Decoder, tokenizer: Tokenizer, run: TrainConfig, config: EvaluateConfig, device: torch.device
) -> dict[str, Any]:
    """Everything that `config` asks for, as plain values. Accuracies are between 0 and 1, losses in nats per token.

    Raises one of `USER_ERRORS` where a task does not fit the model or its data.
    """
    unit = run.alignment
    lengths = config.lengths or tuple(factor * run.seq_len for factor in (1, 2, 4))
    for length in lengths:
        if length % unit:
            raise ConfigError(f"lengths={length} is not a multiple of {unit}, where documents start")
    chosen = [task for task in config.tasks if task in TASKS]
    result: dict[str, Any] = {
        "parameters": model.config.num_parameters()["total"],
        "layer_pattern": model.config.layer_pattern,
        "chunk_size": model.config.chunk_size,
        "summary_tokens": model.config.summary_tokens,
        "trained_at": run.seq_len,
        "rope_scaling": None if config.rope_scaling is None else dataclasses.asdict(config.rope_scaling),
        "lengths": list(lengths),
        "cache_bytes": {str(length): model.config.cache_bytes(length) for length in lengths},
        "chance": 1 / tokenizer.vocab_size,
    }
    scorer = probes.Scorer(model, tokenizer, device, config.rows)
    if chosen:
        result["tasks"] = {
            task: {str(n): scorer.score(task, n, config.samples, config.seed, config.depths) for n in lengths}
            for task in chosen
        }
    if "perplexity" in config.tasks or "insight" in config.tasks:
        result |= _on_documents(model, run, config, lengths, device)
    return result


def _on_documents(
    model: Decoder, run: TrainConfig, config: EvaluateConfig, lengths: tuple[int, ...], device: torch.device
) -> dict[str, Any]:
    data = open_data(run.data)
    maker = batch_maker(model.config)
    result: dict[str, Any] = {}
    for length in lengths:
        held_out = data.samples("validation", length, run.alignment)
        if held_out is None:
            raise ConfigError(
                "tasks: perplexity and insight need held-out documents, and the run's data has none; leave them out"
            )
        packs = [maker(held_out.at(i)).to(device) for i in range(min(config.samples, held_out.num_samples))]
        if "perplexity" in config.tasks:
            result.setdefault("perplexity", {})[str(length)] = probes.loss_by_position(model, packs)
        if "insight" in config.tasks and model.config.has_far:
            result.setdefault("insight", {})[str(length)] = probes.weight_of_summaries(model, packs)
    return result


def load(
    directory: Path, world: World, rope_scaling: RopeScaling | None = None
) -> tuple[Decoder, Tokenizer, TrainConfig]:
    """Model, tokenizer and configuration of a run (its newest checkpoint) or of a Hugging Face directory.

    A Hugging Face directory has no corpus: its held-out documents are those of Python's standard library, and its
    training length is the longest that its config.json allows. `rope_scaling` replaces that of a run's checkpoint; a
    Hugging Face directory has its own in config.json. Raises one of `USER_ERRORS`.
    """
    if (directory / "config.json").is_file() and not (directory / "config.yaml").is_file():
        if rope_scaling is not None:
            raise ConfigError(f"rope_scaling={rope_scaling} is for runs: set rope_scaling in {directory}/config.json")
        return _load_hf(directory, world)
    config = read_config(directory)
    model, tokenizer = load_run(directory, world, rope_scaling=rope_scaling)
    if world.device.type == "cuda" and config.run.precision == "bf16":
        model = model.to(torch.bfloat16)  # as it was trained
    # The tokenizer that the run directory keeps is the one the data were prepared with, here or elsewhere.
    named = config.data.tokenizer
    kept = named if named is not None and Path(named).is_file() else str(directory / tokenizers.RUN_TOKENIZER)
    data = dataclasses.replace(config.data, tokenizer=kept)
    return model, tokenizer, dataclasses.replace(config, data=data)


def _load_hf(directory: Path, world: World) -> tuple[Decoder, Tokenizer, TrainConfig]:
    tensors, source = import_weights.open_source(str(directory))
    path = tokenizers.find_tokenizer(directory)
    if path is None:
        raise ConfigError(
            f"{directory} holds no {' and no '.join(tokenizers.TOKENIZERS)}: evaluation needs its tokenizer"
        )
    dtype = torch.bfloat16 if world.device.type == "cuda" else torch.float32
    model = Decoder(source.config, TensorParallel(world.tensor_group, dtype=dtype))
    import_weights.load_model(model, import_weights.Weights(tensors, source, source.config), world)
    k = source.config.chunk_size
    data = DataConfig(source="stdlib", tokenizer=str(path))
    config = TrainConfig(model=source.config, seq_len=max(k, source.max_positions // k * k), data=data)
    return model.to(world.device).eval(), Tokenizer(path), config
