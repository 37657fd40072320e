"""The whole configuration of a run: typed, frozen, validated across sections before anything heavy starts.

Each section is declared beside its owner and YAML only picks values. `from_mapping` builds the dataclasses and refuses
unknown keys with the nearest existing one; `validate` checks what no section can check alone.
"""

from __future__ import annotations

import difflib
import math
import types
import typing
from collections.abc import Collection, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

import yaml

from data_pipeline import DataConfig, DataError
from ksa_model.config import ModelConfig, ModelConfigError, check_context_ranks, check_tensor_parallel
from ksa_model.fp8 import check_features
from ksa_model.layout import check_context_parallel
from ksa_model.memory import MemoryConfig, MemoryConfigError
from train.optim import OptimConfig, OptimConfigError
from train.parallel import ParallelConfig, ParallelConfigError
from train.perf import PerfConfig, PerfConfigError
from train.stages import StageConfig, StageError


class ConfigError(ValueError):
    """A configuration that cannot run; one line that names the keys, their values and the relation they break."""


# Keys of earlier versions, and what has taken their place.
MOVED = {"run.recompute": "memory.recompute"}

# What a user's mistake looks like, wherever it is found: printed as one line, exit code 2.
USER_ERRORS = (
    ConfigError,
    ModelConfigError,
    MemoryConfigError,
    ParallelConfigError,
    OptimConfigError,
    PerfConfigError,
    StageError,
    DataError,
)


@dataclass(frozen=True)
class RunConfig:
    """What one run is and where it writes: `{root}/{name}` holds everything it leaves behind."""

    name: str = "default"
    root: str = "runs"
    steps: int = 100
    stop_at_step: int | None = None  # end early, as if interrupted: schedules still aim at `steps`
    max_minutes: float | None = None  # save and exit with train.signals.REQUEUE after this time in the loop
    samples_per_step: int = 1  # packed sequences per optimizer step, over all ranks
    samples_per_micro_batch: int = 1  # of these, how many one forward pass takes, one after another
    seed: int = 0
    device: str = "auto"  # auto | cpu | cuda
    precision: str = "fp32"  # fp32 | bf16 (bf16 compute, fp32 master weights and gradient accumulation)
    log_every: int = 10
    eval_every: int = 100
    eval_samples: int = 8
    max_bad_steps: int = 10  # stop after this many steps in a row whose loss or gradient is not finite
    skip_samples: tuple[tuple[int, int], ...] = ()  # [[first, last], ...] of the global order, passed over
    spike_factor: float | None = None  # a loss this many times the recent median: go back, past its samples

    def __post_init__(self) -> None:
        for name in (
            "steps",
            "samples_per_step",
            "samples_per_micro_batch",
            "log_every",
            "eval_every",
            "max_bad_steps",
        ):
            if getattr(self, name) < 1:
                raise ConfigError(f"run.{name}={getattr(self, name)} must be at least 1")
        if self.stop_at_step is not None and self.stop_at_step < 1:
            raise ConfigError(f"run.stop_at_step={self.stop_at_step} must be at least 1, or null to go to the end")
        if self.max_minutes is not None and self.max_minutes <= 0:
            raise ConfigError(f"run.max_minutes={self.max_minutes} must be positive, or null for no limit")
        for first, last in self.skip_samples:
            if not 0 <= first <= last:
                raise ConfigError(
                    f"run.skip_samples=[[{first}, {last}]] must be [[first, last], ...] of sample indices"
                )
        if self.spike_factor is not None and self.spike_factor <= 1:
            raise ConfigError(f"run.spike_factor={self.spike_factor} must be above 1, or null for no rollback")
        if self.eval_samples < 0:
            raise ConfigError(f"run.eval_samples={self.eval_samples} must not be negative; 0 turns validation off")
        if self.precision not in ("fp32", "bf16"):
            raise ConfigError(f"run.precision={self.precision!r} is not one of fp32, bf16")
        if not self.name or self.name.startswith("/") or ".." in self.name.split("/"):
            raise ConfigError(f"run.name={self.name!r} must be a relative path below run.root={self.root!r}")


