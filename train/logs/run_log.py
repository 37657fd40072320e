"""What a run writes while it trains: `metrics.jsonl`, the progress bar, W&B, `loss.png`, and lines for the user."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from train.logs.metrics import METRICS, read_records
from train.logs.metrics_file import MetricsFile
from train.logs.streams import Unbreakable
from train.logs.tracker import Tracker

_IN_BAR = (("loss", "loss", ".3f"), ("validation_loss", "held-out", ".3f"), ("tokens_per_second", "tok/s", ",.0f"))


def line_printer(is_main: bool) -> Callable[[str], None]:
    """A function that prints one line on stderr, above a progress bar where there is one; off the main rank, nothing.

    It writes nothing to the run directory, so it can be used before a start is known to be accepted. Where stderr
    cannot be written, as a file on a full disk, the line is lost and the run goes on.
    """
    return (lambda text: tqdm.write(text, file=Unbreakable(sys.stderr))) if is_main else (lambda text: None)


@dataclass(frozen=True)
class _Outputs:
    file: MetricsFile
    bar: tqdm
    tracker: Tracker


class RunLog:
    """Writes a run's records. Only the main rank writes; elsewhere every method does nothing.

    No failure to write ends the run.
    """

    def __init__(self, directory: Path, *, tracker: Tracker | None, total_steps: int, first_step: int, progress: bool):
        """Set the records after `first_step`, where the run starts, aside.

        `tracker` is None on ranks that do not write. `progress`: whether to show a progress bar of `total_steps`.
        """
        self._directory = directory
        self._out: _Outputs | None = None
        self._say = line_printer(tracker is not None)
        if tracker is not None:
            file = MetricsFile(directory / METRICS, self._say)
            file.rewind(first_step)
            bar = tqdm(
                total=total_steps,
                initial=first_step,
                unit="step",
                disable=not progress,
                file=Unbreakable(sys.stderr),
                dynamic_ncols=True,
                mininterval=0.5,
            )
            self._out = _Outputs(file, bar, tracker)

    def record(self, record: dict[str, Any]) -> None:
        """Append `record` as one line; the progress bar and W&B show the same numbers. It must hold `step`."""
        if self._out is None:
            return
        self._out.file.append(record)
        shown = {name: f"{record[key]:{form}}" for key, name, form in _IN_BAR if key in record}
        if shown:
            self._out.bar.set_postfix(shown, refresh=False)
        self._out.tracker.log({k: v for k, v in record.items() if k != "step"}, step=record["step"])

    def advance(self) -> None:
        """Move the progress bar on by one step."""
        if self._out is not None:
            self._out.bar.update(1)

    def rewind(self, step: int) -> None:
        """Set the records after `step`, from which the run continues, aside."""
        if self._out is not None:
            self._out.file.rewind(step)
            self._out.bar.update(step - self._out.bar.n)

    def close(self) -> None:
        """Close the file, draw the loss curve and end the W&B run."""
        if self._out is None:
            return
        self._out.bar.close()
        self._out.file.close()
        try:
            draw_loss(self._directory)
        except Exception as error:  # a picture is not worth a run, whatever the library makes of a full disk
            self._say(f"{self._directory / 'loss.png'} could not be drawn ({type(error).__name__}: {error})")
        self._out.tracker.finish()


def draw_loss(directory: Path) -> None:
    """Write `loss.png`: training and validation loss against tokens. Nothing where no loss was recorded."""
    records = read_records(directory / METRICS)
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
