"""What a run reports, and the only place where the host waits for the device.

Numbers add up on the device; every `log_every` steps they are read once, written as one line of `metrics.jsonl`, shown
in the progress bar and handed to W&B.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import torch
import torch.distributed as dist
from tqdm import tqdm

from train.batches import Batch
from train.parallel import World

# Dense bf16 peak in FLOP/s by a part of the device's name, from the vendors' data sheets.
PEAK_FLOPS = {"H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "A100": 312e12, "B200": 2250e12}


def peak_flops(device: torch.device) -> float | None:
    """bf16 peak of one device, or None where it is not known (every CPU)."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAK_FLOPS.items() if part in name), None)


@dataclass(frozen=True)
class Agreed:
    """What the ranks know alike after a step."""

    stop: bool  # some rank was asked to end the run
    save: bool  # some rank finds that a checkpoint is due
    bad_steps: int  # steps in a row that were skipped, up to the step before


class StepSums:
    """Sums over steps, kept on the device: loss of this rank; labels, real tokens and model FLOPs of the world."""

    def __init__(self, world: World, tokens: int = 0):
        """`tokens`: real tokens the run has seen before."""
        self._world = world
        self._peak = peak_flops(world.device)
        self._tokens = torch.tensor(float(tokens), dtype=torch.float64, device=world.device)
        on_gpu = world.device.type == "cuda"
        self._bad_row = torch.zeros((), dtype=torch.float64, device=world.device)  # skipped steps in a row
        self._agreed = torch.zeros(3, dtype=torch.float64, pin_memory=on_gpu)
        self._agreed_known = torch.cuda.Event() if on_gpu else None
        self._start()

    def _start(self) -> None:
        self._loss = torch.zeros((), dtype=torch.float64, device=self._world.device)
        self._counts = torch.zeros(4, dtype=torch.float64, device=self._world.device)
        self._steps = 0
        self._began = time.perf_counter()

    def count(self, batches: list[Batch], stop: bool = False, save: bool = False) -> torch.Tensor:
        """Begin a step: [labels, real tokens, model FLOPs] of all ranks' batches, on the device. Collective.

        `stop`, `save`: this rank was asked to end the run, or finds that a checkpoint is due; `agreed` then says so on
        every rank after the same step.
        """
        counts = torch.tensor(
            [[b.num_labels, b.layout.num_tokens, b.model_flops, 0, 0] for b in batches], dtype=torch.float64
        )
        counts = counts.sum(0)
        counts[3], counts[4] = stop, save
        if self._world.device.type == "cuda":
            counts = counts.pin_memory()  # from pageable memory the copy would wait for the steps before
        counts = counts.to(self._world.device, non_blocking=True)
        # Over the whole world, so that a signal to any rank stops all: tensor ranks count the same batches.
        dist.all_reduce(counts)
        counts[:3] /= self._world.tensor_group.size()
        self._agreed.copy_(torch.cat([counts[3:], self._bad_row[None]]), non_blocking=True)
        if self._agreed_known is not None:
            self._agreed_known.record()
        return counts[:3]

    def agreed(self) -> Agreed:
        """What all ranks knew when this step began. The device has long passed that point, so the wait only keeps the
        host from running more than a step ahead."""
        if self._agreed_known is not None:
            self._agreed_known.synchronize()
        stop, save, bad_steps = self._agreed.tolist()
        return Agreed(stop > 0, save > 0, int(bad_steps))

    def add(self, loss_sum: torch.Tensor, counts: torch.Tensor, skipped: torch.Tensor) -> None:
        """End a step: this rank's summed loss, what `count` gave, and 1 if the step was skipped, else 0 (0-d)."""
        done = 1 - skipped
        self._loss += torch.where(skipped > 0, torch.zeros_like(loss_sum), loss_sum)
        self._counts += torch.stack([counts[0] * done, counts[1], counts[2], skipped.double()])
        self._tokens += counts[1]
        self._bad_row = (self._bad_row + skipped) * skipped
        self._steps += 1

    @property
    def tokens(self) -> int:
        """Real tokens of the run so far, all ranks together. Waits for the device."""
        return int(self._tokens.item())

    def read(self) -> dict[str, Any]:
        """Means and rates since the last call, equal on every rank; then start again. Collective.

        Skipped steps have no part in `loss`, which is missing where there was no other, and are counted where any was.
        """
        dist.all_reduce(self._loss, group=self._world.data_context_group)
        loss, (labels, tokens, flops, skipped) = self._loss.item(), self._counts.tolist()
        self._labels = labels
        seconds = time.perf_counter() - self._began
        record: dict[str, Any] = {"tokens": self.tokens}
        if skipped < self._steps:
            record["loss"] = loss / max(1.0, labels)
        if skipped:
            record["skipped_steps"] = int(skipped)
        record |= {
            "tokens_per_second": round(tokens / seconds, 1),
            "step_seconds": round(seconds / self._steps, 5),
        }
        if self._peak is not None:
            record["mfu"] = round(flops / seconds / (self._peak * self._world.size), 4)
        if self._world.device.type == "cuda":
            # Of the fullest rank: its tensors and torch's pool at their largest, and what of the card is in use now.
            free, total = torch.cuda.mem_get_info()
            most = [torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved(), total - free]
            gib = torch.tensor(most, dtype=torch.float64, device=self._world.device) / 2**30
            dist.all_reduce(gib, op=dist.ReduceOp.MAX)
            record |= zip(("peak_gib", "reserved_gib", "card_gib"), (round(x, 2) for x in gib.tolist()))
        self._start()
        return record

    def read_parts(self, sums: torch.Tensor | None, names: Sequence[str]) -> dict[str, float]:
        """Means per label of an objective's `sums` (this rank's, [len(names)]) over the steps of the last `read`.
        Collective."""
        if sums is None:
            return {}
        dist.all_reduce(sums, group=self._world.data_context_group)
        return {f"loss_{name}": value / max(1.0, self._labels) for name, value in zip(names, sums.tolist())}

    @contextlib.contextmanager
    def clock_stopped(self) -> Iterator[None]:
        """Leave what happens inside (validation, a checkpoint) out of the rates."""
        left = time.perf_counter()
        yield
        self._began += time.perf_counter() - left


