"""The host runs ahead of the GPU: nothing of a step waits for it."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent.parent


def train_without_waiting(changes: dict) -> None:
    """Warm-up steps, then steps on new samples in which an operation that waits for the device raises."""
    from tests.bench import workload
    from tests.train.runs import make_config

    config = make_config(Path("corpus.jsonl"), Path("runs"), **changes)
    world = workload.start(config)
    bench = workload.Bench(config, world, [[0], [0, 1000]])
    # Copied to the device beforehand, as the training loop does it; their layouts have not been there.
    steps = [bench.batches(step) for step in range(5)]
    for batches in steps[:3]:
        bench.step(batches)
    optimizer_step = bench.engine._deepspeed.step

    def unwatched(*arguments, **settings):
        torch.cuda.set_sync_debug_mode("default")
        try:
            return optimizer_step(*arguments, **settings)
        finally:
            torch.cuda.set_sync_debug_mode("error")

    bench.engine._deepspeed.step = unwatched
    torch.cuda.set_sync_debug_mode("error")
    for batches in steps[3:]:
        bench.step(batches)
    torch.cuda.set_sync_debug_mode("default")
    # The watch itself works.
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.ones((), device=world.device).item()
    except RuntimeError:
        print("nothing waited")


@pytest.mark.gpu
@pytest.mark.parametrize("memory", [
    {}, dict(memory__recompute="selective", memory__offload=True, memory__mlp_rows=512),
], ids=str)  # fmt: skip
def test_no_wait_between_log_steps(memory):
    """Counting, forward and backward of new samples, and the sums, under torch's own watch for synchronizing calls.

    Not covered: what runs inside DeepSpeed's `step`. Its bf16 optimizer asks on the host whether the gradient norm is
    finite, once a step (`is_invalid_grad_norm`), and our hook before AdamW runs in there as well. Nor does the watch
    see an event that is waited for, which `StepSums.agreed` does on purpose, a step behind.
    """
    changes = dict(
        model__hidden_size=256, model__head_dim=64, model__ffn_size=512, model__vocab_size=512, model__chunk_size=8,
        model__window_chunks=16, model__layer_pattern="KKKF", seq_len=2048, run__device="cuda", run__precision="bf16",
        run__samples_per_step=2, **memory,
    )  # fmt: skip
    code = f"from tests.train.test_host_sync import train_without_waiting; train_without_waiting({changes!r})"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, text=True, capture_output=True)
    assert done.returncode == 0 and "nothing waited" in done.stdout, done.stdout + done.stderr
