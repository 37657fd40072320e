"""The directory of a run: what is written at the start, and whether a later start may continue in it."""

from __future__ import annotations

import os
from pathlib import Path

import yaml

from data_pipeline import TrainingData
from data_pipeline.store.files import atomic_write
from data_pipeline.text.end_token import copy_tokenizer, describe
from train.config.conversion import flatten, to_mapping
from train.config.errors import ConfigError
from train.config.schema import TrainConfig, from_saved

# Sections and keys that may differ between two starts in one run directory: they do not change what is computed, except
# for its precision.
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
    "data.cache_dir",
    "data.cache_gb",
    "data.prefetch_samples",
    "data.retries",
    "data.verify",
    "data.accept_changes",
    "data.tokenizer",  # a checkpoint knows the tokenizer that it was trained with
    "model.attention_backend",
)


def read_config(directory: Path) -> TrainConfig:
    """The configuration of the run in `directory`."""
    path = directory / "config.yaml"
    if not path.is_file():
        raise ConfigError(f"{path} is missing: {directory} is not the directory of a run")
    return _read(path)


def check(directory: Path, config: TrainConfig) -> None:
    """Raise `ConfigError` if the run directory cannot be written, or holds a run with another configuration."""
    existing = next(parent for parent in (directory, *directory.absolute().parents) if parent.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise ConfigError(
            f"run.root={config.run.root} and run.name={config.run.name}: {existing} is not a directory that can be "
            "written"
        )
    path = directory / "config.yaml"
    if not path.exists():
        return
    before = flatten(to_mapping(_read(path)))  # keys that are newer than the run have their defaults
    now = flatten(to_mapping(config))
    before["model.vocab_size"] = now["model.vocab_size"]  # filled in from the tokenizer
    changed = [
        key
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key) and not any(key == c or key.startswith(f"{c}.") for c in CHANGEABLE)
    ]
    if changed:
        shown = ", ".join(f"{key} was {before.get(key)} and is now {now.get(key)}" for key in changed[:4])
        more = f" and {len(changed) - 4} more" if len(changed) > 4 else ""
        raise ConfigError(
            f"{directory} holds a run with another configuration: {shown}{more}; choose another run.name, or remove "
            "the directory"
        )


def _read(path: Path) -> TrainConfig:
    """The configuration in a config.yaml, or `ConfigError` that names the file."""
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ConfigError("no keys and values")
        return from_saved(found)
    except (OSError, ValueError, yaml.YAMLError) as error:  # all of USER_ERRORS are values
        reason = " ".join(str(error).split())
        raise ConfigError(
            f"{path} does not hold the configuration of a run ({reason}); remove it, and the next start writes it"
        ) from error


def write(directory: Path, config: TrainConfig, data: TrainingData) -> None:
    """Write the tokenizer and the configuration into the run directory, each completely or not at all."""
    directory.mkdir(parents=True, exist_ok=True)
    text = yaml.safe_dump(to_mapping(config), sort_keys=False)
    data_config = config.data
    description = None if data_config.tokenizer is None else describe(data_config.tokenizer, data_config.end_token)
    copy_tokenizer(data.tokenizer_path, directory / "tokenizer.model", description or None, data_config.end_token)
    with atomic_write(directory / "config.yaml") as file:
        file.write(text.encode())


def make_directory(key: str, path: Path) -> None:
    """Create the directory that `key` names, with its parents. Call it before the work whose results go there."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{key}={path} cannot be created: {error.strerror}") from error
