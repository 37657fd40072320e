"""Make a run directory from a Hugging Face checkpoint, or print the model settings that fit it.

    python -m train.import_hf HF_DIR                        the model settings that fit it, as overrides
    python -m train.import_hf HF_DIR out=RUN [layer_pattern=KKKF chunk_size=8 ...] [summary_from=mean]
                              [allow_pickle=false]          a run directory: sample it, export it, init_from=RUN

Training reads a checkpoint directly, without this command: `init_from=hf:HF_DIR`, each rank its own slices.
"""

from __future__ import annotations

import json
import shlex
import sys
import typing
from dataclasses import asdict, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

from data_pipeline import commands
from ksa_model.config import ModelConfig
from train.config.conversion import expand_home, from_mapping, from_text, from_words, key_values
from train.config.errors import ConfigError
from train.config.quoting import override
from train.config.run_directory import directory_argument
from train.config.schema import USER_ERRORS
from train.hf.files import HfDirectory
from train.hf.import_weights import MEAN, import_run
from train.hf.tokenizers import find_tokenizer

USAGE = (
    "python -m train.import_hf HF_DIR [out=RUN] [layer_pattern=... and other model keys] [summary_from=mean] "
    "[allow_pickle=false]"
)


@dataclass(frozen=True)
class ImportOptions:
    """The keys of the command besides those of the model."""

    out: str = ""  # the run directory to write; nothing: print the model's settings
    summary_from: str = MEAN
    allow_pickle: bool = False


def _run(arguments: list[str]) -> str:
    directory, hints = str(directory_argument(arguments, USAGE)), typing.get_type_hints(ModelConfig)
    words = key_values(arguments[1:], sorted({*hints, *(f.name for f in fields(ImportOptions))}), ConfigError)
    options = from_words(ImportOptions, [f"{key}={text}" for key, text in words if key not in hints])
    changes = {key: from_text(hints[key], text, f"model.{key}", ConfigError) for key, text in words if key in hints}
    source = HfDirectory(directory, options.allow_pickle).spec()
    model = from_mapping(ModelConfig, asdict(source.config) | changes, "model.")
    if not options.out:
        tokenizer = find_tokenizer(Path(directory))
        return overrides(model) + ("" if tokenizer is None else f" {shlex.quote(f'data.tokenizer={tokenizer}')}")
    out = Path(expand_home(options.out))
    checkpoint, unused = import_run(directory, out, model, options.summary_from, options.allow_pickle)
    train_from = f"train from it: {override('init_from', str(out))}"
    if source.mix_coeff_in(model) != 1:
        train_from = f"it is from the middle of annealing (mix_coeff={source.mix_coeff:g}), so no run can begin with it"
    return f"wrote {checkpoint}; sample it: python -m train.generate {shlex.quote(str(out))}; {train_from}{unused}"


def main(arguments: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    return commands.run(lambda: print(_run(arguments)), arguments, USER_ERRORS)


def overrides(model: ModelConfig) -> str:
    """The settings of a model as command-line overrides."""
    values = {f.name: getattr(model, f.name) for f in fields(model) if f.name != "attention_backend"}
    return " ".join(shlex.quote(f"model.{key}={_override(value)}") for key, value in values.items())


def _override(value: Any) -> str:
    """A value in the grammar of Hydra's overrides, whose groups have keys without quotes."""
    if is_dataclass(value):
        chosen = [f for f in fields(value) if getattr(value, f.name) != f.default]
        return "{" + ",".join(f"{f.name}:{_override(getattr(value, f.name))}" for f in chosen) + "}"
    return json.dumps(list(value) if isinstance(value, tuple) else value, separators=(",", ":")).strip('"')


if __name__ == "__main__":
    sys.exit(main())