@dataclass(frozen=True)
class CheckpointConfig:
    """When a run saves, what it keeps, and what it does about a checkpoint that is damaged."""

    every_steps: int | None = 100
    every_minutes: float | None = None  # besides: at the end of the step after this time since the last save
    keep_last: int = 2
    keep_every: int | None = None  # never removed: those whose step is a multiple of this
    dir: str | None = None  # `{dir}/{run.name}` holds them, a directory or an fsspec URL; null: the run directory
    asynchronous: bool = True  # write in the background, from a copy in host memory
    on_damage: str = "fallback"  # fallback: set it aside and take the one before; fail: stop

    def __post_init__(self) -> None:
        for name in ("every_steps", "keep_last", "keep_every"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"checkpoint.{name}={value} must be at least 1")
        if self.every_minutes is not None and self.every_minutes <= 0:
            raise ConfigError(f"checkpoint.every_minutes={self.every_minutes} must be positive, or null")
        if self.on_damage not in ("fallback", "fail"):
            raise ConfigError(f"checkpoint.on_damage={self.on_damage!r} is not one of fallback, fail")


@dataclass(frozen=True)
class LoggingConfig:
    wandb: str = "offline"  # online | offline | off
    wandb_project: str = "ksa"
    wandb_group: str | None = None
    progress: bool = True

    def __post_init__(self) -> None:
        if self.wandb not in ("online", "offline", "off"):
            raise ConfigError(f"logging.wandb={self.wandb!r} is not one of online, offline, off")


