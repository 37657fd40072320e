"""Where a training step of the default CPU run spends its time: `python -m tests.bench.cpu_step [key=value ...]`.

Prints tokens per second and the share of each part, measured with the torch profiler over a few steps after a warm-up,
and writes docs/results/cpu_step.json.
"""

from __future__ import annotations

import dataclasses
import json
import platform
import statistics
import sys
import time
from pathlib import Path

import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from torch.profiler import ProfilerActivity, profile, record_function

import data_pipeline
from train import parallel, trainer
from train.config import TrainConfig, from_mapping
from train.metrics import StepSums

ROOT = Path(__file__).resolve().parent.parent.parent
WARM_UP, STEPS = 3, 8


def main() -> None:
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        values = OmegaConf.to_container(compose("config", sys.argv[1:]), resolve=True)
    config = from_mapping(TrainConfig, values)  # type: ignore[arg-type]
    data = data_pipeline.open_data(config.data)
    config = dataclasses.replace(config, model=trainer.with_vocabulary(config.model, data.vocab_size))
    world = parallel.initialize(config.parallel, torch.device("cpu"))
    engine, loader = trainer.build_engine(config, world), trainer.make_loader(config, data, world)
    sums = StepSums(world)
    seconds = []
    for _ in range(WARM_UP + STEPS):
        began = time.perf_counter()
        trainer.train_step(engine, loader.next_step(), world, sums, 1e-3)
        seconds.append(time.perf_counter() - began)
    step = statistics.median(seconds[WARM_UP:])
    waited = loader.wait_seconds
    with profile(activities=[ProfilerActivity.CPU]) as trace:
        for _ in range(2):
            with record_function("step"):
                trainer.train_step(engine, loader.next_step(), world, sums, 1e-3)
    print(trace.key_averages().table(sort_by="self_cpu_time_total", row_limit=25, max_name_column_width=60))
    result = {
        "command": "python -m tests.bench.cpu_step " + " ".join(sys.argv[1:]),
        "device": f"CPU, {torch.get_num_threads()} threads, {platform.processor() or platform.machine()}",
        "torch": torch.__version__,
        "step_seconds_median": round(step, 4),
        "step_seconds": [round(s, 4) for s in seconds[WARM_UP:]],
        "tokens_per_second": round(config.seq_len * config.run.samples_per_step / step, 1),
        "loader_wait_share": round(waited / sum(seconds), 5),
    }
    print(json.dumps(result, indent=1))
    (ROOT / "docs/results/cpu_step.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
