"""`python -m train.evaluate RUN|HF_DIR [KEY=VALUE ...]`: what a trained model remembers, and its loss by position.

    python -m train.evaluate runs/default                                all tasks, at 1x, 2x and 4x the training length
    python -m train.evaluate runs/default tasks=needle,multikey lengths=2048,8192 samples=32 depths=11
    python -m train.evaluate RUN lengths=16384 rope_scaling="{kind: yarn, factor: 2, original_max_positions: 8192}"

See `train.evaluate.evaluation` for the tasks. Writes `evaluation.json` and pictures into the run directory, or into
`out=`. Results with `rope_scaling` go into a directory of their own in it, unless `out=` names another.
"""

from __future__ import annotations

import sys
from pathlib import Path

from data_pipeline import commands
from data_pipeline.store.files import write_json
from train.config.conversion import from_words
from train.config.run_directory import directory_argument, make_directory
from train.config.schema import USER_ERRORS
from train.distributed import groups
from train.evaluate.evaluation import EvaluateConfig, evaluate, load


def _parse(arguments: list[str]) -> tuple[Path, EvaluateConfig]:
    keys = " ".join(f"[{name}=...]" for name in EvaluateConfig.__dataclass_fields__)
    directory = directory_argument(arguments, f"python -m train.evaluate RUN_DIRECTORY|HF_DIRECTORY {keys}")
    return directory, from_words(EvaluateConfig, arguments[1:])


def _run(arguments: list[str]) -> None:
    directory, config = _parse(arguments)
    out = Path(config.out or directory)
    if config.out is None and config.rope_scaling is not None:  # beside the results of the model as it was trained
        out = directory / f"evaluation-{config.rope_scaling.kind}-{config.rope_scaling.factor:g}"
    if out != directory:
        make_directory("out", out)
    world = groups.initialize(groups.ParallelConfig(), groups.pick_device("auto"))
    try:
        model, tokenizer, run = load(directory, world, config.rope_scaling)
        result = evaluate(model, tokenizer, run, config, world.device)
    finally:
        groups.shutdown()
    from train.evaluate import plots

    write_json(out / "evaluation.json", {"run": str(directory), **result})
    print(plots.table(result))
    for path in [out / "evaluation.json", *plots.draw(result, out)]:
        print(path)


def main() -> int:
    """The command; returns its exit code."""
    return commands.run(lambda: _run(sys.argv[1:]), sys.argv[1:], USER_ERRORS)


if __name__ == "__main__":
    sys.exit(main())
