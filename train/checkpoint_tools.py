"""`python -m train.checkpoint list|verify|reshape|average RUN_DIR [key=value ...]`: look after a run's checkpoints.

    list RUN_DIR                          what is there: steps, sizes, layouts, and what was set aside
    verify RUN_DIR                        read every file of every checkpoint against its manifest
    reshape RUN_DIR out=DIR [files=1] [moments=true]
                                          rewrite the newest one as whole tensors in so many files
    average RUN_DIR [last=5] [out=DIR]    mean of the weights of the last ones, as a run directory to sample or export

RUN_DIR may be a run directory, a directory of checkpoints, or one checkpoint; local or an fsspec URL. Nothing here
needs a GPU, a process group or the model; one tensor is in memory at a time. Resuming on another layout
needs none of this: loading reshapes by itself. `reshape` is for other programs, and for reading from slow storage.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from train import checkpoint
from train import checkpoint_files as files
from train import checkpoint_tensors as tensors
from train.checkpoint import FORMAT, read_state
from train.checkpoint_files import MANIFEST, STATE, CheckpointError, Place
from train.config import ConfigError
from train.signals import BAD_INPUT

DAMAGED = 1  # exit code of `verify`


class StoredTensor:
    """A tensor that is computed when the writer asks for it: one is in memory at a time."""

    def __init__(self, shape: Sequence[int], dtype: torch.dtype, read: Callable[[], torch.Tensor]):
        self._shape, self._dtype, self._read = shape, dtype, read

    def size(self) -> torch.Size:
        return torch.Size(self._shape)

    def piece(self, _: torch.Size) -> torch.Tensor:
        return self._read()

    def __create_write_items__(self, name: str, _: object) -> list:
        return tensors.write_items(name, self.size(), self._dtype, [(torch.Size([0] * len(self._shape)), self.size())])


def list_checkpoints(directory: Place) -> int:
    """Print what is below `directory`."""
    found = {saved.place.name: saved for saved in files.finished(directory)}
    print(f"{directory}: {len(found)} finished")
    for name, saved in found.items():
        try:
            state, manifest = read_state(saved.place), files.read_manifest(saved.place)
        except CheckpointError as error:
            print(f"  {name}  DAMAGED: {error}")
            continue
        size = sum(entry["bytes"] for entry in manifest["files"].values())
        layout = " ".join(f"{key}={value}" for key, value in state.get("layout", {}).items())
        took = f"  written in {manifest['write_seconds']} s" if "write_seconds" in manifest else ""
        print(
            f"  {name}  {state['tokens']:,} tokens  {size / 1e6:,.1f} MB  {state.get('saved_at', '')}  {layout}{took}"
        )
    for name in sorted(directory.entries().keys() - found.keys()):
        if name.startswith("step-"):
            print(f"  {name}  not used")
    return 0


def verify(places: list[Place]) -> int:
    """Read every file; name each checkpoint that is damaged. Returns the exit code."""
    damaged = 0
    for place in places:
        try:
            size = sum(entry["bytes"] for entry in files.read_manifest(place)["files"].values())
            with tqdm(total=size, unit="B", unit_scale=True, desc=place.name, file=sys.stderr) as bar:
                files.verify(place, progress=bar.update)
            read_state(place)
            tensors.shapes(place)
        except CheckpointError as error:
            damaged += 1
            print(f"{place.name}  DAMAGED: {error}")
        else:
            print(f"{place.name}  whole")
    return DAMAGED if damaged else 0


def reshape(source: Place, out: Place, num_files: int, moments: bool) -> Place:
    """Rewrite `source` below `out` as whole tensors, spread evenly over `num_files` files."""
    files.verify(source)
    state = read_state(source)
    kept = {n: s for n, s in tensors.shapes(source).items() if moments or n.startswith("master/")}
    state |= {"format": FORMAT, "made_by": "python -m train.checkpoint reshape"}
    state["contains"] = ["master", "exp_avg", "exp_avg_sq"] if moments else ["master"]
    stored = {name: _of(source, name) for name in kept}
    return write(out, state, stored, num_files)


def average(sources: list[Place], out: Place) -> Place:
    """Mean of the weights of `sources`, newest last, written below `out`; it cannot be resumed, only used."""
    for source in sources:
        files.verify(source)
    states = [read_state(source) for source in sources]
    shapes = [{n: s for n, s in tensors.shapes(p).items() if n.startswith("master/")} for p in sources]
    for source, found in zip(sources[1:], shapes[1:]):
        if found != shapes[0]:
            raise CheckpointError(f"{source} is of another model than {sources[0]}: their weights cannot be averaged")

    def mean(name: str) -> torch.Tensor:
        total = torch.zeros(shapes[0][name], dtype=torch.float64)
        for source in sources:
            total += tensors.copy_of(source, name)
        return (total / len(sources)).float()

    steps = ", ".join(str(state["step"]) for state in states)
    state = {
        **states[-1],
        "format": FORMAT,
        "contains": ["master"],
        "made_by": f"python -m train.checkpoint average, of steps {steps}",
        "saved_at": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
    stored = {n: StoredTensor(s, torch.float32, lambda n=n: mean(n)) for n, s in shapes[0].items()}  # type: ignore[misc]
    return write(out, state, stored, 1)


def _of(source: Place, name: str) -> StoredTensor:
    entry = tensors.entry(source, name)
    return StoredTensor(tuple(entry.size), entry.properties.dtype, lambda: tensors.copy_of(source, name))


def write(out: Place, state: dict[str, Any], stored: dict[str, StoredTensor], num_files: int) -> Place:
    """Write a finished checkpoint below `out`, one tensor in memory at a time; its step is that of `state`. What is
    there is not replaced: `ConfigError`."""
    if any(saved.step == state["step"] for saved in files.finished(out)):
        raise ConfigError(f"out={out} holds a checkpoint of step {state['step']} already: choose another directory")
    aside = files.begin(out, state["step"])
    size = sum(tensor.size().numel() for tensor in stored.values())
    with tqdm(total=size, unit=" elements", unit_scale=True, desc=aside.name, file=sys.stderr) as bar:
        written = tensors.write(aside, stored, None, num_files=num_files, progress=bar.update)
    written[STATE] = (aside / STATE).write(json.dumps(state, indent=1).encode())
    return files.commit(aside, out, written, {})


# -- command line -----------------------------------------------------------------------------------------------------


def checkpoints_of(location: str) -> list[Place]:
    """The checkpoints that a run directory, a directory of them, or the path of one stands for, oldest first."""
    place = Place(location)
    if MANIFEST in place.entries():
        return [place]
    return [saved.place for saved in files.finished(directory_of(location))]


def directory_of(location: str) -> Place:
    found = checkpoint.directory_of(location)
    if not found.exists():
        raise CheckpointError(f"{location} does not exist; give a run directory, or a directory of checkpoints")
    return found


def _options(arguments: list[str], known: dict[str, Any]) -> dict[str, Any]:
    """key=value words -> values of the defaults' types."""
    values = dict(known)
    for argument in arguments:
        key, found, text = argument.partition("=")
        if not found or key not in known:
            raise ConfigError(f"{argument}: the options here are {', '.join(f'{k}=' for k in known) or 'none'}")
        if isinstance(known[key], bool):
            if text not in ("true", "false"):
                raise ConfigError(f"{argument} must be true or false")
            values[key] = text == "true"
        elif isinstance(known[key], int):
            if not text.isdigit() or int(text) < 1:
                raise ConfigError(f"{argument} must be a whole number, at least 1")
            values[key] = int(text)
        else:
            values[key] = text
    return values


