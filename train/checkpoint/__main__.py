"""`python -m train.checkpoint list|verify|reshape|average RUN_DIR [key=value ...]`: look after a run's checkpoints.

    list RUN_DIR                          steps, sizes, parallel layouts, and which are quarantined
    verify RUN_DIR                        read every file of every checkpoint and compare it with its manifest
    reshape RUN_DIR out=DIR [files=1] [moments=true]
                                          rewrite the newest one as full tensors in that number of files
    average RUN_DIR [last=5] [out=DIR]    mean of the weights of the last ones, as a run directory to sample or export

RUN_DIR may be a run directory, a directory of checkpoints, or one checkpoint; local or an fsspec URL. Nothing here
needs a GPU, a process group or the model; one tensor is in memory at a time. Resuming on another parallel layout does
not need `reshape`, which is for other programs and for slow storage.
"""

from __future__ import annotations

import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from data_pipeline import commands
from data_pipeline.text.end_token import DESCRIPTION
from train.checkpoint import locate, storage, tensors
from train.checkpoint.locate import read_state
from train.checkpoint.retention import last_finite_step
from train.checkpoint.rewrite import average, reshape
from train.checkpoint.storage import MANIFEST, CheckpointError, CheckpointPath
from train.config.conversion import expand_home, from_words
from train.config.errors import ConfigError
from train.config.quoting import override
from train.config.run_directory import named_directory
from train.config.schema import USER_ERRORS

VERBS = ("list", "verify", "reshape", "average")
USAGE = (
    f"python -m train.checkpoint {'|'.join(VERBS)} RUN_DIR [key=value ...]; reshape: out=DIR files=1 moments=true; "
    "average: last=5 out=DIR"
)
DAMAGED = 1  # exit code of `verify`


@dataclass(frozen=True)
class NoOptions:
    """`list` and `verify` have no options."""


@dataclass(frozen=True)
class ReshapeOptions:
    """Options of `reshape`."""

    out: str  # directory of the new checkpoint
    files: int = 1
    moments: bool = True

    def __post_init__(self) -> None:
        if self.files < 1:
            raise ConfigError(f"files={self.files} must be at least 1")
        if not self.out:
            raise ConfigError("out must be given: a directory for the new checkpoint")


@dataclass(frozen=True)
class AverageOptions:
    """Options of `average`."""

    last: int = 5  # number of checkpoints, newest first
    out: str | None = None  # run directory to write; null: RUN_DIR-average

    def __post_init__(self) -> None:
        if self.last < 1:
            raise ConfigError(f"last={self.last} must be at least 1")


def list_checkpoints(directory: CheckpointPath) -> int:
    """Print the checkpoints below `directory`, and which entries are not used. Returns the exit code."""
    found = {checkpoint.name: checkpoint for checkpoint in storage.finished(directory)}
    print(f"{directory}: {len(found)} finished")
    for name, checkpoint in found.items():
        try:
            state, manifest = read_state(checkpoint), storage.read_manifest(checkpoint)
        except CheckpointError as error:
            print(f"  {name}  DAMAGED: {error}")
            continue
        size = sum(entry["bytes"] for entry in manifest["files"].values())
        layout = " ".join(f"{key}={value}" for key, value in state.get("layout", {}).items())
        took = f"  written in {manifest['write_seconds']} s" if "write_seconds" in manifest else ""
        finite = last_finite_step(state)
        skipped = f"  steps {finite + 1} to {state['step']} were skipped" if finite < state["step"] else ""
        print(
            f"  {name}  {state['tokens']:,} tokens  {size / 1e6:,.1f} MB  {state.get('saved_at', '')}  {layout}{took}"
            f"{skipped}"
        )
    for name in sorted(directory.entries().keys() - found.keys()):
        if name.startswith("step-"):
            print(f"  {name}  not used")
    return 0


def verify(checkpoints: list[CheckpointPath]) -> int:
    """Read every file and print which checkpoints are damaged. Returns the exit code."""
    damaged = 0
    for checkpoint in checkpoints:
        try:
            size = sum(entry["bytes"] for entry in storage.read_manifest(checkpoint)["files"].values())
            with tqdm(total=size, unit="B", unit_scale=True, desc=checkpoint.name, file=sys.stderr) as bar:
                storage.verify(checkpoint, progress=bar.update)
            read_state(checkpoint)
            tensors.shapes(checkpoint)
        except CheckpointError as error:
            damaged += 1
            print(f"{checkpoint.name}  DAMAGED: {error}")
        else:
            print(f"{checkpoint.name}  whole")
    return DAMAGED if damaged else 0


def checkpoints_of(location: str) -> list[CheckpointPath]:
    """The checkpoints of a run directory or a directory of checkpoints, oldest first, or the one that `location` is."""
    path = CheckpointPath(location)
    return [path] if MANIFEST in path.entries() else storage.finished(directory_of(location))


def directory_of(location: str) -> CheckpointPath:
    """The directory of checkpoints that `location` means. Raises `CheckpointError` if there is none."""
    found = locate.directory_of(location)
    if not found.exists():
        raise CheckpointError(f"{location} does not exist; give a run directory, or a directory of checkpoints")
    if found.is_file():
        raise CheckpointError(f"{location} is a file; give a run directory, or a directory of checkpoints")
    return found


def _run(command: str, location: str, words: list[str]) -> int:
    if command == "list":
        from_words(NoOptions, words)
        return list_checkpoints(directory_of(location))
    checkpoints = checkpoints_of(location)
    if not checkpoints:
        raise CheckpointError(f"{location} holds no finished checkpoint")
    if command == "verify":
        from_words(NoOptions, words)
        return verify(checkpoints)
    if command == "reshape":
        return _reshape(checkpoints[-1], from_words(ReshapeOptions, words))
    return _average(location, checkpoints, from_words(AverageOptions, words))


def _reshape(checkpoint: CheckpointPath, options: ReshapeOptions) -> int:
    written = reshape(checkpoint, CheckpointPath(expand_home(options.out)), options.files, options.moments)
    print(f"wrote {written}; use it with {override('resume' if options.moments else 'init_from', str(written))}")
    return 0


def _average(location: str, checkpoints: list[CheckpointPath], options: AverageOptions) -> int:
    out, chosen = expand_home(options.out) or f"{location.rstrip('/')}-average", checkpoints[-options.last :]
    written = average(chosen, CheckpointPath(out) / "checkpoints")
    for name in ("config.yaml", "tokenizer.model", DESCRIPTION):  # which make `out` a run directory
        if (Path(location) / name).is_file():
            (Path(out) / name).write_bytes((Path(location) / name).read_bytes())
    print(f"wrote the mean of {', '.join(checkpoint.name for checkpoint in chosen)} to {written}")
    if (Path(out) / "config.yaml").is_file():
        print(f"sample text from it: python -m train.generate {shlex.quote(str(out))}")
    return 0


def _command(arguments: list[str]) -> int:
    if len(arguments) < 2 or arguments[0] not in VERBS:
        given = f"{arguments[0]!r} is not a command; " if arguments and arguments[0] not in VERBS else ""
        raise ConfigError(f"{given}usage: {USAGE}")
    named_directory(arguments[1], USAGE)
    return _run(arguments[0], arguments[1], arguments[2:])


def main(arguments: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    return commands.run(lambda: _command(arguments), arguments, USER_ERRORS)


if __name__ == "__main__":
    sys.exit(main())
