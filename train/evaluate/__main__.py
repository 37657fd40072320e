"""`python -m train.evaluate RUN|HF_DIR [KEY=VALUE ...]`: what a trained model remembers, and its loss by position.

    python -m train.evaluate runs/default                                all tasks, at 1x, 2x and 4x the training length
    python -m train.evaluate runs/default tasks=needle,multikey lengths=2048,8192 samples=32 depths=11

See `train.evaluate.evaluation` for the tasks. Writes `evaluation.json` and pictures into the run directory, or into
`out=`.
"""

from __future__ import annotations

import sys
from pathlib import Path

from data_pipeline.cli import printing
from data_pipeline.store.files import write_json
from train.config.conversion import expand_home, from_words
from train.config.errors import ConfigError
from train.config.run_directory import make_directory
from train.config.schema import USER_ERRORS
from train.distributed import groups
from train.distributed.signals import BAD_INPUT
from train.evaluate.evaluation import EvaluateConfig, evaluate, load


def _parse(arguments: list[str]) -> tuple[Path, EvaluateConfig]:
    names = EvaluateConfig.__dataclass_fields__
    if not arguments or ("=" in arguments[0] and not Path(arguments[0]).is_dir()):
        keys = " ".join(f"[{name}=...]" for name in names)
        raise ConfigError(f"usage: python -m train.evaluate RUN_DIRECTORY|HF_DIRECTORY {keys}")
    return Path(arguments[0]), from_words(EvaluateConfig, arguments[1:])


def main() -> int:
    """The command; returns its exit code."""
    try:
        directory, config = _parse(sys.argv[1:])
        out = Path(expand_home(config.out) or directory)
        if config.out is not None:
            make_directory("out", out)
        world = groups.initialize(groups.ParallelConfig(), groups.pick_device("auto"))
        try:
            model, tokenizer, run = load(directory, world)
            result = evaluate(model, tokenizer, run, config, world.device)
        finally:
            groups.shutdown()
    except USER_ERRORS as error:
        print(f"error: {error}", file=sys.stderr)
        return BAD_INPUT
    from train.evaluate import plots

    write_json(out / "evaluation.json", {"run": str(directory), **result})
    print(plots.table(result))
    for path in [out / "evaluation.json", *plots.draw(result, out)]:
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(printing(main))
