"""A rank that dies, hangs or waits for data for ever ends the job, and the message names it."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from tests.ranks import run_on_ranks
from tests.train.runs import make_config
from train.distributed.watchdog import STALLED

TIMEOUT_SECONDS = 4


def train_with_a_fault(corpus: str, root: str, fault: str, num_ranks: int, context: int):
    """A rank suffers `fault` once its run has done some steps: rank 0 hosts the job's store.

    What a rank prints goes to `root/rank-N.txt`.
    """
    from data_pipeline import Loader
    from train import trainer
    from train.distributed import groups
    from train.logs.metrics import read_records

    rank = groups.environment_world()[0]
    Path(root).mkdir(exist_ok=True)
    os.dup2(os.open(f"{root}/rank-{rank}.txt", os.O_CREAT | os.O_WRONLY), 2)
    config = make_config(
        Path(corpus), Path(root), run__steps=100_000, parallel__timeout_minutes=TIMEOUT_SECONDS / 60,
        parallel__context=context, checkpoint__every_steps=100_000, run__eval_every=100_000,
    )  # fmt: skip

    def strike():
        while len(read_records(Path(root) / "default" / "metrics.jsonl")) < 3:
            time.sleep(0.05)
        if fault == "data":

            def for_ever(self):
                time.sleep(1000)

            Loader.next_step = for_ever
        else:
            os.kill(os.getpid(), signal.SIGKILL if fault == "kill" else signal.SIGSTOP)

    if rank == (0 if fault == "hang of the store" else 1):
        threading.Thread(target=strike, daemon=True).start()
    trainer.train(config)


@pytest.mark.parametrize("fault, context", [("kill", 1), ("hang", 2), ("data", 1)])
def test_the_message_names_the_rank(fault, context, corpus, tmp_path):
    with pytest.raises(AssertionError) as ended:
        run_on_ranks(2, train_with_a_fault, str(corpus), str(tmp_path), fault, 2, context, timeout=240)
    assert "said nothing" not in str(ended.value)  # rank 0 ended by itself, not after the ten minutes of the default
    said = (tmp_path / "rank-0.txt").read_text()
    first = next(line for line in said.splitlines() if " failed at step " in line)
    assert first.startswith("rank 0 on ")
    likely = next(line for line in said.splitlines() if line.startswith("likely cause: "))
    if fault == "data":
        assert "rank 1 on " in likely and "waiting for data" in likely
    elif fault == "hang":
        assert "rank 1 on " in likely and "was last heard of" in likely and "at step " in likely


def test_a_rank_ends_though_the_host_of_the_store_stands_still(corpus, tmp_path):
    """Nothing answers then: neither the collective nor the job's store."""
    began = time.monotonic()
    with pytest.raises(AssertionError, match="rank 0 did not answer"):
        arguments = (str(corpus), str(tmp_path), "hang of the store", 2, 1)
        run_on_ranks(2, train_with_a_fault, *arguments, timeout=TIMEOUT_SECONDS + 26)
    assert time.monotonic() - began < 60
    said = (tmp_path / "rank-1.txt").read_text()
    first = next(line for line in said.splitlines() if " failed at step " in line)
    assert first.startswith("rank 1 on ")
    assert "likely cause: the rank that hosts the job's store (rank 0) does not answer" in said


def train_slowly(corpus: str, root: str, slow: str):
    """One step of 12 micro-batches, and a validation of 12 samples; in each of them `slow` takes half a second."""
    from ksa_model.model import Decoder
    from train import build, trainer

    make, forward = build.batch_maker, Decoder.forward

    def slow_batch_maker(*arguments):
        inner = make(*arguments)
        return lambda sample: time.sleep(0.5) or inner(sample)

    def slow_forward(self, *arguments):
        if torch.is_grad_enabled() == (slow == "step"):
            time.sleep(0.5)
        return forward(self, *arguments)

    if slow == "data":
        build.batch_maker = slow_batch_maker
    else:
        Decoder.forward = slow_forward
    config = make_config(
        Path(corpus), Path(root), run__steps=2, run__samples_per_step=12, run__eval_samples=12, run__eval_every=1,
        data__prefetch_samples=1, parallel__timeout_minutes=TIMEOUT_SECONDS / 60, checkpoint__every_steps=1,
    )  # fmt: skip
    return trainer.train(config).step


@pytest.mark.slow
@pytest.mark.parametrize("slow", ["step", "validation", "data"])
def test_long_work_that_goes_on_is_not_ended(slow, corpus, tmp_path):
    """Six seconds a step or a validation, with four allowed."""
    assert run_on_ranks(1, train_slowly, str(corpus), str(tmp_path), slow) == [2]


STUCK = """
import time, torch.distributed as dist
from train.distributed.watchdog import Watchdog
with Watchdog(dist.HashStore(), 0, 1, 0.6) as watch:
    for _ in range(10):
        time.sleep(0.1)
        watch.beat()
    watch.progress(7, "training")
    print("alive", flush=True)
    time.sleep(60)
"""


def test_the_message_names_the_key():
    done = subprocess.run([sys.executable, "-c", STUCK], capture_output=True, text=True, timeout=60)
    assert done.returncode == STALLED and done.stdout == "alive\n"
    assert "failed at step 7 (training): no progress for 1 s" in done.stderr
    assert "parallel.timeout_minutes" in done.stderr
