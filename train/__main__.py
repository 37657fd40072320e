"""`python -m train [key=value ...]`: compose the configuration with Hydra, check it, run it.

Exit codes: 0 the run is finished, `BAD_INPUT` it cannot start, `DIVERGED` it trained and cannot go on, `REQUEUE` it
saved its state and wants to be started again, `NOT_SAVED` its last checkpoint could not be written, `FAILED` anything
else: the ranks did not come together, or what a run that trains reads is gone (`train.distributed.signals`).
"""

from __future__ import annotations

import atexit
import gc
import hashlib
import os
import re
import shlex
import signal
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, NoReturn, get_args

import hydra
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import InterpolationResolutionError, OmegaConfBaseException

from train import chain
from train.checkpoint.storage import SaveError
from train.config.command import printable, robust_streams
from train.config.compose import CONFIGS, compose, register_defaults
from train.config.conversion import from_mapping, how_to_quote, key_types, unknown_key
from train.config.errors import ConfigError, RunError, StartError
from train.config.quoting import as_text, override, unreadable
from train.config.schema import USER_ERRORS, TrainConfig, validate
from train.config.sections import MAX_NAME_BYTES, RunConfig
from train.distributed.environment import command_of_run, environment_world, is_first_of_host
from train.distributed.signals import BAD_INPUT, DIVERGED, FAILED, NOT_SAVED, REQUEUE
from train.health import TrainingDiverged
from train.logs.streams import Unbreakable

if TYPE_CHECKING:
    from train.trainer import RunResult

# What ends a run with one line instead of a traceback.
FOREIGN_ERRORS = (*USER_ERRORS, TrainingDiverged, SaveError, StartError, RunError, OmegaConfBaseException)
_failed: list[int] = []  # exit codes of the points of a multirun that failed


@hydra.main(version_base="1.3", config_path=str(CONFIGS), config_name="config")
def _run(composed: DictConfig) -> None:
    """One run, or one point of a multirun, where a failure leaves its exit code in `_failed` and the next begins."""
    try:
        result = _run_one(composed)
    except FOREIGN_ERRORS as error:
        code = _code_of(error)
        if HydraConfig.get().mode != RunMode.MULTIRUN:
            _exit_with(error, code)
        _print_error(error, f"{_point_name()}: ")
        _failed.append(code)
        return
    if result is not None and result.interrupted:
        sys.exit(REQUEUE)


def _run_one(composed: DictConfig) -> RunResult | None:
    """Check and run what Hydra composed; None after a dry run."""
    values: Any = OmegaConf.to_container(composed, resolve=True)
    if HydraConfig.get().mode == RunMode.MULTIRUN:  # each point of a sweep has its own run directory
        values["run"]["name"] += "/" + _point_name()
    config = from_mapping(TrainConfig, values)
    if config.dry_run:
        from train.dry_run import describe

        for run in chain.links(config) if config.stages else [config]:
            print(describe(run, run.dry_run_ranks or environment_world()[1], run.dry_run_gpu))
        return None
    _check_run(config)
    gc.disable()
    from train.trainer import train  # takes seconds, which a refused configuration should not wait for

    gc.freeze()  # imported modules stay, so the garbage collector need not search them between steps
    gc.enable()
    atexit.register(gc.unfreeze)  # libraries that count their objects would report the frozen ones as leaked
    result = chain.run(config) if config.stages else train(config)
    if not result.interrupted and environment_world()[0] == 0:
        print(closing_words(config, result, list(HydraConfig.get().overrides.task)), file=Unbreakable(sys.stdout))
    return result


def _check_run(config: TrainConfig) -> None:
    """Raise one of `USER_ERRORS` unless every run of `config` fits this launch."""
    for run in chain.links(config) if config.stages else [config]:
        validate(run, environment_world()[1])


