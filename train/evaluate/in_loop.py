"""Probes during training: what the model remembers, every `run.probe_every` steps, on any parallel layout.

Probes are packed into samples of the training length (longer ones into a multiple of it) and go through the engine's
forward, so tensor, sequence and context parallelism and ZeRO-3 need nothing of their own. Each rank counts its rows;
one all-reduce per evaluation adds them up.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F

from data_pipeline import IGNORE_INDEX, DataError, PackedSample, Tokenizer
from data_pipeline.corpora.synthetic import Probe, evaluation_probes
from ksa_model.layout.sequence import SequenceLayout, ShardedLayout
from ksa_model.model import Decoder
from train.batches import Batch, batch_maker
from train.config.errors import ConfigError
from train.config.schema import TrainConfig
from train.distributed.engine import Engine
from train.distributed.groups import World
from train.evaluate.probes import summarize

SEED = 40_961  # of the probes; `train.evaluate` takes others, so that nobody tunes on the numbers that are reported


@dataclass(frozen=True)
class _Pack:
    """Probes packed into one sample: this rank's rows, and which answer each labelled row belongs to."""

    batch: Batch
    answer_of_row: np.ndarray  # int64 [labelled rows of this rank]


class InLoopProbes:
    """Probes of `run.probe_tasks` at `run.probe_lengths`, the same at every call and on every parallel layout."""

    def __init__(self, config: TrainConfig, tokenizer: Tokenizer, world: World):
        self._world, run = world, config.run
        self.on_batch: Callable[[], None] = lambda: None  # called after every batch of `score`
        self._answers: list[tuple[str, int, int, int]] = []  # task, length, distance, tokens of each answer
        packs: list[tuple[PackedSample, np.ndarray]] = []
        for task in run.probe_tasks:
            for length in run.probe_lengths or (config.seq_len,):
                try:
                    probes = evaluation_probes(tokenizer, task, length, run.probe_samples, SEED)
                except DataError as error:
                    raise ConfigError(f"run.probe_lengths={length}, run.probe_tasks={task}: {error}") from error
                rows = -(-length // config.seq_len) * config.seq_len
                packs += self._pack(task, length, probes, rows, config.alignment)
        # Every data rank runs as many forwards, since ZeRO-3 makes them collective; the last ones may count nothing.
        ranks = world.data_size
        rounds = -(-len(packs) // ranks)
        make = batch_maker(config.model, world.context_group.rank(), world.context_group.size())
        self._packs: list[_Pack] = []
        for number in range(world.data_rank, rounds * ranks, ranks):
            sample, answers = packs[min(number, len(packs) - 1)]
            batch = make(sample)
            if isinstance(batch.layout, ShardedLayout):
                answers = batch.layout.rows(answers)
            mine = answers[answers >= 0]
            self._packs.append(_Pack(batch, mine if number < len(packs) else np.full_like(mine, -1)))

    def _pack(
        self, task: str, length: int, probes: list[Probe], rows: int, alignment: int
    ) -> list[tuple[PackedSample, np.ndarray]]:
        """Samples of `rows` rows that hold the probes, each with the answer (by number, else -1) of every row."""
        samples = []
        waiting = list(probes)
        while waiting:
            tokens, labels = np.zeros(rows, np.int64), np.full(rows, IGNORE_INDEX, np.int64)
            answers, starts, lengths, start = np.full(rows, -1, np.int64), [], [], 0
            while waiting and start + waiting[0].tokens.size <= rows:
                probe = waiting.pop(0)
                tokens[start : start + probe.tokens.size] = probe.tokens
                for (begin, end), distance in zip(probe.answers, probe.distances):
                    labels[start + begin - 1 : start + end - 1] = probe.tokens[begin:end]
                    answers[start + begin - 1 : start + end - 1] = len(self._answers)
                    self._answers.append((task, length, distance, end - begin))
                starts.append(start)
                lengths.append(probe.tokens.size)
                start += -(-probe.tokens.size // alignment) * alignment
            documents = np.array(starts, np.int64), np.array(lengths, np.int64)
            samples.append((PackedSample(tokens, labels, *documents, np.zeros(len(starts), bool), 0), answers))
        return samples

    @torch.no_grad()
    def score(self, engine: Engine) -> dict[str, Any]:
        """`{"probes": {task: {length: scores}}, "probe_seconds": s}`, the same on every rank. Collective."""
        began = time.perf_counter()
        right = torch.zeros(len(self._answers) + 1, dtype=torch.float64, device=self._world.device)  # last: uncounted
        for pack in self._packs:
            batch = pack.batch.to(self._world.device)
            hits = engine(batch.tokens, batch.labels, batch.layout, answer_hits)
            index = torch.from_numpy(pack.answer_of_row).to(self._world.device)
            right.index_add_(0, torch.where(index < 0, len(self._answers), index), hits.double())
            self.on_batch()
        dist.all_reduce(right, group=self._world.data_context_group)
        scores: dict[str, dict[str, Any]] = {}
        grouped: dict[tuple[str, int], list[tuple[int, np.ndarray]]] = {}
        for (task, length, distance, size), count in zip(self._answers, right.tolist()):
            answer = np.arange(size) < round(count)  # which of its tokens are right matters to no score
            grouped.setdefault((task, length), []).append((distance, answer))
        for (task, length), answers in grouped.items():
            scores.setdefault(task, {})[str(length)] = summarize(answers)
        return {"probes": scores, "probe_seconds": round(time.perf_counter() - began, 3)}


def answer_hits(model: Decoder, tokens: torch.Tensor, labels: torch.Tensor, layout: SequenceLayout) -> torch.Tensor:
    """fp32 [rows with a label]: 1 where the likeliest token of the whole vocabulary is the label. An `Objective`, so
    that it runs inside the engine's forward."""
    hidden = model.tp.gather(model.norm(model.hidden(tokens, layout)))
    rows = labels != IGNORE_INDEX
    logits = F.linear(hidden[rows], model.head_weight).float()
    logits[:, model.valid_columns :] = -torch.inf  # vocabulary padding
    top, picked = logits.max(-1)
    picked += model.tp.rank * model.head_weight.shape[0]
    if model.tp.size > 1:
        tops = [torch.empty_like(top) for _ in range(model.tp.size)]
        picks = [torch.empty_like(picked) for _ in range(model.tp.size)]
        dist.all_gather(tops, top, group=model.tp.group)
        dist.all_gather(picks, picked, group=model.tp.group)
        best = torch.stack(tops).argmax(0, keepdim=True)
        picked = torch.stack(picks).gather(0, best)[0]
    return (picked == labels[rows]).float()
