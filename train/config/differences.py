"""What differs between the configuration that a checkpoint or a run directory holds and the one of now.

Every way to begin uses this one comparison: going on by itself (`resume=auto`), from a path (`resume=PATH`), with the
weights of another run (`init_from=RUN`, stages), and in a directory that is in use already.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from train.config.conversion import defaults, flatten
from train.config.schema import TrainConfig

# Sections and keys that may differ between two starts of one run: they do not change what is computed, except for its
# precision, or something else compares what they stand for (the fingerprints of data and tokenizer).
CHANGEABLE = (
    "logging",
    "checkpoint",
    "parallel",
    "perf",
    "memory",
    "resume",
    "init_from",
    "dry_run",
    "dry_run_ranks",
    "dry_run_gpu",
    "run.name",  # a directory that was moved is the same run
    "run.root",
    "run.device",
    "run.log_every",
    "run.eval_every",
    "run.eval_samples",
    "run.stop_at_step",
    "run.max_minutes",
    "run.steps",
    "run.max_bad_steps",
    "run.skip_samples",
    "run.spike_factor",
    "run.samples_per_micro_batch",
    "data.path",  # data are what they hold, not where they lie
    "data.validation_path",
    "data.cache_dir",
    "data.cache_gb",
    "data.prefetch_samples",
    "data.retries",
    "data.verify",
    "data.accept_changes",
    "data.tokenizer",  # a checkpoint knows the tokenizer that it was trained with
    "model.attention_backend",
)
# Keys that tell where a call runs and how it is watched. A resumed run does not report them as changes.
UNREPORTED = (
    "logging",
    "checkpoint",
    "resume",
    "init_from",
    "dry_run",
    "dry_run_ranks",
    "dry_run_gpu",
    "run.name",
    "run.root",
    "run.device",
    "run.log_every",
    "run.stop_at_step",
    "run.max_minutes",
    "data.cache_dir",
    "data.cache_gb",
    "data.prefetch_samples",
    "data.retries",
    "data.verify",
    "data.accept_changes",
)
# What a run that resumes another run's checkpoint must share with it: the model, and what the stage trains.
SAME_MODEL = ("model", "stage.kind")
_PLACES = ("path", "validation_path")  # of a corpus of a mixture
_DEFAULTS = flatten(defaults(TrainConfig))

Differences = dict[str, tuple[Any, Any]]  # dotted key -> (before, now)


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> Differences:
    """The keys whose values differ, in order. `before`: nested values as saved; `now`: all keys, dotted.

    A key that is newer than what was saved had its default. Sections that were not saved are not compared.
    """
    found: Differences = {}
    for key in sorted(now):
        old = _saved(before, key, now[key])
        if old != now[key]:
            found[key] = (old, now[key])
    return found


def _saved(saved: Mapping[str, Any], key: str, now: Any) -> Any:
    """The value of a dotted key in saved values; `now` where nothing is known about it."""
    section, _, rest = key.partition(".")
    if rest and not saved.get(section):
        return now
    value: Any = saved
    for part in key.split("."):
        if value is None:  # a group that was null had none of its keys
            return None
        if not isinstance(value, Mapping):
            return now
        if part not in value:
            return _DEFAULTS.get(key, now)
        value = value[part]
    return value


def under(key: str, chosen: Iterable[str]) -> bool:
    """Whether a dotted key is one of `chosen`, or in one of its sections."""
    return any(key == name or key.startswith(f"{name}.") for name in chosen)


def of_another_run(found: Differences) -> Differences:
    """The differences that make it another run, or none. Where data lie is not one of them, what they are is."""
    return {
        key: pair
        for key, pair in found.items()
        if not under(key, CHANGEABLE)
        and not (key == "data.corpora" and without_places(pair[0]) == without_places(pair[1]))
    }


def without_places(corpora: Any) -> Any:
    """The corpora of a mixture (`data.corpora` as plain values) without where they lie."""
    return [
        {name: value for name, value in corpus.items() if name not in _PLACES}
        if isinstance(corpus, Mapping)
        else corpus
        for corpus in corpora or ()
    ]


def in_words(found: Differences, most: int = 4) -> str:
    """`KEY was OLD and is now NEW, ...` for at most so many keys, and the number of the others."""
    shown = ", ".join(f"{key} was {old} and is now {new}" for key, (old, new) in list(found.items())[:most])
    return shown + (f" and {len(found) - most} more" if len(found) > most else "")


def in_arrows(found: Differences) -> str:
    """`KEY OLD -> NEW, ...` for a line that lists all."""
    return ", ".join(f"{key} {old} -> {new}" for key, (old, new) in found.items())
