"""Where the time and the memory of a training step go: `perf.profile=true`.

A few steps run under torch's profiler. Each rank writes a trace for chrome://tracing or Perfetto and, on CUDA, a memory
snapshot for pytorch.org/memory_viz. The main rank also writes a table of the time by part of the model.

Work is counted to the part that asked for it. While steps are profiled, hooks put each attention and each MLP in a
named range; norms and the loss have operators of their own. Autograd numbers forward operators, so the operators of
backward are counted to the same part. Within attention the kernel decides: causal library kernels compute far
attention, the project's own kernels compute near attention.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from ksa_model.layers.attention import Attention
from ksa_model.model import MLP, Decoder
from train.config.sections import PerfConfig
from train.distributed.engine import PART_PREFIX
from train.distributed.groups import World
from train.logs.streams import Unbreakable

IDLE, OTHER = "device idle", "other"
BACKWARD = 1  # the scope of autograd's operators (RecordScope::BACKWARD_FUNCTION)
# Parts by operator, wherever it is called from: the first key that the operator's name contains.
OPERATORS = {
    "_ChunkedCrossEntropy": "loss",
    "_ChunkedDivergence": "loss",
    "SummaryAttention": "attention: summaries",
    "_JointAttention": "attention",
    "_Pool": "pooling of chunks",
    "NormRotate": "norms, rotation",
    "RMSNorm": "norms, rotation",
    "c10d::": "communication",
    "nccl:": "communication",
}
# Parts by kernel, whichever operator launched it.
KERNELS = {"nccl": "communication", "Memcpy HtoD": "data"}
LIBRARY = ("sdpa", "cudnn")  # attention kernels of torch and cuDNN, used for long causal ranges


class StepProfiler:
    """Profiles the configured steps. Wrap every step in `step()`; the other steps are not affected."""

    def __init__(self, config: PerfConfig, model: torch.nn.Module, world: World, directory: Path):
        self._config, self._model, self._world, self._directory = config, model, world, directory / "profile"
        self._steps, self._is_done = 0, False
        self._profile: Any = None
        self._began = 0.0
        self._ranges = contextlib.ExitStack()

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        """Wraps one optimizer step, including the wait for its data."""
        if self._config.profile and self._steps == self._config.profile_after:
            self._start()
        yield
        self._steps += 1
        if self._profile is not None and self._steps == self._config.profile_after + self._config.profile_steps:
            self._finish()

    def range(self, part: str) -> contextlib.AbstractContextManager:
        """While a profile is taken, counts what runs inside to `part`."""
        return contextlib.nullcontext() if self._profile is None else record_function(PART_PREFIX + part)

    def close(self) -> None:
        """Print a line if the run ended before the profile was complete."""
        if self._config.profile and self._world.is_main and not self._is_done:
            wanted = (
                f"perf.profile_after={self._config.profile_after} + perf.profile_steps={self._config.profile_steps}"
            )
            print(f"perf.profile=true wrote no profile: it needs {wanted} steps, and this call had {self._steps}")

    def _start(self) -> None:
        cuda = self._world.device.type == "cuda"
        if cuda:
            torch.cuda.memory._record_memory_history(max_entries=200_000)
            torch.cuda.synchronize()
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * cuda
        self._ranges.enter_context(_ranges_in(self._model))
        self._profile = self._ranges.enter_context(profile(activities=activities))
        self._began = time.perf_counter()

    def _finish(self) -> None:
        cuda = self._world.device.type == "cuda"
        if cuda:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - self._began
        taken, self._profile, self._is_done = self._profile, None, True
        self._ranges.close()
        try:
            self._write(taken, seconds)
        except Exception as error:  # a profile is not worth a run, whatever a full disk makes the libraries raise
            text = f"the profile could not be written to {self._directory} ({type(error).__name__}: {error})"
            print(text, file=Unbreakable(sys.stderr))
        if cuda:
            torch.cuda.memory._record_memory_history(enabled=None)

    def _write(self, taken: Any, seconds: float) -> None:
        """Write the traces of this rank; the main rank writes and prints the table."""
        cuda, rank = self._world.device.type == "cuda", self._world.rank
        self._directory.mkdir(parents=True, exist_ok=True)
        taken.export_chrome_trace(str(self._directory / f"trace-rank{rank}.json.gz"))
        if cuda:
            torch.cuda.memory._dump_snapshot(str(self._directory / f"memory-rank{rank}.pickle"))
        if self._world.is_main:
            parts = time_by_part(taken.events(), on_device=cuda)
            if cuda:
                parts[IDLE] = max(0.0, seconds - sum(parts.values()))
            table = as_table(parts, seconds, self._config.profile_steps, "device" if cuda else "CPU")
            (self._directory / "parts.txt").write_text(table + "\n", encoding="utf-8")
            print(f"\n{table}\ntraces in {self._directory}\n", flush=True)


@contextlib.contextmanager
def _ranges_in(model: torch.nn.Module) -> Iterator[None]:
    """Inside, every attention and MLP of the model runs in a range with the name of its part."""
    handles, running = [], []

    def enter(part: str):
        def hook(*_: object) -> None:
            running.append(record_function(PART_PREFIX + part))
            running[-1].__enter__()

        return hook

    def leave(*_: object) -> None:
        running.pop().__exit__(None, None, None)

    for module in model.modules():
        if part := _part_of_module(module):
            handles += [module.register_forward_pre_hook(enter(part)), module.register_forward_hook(leave)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _part_of_module(module: torch.nn.Module) -> str | None:
    if isinstance(module, Attention):
        return f"projections ({module.layer.mixer} layers)"
    if isinstance(module, Decoder):
        return "projections (output), residual stream, embedding"
    return "MLP" if isinstance(module, MLP) else None


def time_by_part(events: Any, on_device: bool) -> dict[str, float]:
    """Seconds by part, from the events of a profile: time of kernels on a device, or of operators on the CPU."""
    # A backward node has the sequence number of its forward operator. Of several with that number, the last one counts.
    forward = {
        (event.thread, event.sequence_nr): event
        for event in events
        if event.sequence_nr >= 0 and event.scope != BACKWARD and not event.name.startswith("autograd::")
    }
    found: dict[str, float] = defaultdict(float)
    for event in events:
        if event.device_type != torch.autograd.DeviceType.CPU:
            continue
        if not on_device:  # the time of a range itself is Python, or waiting
            found[_part(event, forward, "")] += event.self_cpu_time_total * 1e-6
        for kernel in event.kernels if on_device else ():
            found[_part(event, forward, kernel.name)] += kernel.duration * 1e-6
    return {part: seconds for part, seconds in found.items() if seconds > 0}


def _part(event: Any, forward: dict[tuple[int, int], Any], kernel: str) -> str:
    if whole := next((part for word, part in KERNELS.items() if word in kernel), None):
        return whole
    operator, named = None, None
    while event is not None and named is None:
        if event.name.startswith(PART_PREFIX):
            named = event.name.removeprefix(PART_PREFIX)
        elif operator is None:
            operator = next((part for word, part in OPERATORS.items() if word in event.name), None)
        twin = forward.get((event.fwd_thread, event.sequence_nr)) if event.scope == BACKWARD else None
        event = twin or event.cpu_parent
    if operator != "attention":
        return operator or named or OTHER
    mixer = named[len("projections (")] if named and named.startswith("projections (") else "?"
    if mixer != "K":
        return f"attention: {mixer} layers"
    if not kernel:
        return "attention: near and far"
    is_far = any(word in kernel for word in LIBRARY)
    return "attention: far" if is_far else "attention: near, and short ranges of far"


def as_table(parts: dict[str, float], seconds: float, steps: int, what: str) -> str:
    """Milliseconds per step and percentages of its time, largest first. `seconds`: wall-clock time of all `steps`."""
    lines = [f"{what} time per step, mean of {steps}: {1e3 * seconds / steps:.1f} ms wall-clock", ""]
    for part, took in sorted(parts.items(), key=lambda item: -item[1]):
        lines.append(f"  {part:<52}{1e3 * took / steps:10.2f} ms{100 * took / seconds:7.1f} %")
    return "\n".join(lines)