@dataclass(frozen=True)
class TrainConfig:
    """One pretraining run."""

    model: ModelConfig
    seq_len: int
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    run: RunConfig = field(default_factory=RunConfig)
    perf: PerfConfig = field(default_factory=PerfConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    stage: StageConfig = field(default_factory=StageConfig)
    stages: tuple[dict[str, Any], ...] = ()  # several runs in a row: see train/chain.py
    resume: str = "auto"  # auto | never | path of a checkpoint or of another run's directory
    init_from: str | None = None  # weights to begin with where nothing is resumed: another run, a checkpoint, hf:DIR
    init_summary_from: str = "mean"  # with hf:, a summary embedding that is not there: mean, or a token (id or text)
    dry_run: bool = False  # print the layout, memory and exchanges of a rank, and stop
    dry_run_ranks: int | None = None  # the world to plan for; null: this one
    dry_run_gpu: str = "h100-80gb"
    document_alignment: int | None = None  # documents start on multiples of this; None: model.chunk_size

    def __post_init__(self) -> None:
        if self.dry_run_ranks is not None and self.dry_run_ranks < 1:
            raise ConfigError(f"dry_run_ranks={self.dry_run_ranks} must be at least 1, or null for this world")

    @property
    def alignment(self) -> int:
        return self.document_alignment or self.model.chunk_size

    def micro_batches(self, data_size: int) -> int:
        """Of a step, on each of `data_size` data-parallel ranks."""
        return self.run.samples_per_step // data_size // self.run.samples_per_micro_batch


def validate(config: TrainConfig, world_size: int) -> None:
    """Raise one of `USER_ERRORS` unless the sections fit each other and a world of `world_size` ranks."""
    model, parallel = config.model, config.parallel
    data_size = parallel.data(world_size)
    check_tensor_parallel(model, parallel.tensor)
    if parallel.sequence and parallel.tensor == 1:
        raise ConfigError("parallel.sequence=true shares rows among tensor ranks and needs parallel.tensor > 1")
    if config.run.precision == "bf16" and parallel.zero == 0:
        raise ConfigError(
            "run.precision=bf16 adds gradients up in fp32, for which DeepSpeed needs parallel.zero=1 or more (on a "
            "single rank stage 1 shards nothing)"
        )
    if config.perf.precision == "fp8":
        if config.run.precision != "bf16":
            raise ConfigError(
                f"perf.precision=fp8 takes the place of 16-bit products, and run.precision={config.run.precision} has "
                "none; use run.precision=bf16, or perf.precision=bf16"
            )
        check_features(model, parallel.tensor)
    if config.run.samples_per_step % data_size:
        raise ConfigError(
            f"run.samples_per_step={config.run.samples_per_step} is not a multiple of the {data_size} data-parallel "
            f"ranks ({world_size} ranks / parallel.tensor={parallel.tensor} / parallel.context={parallel.context})"
        )
    if config.run.samples_per_step // data_size % config.run.samples_per_micro_batch:
        raise ConfigError(
            f"run.samples_per_micro_batch={config.run.samples_per_micro_batch} does not divide the "
            f"{config.run.samples_per_step // data_size} samples that a data-parallel rank has in a step "
            f"(run.samples_per_step={config.run.samples_per_step} / {data_size} ranks)"
        )
    if config.alignment % model.chunk_size:
        raise ConfigError(
            f"document_alignment={config.alignment} is not a multiple of model.chunk_size={model.chunk_size}: "
            "documents start on chunk boundaries"
        )
    config.stage.check(model, config.run.steps, config.init_from)
    _check_seq_len(config)
    check_context_ranks(model, parallel.context)
    check_context_parallel(config.seq_len, model.chunk_size, model.halo_rows, parallel.context)
    if model.attention_backend == "fused" and config.run.precision != "bf16":
        raise ConfigError(
            f"model.attention_backend=fused computes in 16 bits, and run.precision={config.run.precision}; use "
            "run.precision=bf16, or model.attention_backend=auto"
        )
    if parallel.context > 1 and model.attention_backend == "reference":
        raise ConfigError("model.attention_backend=reference sees one rank's rows only and needs parallel.context=1")


def _check_seq_len(config: TrainConfig) -> None:
    parallel, chunk = config.parallel, config.model.chunk_size
    unit, reasons = config.alignment, [f"document alignment {config.alignment}"]
    if parallel.context > 1:
        unit = math.lcm(unit, 2 * parallel.context * chunk)
        reasons.append(f"2 x parallel.context={parallel.context} slices of whole chunks of {chunk}")
    if parallel.sequence:
        unit = math.lcm(unit, parallel.context * parallel.tensor * chunk)
        reasons.append(f"parallel.tensor={parallel.tensor} equal shares of chunks (parallel.sequence=true)")
    if config.seq_len < 1 or config.seq_len % unit:
        below = config.seq_len // unit * unit
        raise ConfigError(
            f"seq_len={config.seq_len} is not a multiple of {unit} ({', '.join(reasons)}); "
            f"the nearest that fit are {max(below, unit)} and {below + unit}"
        )


# -- mappings to dataclasses and back ---------------------------------------------------------------------------------

T = typing.TypeVar("T")


def from_mapping(cls: type[T], mapping: Mapping[str, Any], place: str = "") -> T:
    """Build dataclass `cls` from plain values; `place` is the dotted path used in messages."""
    hints = typing.get_type_hints(cls)
    known = {f.name: f for f in fields(cls)}  # type: ignore[arg-type]
    values = {}
    for key, value in mapping.items():
        if key not in known:
            raise unknown_key(f"{place}{key}", [f"{place}{name}" for name in known])
        values[key] = _convert(hints[key], value, f"{place}{key}")
    missing = [
        f"{place}{name}"
        for name, f in known.items()
        if name not in values and f.default is MISSING and f.default_factory is MISSING
    ]
    if missing:
        raise ConfigError(f"{', '.join(missing)} must be given")
    return cls(**values)


def from_saved(mapping: Mapping[str, Any]) -> TrainConfig:
    """The configuration that a run directory or a checkpoint holds, of this version or an earlier one."""
    run, memory = dict(mapping.get("run", {})), dict(mapping.get("memory", {}))
    if run.pop("recompute", False):
        memory.setdefault("recompute", "full")
    return from_mapping(TrainConfig, {**mapping, "run": run, "memory": memory})


def key_values(arguments: Sequence[str], known: Sequence[str], texts: Collection[str] = ()) -> list[tuple[str, Any]]:
    """The `key=value` words of a command, each key one of `known`; values as YAML reads them, of `texts` as given."""
    found = []
    for argument in arguments:
        key, _, text = argument.partition("=")
        if key not in known:
            raise unknown_key(key, list(known))
        found.append((key, text if key in texts else parsed(key, text)))
    return found


def parsed(key: str, text: str) -> Any:
    """The value of a command's `key=text`, as YAML reads it."""
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{key}={text} cannot be read: {' '.join(str(error).split())}") from error


def make_directory(key: str, path: Path) -> None:
    """The directory that `key` names, with its parents; before the work that fills it, not behind it."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{key}={path} cannot be made a directory: {error.strerror}") from error


def unknown_key(key: str, known: list[str]) -> ConfigError:
    beside = [name for name in known if name.rpartition(".")[0] == key.rpartition(".")[0]]
    known = beside or known  # in a section that exists, only its own keys help
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    if key in MOVED:
        near = [MOVED[key]]
    return ConfigError(
        f"{key} is not a configuration key"
        + (f"; did you mean {near[0]}?" if near else f"; the keys there are {', '.join(sorted(known))}")
    )


def all_keys(cls: type = TrainConfig, place: str = "") -> list[str]:
    """Every dotted key of the configuration, sections included."""
    keys = []
    for name, hint in typing.get_type_hints(cls).items():
        keys.append(f"{place}{name}")
        if is_dataclass(hint):
            keys += all_keys(hint, f"{place}{name}.")  # type: ignore[arg-type]
    return keys


def to_mapping(config: TrainConfig) -> dict[str, Any]:
    """Plain values, ready for YAML and JSON; inverse of `from_mapping`."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: plain(v) for k, v in value.items()}
        return [plain(v) for v in value] if isinstance(value, (list, tuple)) else value

    return plain(asdict(config))


def flatten(mapping: Mapping[str, Any], place: str = "") -> dict[str, Any]:
    """Nested values -> dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in mapping.items():
        flat.update(flatten(value, f"{place}{key}.") if isinstance(value, dict) else {f"{place}{key}": value})
    return flat


def _convert(hint: Any, value: Any, key: str) -> Any:
    """`value` as YAML gives it -> the type the dataclass declares, or `ConfigError`."""
    if is_dataclass(hint):
        if not isinstance(value, Mapping):
            raise ConfigError(f"{key}={value!r} must be a group of keys")
        return from_mapping(hint, value, f"{key}.")  # type: ignore[arg-type]
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        # Sequences go to the tuple member, everything else to the scalar one.
        members = [a for a in args if a is not type(None)]
        wants_tuple = isinstance(value, (list, tuple))
        for member in members:
            if (typing.get_origin(member) is tuple) == wants_tuple:
                return _convert(member, value, key)
        raise ConfigError(f"{key}={value!r} is not of type {' or '.join(map(_type_name, members))}")
    if origin is dict:
        if not isinstance(value, Mapping):
            raise ConfigError(f"{key}={value!r} must be a group of keys")
        return dict(value)
    if origin is tuple:
        if not isinstance(value, (list, tuple)) or (args[-1] is not ... and len(value) != len(args)):
            raise ConfigError(
                f"{key}={value!r} must be a list" + ("" if args[-1] is ... else f" of {len(args)} values")
            )
        return tuple(_convert(args[0], item, f"{key}[{i}]") for i, item in enumerate(value))
    if hint is float and isinstance(value, (int, str)) and not isinstance(value, bool):
        try:  # YAML reads 1e-3 as text
            return float(value)
        except ValueError:
            pass
    elif isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
        return value
    raise ConfigError(f"{key}={value!r} is not of type {_type_name(hint)}")


def _type_name(hint: Any) -> str:
    return {int: "integer", float: "number", str: "text", bool: "true or false"}.get(hint, str(hint))
