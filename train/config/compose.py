"""Hydra's part of the configuration: `configs/` laid over the defaults of the dataclasses.

The dataclasses own every default. They are given to Hydra as the config `dataclass_defaults`, which heads the defaults
list of `configs/config.yaml`; so every key exists, `--cfg job` shows it and `key=value` overrides it, and YAML names
only what it changes.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf

from train.config.conversion import defaults
from train.config.schema import TrainConfig

CONFIGS = Path(__file__).resolve().parent.parent.parent / "configs"


def register_defaults() -> None:
    """Give Hydra the defaults of the dataclasses; call it before Hydra composes `configs/config.yaml`."""
    ConfigStore.instance().store(name="dataclass_defaults", node=defaults(TrainConfig))


def compose(overrides: Iterable[str]) -> dict[str, Any]:
    """The configuration of `python -m train OVERRIDES` as plain values. Raises what Hydra and OmegaConf raise."""
    register_defaults()
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return OmegaConf.to_container(hydra_compose("config", list(overrides)), resolve=True)  # type: ignore[return-value]
