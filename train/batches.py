"""Turns a packed sample of the data pipeline into a micro-batch of the model."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import torch

from data_pipeline import IGNORE_INDEX, PackedSample
from ksa_model.config import ModelConfig
from ksa_model.layout.sequence import SequenceLayout, ShardedLayout, build_layout


@dataclass(frozen=True)
class Batch:
    """One micro-batch: int64 [T] tokens and labels, their sequence layout, and what it counts for."""

    tokens: torch.Tensor
    labels: torch.Tensor
    layout: SequenceLayout
    num_labels: int  # tokens that carry loss
    model_flops: int  # forward and backward, without recomputation

    def to(self, device: torch.device) -> Batch:
        """Copy to `device`; on a GPU from pinned memory, so that the host does not wait."""
        if device.type == "cpu":
            return self
        tokens, labels = (x.pin_memory().to(device, non_blocking=True) for x in (self.tokens, self.labels))
        return dataclasses.replace(self, tokens=tokens, labels=labels)


def batch_maker(config: ModelConfig, context_rank: int = 0, context_size: int = 1) -> Callable[[PackedSample], Batch]:
    """A function from a sample to its batch. The loader's thread runs it, so that layouts are ready before the step.

    With several context ranks, the batch holds this rank's two slices of the sample.
    """

    def make(sample: PackedSample) -> Batch:
        pack = build_layout(
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
        )

    return make


def model_flops(config: ModelConfig, pack: SequenceLayout) -> int:
    """FLOPs of forward and backward for the tokens of `pack`, without recomputation and padding.

    Attention counts the keys that are visible in the real documents. The dense layers count text and summary tokens.
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