def closing_words(config: TrainConfig, result: RunResult, overrides: list[str]) -> str:
    """What the run wrote, where it is, and which commands come next. `overrides`: those of this command."""
    if config.stages:
        return _closing_words_of_chain(config, result)
    directory, k = result.directory, config.model.chunk_size
    remote = config.checkpoint.dir
    checkpoints = f"{directory}/checkpoints" if remote is None else f"{remote}/{config.run.name}"
    other_k = 2 * k if config.seq_len % (2 * k) == 0 else 1
    held_out = "" if result.validation_loss is None else f", held-out loss {result.validation_loss:.3f}"
    tracked = {
        "online": "",
        "off": "",
        "offline": f"\n  {directory}/wandb/          the W&B run; upload it with `wandb sync`",
    }[config.logging.wandb]

    def command(**changes: object) -> str:
        dropped = {*changes, "run.name", "resume", "run.stop_at_step"}
        kept = [o for o in overrides if o.split("=")[0].lstrip("+") not in dropped]
        return f"{shlex.join([*command_of_run(), *kept])} {' '.join(override(k, v) for k, v in changes.items())}"

    other = command(**{"run.name": f"{config.run.name}-k{other_k}", "model.chunk_size": other_k})
    going_on = ""
    # Once its summary projections are annealed away, a run cannot be made longer.
    if config.stage.summary_projection_weight(result.step, config.run.steps) > 0:
        named = {} if config.run.name == RunConfig.name else {"run.name": config.run.name}
        going_on = (
            f"  train for more steps     {command(**{'run.steps': 2 * max(result.step, config.run.steps)}, **named)}\n"
        )
    reached = f"Step {result.step} of {config.run.steps}"
    if result.step > config.run.steps:
        reached = f"The run is at step {result.step}, beyond run.steps={config.run.steps}"
    return f"""
{reached}: {result.tokens:,} tokens{held_out}. This call took {result.seconds:.0f} s, \
including data preparation.

  {directory}/metrics.jsonl   the numbers of each log step, one JSON object per line
  {directory}/loss.png        the loss curve
  {directory}/config.yaml     the full configuration of the run
  {checkpoints}/    the newest checkpoints, up to {config.checkpoint.keep_last}{tracked}

Next:
{going_on}  try another chunk size   {other}
  generate text            python -m train.generate {shlex.quote(str(directory))} prompt='def main('
"""


def _closing_words_of_chain(config: TrainConfig, result: RunResult) -> str:
    runs = chain.links(config)
    index = next(i for i, run in enumerate(runs) if run.run.directory == result.directory)
    if result.step < runs[index].run.steps:
        return (
            f"\nStage {index + 1} of {len(runs)} is at step {result.step} of {runs[index].run.steps} in "
            f"{result.directory}. Run the same command again to continue.\n"
        )
    return f"\nAll {len(runs)} stages are done. The last one is in {result.directory}.\n"


def check_keys(overrides: list[str], is_multirun: bool = False) -> None:
    """Refuse what Hydra would refuse in words of its own: unknown keys, values that its grammar does not take, several
    values where `is_multirun` is not set, and numbers where text is meant. Raises one of `USER_ERRORS`."""
    for text in overrides:
        if problem := unreadable(text):
            raise ConfigError(problem)
    known = key_types(TrainConfig)
    groups = {p.name for p in CONFIGS.iterdir() if p.is_dir()}
    for given in OverridesParser.create().parse_overrides(overrides):
        key = given.key_or_group
        if given.is_sweep_override() and not is_multirun:
            text = (given.input_line or "").partition("=")[2]
            raise ConfigError(
                f"{given.input_line} lists several values: as one text it is written {as_text(key, text)}; to run each "
                "of them, add -m"
            )
        is_text = str in (known.get(key), *get_args(known.get(key)))
        if is_text and isinstance(given.value(), (int, float)) and not given.is_sweep_override():
            # The value itself would be spelled otherwise: 1E2 as 100.0, 007 as 7.
            spelled = (given.input_line or "").partition("=")[2]
            raise ConfigError(f"{key}={spelled} must be a string{how_to_quote(key, spelled)}")
        if key not in known and key not in groups and not key.startswith("hydra"):
            raise unknown_key(key, sorted({*known, *groups}))


def _point_name() -> str:
    """What sets this point of a multirun apart from the others, such as `model.chunk_size=4`."""
    typed = OverridesParser.create().parse_overrides([a for a in sys.argv[1:] if "=" in a and not a.startswith("-")])
    return name_of_point(HydraConfig.get().overrides.task, typed) or str(HydraConfig.get().job.num)


def name_of_point(point: Iterable[str], typed: Iterable[Override]) -> str:
    """The name of a point of a multirun by its overrides; `typed`: those of the command, which vary some of them."""
    swept = {override.key_or_group for override in typed if override.is_sweep_override()}
    here = [text for text in point if text.lstrip("+").split("=")[0] in swept]
    return short_name(re.sub(r"[^\w.=,+-]+", "_", ",".join(here)))