def _run(command: str, location: str, rest: list[str]) -> int:
    if command == "list":
        _options(rest, {})
        return list_checkpoints(directory_of(location))
    places = checkpoints_of(location)
    if not places:
        raise CheckpointError(f"{location} holds no finished checkpoint")
    if command == "verify":
        _options(rest, {})
        return verify(places)
    if command == "reshape":
        options = _options(rest, {"out": "", "files": 1, "moments": True})
        if not options["out"]:
            raise ConfigError("reshape needs out=DIR, a directory for the new checkpoint")
        made = reshape(places[-1], Place(options["out"]), options["files"], options["moments"])
        print(f"wrote {made}; use it with {'resume' if options['moments'] else 'init_from'}={made}")
        return 0
    options = _options(rest, {"last": 5, "out": f"{location.rstrip('/')}-average"})
    chosen = places[-options["last"] :]
    made = average(chosen, Place(options["out"]) / "checkpoints")
    for name in ("config.yaml", "tokenizer.model"):  # so that it is a run directory
        if (Path(location) / name).is_file():
            (Path(options["out"]) / name).write_bytes((Path(location) / name).read_bytes())
    print(f"wrote the mean of {', '.join(place.name for place in chosen)} to {made}")
    if (Path(options["out"]) / "config.yaml").is_file():
        print(f"sample text from it: python -m train.generate {options['out']}")
    return 0


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        if len(arguments) < 2 or arguments[0] not in ("list", "verify", "reshape", "average"):
            raise ConfigError(
                "usage: python -m train.checkpoint list|verify|reshape|average RUN_DIR [key=value ...]; "
                "reshape: out=DIR files=1 moments=true; average: last=5 out=DIR"
            )
        return _run(arguments[0], arguments[1], arguments[2:])
    except (ConfigError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return BAD_INPUT
