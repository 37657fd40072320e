"""A packed sample of the data pipeline -> what one micro-batch of the model takes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import torch

from data_pipeline import IGNORE_INDEX, PackedSample
from ksa_model import layout
from ksa_model.config import ModelConfig
from ksa_model.layout import SequenceLayout, ShardedLayout


@dataclass(frozen=True)
class Batch:
    """One packed sequence: int64 [T] tokens and labels, where its documents stand, and what it counts for."""

    tokens: torch.Tensor
    labels: torch.Tensor
    layout: SequenceLayout
    num_labels: int  # rows that carry loss
    model_flops: int  # forward and backward, without recomputation
    index: int

    def to(self, device: torch.device) -> Batch:
        if device.type == "cpu":
            return self
        tokens, labels = (x.pin_memory().to(device, non_blocking=True) for x in (self.tokens, self.labels))
        return dataclasses.replace(self, tokens=tokens, labels=labels)


def batch_maker(config: ModelConfig, context_rank: int = 0, context_size: int = 1) -> Callable[[PackedSample], Batch]:
    """What the loader's thread runs on every sample, so that layouts and their ranges are ready before the step.

    With several context ranks, the batch is this rank's two slices of the sample.
    """

    def make(sample: PackedSample) -> Batch:
        pack = layout.build(
            sample.doc_starts, sample.doc_lengths, len(sample.tokens), config.chunk_size, config.summary_tokens
        )
        tokens, labels = sample.tokens, sample.labels
        if context_size > 1:
            pack = ShardedLayout(pack, context_rank, context_size)
            tokens, labels = pack.rows(tokens), pack.rows(labels)
        return Batch(
            torch.from_numpy(tokens),
            torch.from_numpy(labels),
            pack,
            int((labels != IGNORE_INDEX).sum()),
            model_flops(config, pack),
            sample.index,
        )

    return make


def model_flops(config: ModelConfig, pack: SequenceLayout) -> int:
    """FLOPs of forward and backward that the rows of `pack` ask for: no recomputation, no padding.

    Attention counts the keys the real documents make visible; the summary stream's dense work is included.
    """
    num_summary = int((pack.chunk_lengths > 0).sum()) * config.summary_tokens
    forward = config.dense_flops(pack.num_tokens, num_summary if config.has_summaries else 0)
    for layer in config.layers:
        forward += config.attention_flops(pack.visible_keys(layer.mixer, layer.window_chunks, config.window_tokens))
        if layer.mixer == "G":
            forward += config.delta_flops(pack.num_tokens)
        if layer.updates_summaries:
            forward += config.attention_flops(pack.summary_visible_keys())
    return 3 * forward