def short_name(name: str) -> str:
    """`name`, or where it is too long for a directory its beginning and a hash of all of it."""
    if len(name.encode()) <= MAX_NAME_BYTES:
        return name
    start = name.encode()[: MAX_NAME_BYTES - 9].decode(errors="ignore")
    return f"{start}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def check_points(arguments: list[str]) -> None:
    """Raise what a point of a multirun would raise, before the first of them is trained.

    Other sweepers choose their points while they run, and other configuration files are for Hydra to find: of these
    nothing is checked here.
    """
    overrides = [a for a in arguments if "=" in a and not a.startswith("-")]
    flags = [a.split("=")[0] for a in arguments if a.startswith("-")]
    if not {"-m", "--multirun"} & set(flags) or set(flags) - {"-m", "--multirun"}:
        return
    if any(text.lstrip("+").startswith("hydra") for text in overrides):
        return
    parsed = OverridesParser.create().parse_overrides(overrides)
    if any(override.is_sweep_override() and not override.is_discrete_sweep() for override in parsed):
        return
    (points,) = BasicSweeper.split_arguments(parsed, None)
    names: dict[str, str] = {}
    for point in points:
        name = name_of_point(point, parsed)
        values = " ".join(text for text in point if f"{text.partition('=')[0]}=" in name)
        if (other := names.setdefault(name, values)) != values:
            raise ConfigError(
                f"{other} and {values} would both be run {name}, because they differ in punctuation only: start them "
                "one by one, each with its run.name; no point was started"
            )
        try:
            config = from_mapping(TrainConfig, compose(point))
            if not config.dry_run:
                _check_run(config)
        except (*USER_ERRORS, OmegaConfBaseException) as error:
            raise ConfigError(f"{' '.join(point)}: {one_line(error)}; no point was started") from error


def one_line(error: BaseException) -> str:
    """The message of an error in one line, with the key where a library tells it in a line of its own."""
    if not isinstance(error, (HydraException, OmegaConfBaseException)):
        return printable(str(error))
    text = str(error).split("Config search path")[0]
    key = getattr(error, "full_key", None)
    if key:
        kept = [line for line in text.split("\n") if not line.strip().startswith(("full_key:", "object_type="))]
        advice = "; set it, or give the key a value" if isinstance(error, InterpolationResolutionError) else ""
        text = f"{key}: " + " ".join(kept) + advice
    return " ".join(text.split())


def _code_of(error: BaseException) -> int:
    """The exit code that an error of `FOREIGN_ERRORS` stands for."""
    if isinstance(error, TrainingDiverged):
        return DIVERGED
    if isinstance(error, SaveError):
        return NOT_SAVED
    return FAILED if isinstance(error, (StartError, RunError)) else BAD_INPUT


def _print_error(error: BaseException, prefix: str = "") -> None:
    if is_first_of_host() or isinstance(error, RunError):  # which one rank alone may meet
        print(f"error: {prefix}{one_line(error)}", file=sys.stderr)


def _exit_with(error: BaseException, code: int) -> NoReturn:
    """Print `error` as one line and exit."""
    _print_error(error)
    sys.exit(code)


def main() -> None:
    """The command."""
    overrides = [a for a in sys.argv[1:] if not a.startswith("-") and "=" in a]
    _failed.clear()
    robust_streams()
    try:
        check_keys(overrides, bool({"-m", "--multirun", "hydra.mode=MULTIRUN"} & {*sys.argv[1:]}))
        check_points(sys.argv[1:])
    except USER_ERRORS as error:
        _exit_with(error, BAD_INPUT)
    except HydraException:
        pass  # not an override at all: Hydra explains it better
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # let Hydra raise its errors here instead of printing them
    register_defaults()
    try:
        _run()
    except (HydraException, OmegaConfBaseException) as error:
        _exit_with(error, BAD_INPUT)
    except KeyboardInterrupt:
        if is_first_of_host():
            print("stopped by SIGINT; the same command goes on from the newest checkpoint", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
    if _failed:
        print(f"error: {len(_failed)} point(s) of the multirun failed, see above", file=sys.stderr)
        sys.exit(next((code for code in (FAILED, NOT_SAVED, DIVERGED) if code in _failed), BAD_INPUT))


if __name__ == "__main__":
    main()
