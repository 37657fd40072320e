"""Reads finished and unfinished runs from the files in their run directories, without weights and without network."""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from ksa_model.config import ModelConfig
from ksa_model.layout.sequence import SequenceLayout, build_layout
from train.batches import model_flops
from train.config.conversion import flatten, from_mapping
from train.config.errors import ConfigError
from train.evaluate.plots import points_by_distance
from train.logs.metrics import METRICS, read_with_torn

CONTEXT = 131_072  # tokens at which cache sizes are compared
# Keys that name a run or its files, and say nothing about how it trains.
NAMES = ("run.name", "run.root", "logging", "data.cache_dir", "resume", "checkpoint")


class ReportError(ConfigError):
    """There is no run to report on; the message names the directories and what they lack."""


@dataclass(frozen=True)
class Run:
    """One run, as its files describe it."""

    name: str
    directory: Path
    config: dict[str, Any]
    model: ModelConfig
    records: list[dict[str, Any]]
    remarks: tuple[str, ...] = ()
    evaluation: dict[str, Any] = dataclasses.field(default_factory=dict)  # of `python -m train.evaluate`

    def series(self, key: str) -> tuple[list[float], list[float]]:
        """(tokens, values) of the records that have `key`."""
        found = [(r["tokens"], r[key]) for r in self.records if key in r and "tokens" in r]
        return [x for x, _ in found], [y for _, y in found]

    @property
    def final_loss(self) -> float:
        """The last held-out loss or, if there is none, the mean training loss over the last tenth."""
        held_out = self.series("validation_loss")[1]
        if held_out:
            return held_out[-1]
        losses = self.series("loss")[1]
        return statistics.fmean(losses[-max(1, len(losses) // 10) :])

    @property
    def has_held_out(self) -> bool:
        """Whether a held-out loss was recorded."""
        return bool(self.series("validation_loss")[1])

    @property
    def tokens_per_second(self) -> float:
        """Median speed, without the first two records (which include warm-up) if there are more than four."""
        speeds = self.series("tokens_per_second")[1]
        return statistics.median(speeds[2:] if len(speeds) > 4 else speeds)

    @property
    def peak_memory(self) -> float | None:
        """Peak device memory in bytes, or None if the run did not record it."""
        peaks = self.series("peak_gib")[1]
        return max(peaks) * 2**30 if peaks else None

    @property
    def cache_bytes(self) -> int:
        """Size of the decoding cache at `CONTEXT` tokens, in bf16."""
        return self.model.cache_bytes(CONTEXT)

    @property
    def visible_keys(self) -> float:
        """Keys that a token attends to, averaged over the layers and over a sample that is one document."""
        length = self.config["seq_len"]
        pack = one_document(self.model, length)
        counts = [pack.visible_keys(x.mixer, x.window_chunks, self.model.window_tokens) for x in self.model.layers]
        return sum(counts) / len(counts) / length

    @property
    def window(self) -> int:
        """Text tokens that a KSA layer attends to directly, the token's own chunk included."""
        return (max(self.model.window_per_letter) + 1) * self.model.chunk_size

    def probes(self) -> list[dict[str, Any]]:
        """{"task", "distance", "accuracy"} of every task and distance that was evaluated."""
        return [
            {"task": task, "distance": distance, "accuracy": accuracy}
            for task, scores in self.evaluation.get("tasks", {}).items()
            for distance, accuracy in points_by_distance([scores]).items()
        ]


def one_document(model: ModelConfig, length: int) -> SequenceLayout:
    """The sequence layout of a sample that is one document of `length` tokens."""
    return build_layout(np.array([0]), np.array([length]), length, model.chunk_size, model.summary_tokens)


def flops_per_sample(model: ModelConfig, length: int) -> int:
    """Training FLOPs of one sample that is one document, in the trainer's own count."""
    return model_flops(model, one_document(model, length))


# -- reading ----------------------------------------------------------------------------------------------------------


def find_runs(paths: Sequence[Path]) -> tuple[list[Run], list[str]]:
    """Every readable run at or below `paths`, and one line for each that cannot be read. `ReportError` if none can."""
    runs, left_out = [], []
    for path in paths:
        if not path.is_dir():
            raise ReportError(f"{path} is not a directory")
        found = sorted(
            {
                p.parent
                for name in ("config.yaml", "metrics.jsonl")
                for p in path.rglob(name)
                if "wandb" not in p.relative_to(path).parts
            }
        )
        for directory in found:
            try:
                runs.append(
                    read_run(directory, name=str(directory.relative_to(path)) if directory != path else path.name)
                )
            except ReportError as error:
                left_out.append(str(error))
        if not found:
            left_out.append(f"{path} holds no run: no config.yaml and no metrics.jsonl")
        left_out += [f"{path / name} has not been started" for name in _planned(path) if path / name not in found]
    if not runs:
        raise ReportError("nothing to report: " + "; ".join(left_out))
    ordered = sorted(runs, key=lambda r: (r.model.chunk_size, widest_window(r), r.name))
    return _distinct(ordered), left_out


def read_run(directory: Path, name: str) -> Run:
    """The run in `directory`. Raises `ReportError` where it has no loss or no usable configuration yet."""
    found, torn = read_with_torn(directory / METRICS)
    records = standing(found)
    if not any("loss" in r for r in records):
        raise ReportError(f"{directory} has no record of a loss in metrics.jsonl yet")
    try:
        config = yaml.safe_load((directory / "config.yaml").read_text(encoding="utf-8"))
        model = from_mapping(ModelConfig, config["model"], "model.")
        steps, _ = config["run"]["steps"], config["seq_len"]
    except FileNotFoundError:
        raise ReportError(f"{directory} has no config.yaml") from None
    except (OSError, ValueError, yaml.YAMLError, KeyError, TypeError) as error:  # bad bytes and settings are values
        raise ReportError(f"{directory / 'config.yaml'} cannot be used: {' '.join(str(error).split())}") from None
    remarks = []
    if torn:
        lines = "a line of metrics.jsonl is" if torn == 1 else f"{torn} lines of metrics.jsonl are"
        remarks.append(f"{lines} damaged and left out")
    last = max(r["step"] for r in records)
    if last < steps:
        remarks.append(f"is at step {last} of {steps}")
    return Run(name, directory, config, model, records, tuple(remarks), _evaluation(directory))


def standing(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The records that describe the run as it is, sorted by step.

    A record whose step is earlier than that of the record before it shows that the run went back and trained the later
    steps again: the old records from its step on are dropped. So is a record with the same step and the same keys.
    """
    kept: list[dict[str, Any]] = []
    for record in records:
        step, keys = record["step"], record.keys() - {"step", "tokens"}
        if kept and kept[-1]["step"] > step:
            while kept and kept[-1]["step"] >= step:
                kept.pop()
        first = len(kept)
        while first and kept[first - 1]["step"] == step:
            first -= 1
        kept[first:] = [r for r in kept[first:] if not keys & r.keys()] + [record]
    return kept


def _evaluation(directory: Path) -> dict[str, Any]:
    try:
        found = json.loads((directory / "evaluation.json").read_bytes())
    except (OSError, ValueError):  # not evaluated, or not to the end
        return {}
    return found if isinstance(found, dict) else {}


def _planned(path: Path) -> list[str]:
    try:
        return [point["name"] for point in json.loads((path / "sweep.json").read_text(encoding="utf-8"))["points"]]
    except (OSError, ValueError, KeyError, TypeError):
        return []


def widest_window(run: Run) -> int:
    """The largest `model.window_chunks` of the layers."""
    return max(run.model.window_per_letter)


def _distinct(runs: list[Run]) -> list[Run]:
    """The runs with distinct names: runs with equal names are named by their directories."""
    names = [r.name for r in runs]
    return [r if names.count(r.name) == 1 else dataclasses.replace(r, name=str(r.directory)) for r in runs]


def differences(runs: Sequence[Run]) -> dict[str, list[Any]]:
    """Configuration keys whose values are not the same in all runs, with the value of each run."""
    flat = [flatten(r.config) for r in runs]
    keys = sorted({key for f in flat for key in f})
    return {
        key: [f.get(key) for f in flat]
        for key in keys
        if not key.startswith(NAMES) and len({repr(f.get(key)) for f in flat}) > 1
    }


def smoothed(values: Sequence[float]) -> list[float]:
    """Moving average over a twentieth of the values, centred. Near the ends it is narrower, and still symmetric."""
    half, out = len(values) // 40, []
    for i in range(len(values)):
        reach = min(half, i, len(values) - 1 - i)
        out.append(statistics.fmean(values[i - reach : i + reach + 1]))
    return out


def pareto(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the points that no other point beats in both numbers, sorted by the first. Less is better."""
    front, best = [], float("inf")
    for i in sorted(range(len(points)), key=lambda i: points[i]):
        if points[i][1] < best:
            front.append(i)
            best = points[i][1]
    return front
