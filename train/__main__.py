"""`python -m train [key=value ...]`: compose the configuration with Hydra, check it, run it."""

from __future__ import annotations

import atexit
import gc
import os
import re
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from train import chain
from train.config import USER_ERRORS, RunConfig, TrainConfig, all_keys, from_mapping, unknown_key, validate
from train.parallel import environment_world
from train.signals import BAD_INPUT, REQUEUE

if TYPE_CHECKING:
    from train.trainer import RunResult

CONFIGS = Path(__file__).resolve().parent.parent / "configs"


@hydra.main(version_base="1.3", config_path=str(CONFIGS), config_name="config")
def _run(composed: DictConfig) -> None:
    try:
        values: Any = OmegaConf.to_container(composed, resolve=True)
        if HydraConfig.get().mode == RunMode.MULTIRUN:  # every point of a sweep has a run directory of its own
            values["run"]["name"] += "/" + _point_name()
        config = from_mapping(TrainConfig, values)
        runs = chain.links(config) if config.stages else [config]
        if config.dry_run:
            from train.dry_run import describe

            for run in runs:
                print(describe(run, run.dry_run_ranks or environment_world()[1], run.dry_run_gpu))
            return
        for run in runs:
            validate(run, environment_world()[1])
        gc.disable()
        from train.trainer import train  # seconds of imports, which a refused configuration need not wait for

        gc.freeze()  # what is imported stays: neither now nor between steps need it be looked through for garbage
        gc.enable()
        atexit.register(gc.unfreeze)  # or libraries that count what they made call it leaked
        result = chain.run(config) if config.stages else train(config)
    except USER_ERRORS as error:
        _exit_with(error)
    if result.interrupted:
        sys.exit(REQUEUE)
    if environment_world()[0] == 0:
        print(closing_words(config, result, list(HydraConfig.get().overrides.task)))


def closing_words(config: TrainConfig, result: RunResult, overrides: list[str]) -> str:
    """What the run wrote, where, and what to try next."""
    if config.stages:
        runs = chain.links(config)
        place = next(i for i, run in enumerate(runs) if Path(run.run.root) / run.run.name == result.directory)
        if result.step < runs[place].run.steps:
            return (
                f"\nStage {place + 1} of {len(runs)} is at step {result.step} of {runs[place].run.steps} in "
                f"{result.directory}; start again to go on.\n"
            )
        return f"\nAll {len(runs)} stages are done; the last is in {result.directory}.\n"
    directory, k = result.directory, config.model.chunk_size
    remote = config.checkpoint.dir
    checkpoints = f"{directory}/checkpoints" if remote is None else f"{remote}/{config.run.name}"
    other_k = 2 * k if config.seq_len % (2 * k) == 0 else 1
    held_out = "" if result.validation_loss is None else f", held-out loss {result.validation_loss:.3f}"
    done = f"{result.tokens:,} tokens{held_out}; this call took {result.seconds:.0f} s, data preparation included"
    tracked = {
        "online": "",
        "off": "",
        "offline": f"\n  {directory}/wandb/          the W&B run; `wandb sync` uploads it",
    }[config.logging.wandb]

    def command(**changes: object) -> str:
        kept = [o for o in overrides if o.split("=")[0].lstrip("+") not in {*changes, "run.name", "resume"}]
        words = (f"{key}='{value}'" if "=" in str(value) else f"{key}={value}" for key, value in changes.items())
        return shlex.join(["python", "-m", "train", *kept, *words])

    other = command(**{"run.name": f"{config.run.name}-k{other_k}", "model.chunk_size": other_k})
    going_on = ""
    if config.stage.own_share(result.step, config.run.steps) > 0:  # not annealed to the end
        named = {} if config.run.name == RunConfig.name else {"run.name": config.run.name}
        going_on = f"  go on from the checkpoint    {command(**{'run.steps': 2 * config.run.steps}, **named)}\n"
    return f"""
Step {result.step} of {config.run.steps}: {done}.

  {directory}/metrics.jsonl   one line per log step
  {directory}/loss.png        the loss curve
  {directory}/config.yaml     everything this run was told
  {checkpoints}/    the newest {config.checkpoint.keep_last}{tracked}

Next:
{going_on}  another compression ratio    {other}
  sample text                  python -m train.generate {shlex.quote(str(directory))} prompt='def main('
"""


def check_keys(overrides: list[str]) -> None:
    """Refuse a key that does not exist, naming the nearest one; Hydra's own message does not."""
    known = set(all_keys())
    groups = {p.name for p in CONFIGS.iterdir() if p.is_dir()}
    for override in OverridesParser.create().parse_overrides(overrides):
        key = override.key_or_group
        if key not in known and key not in groups and not key.startswith("hydra"):
            raise unknown_key(key, sorted(known | groups))


def _point_name() -> str:
    """`model.chunk_size=4` and the like: what this point of a multirun has that the others have not."""
    typed = OverridesParser.create().parse_overrides([a for a in sys.argv[1:] if "=" in a and not a.startswith("-")])
    swept = {override.key_or_group for override in typed if override.is_sweep_override()}
    here = [text for text in HydraConfig.get().overrides.task if text.lstrip("+").split("=")[0] in swept]
    return re.sub(r"[^\w.=,+-]+", "_", ",".join(here)) or str(HydraConfig.get().job.num)


def _exit_with(error: Exception) -> None:
    if environment_world()[2] == 0:  # once per host
        lines = str(error).split("Config search path")[0].split("\n")
        print("error: " + " ".join(line.strip() for line in lines if line.strip()), file=sys.stderr)
    sys.exit(BAD_INPUT)


def main() -> None:
    overrides = [a for a in sys.argv[1:] if not a.startswith("-") and "=" in a]
    try:
        check_keys(overrides)
    except USER_ERRORS as error:
        _exit_with(error)
    except HydraException:
        pass  # not an override at all: Hydra explains it better
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # raise its errors here instead of printing them and leaving
    try:
        _run()
    except HydraException as error:
        _exit_with(error)


if __name__ == "__main__":
    main()
