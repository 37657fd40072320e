"""Scores of a trained model on one rank: answers to probes, loss by position, attention weight of summaries."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from data_pipeline import Tokenizer
from data_pipeline.corpora.synthetic import Probe, evaluation_probes
from ksa_model.config import LOSS_ROWS
from ksa_model.layout.sequence import build_layout
from ksa_model.loss import IGNORE_INDEX
from ksa_model.model import Decoder
from ksa_model.objectives.insight import summary_weights
from train.batches import Batch


class Scorer:
    """Scores probes, several documents at a time: at most `rows` tokens, or a single document that is longer."""

    def __init__(self, model: Decoder, tokenizer: Tokenizer, device: torch.device, rows: int):
        self._model, self._tokenizer, self._device, self._rows = model, tokenizer, device, rows

    def score(self, task: str, length: int, samples: int, seed: int, depths: int) -> dict[str, Any]:
        """Accuracies of `samples` probes of `length` tokens.

        `exact_match` counts answers with every token right, `token_accuracy` counts tokens, each predicted from the
        correct tokens before it. Both also by distance (to the furthest fact that an answer needs, in bins that
        double), and for the needle by depth.
        """
        if task != "needle":
            probes = evaluation_probes(self._tokenizer, task, length, samples, seed)
            return summarize(self.ask(probes))
        all_answers, by_depth = [], []
        for number in range(depths):
            depth = number / max(1, depths - 1)
            answers = self.ask(evaluation_probes(self._tokenizer, task, length, samples, seed + number, depth))
            by_depth.append([round(depth, 4), summarize(answers)["token_accuracy"]])
            all_answers += answers
        return summarize(all_answers) | {"by_depth": by_depth}

    @torch.no_grad()
    def ask(self, probes: list[Probe]) -> list[tuple[int, np.ndarray]]:
        """Take the most likely token at each position; (distance, bool [tokens]: which are right) of every answer."""
        found: list[tuple[int, np.ndarray]] = []
        for group in self._packs(probes):
            k, m = self._model.config.chunk_size, self._model.config.summary_tokens
            sizes = np.array([probe.tokens.size for probe in group])
            rows = -(-sizes // k) * k
            starts = np.cumsum(rows) - rows
            tokens = np.zeros(int(rows.sum()), np.int64)
            for start, probe in zip(starts, group):
                tokens[start : start + probe.tokens.size] = probe.tokens
            pack = build_layout(starts, sizes, len(tokens), k, m)
            spans = [(start + b, start + e) for start, probe in zip(starts, group) for b, e in probe.answers]
            wanted = np.concatenate([np.arange(begin, end) for begin, end in spans])
            where = torch.from_numpy(wanted - 1).to(self._device)
            logits = self._model.logits(torch.from_numpy(tokens).to(self._device), pack, rows=where)
            right = logits.argmax(-1).cpu().numpy() == tokens[wanted]
            cut = np.cumsum([end - begin for begin, end in spans])[:-1]
            distances = [distance for probe in group for distance in probe.distances]
            found += list(zip(distances, np.split(right, cut)))
        return found

    def _packs(self, probes: list[Probe]) -> Iterator[list[Probe]]:
        group: list[Probe] = []
        rows = 0
        for probe in probes:
            if group and rows + probe.tokens.size > self._rows:
                yield group
                group, rows = [], 0
            group.append(probe)
            rows += probe.tokens.size
        yield group


def summarize(answers: list[tuple[int, np.ndarray]]) -> dict[str, Any]:
    """Accuracies of answers, each given as its distance and which of its tokens are right (bool [tokens])."""
    by_distance: dict[int, list[np.ndarray]] = {}
    for distance, right in answers:
        by_distance.setdefault(1 << (distance.bit_length() - 1) if distance > 0 else 0, []).append(right)
    rights = [right for _, right in answers]
    return {
        "exact_match": round(float(np.mean([right.all() for right in rights])), 4),
        "token_accuracy": round(float(np.concatenate(rights).mean()), 4),
        "answers": len(answers),
        "by_distance": [
            [distance, round(float(np.concatenate(group).mean()), 4), len(group)]
            for distance, group in sorted(by_distance.items())
        ],
    }


@torch.no_grad()
def loss_by_position(model: Decoder, packs: list[Batch]) -> dict[str, Any]:
    """Mean loss over `packs`, and by position in the document as [first position, loss, tokens] of bins that double."""
    bins = 32
    sums = torch.zeros(2, bins, dtype=torch.float64)
    for batch in packs:
        hidden = model.norm(model.hidden(batch.tokens, batch.layout))
        losses = torch.cat([_row_losses(model, hidden, batch, s) for s in range(0, len(hidden), LOSS_ROWS)]).cpu()
        counted = batch.labels.cpu() != IGNORE_INDEX
        position = torch.from_numpy(batch.layout.text_positions)
        bin_of = torch.where(position > 0, position.clamp(min=1).double().log2().floor().long() + 1, 0)
        for row, values in enumerate((losses.double(), torch.ones_like(losses, dtype=torch.float64))):
            sums[row].index_add_(0, bin_of[counted], values[counted])
    total, count = sums.sum(1).tolist()
    by_position = [
        [0 if number == 0 else 1 << (number - 1), round(loss / tokens, 5), int(tokens)]
        for number, (loss, tokens) in enumerate(sums.t().tolist())
        if tokens
    ]
    return {"loss": round(total / count, 5), "tokens": int(count), "by_position": by_position}


def _row_losses(model: Decoder, hidden: torch.Tensor, batch: Batch, start: int) -> torch.Tensor:
    rows = slice(start, start + LOSS_ROWS)
    logits = torch.nn.functional.linear(hidden[rows], model.head_weight)[:, : model.valid_columns].float()
    return torch.nn.functional.cross_entropy(logits, batch.labels[rows], ignore_index=IGNORE_INDEX, reduction="none")


def weight_of_summaries(model: Decoder, packs: list[Batch]) -> dict[str, list[list[float]]]:
    """By layer: [first distance in tokens, mean attention weight] of bins that double; see `objectives.insight`."""
    sums: dict[int, torch.Tensor] = {}
    for batch in packs:
        for index, found in summary_weights(model, batch.tokens, batch.layout).items():
            sums[index] = sums[index] + found if index in sums else found
    k = model.config.chunk_size
    return {
        str(index): [
            [(1 << number) * k, round(weight / rows, 6)]
            for number, (weight, rows) in enumerate(found.t().tolist())
            if rows
        ]
        for index, found in sums.items()
    }
