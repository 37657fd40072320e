"""The workload of the benchmarks: packed samples of random tokens, and timed optimizer steps through the trainer."""

from __future__ import annotations

import functools
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn
from unittest import mock

import numpy as np
import torch
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from data_pipeline import IGNORE_INDEX, PackedSample, commands
from data_pipeline.packing.samples import join
from train import build, trainer
from train.__main__ import check_keys, one_line
from train.batches import Batch, batch_maker
from train.config.compose import compose
from train.config.conversion import from_mapping, key_values
from train.config.errors import ConfigError
from train.config.schema import USER_ERRORS, TrainConfig
from train.distributed import groups
from train.distributed.consensus import RankConsensus
from train.distributed.groups import World
from train.logs.step_sums import StepSums

ROOT = Path(__file__).resolve().parent.parent.parent


def arguments(words: Sequence[str], *keys: str) -> dict[str, str]:
    """The words KEY=VALUE of a benchmark. Ends it with one line and exit code 2 where a key is not one of `keys`."""
    try:
        return dict(key_values(words, keys, ConfigError))
    except ConfigError as error:
        refuse(error)


def configured(overrides: Sequence[str]) -> TrainConfig:
    """The configuration of `python -m train OVERRIDES`. Ends the benchmark with one line where there is none."""
    try:
        check_keys(list(overrides))
        return from_mapping(TrainConfig, compose(overrides))
    except (*USER_ERRORS, HydraException, OmegaConfBaseException) as error:
        refuse(error)


def refuse(error: Exception) -> NoReturn:
    """Print one line and exit with code 2."""
    sys.exit(commands.fail(one_line(error)))


def sample(seq_len: int, vocab_size: int, index: int, cuts: list[int]) -> PackedSample:
    """Zipf-distributed tokens in documents that start at rows `cuts` (the first is 0)."""
    random = np.random.default_rng([7, index])
    tokens = random.zipf(1.3, seq_len).astype(np.int64) % vocab_size
    labels = np.append(tokens[1:], IGNORE_INDEX)
    starts = np.array(cuts, np.int64)
    labels[starts[1:] - 1] = IGNORE_INDEX
    lengths = np.diff(np.append(starts, seq_len))
    return PackedSample(tokens, labels, starts, lengths, np.zeros(len(starts), bool), index)


@functools.cache
def _table() -> torch.Tensor:
    return torch.randn((1 << 20) + 1, generator=torch.Generator().manual_seed(7))


def _from_a_table(weight: torch.Tensor, mean: float = 0.0, std: float = 1.0, generator=None) -> torch.Tensor:
    """Replaces `torch.nn.init.normal_` with a repeated table, because drawing two billion numbers takes 30 s."""
    with torch.no_grad():
        flat, table = weight.view(-1), (mean + std * _table()).to(weight.dtype)
        for first in range(0, len(flat), len(table)):  # the table's length is odd, so that no two rows are equal
            part = flat[first : first + len(table)]
            part.copy_(table[: len(part)])
    return weight


@dataclass
class Bench:
    """A model under the engine on this rank, and the samples of its steps."""

    config: TrainConfig
    world: World
    cuts: list[list[int]]  # document starts of each sample of a step

    def __post_init__(self) -> None:
        with mock.patch("torch.nn.init.normal_", _from_a_table):
            self.engine = build.build_engine(self.config, self.world)
        self.sums, self.consensus = StepSums(self.world), RankConsensus(self.world)
        context = self.world.context_group
        self._make = batch_maker(self.config.model, context.rank(), context.size())

    def batches(self, step: int) -> list[Batch]:
        """This rank's micro-batches of a step."""
        assert self.config.model.vocab_size is not None
        run, mine = self.config.run, []
        for j in range(self.world.data_rank, run.samples_per_step, self.world.data_size):
            index, cuts = run.samples_per_step * step + j, self.cuts[j % len(self.cuts)]
            mine.append(sample(self.config.seq_len, self.config.model.vocab_size, index, cuts))
        size = run.samples_per_micro_batch
        packs = [join(mine[first : first + size]) for first in range(0, len(mine), size)]
        return [self._make(pack).to(self.world.device) for pack in packs]

    def step(self, batches: list[Batch], lr: float = 1e-3) -> None:
        trainer.train_step(self.engine, batches, self.world, self.sums, self.consensus, lr)

    def losses(self, steps: int, lr: float = 1e-3) -> list[float]:
        found = []
        for step in range(steps):
            self.step(self.batches(step), lr)
            found.append(self.sums.read()["loss"])
        return found

    def seconds(self, warm_up: int, timed: int) -> float:
        """Median seconds of a step on the same samples."""
        given, found = self.batches(0), []
        for _ in range(warm_up + timed):
            synchronize(self.world.device)
            began = time.perf_counter()
            self.step(given)
            synchronize(self.world.device)
            found.append(time.perf_counter() - began)
        return statistics.median(found[warm_up:])


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def start(config: TrainConfig) -> World:
    return groups.initialize(config.parallel, groups.pick_device("auto"))


def device_name() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"


def visible_gpus() -> list[str]:
    """The names in `CUDA_VISIBLE_DEVICES` of this process's GPUs."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return visible.split(",") if visible else [str(i) for i in range(torch.cuda.device_count())]


def ranks_results(
    module: str, ranks: int, *arguments: str, threads: int | None = None, devices: Sequence[int] | None = None
) -> Iterator[dict]:
    """Start `python -m module RANKS ARGUMENTS...` under torchrun; yields what rank 0 passes to `result`.

    `devices`: indices of this process's GPUs that the ranks may use; None for all.
    """
    torchrun = [
        "torch.distributed.run",
        f"--nproc-per-node={ranks}",
        "--rdzv-backend=c10d",
        "--rdzv-endpoint=localhost:0",
    ]
    command = [sys.executable, "-m", *torchrun, "-m", module, str(ranks), *arguments]
    environment = os.environ | ({"OMP_NUM_THREADS": str(threads)} if threads else {})
    if devices is not None:
        names = visible_gpus()
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(names[i] for i in devices)
    with tempfile.TemporaryFile("w+") as errors:
        started = subprocess.Popen(command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=errors)
        assert started.stdout is not None
        began = time.perf_counter()
        for line in started.stdout:
            if line.startswith("RESULT "):
                yield json.loads(line.removeprefix("RESULT "))
            elif line.startswith("NOTE "):
                print(f"  {time.perf_counter() - began:6.1f} s: {line.removeprefix('NOTE ').strip()}", flush=True)
        if started.wait():
            errors.seek(0)
            raise SystemExit(f"{ranks} ranks: exit code {started.returncode}\n{errors.read()[-5000:]}")


def result(values: dict) -> None:
    """Pass results to `ranks_results`. Only rank 0 does."""
    if os.environ.get("RANK", "0") == "0":
        print("RESULT " + json.dumps(values), flush=True)


def note(text: str) -> None:
    """Print rank 0's progress where `ranks_results` runs."""
    if os.environ.get("RANK", "0") == "0":
        print("NOTE " + text, flush=True)


def forget() -> None:
    """Free the memory of a deleted `Bench`."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
