"""Recall during training: the probes of `run.probe_every`, as a run's records hold them, and what they cost."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeGuard

import numpy as np

from train.config.sections import RunConfig
from train.evaluate.plots import points_by_distance
from train.logs.metrics import is_number
from train.report.records import Run

By = Literal["length", "distance"]
Key = tuple[str, int]  # a task, and tokens of a probe or between the fact and the answer


@dataclass(frozen=True)
class Probed:
    """What a run recalled at one step. What the run did not record is None or absent."""

    tokens: float | None  # trained on before it
    gpu_seconds: float | None  # trained for before it; see `TrainingTime`
    scores: Mapping[By, Mapping[Key, float]]  # share of correct answer tokens; by distance over all lengths


@dataclass(frozen=True)
class TrainingTime:
    """How long a run had trained at each of its reports.

    `step_seconds` of a report times the steps since the report before it; so a step that ran again after a resume
    counts once. It includes waiting for data, but no validation, checkpoint or probe, for which the trainer stops its
    clock. `gpu_seconds` is that times the ranks, of which each has one GPU.
    """

    steps: Sequence[int]  # the first: where the counting starts
    seconds: Sequence[float]
    gpu_seconds: Sequence[float]

    def gpu_seconds_at(self, step: int) -> float | None:
        """GPU seconds before the end of `step`, with equally long steps between two reports and after the last one."""
        if len(self.steps) < 2 or step < self.steps[0]:
            return None
        if step <= self.steps[-1]:
            return float(np.interp(step, self.steps, self.gpu_seconds))
        rate = (self.gpu_seconds[-1] - self.gpu_seconds[-2]) / (self.steps[-1] - self.steps[-2])
        return self.gpu_seconds[-1] + rate * (step - self.steps[-1])


@dataclass(frozen=True)
class Cost:
    """What the probes of a run cost, in seconds of the clock (of all ranks at once)."""

    evaluations: int
    probe_seconds: float
    training_seconds: float

    @property
    def share(self) -> float:
        """Of probes in the time of probes and training."""
        total = self.probe_seconds + self.training_seconds
        return self.probe_seconds / total if total else 0.0


def training_time(run: Run) -> TrainingTime:
    """The training time of a run, from its reports."""
    reports = [r for r in run.records if _is_finite(r.get("step_seconds"))]
    start = _first_step(run)
    steps, seconds, gpu_seconds = [start], [0.0], [0.0]
    for report in reports:
        if report["step"] > steps[-1]:
            spent = report["step_seconds"] * (report["step"] - steps[-1])
            steps.append(report["step"])
            seconds.append(seconds[-1] + spent)
            gpu_seconds.append(gpu_seconds[-1] + spent * (report.get("ranks") or _smallest_world(run)))
    return TrainingTime(steps, seconds, gpu_seconds)


def probed(run: Run) -> list[Probed]:
    """What the run recalled, sorted by step; empty for a run without probes."""
    found, time = [], training_time(run)
    for record in run.records:
        by_length, by_distance = _scores(record.get("probes"))
        if by_length or by_distance:
            tokens = record.get("tokens")
            found.append(
                Probed(
                    tokens if _is_finite(tokens) else None,
                    time.gpu_seconds_at(record["step"]),
                    {"length": by_length, "distance": by_distance},
                )
            )
    return found


def keys_of(found: Sequence[Probed], by: By) -> list[Key]:
    """Every task and length, or task and distance: tasks in the order of the records, numbers ascending."""
    keys = dict.fromkeys(key for p in found for key in p.scores[by])
    tasks = list(dict.fromkeys(task for task, _ in keys))
    return sorted(keys, key=lambda key: (tasks.index(key[0]), key[1]))


def curve(
    found: Sequence[Probed], by: By, key: Key, x: Callable[[Probed], float | None]
) -> tuple[list[float], list[float]]:
    """(x, recall) of every evaluation that has both."""
    points = [(at, p.scores[by][key]) for p in found if key in p.scores[by] and (at := x(p)) is not None]
    return [at for at, _ in points], [recall for _, recall in points]


def reached(found: Sequence[Probed], key: Key, threshold: float) -> Probed | None:
    """The evaluation from which on recall of a task and length is at or above `threshold` up to the last one."""
    first = None
    for p in found:
        recall = p.scores["length"].get(key)
        if recall is not None and recall < threshold:
            first = None
        elif recall is not None and first is None:
            first = p
    return first


def cost(run: Run) -> Cost | None:
    """What the probes of a run cost; None if it did not record that."""
    spent = [r["probe_seconds"] for r in run.records if "probes" in r and _is_finite(r.get("probe_seconds"))]
    return Cost(len(spent), math.fsum(spent), training_time(run).seconds[-1]) if spent else None


def remarks(run: Run) -> list[str]:
    """What a reader of the GPU seconds of a run with probes has to know."""
    time, found = training_time(run), []
    if not probed(run):
        return []
    if len(time.steps) < 2:
        return ["recorded no step_seconds, so its GPU seconds are not known"]
    if time.steps[0]:
        found.append(f"GPU seconds count from step {time.steps[0]} on; there is no record of the time before it")
    if any("ranks" not in r for r in run.records if "step_seconds" in r):
        found.append(
            "not all records have the number of ranks; in those without it, GPU seconds count "
            f"parallel.tensor x parallel.context = {_smallest_world(run)}"
        )
    return found


def _first_step(run: Run) -> int:
    """The step from which on there are reports: 0, but for a run that began at a step of another run's checkpoint."""
    first = next(r["step"] for r in run.records if "loss" in r or "skipped_steps" in r)
    return max(0, first - run.config["run"].get("log_every", RunConfig.log_every))


def _smallest_world(run: Run) -> int:
    parallel = run.config.get("parallel", {})
    return parallel.get("tensor", 1) * parallel.get("context", 1)


def _scores(probes: Any) -> tuple[dict[Key, float], dict[Key, float]]:
    """Recall by task and length, and by task and distance, of the `probes` of a record; without what is damaged."""
    by_length: dict[Key, float] = {}
    by_distance: dict[Key, float] = {}
    for task, lengths in _items(probes):
        binned = {}
        for length, scores in _items(lengths):
            if not (length.isdecimal() and isinstance(scores, dict)):
                continue
            recall = scores.get("token_accuracy")
            if _is_finite(recall):
                by_length[task, int(length)] = recall
            bins = scores.get("by_distance")
            binned[length] = {"by_distance": [b for b in bins if _is_bin(b)] if isinstance(bins, list) else []}
        by_distance |= {(task, distance): recall for distance, recall in points_by_distance([binned]).items()}
    return by_length, by_distance


def _items(value: Any) -> list[tuple[str, Any]]:
    return list(value.items()) if isinstance(value, dict) else []


def _is_bin(value: Any) -> bool:
    """Whether this is [distance, recall, answers], with answers."""
    return isinstance(value, list) and len(value) == 3 and all(map(_is_finite, value)) and value[2] > 0


def _is_finite(value: Any) -> TypeGuard[float]:
    return is_number(value) and math.isfinite(value)
