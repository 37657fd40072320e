"""`python -m train.export RUN format=hf|safetensors out=DIR [step=N] [dtype=bf16|fp32]`: export a run's weights.

    hf            a directory that transformers loads: Qwen3ForCausalLM where every layer is full attention, otherwise
                  with the model code beside the weights (`trust_remote_code=True`); tokenizer, generation settings and
                  a model card with the facts of the training
    safetensors   the same tensors under this project's names, with the run's config.yaml

RUN is a run directory; `step` picks one of its checkpoints. One tensor is in memory at a time. Rows of vocabulary
padding are left out. Needs no GPU, no process group and no transformers.
"""

from __future__ import annotations

import sys
from pathlib import Path

from data_pipeline import commands
from train.config.conversion import from_words
from train.config.errors import ConfigError
from train.config.run_directory import directory_argument
from train.config.schema import USER_ERRORS
from train.hf.export import ExportConfig, export, open_run

USAGE = "python -m train.export RUN out=DIR [format=hf|safetensors] [step=N] [dtype=bf16|fp32]"


def _parse(arguments: list[str]) -> tuple[Path, ExportConfig]:
    directory = directory_argument(arguments, USAGE)
    if not any(word.startswith("out=") for word in arguments):
        raise ConfigError(f"out must be given; usage: {USAGE}")
    return directory, from_words(ExportConfig, arguments[1:])


def _run(arguments: list[str]) -> None:
    directory, config = _parse(arguments)
    run = open_run(directory, config.step)
    print(f"wrote {', '.join(export(run, config))} to {config.out}, from {run.checkpoint}")


def main(arguments: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    return commands.run(lambda: _run(arguments), arguments, USER_ERRORS)


if __name__ == "__main__":
    sys.exit(main())
