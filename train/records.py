"""What finished or half-finished runs tell from the files beside their checkpoints alone: no weights, no network."""

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

from ksa_model import layout
from ksa_model.config import ModelConfig, ModelConfigError
from train.batches import model_flops
from train.config import ConfigError, flatten, from_mapping
from train.evaluation_plots import points_by_distance

CONTEXT = 131_072  # tokens: where cache sizes are compared
# Keys that name a run or say where it wrote, not what it was.
NAMES = ("run.name", "run.root", "logging", "data.cache_dir", "resume", "checkpoint")


class ReportError(ConfigError):
    """Nothing to report on; the message names the directories and what they lack."""


@dataclass(frozen=True)
class Run:
    """One run as its own files tell it."""

    name: str
    directory: Path
    config: dict[str, Any]
    model: ModelConfig
    records: list[dict[str, Any]]
    remarks: tuple[str, ...] = ()
    evaluation: dict[str, Any] = dataclasses.field(default_factory=dict)  # what `python -m train.evaluate` left

    def series(self, key: str) -> tuple[list[float], list[float]]:
        """(tokens, values) of the records that hold `key`."""
        found = [(r["tokens"], r[key]) for r in self.records if key in r]
        return [x for x, _ in found], [y for _, y in found]

    @property
    def final_loss(self) -> float:
        """The last held-out loss, or, where there is none, the mean training loss over the last tenth."""
        held_out = self.series("validation_loss")[1]
        if held_out:
            return held_out[-1]
        losses = self.series("loss")[1]
        return statistics.fmean(losses[-max(1, len(losses) // 10) :])

    @property
    def has_held_out(self) -> bool:
        return bool(self.series("validation_loss")[1])

    @property
    def tokens_per_second(self) -> float:
        """Median; the first records, which hold warm-up, are left out where there are more than four."""
        speeds = self.series("tokens_per_second")[1]
        return statistics.median(speeds[2:] if len(speeds) > 4 else speeds)

    @property
    def peak_memory(self) -> float | None:
        """Bytes of device memory at the most, where the run recorded it."""
        seen = self.series("peak_gib")[1]
        return max(seen) * 2**30 if seen else None

    @property
    def cache_bytes(self) -> int:
        return self.model.cache_bytes(CONTEXT)

    @property
    def visible_keys(self) -> float:
        """Keys a token sees, mean over its sample (as one document) and the layers."""
        length = self.config["seq_len"]
        pack = one_document(self.model, length)
        counts = [pack.visible_keys(x.mixer, x.window_chunks, self.model.window_tokens) for x in self.model.layers]
        return sum(counts) / len(counts) / length

    @property
    def window(self) -> int:
        """Text tokens a KSA layer sees beside the summaries, its own chunk included."""
        return (max(self.model.window_per_letter) + 1) * self.model.chunk_size

    def probes(self) -> list[dict[str, Any]]:
        """{"task", "distance", "accuracy"} of every task and distance that was evaluated."""
        return [
            {"task": task, "distance": distance, "accuracy": accuracy}
            for task, scores in self.evaluation.get("tasks", {}).items()
            for distance, accuracy in points_by_distance([scores]).items()
        ]


def one_document(model: ModelConfig, length: int) -> layout.SequenceLayout:
    """The layout of a sample that is one document of `length` tokens."""
    return layout.build(np.array([0]), np.array([length]), length, model.chunk_size, model.summary_tokens)


def flops_per_sample(model: ModelConfig, length: int) -> int:
    """Training FLOPs of one sample that is one document, in the trainer's own count."""
    return model_flops(model, one_document(model, length))


# -- reading ----------------------------------------------------------------------------------------------------------


def find_runs(paths: Sequence[Path]) -> tuple[list[Run], list[str]]:
    """Every readable run at or below `paths`, and a line about each that is not; `ReportError` if none is."""
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
    records, torn = _records(directory / "metrics.jsonl")
    if not any("loss" in r for r in records):
        raise ReportError(f"{directory} has no record of a loss in metrics.jsonl yet")
    try:
        config = yaml.safe_load((directory / "config.yaml").read_text(encoding="utf-8"))
        model = from_mapping(ModelConfig, config["model"], "model.")
        steps, _ = config["run"]["steps"], config["seq_len"]
    except FileNotFoundError:
        raise ReportError(f"{directory} has no config.yaml") from None
    except (OSError, yaml.YAMLError, KeyError, TypeError, ConfigError, ModelConfigError) as error:
        raise ReportError(f"{directory / 'config.yaml'} cannot be used: {' '.join(str(error).split())}") from None
    remarks = []
    if torn:
        remarks.append(
            "a line of metrics.jsonl could not be read and is left out"
            if torn == 1
            else f"{torn} lines of metrics.jsonl could not be read and are left out"
        )
    last = max(r["step"] for r in records)
    if last < steps:
        remarks.append(f"stands at step {last} of {steps}")
    return Run(name, directory, config, model, records, tuple(remarks), _evaluation(directory))


def _evaluation(directory: Path) -> dict[str, Any]:
    try:
        found = json.loads((directory / "evaluation.json").read_bytes())
    except (OSError, ValueError):  # not evaluated, or not to its end
        return {}
    return found if isinstance(found, dict) else {}


def _records(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The records of a metrics.jsonl, and how many lines are none (a run that was killed leaves half a line)."""
    if not path.is_file():
        return [], 0
    records, torn = [], 0
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
            whole = isinstance(record, dict) and {"step", "tokens"} <= record.keys()
        except json.JSONDecodeError:
            whole = False
        if whole:
            records.append(record)
        else:
            torn += bool(line.strip())
    return records, torn


def _planned(path: Path) -> list[str]:
    try:
        return [point["name"] for point in json.loads((path / "sweep.json").read_text(encoding="utf-8"))["points"]]
    except (OSError, ValueError, KeyError, TypeError):
        return []


def widest_window(run: Run) -> int:
    """`model.window_chunks` of the layer with the most."""
    return max(run.model.window_per_letter)


def _distinct(runs: list[Run]) -> list[Run]:
    """Names that tell the runs apart: where two are equal, their directories."""
    names = [r.name for r in runs]
    return [r if names.count(r.name) == 1 else dataclasses.replace(r, name=str(r.directory)) for r in runs]


def differences(runs: Sequence[Run]) -> dict[str, list[Any]]:
    """Configuration keys that are not the same in all runs -> the value of each run."""
    flat = [flatten(r.config) for r in runs]
    keys = sorted({key for f in flat for key in f})
    return {
        key: [f.get(key) for f in flat]
        for key in keys
        if not key.startswith(NAMES) and len({repr(f.get(key)) for f in flat}) > 1
    }


def smoothed(values: Sequence[float]) -> list[float]:
    """Mean over a twentieth of the values around each; around the first and last, over what there is on both sides."""
    half, out = len(values) // 40, []
    for i in range(len(values)):
        reach = min(half, i, len(values) - 1 - i)
        out.append(statistics.fmean(values[i - reach : i + reach + 1]))
    return out


def pareto(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the points that no other beats in both numbers (less is better), by the first number."""
    front, best = [], float("inf")
    for i in sorted(range(len(points)), key=lambda i: points[i]):
        if points[i][1] < best:
            front.append(i)
            best = points[i][1]
    return front
