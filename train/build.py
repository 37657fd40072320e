"""Builds the parts of a run from its configuration: the model under its engine, the loader, the validation set."""

from __future__ import annotations

import dataclasses

import torch

from data_pipeline import Loader, Tokenizer, TrainingData
from ksa_model.config import ModelConfig
from ksa_model.layers.tensor_parallel import TensorParallel
from ksa_model.model import Decoder
from ksa_model.parallel.context import ContextParallel
from train.batches import batch_maker
from train.config.errors import ConfigError
from train.config.schema import TrainConfig
from train.distributed.engine import Engine
from train.distributed.groups import World
from train.evaluate.held_out import HeldOut
from train.evaluate.in_loop import InLoopProbes


def compute_dtype(config: TrainConfig) -> torch.dtype:
    """The dtype of the weights that forward and backward use."""
    return torch.bfloat16 if config.run.precision == "bf16" else torch.float32


def with_vocabulary(model: ModelConfig, vocab_size: int) -> ModelConfig:
    """`model` with the tokenizer's vocabulary, or `ConfigError` when it names a smaller one itself."""
    if model.vocab_size is not None and model.vocab_size < vocab_size:
        raise ConfigError(
            f"model.vocab_size={model.vocab_size} is smaller than the tokenizer's {vocab_size} pieces; "
            "leave it null to take the tokenizer's"
        )
    return dataclasses.replace(model, vocab_size=model.vocab_size or vocab_size)


def build_engine(config: TrainConfig, world: World) -> Engine:
    """The model under its engine. The seed gives the same initial weights on every parallel layout."""
    torch.manual_seed(config.run.seed)
    tp = TensorParallel(world.tensor_group, config.parallel.sequence, compute_dtype(config))
    in_fp8 = config.perf.precision == "fp8"
    model = Decoder(config.model, tp, ContextParallel(world.context_group), config.memory, in_fp8)
    return Engine(
        model,
        config.optim,
        config.parallel,
        world,
        precision=config.run.precision,
        micro_batches=config.micro_batches(world.data_size),
        trains=config.stage.trains,
    )


def make_loader(config: TrainConfig, data: TrainingData, world: World) -> Loader:
    """This rank's share of the training samples, as `Batch`es, from the first sample on."""
    return Loader(
        data.samples("train", config.seq_len, config.alignment),
        samples_per_step=config.run.samples_per_step,
        dp_rank=world.data_rank,
        dp_size=world.data_size,
        prefetch=config.data.prefetch_samples,
        joined=config.run.samples_per_micro_batch,
        transform=batch_maker(config.model, world.context_group.rank(), world.context_group.size()),
    )


def make_held_out(config: TrainConfig, data: TrainingData, world: World) -> HeldOut:
    """The validation set; empty with `run.eval_samples=0`, or where the data have no held-out documents."""
    samples = data.samples("validation", config.seq_len, config.alignment) if config.run.eval_samples else None
    return HeldOut(samples, config.model, world, config.run.eval_samples)


def make_probes(config: TrainConfig, data: TrainingData, world: World) -> InLoopProbes | None:
    """The probes of `run.probe_every`, or None where it is null."""
    if config.run.probe_every is None:
        return None
    return InLoopProbes(config, Tokenizer(data.tokenizer_path, config.data.end_token), world)
