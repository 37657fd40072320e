"""The directory of a run: what is written at the start, and whether a later start may continue in it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import yaml

from data_pipeline import TrainingData
from data_pipeline.store.files import atomic_write
from data_pipeline.text.end_token import copy_tokenizer, describe
from train.config.conversion import flatten, to_mapping
from train.config.differences import differences, in_words, of_another_run
from train.config.errors import ConfigError
from train.config.schema import TrainConfig, from_saved

CONFIG = "config.yaml"  # its name inside the run directory


def read_config(directory: Path) -> TrainConfig:
    """The configuration of the run in `directory`."""
    path = directory / CONFIG
    if not path.is_file():
        raise ConfigError(f"{path} is missing: {directory} is not the directory of a run")
    return _read(path)


def check(directory: Path, config: TrainConfig) -> None:
    """Raise `ConfigError` if the run directory cannot be written, or holds a run with another configuration."""
    try:
        existing = next(p for p in (directory, *directory.absolute().parents) if p.exists() or p.is_symlink())
    except OSError as error:  # a name that is too long, a file system that does not answer
        raise ConfigError(
            f"run.root={config.run.root} and run.name={config.run.name}: the directory cannot be reached "
            f"({error.strerror}): choose another place or a shorter name"
        ) from error
    if not existing.exists():
        raise ConfigError(
            f"run.root={config.run.root} and run.name={config.run.name}: {existing} is a link to "
            f"{os.readlink(existing)}, which is not there: create or mount it, or remove the link"
        )
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise ConfigError(
            f"run.root={config.run.root} and run.name={config.run.name}: {existing} is not a directory that can be "
            "written"
        )
    path = directory / CONFIG
    if not path.exists():
        return
    saved = to_mapping(_read(path))  # keys that are newer than the run have their defaults
    now = flatten(to_mapping(config))
    saved["model"]["vocab_size"] = now["model.vocab_size"]  # filled in from the tokenizer
    if changed := of_another_run(differences(saved, now)):
        text = path.read_text(encoding="utf-8")
        if changed.keys() - flatten(yaml.safe_load(text)).keys() or not text.endswith("\n"):
            raise ConfigError(
                f"{path} ends early, or an earlier version wrote it: {in_words(changed)}. If it is damaged, rename it, "
                "and the next start writes it again; if not, set them back, or choose another run.name for a new run"
            )
        raise ConfigError(
            f"{directory} holds a run with another configuration: {in_words(changed)}; choose another run.name for a "
            "new run, or set them back to go on with this one"
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
            f"{path} does not hold the configuration of a run ({reason}); rename it, and the next start writes it again"
        ) from error


def write(directory: Path, config: TrainConfig, data: TrainingData) -> None:
    """Write the tokenizer and the configuration into the run directory, each completely or not at all."""
    directory.mkdir(parents=True, exist_ok=True)
    text = yaml.safe_dump(to_mapping(config), sort_keys=False)
    data_config = config.data
    description = None if data_config.tokenizer is None else describe(data_config.tokenizer, data_config.end_token)
    copy_tokenizer(data.tokenizer_path, directory / "tokenizer.model", description or None, data_config.end_token)
    with atomic_write(directory / CONFIG) as file:
        file.write(text.encode())


def make_directory(key: str, path: Path) -> None:
    """Create the directory that `key` names, with its parents. Call it before the work whose results go there."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{key}={path} cannot be created: {error.strerror}") from error


def directory_argument(arguments: Sequence[str], usage: str) -> Path:
    """The directory that the first word of a command names. Raises `ConfigError` with the usage where there is none."""
    if not arguments or ("=" in arguments[0] and not Path(arguments[0]).is_dir()):
        raise ConfigError(f"usage: {usage}")
    return named_directory(arguments[0], usage)


def named_directory(text: str, usage: str) -> Path:
    """`text` as a path; an empty one, as an unset variable of a shell leaves it, would be the working directory."""
    if not text.strip():
        raise ConfigError(f"{text!r} names no directory; usage: {usage}")
    return Path(text)
