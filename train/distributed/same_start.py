"""What all ranks of a job must share before they train together: settings, code, and the order of the data.

Ranks with different learning rates or RoPE bases would train on without an error and give another model.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import platform
from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

from train.config.conversion import flatten, to_mapping
from train.config.differences import under, without_places
from train.config.schema import TrainConfig
from train.distributed.ranks import Ranks

# Keys that may differ from rank to rank: where something lies on a host, and what only one rank uses. What the data
# are is compared once they are open. A chain gives each rank the time that it has left.
_OF_A_HOST = (
    "logging",
    "run.max_minutes",
    "data.path",
    "data.validation_path",
    "data.tokenizer",
    "data.cache_dir",
    "data.cache_gb",
    "data.prefetch_samples",
    "data.retries",
    "data.verify",
)
_SAME_DATA = "give every rank the same data (data.path, data.tokenizer, data.cache_dir)"
_LIBRARIES = ("torch", "deepspeed", "megatron-core", "numpy", "triton")
_PACKAGES = ("train", "ksa_model", "data_pipeline")
_ROOT = Path(__file__).resolve().parent.parent.parent


def check_settings(ranks: Ranks, config: TrainConfig) -> None:
    """Raise `ConfigError` on every rank unless all have the same configuration, code and libraries. Collective."""
    ranks.check_same(
        settings(config),
        "which compares its settings with those of the others",
        "start all ranks with the same command, from the same code and environment",
    )


def check_data(ranks: Ranks, fingerprint: str) -> None:
    """Raise `ConfigError` on every rank unless all have the same documents. Collective; waits for preparation."""
    ranks.check_same({"data.fingerprint": fingerprint}, "which is still preparing its data", _SAME_DATA)


def check_plan(ranks: Ranks, plan: Mapping[str, Any]) -> None:
    """Raise `ConfigError` on every rank unless all have the same samples in the same order. Collective.

    `plan` is the state of a loader at its start.
    """
    facts = {"data plan": plan["fingerprint"]}
    facts |= {f"data plan, {name}": value for name, value in plan["identity"].items()}
    ranks.check_same(facts, "which is still planning its samples", _SAME_DATA)


def settings(config: TrainConfig) -> dict[str, Any]:
    """What is compared: dotted keys with their values, the code and the versions of libraries."""
    flat = {key: value for key, value in flatten(to_mapping(config)).items() if not under(key, _OF_A_HOST)}
    flat["data.corpora"] = without_places(flat["data.corpora"])
    return flat | versions()


@cache
def versions() -> dict[str, str]:
    """The versions of Python and the libraries, and a hash of the project's own code."""
    found = {"version of python": platform.python_version(), "code": code_version()}
    for name in _LIBRARIES:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[f"version of {name}"] = importlib.metadata.version(name)
    return found


def code_version() -> str:
    """A hash of the source files of the packages that train, the same wherever they lie."""
    digest = hashlib.sha256()
    for package in _PACKAGES:
        for path in sorted((_ROOT / package).rglob("*.py")):
            content = path.read_bytes()
            digest.update(f"{path.relative_to(_ROOT).as_posix()} {len(content)}\n".encode() + content)
    return digest.hexdigest()[:12]
