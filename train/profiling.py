"""Where the time and the memory of a training step go: `perf.profile=true`.

A few steps run under torch's profiler. They leave, for each rank, a trace for chrome://tracing or Perfetto and on CUDA
a memory snapshot for pytorch.org/memory_viz, and from the main rank a table of the time by part of the model.

A part is known by where its work was asked for: hooks put each attention and MLP under a name of its own while steps
are profiled, norms and the loss are operators of their own, and autograd numbers forward operators so that those of
backward are counted to the same part.
Within attention the kernel decides: the library's causal kernels compute what is far, our own what is near and short.
"""

from __future__ import annotations

import contextlib
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from ksa_model.attention import Attention
from ksa_model.model import MLP, Decoder
from train.parallel import World
from train.perf import PREFIX, PerfConfig

IDLE, OTHER = "device idle", "other"
BACKWARD = 1  # the scope of an operator of autograd's (RecordScope::BACKWARD_FUNCTION)
# Operators that are a part wherever they stand; the first that an operator's name contains.
OPERATORS = {
    "_ChunkedCrossEntropy": "loss",
    "_ChunkedDivergence": "loss",
    "SummaryAttention": "attention: summaries",
    "_JointAttention": "attention",
    "NormRotate": "norms, rotation",
    "RMSNorm": "norms, rotation",
    "c10d::": "communication",
    "nccl:": "communication",
}
# Kernels that are a part wherever they were asked for.
KERNELS = {"nccl": "communication", "Memcpy HtoD": "data"}
LIBRARY = ("sdpa", "cudnn")  # of attention's kernels: those for long causal stretches


class StepProfiler:
    """Profiles the chosen steps of one start; elsewhere it does nothing. Ask for a `step()` around each."""

    def __init__(self, config: PerfConfig, model: torch.nn.Module, world: World, directory: Path):
        self._config, self._model, self._world, self._directory = config, model, world, directory / "profile"
        self._steps, self._is_done = 0, False
        self._profile: Any = None
        self._began = 0.0
        self._ranges = contextlib.ExitStack()

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        """Around one optimizer step with the wait for its data."""
        if self._config.profile and self._steps == self._config.profile_after:
            self._start()
        yield
        self._steps += 1
        if self._profile is not None and self._steps == self._config.profile_after + self._config.profile_steps:
            self._finish()

    def range(self, part: str) -> contextlib.AbstractContextManager:
        """Counts what runs inside to `part`, as long as a profile is taken."""
        return contextlib.nullcontext() if self._profile is None else record_function(PREFIX + part)

    def close(self) -> None:
        """Say so where the run ended before the profile did."""
        if self._config.profile and self._world.is_main and not self._is_done:
            wanted = (
                f"perf.profile_after={self._config.profile_after} + perf.profile_steps={self._config.profile_steps}"
            )
            print(f"perf.profile=true has left nothing: it needs {wanted} steps, and this call had {self._steps}")

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
        cuda, rank = self._world.device.type == "cuda", self._world.rank
        if cuda:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - self._began
        taken, self._profile, self._is_done = self._profile, None, True
        self._ranges.close()
        self._directory.mkdir(parents=True, exist_ok=True)
        taken.export_chrome_trace(str(self._directory / f"trace-rank{rank}.json.gz"))
        if cuda:
            torch.cuda.memory._dump_snapshot(str(self._directory / f"memory-rank{rank}.pickle"))
            torch.cuda.memory._record_memory_history(enabled=None)
        if self._world.is_main:
            parts = time_by_part(taken.events(), on_device=cuda)
            if cuda:
                parts[IDLE] = max(0.0, seconds - sum(parts.values()))
            table = as_table(parts, seconds, self._config.profile_steps, "device" if cuda else "CPU")
            (self._directory / "parts.txt").write_text(table + "\n", encoding="utf-8")
            print(f"\n{table}\ntraces in {self._directory}\n", flush=True)


@contextlib.contextmanager
def _ranges_in(model: torch.nn.Module) -> Iterator[None]:
    """Every attention and MLP of the model runs under a range with the name of its part."""
    handles, running = [], []

    def enter(part: str):
        def hook(*_: object) -> None:
            running.append(record_function(PREFIX + part))
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
    """Seconds by part of a profile's events: of the kernels on a device, or of the operators on the CPU."""
    # Autograd gives a node the number of its forward operator on that thread, the last one recorded with it.
    forward = {
        (event.thread, event.sequence_nr): event
        for event in events
        if event.sequence_nr >= 0 and event.scope != BACKWARD and not event.name.startswith("autograd::")
    }
    found: dict[str, float] = defaultdict(float)
    for event in events:
        if event.device_type != torch.autograd.DeviceType.CPU:
            continue
        if not on_device:  # a range's own time is Python, or waiting
            found[_part(event, forward, "")] += event.self_cpu_time_total * 1e-6
        for kernel in event.kernels if on_device else ():
            found[_part(event, forward, kernel.name)] += kernel.duration * 1e-6
    return {part: seconds for part, seconds in found.items() if seconds > 0}


def _part(event: Any, forward: dict[tuple[int, int], Any], kernel: str) -> str:
    if whole := next((part for word, part in KERNELS.items() if word in kernel), None):
        return whole
    operator, place = None, None
    while event is not None and place is None:
        if event.name.startswith(PREFIX):
            place = event.name.removeprefix(PREFIX)
        elif operator is None:
            operator = next((part for word, part in OPERATORS.items() if word in event.name), None)
        twin = forward.get((event.fwd_thread, event.sequence_nr)) if event.scope == BACKWARD else None
        event = twin or event.cpu_parent
    if operator != "attention":
        return operator or place or OTHER
    mixer = place[len("projections (")] if place and place.startswith("projections (") else "?"
    if mixer != "K":
        return f"attention: {mixer} layers"
    if not kernel:
        return "attention: near and far"
    is_far = any(word in kernel for word in LIBRARY)
    return "attention: far" if is_far else "attention: near, with short stretches of far"


def as_table(parts: dict[str, float], seconds: float, steps: int, what: str) -> str:
    """Milliseconds of a step and shares of its time, largest first."""
    lines = [f"{what} time of a step, mean of {steps}: {1e3 * seconds / steps:.1f} ms by the clock", ""]
    for part, took in sorted(parts.items(), key=lambda item: -item[1]):
        lines.append(f"  {part:<52}{1e3 * took / steps:10.2f} ms{100 * took / seconds:7.1f} %")
    return "\n".join(lines)
