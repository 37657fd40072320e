"""Training is killed with SIGKILL at random moments and goes on from its last checkpoint, on other ranks."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest

from data_pipeline import DataConfig
from tests.data_pipeline.conftest import REPOSITORY, write_corpus

# What a trainer does with its data: consume, and now and then write loader state and results together, atomically.
CONSUMER = """
import hashlib, json, os, sys, time
from data_pipeline import DataConfig, Loader, open_data

config, checkpoint, size, last = DataConfig(**json.loads(sys.argv[1])), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
data = open_data(config)
samples = [data.samples("train", 256, 8) for rank in range(size)]
loaders = [Loader(samples[rank], samples_per_step=4, dp_rank=rank, dp_size=size) for rank in range(size)]
seen = []
if os.path.exists(checkpoint):
    saved = json.load(open(checkpoint))
    seen = saved["seen"]
    for loader in loaders:
        loader.load_state(saved["state"])
while len(seen) < last:
    parts = [loader.next_step() for loader in loaders]
    for j in range(4 // size):
        seen += [[part[j].index, hashlib.sha256(part[j].tokens.tobytes() + part[j].labels.tobytes()).hexdigest()]
                 for part in parts]
    time.sleep(0.01)
    if len(seen) % 12 == 0:
        with open(checkpoint + ".tmp", "w") as file:
            json.dump({"seen": seen, "state": loaders[0].state()}, file)
        os.replace(checkpoint + ".tmp", checkpoint)
"""


@pytest.mark.slow
@pytest.mark.parametrize("stream", [False, True], ids=["prepared", "stream"])
def test_kill_9_at_10_random_moments_of_training(tmp_path, model_path, stream):
    for number in range(3):
        write_corpus(tmp_path / f"{number}.jsonl", 100, seed=number)
    config = {
        "source": "jsonl",
        "path": str(tmp_path / "*.jsonl"),
        "tokenizer": str(model_path),
        "stream": stream,
        "slab_mb": 0.03,
        "cache_dir": str(tmp_path / "cache"),
    }
    DataConfig(**config)
    last = 840

    def start(checkpoint, size):
        command = [sys.executable, "-c", CONSUMER, json.dumps(config), str(checkpoint), str(size), str(last)]
        return subprocess.Popen(command, cwd=REPOSITORY)

    straight = tmp_path / "straight.json"
    began = time.monotonic()
    assert start(straight, 1).wait(timeout=300) == 0
    whole = time.monotonic() - began
    expected = json.loads(straight.read_text())["seen"]
    assert [index for index, _ in expected] == list(range(last))

    rng, kills, restarts = random.Random(5), 0, 0
    checkpoint = tmp_path / "killed.json"
    while kills < 10:
        child = start(checkpoint, rng.choice([1, 2, 4]))
        try:
            child.wait(timeout=rng.uniform(0.1, 0.5) * whole)
        except subprocess.TimeoutExpired:
            os.kill(child.pid, signal.SIGKILL)
            child.wait()
            kills += 1
            restarts += checkpoint.exists()
            continue
        assert child.returncode == 0
        assert json.loads(checkpoint.read_text())["seen"] == expected
        checkpoint.unlink()
    assert restarts >= 3
    assert start(checkpoint, 2).wait(timeout=300) == 0
    assert json.loads(checkpoint.read_text())["seen"] == expected