@dataclass(frozen=True)
class _Outputs:
    file: TextIO
    bar: tqdm
    tracker: Tracker


class RunLog:
    """Writes a run's records. Only the main rank writes; elsewhere every method does nothing."""

    def __init__(self, directory: Path, *, tracker: Tracker | None, total_steps: int, first_step: int, progress: bool):
        """`tracker` is None on ranks that do not write."""
        self._directory = directory
        self._out: _Outputs | None = None
        if tracker is not None:
            path = directory / "metrics.jsonl"
            _drop_records_after(path, first_step)
            bar = tqdm(
                total=total_steps,
                initial=first_step,
                unit="step",
                disable=not progress,
                file=sys.stderr,
                dynamic_ncols=True,
                mininterval=0.5,
            )
            self._out = _Outputs(open(path, "a", encoding="utf-8", buffering=1), bar, tracker)

    def record(self, record: dict[str, Any]) -> None:
        """One object per line; the progress bar and W&B show the same numbers."""
        if self._out is None:
            return
        self._out.file.write(json.dumps(record) + "\n")
        shown = {name: f"{record[key]:{form}}" for key, name, form in _IN_BAR if key in record}
        if shown:
            self._out.bar.set_postfix(shown, refresh=False)
        self._out.tracker.log({k: v for k, v in record.items() if k != "step"}, step=record["step"])

    def advance(self) -> None:
        if self._out is not None:
            self._out.bar.update(1)

    def rewind(self, step: int) -> None:
        """The run goes on from `step` again: drop the records after it."""
        if self._out is None:
            return
        path = self._directory / "metrics.jsonl"
        self._out.file.close()
        _drop_records_after(path, step)
        self._out.bar.update(step - self._out.bar.n)
        self._out = _Outputs(open(path, "a", encoding="utf-8", buffering=1), self._out.bar, self._out.tracker)

    def say(self, text: str) -> None:
        """A line for people, above the progress bar."""
        if self._out is not None:
            tqdm.write(text, file=sys.stderr)

    def close(self) -> None:
        if self._out is None:
            return
        self._out.bar.close()
        self._out.file.close()
        draw_loss(self._directory)
        self._out.tracker.finish()


_IN_BAR = (("loss", "loss", ".3f"), ("validation_loss", "held-out", ".3f"), ("tokens_per_second", "tok/s", ",.0f"))


class Tracker:
    """A W&B run that never stops training: whatever fails in it is said once, and the run goes on without it."""

    def __init__(self, mode: str, directory: Path, *, project: str, group: str | None, name: str, config: dict):
        """`mode`: online, offline (synced later by `wandb sync`) or off."""
        self._run: Any = None
        if mode != "off":
            self._attempt("start", lambda: self._start(mode, directory, project, group, name, config))

    def _start(self, mode: str, directory: Path, project: str, group: str | None, name: str, config: dict) -> None:
        import wandb

        self._run = wandb.init(
            mode=mode,  # type: ignore[arg-type]
            dir=str(directory),
            project=project,
            group=group,
            name=name,
            config=config,  # type: ignore[arg-type]
            settings=wandb.Settings(silent=True, console="off", init_timeout=60),
        )

    def log(self, numbers: dict[str, Any], step: int) -> None:
        if self._run is not None:
            self._attempt("log", lambda: self._run.log(numbers, step=step))

    def finish(self) -> None:
        if self._run is not None:
            self._attempt("finish", lambda: self._run.finish())

    def _attempt(self, what: str, action: Callable[[], Any]) -> None:
        try:
            action()
        except Exception as error:
            self._run = None
            print(
                f"W&B could not {what} ({type(error).__name__}: {error}); the run goes on without it", file=sys.stderr
            )


def read_records(path: Path) -> list[dict[str, Any]]:
    """The records of a `metrics.jsonl`; a last line cut short by a crash is left out."""
    if not path.exists():
        return []
    records = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records


def _drop_records_after(path: Path, step: int) -> None:
    """After a resume the steps behind the checkpoint run again; their old records would stand there twice."""
    records = read_records(path)
    kept = [r for r in records if r["step"] <= step]
    if path.exists():
        path.write_text("".join(json.dumps(r) + "\n" for r in kept), encoding="utf-8")


def draw_loss(directory: Path) -> None:
    """`loss.png`: training and validation loss against tokens."""
    records = read_records(directory / "metrics.jsonl")
    train = [(r["tokens"], r["loss"]) for r in records if "loss" in r]
    held_out = [(r["tokens"], r["validation_loss"]) for r in records if "validation_loss" in r]
    if not train:
        return
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), dpi=120)
    axes.plot(*zip(*train), color="#8fb3d9", label="training")
    if held_out:
        axes.plot(*zip(*held_out), color="#b3412e", marker="o", markersize=4, label="held-out documents")
    axes.set_xlabel("tokens")
    axes.set_ylabel("loss (nats per token)")
    axes.set_title(directory.name)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.tight_layout()
    figure.savefig(directory / "loss.png")
    pyplot.close(figure)
