"""`python -m train.export RUN format=hf|safetensors out=DIR [step=N] [dtype=bf16|fp32]`: export a run's weights.

    hf            a directory that transformers loads: a Llama, Mistral, Qwen2 or Qwen3 where one of these computes the
                  model, otherwise with the model code beside the weights (`trust_remote_code=True`); tokenizer,
                  generation settings and a model card with the facts of the training
    safetensors   the same tensors under this project's names, with the run's config.yaml

RUN is a run directory; `step` picks one of its checkpoints. One tensor is in memory at a time. Rows of vocabulary
padding are left out. Needs no GPU, no process group and no transformers.
"""

from __future__ import annotations

import sys
from pathlib import Path

from train.config.conversion import from_words
from train.config.errors import ConfigError
from train.config.schema import USER_ERRORS
from train.distributed.signals import BAD_INPUT
from train.hf.export import ExportConfig, export, open_run


def _parse(arguments: list[str]) -> tuple[Path, ExportConfig]:
    if (
        not arguments
        or ("=" in arguments[0] and not Path(arguments[0]).is_dir())
        or not any(a.startswith("out=") for a in arguments)
    ):
        raise ConfigError(
            "usage: python -m train.export RUN out=DIR [format=hf|safetensors] [step=N] [dtype=bf16|fp32]"
        )
    return Path(arguments[0]), from_words(ExportConfig, arguments[1:])


def main(arguments: list[str] | None = None) -> int:
    try:
        directory, config = _parse(sys.argv[1:] if arguments is None else arguments)
        run = open_run(directory, config.step)
        print(f"wrote {', '.join(export(run, config))} to {config.out}, from {run.checkpoint}")
    except (*USER_ERRORS, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return BAD_INPUT
    return 0


if __name__ == "__main__":
    sys.exit(main())
