"""New checkpoints from old ones: with another number of files, without moments, or with averaged weights.

One tensor is in memory at a time. Needs no GPU, no process group and no model.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from typing import Any

import torch
from tqdm import tqdm

from train.checkpoint import storage, tensors
from train.checkpoint.locate import FORMAT, read_state
from train.checkpoint.storage import STATE, CheckpointError, CheckpointPath
from train.config.errors import ConfigError


class StoredTensor:
    """A tensor that is read or computed when the writer asks for it."""

    def __init__(self, shape: Sequence[int], dtype: torch.dtype, read: Callable[[], torch.Tensor]):
        self._shape, self._dtype, self._read = shape, dtype, read

    def size(self) -> torch.Size:
        return torch.Size(self._shape)

    def piece(self, _: torch.Size) -> torch.Tensor:
        return self._read()

    def __create_write_items__(self, name: str, _: object) -> list:
        return tensors.write_items(name, self.size(), self._dtype, [(torch.Size([0] * len(self._shape)), self.size())])


def reshape(source: CheckpointPath, out: CheckpointPath, num_files: int, moments: bool) -> CheckpointPath:
    """Rewrite `source` below `out` as whole tensors, spread evenly over `num_files` storage."""
    storage.verify(source)
    state = read_state(source)
    kept = {n: s for n, s in tensors.shapes(source).items() if moments or n.startswith("master/")}
    state |= {"format": FORMAT, "made_by": "python -m train.checkpoint reshape"}
    state["contains"] = ["master", "exp_avg", "exp_avg_sq"] if moments else ["master"]
    stored = {name: _stored(source, name) for name in kept}
    return write(out, state, stored, num_files)


def average(sources: list[CheckpointPath], out: CheckpointPath) -> CheckpointPath:
    """Write the mean of the weights of `sources`, newest last, below `out`; without moments, no run resumes from it."""
    for source in sources:
        storage.verify(source)
    states = [read_state(source) for source in sources]
    shapes = [{n: s for n, s in tensors.shapes(p).items() if n.startswith("master/")} for p in sources]
    for source, found in zip(sources[1:], shapes[1:]):
        if found != shapes[0]:
            raise CheckpointError(f"{source} is of another model than {sources[0]}: their weights cannot be averaged")

    def mean(name: str) -> torch.Tensor:
        total = torch.zeros(shapes[0][name], dtype=torch.float64)
        for source in sources:
            total += tensors.read_tensor(source, name)
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


def _stored(source: CheckpointPath, name: str) -> StoredTensor:
    entry = tensors.entry(source, name)
    return StoredTensor(tuple(entry.size), entry.properties.dtype, lambda: tensors.read_tensor(source, name))


def write(
    out: CheckpointPath, state: dict[str, Any], stored: dict[str, StoredTensor], num_files: int
) -> CheckpointPath:
    """Write a finished checkpoint of step `state["step"]` below `out`; returns it.

    Raises `ConfigError` if there is one of that step.
    """
    if any(checkpoint.step == state["step"] for checkpoint in storage.finished(out)):
        raise ConfigError(f"out={out} already holds a checkpoint of step {state['step']}: choose another directory")
    incomplete = storage.begin(out, state["step"])
    size = sum(tensor.size().numel() for tensor in stored.values())
    with tqdm(total=size, unit=" elements", unit_scale=True, desc=incomplete.name, file=sys.stderr) as bar:
        written = tensors.write(incomplete, stored, None, num_files=num_files, progress=bar.update)
    written[STATE] = (incomplete / STATE).write(json.dumps(state, indent=1).encode())
    return storage.commit(incomplete, out, written, {})
