"""The host runs ahead of the GPU: nothing of a step waits for it."""

import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.ranks import run_on_ranks
from tests.train.runs import make_config

ROOT = Path(__file__).resolve().parent.parent.parent

# Methods of a tensor that give its values to Python, and operators that do or whose result has a size that depends on
# values. On a GPU each of them waits for the device.
METHODS = ("__bool__", "__float__", "__int__", "__index__", "__contains__", "item", "tolist", "numpy", "cpu", "nonzero")
OPERATORS = {"_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "unique_dim", "_unique2"}
# The one wait on purpose: for what the ranks decided, a step behind.
ALLOWED = {"train/distributed/consensus.py:decision"}


class HostSyncs(TorchDispatchMode):
    """While `watching`, collects where the main thread's own code asks a tensor for its values: `file:function`.

    DeepSpeed's own code is not ours to watch: what runs inside its `step` is left out.
    """

    def __init__(self):
        super().__init__()
        self.found: set[str] = set()
        self.watching = False

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        name = function.overloadpacket.__name__
        masked = name in ("index", "index_put_", "index_put") and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in arguments[1]
        )
        if name in OPERATORS or masked:
            self.note(name)
        return function(*arguments, **(keywords or {}))

    def patch(self) -> None:
        for name in METHODS:
            setattr(torch.Tensor, name, self._noted(name, getattr(torch.Tensor, name)))

    def _noted(self, name, method):
        def call(tensor, *arguments, **keywords):
            self.note(name)
            return method(tensor, *arguments, **keywords)

        return call

    def note(self, what: str) -> None:
        if not self.watching or threading.current_thread() is not threading.main_thread():
            return
        frame = sys._getframe(2)
        while frame is not None and "/deepspeed/" not in frame.f_code.co_filename:
            path = Path(frame.f_code.co_filename)
            if path.is_relative_to(ROOT) and path != Path(__file__) and ".venv" not in path.parts:
                file = str(path.relative_to(ROOT))
                caller = f"{file}:{frame.f_code.co_name}"
                if caller not in ALLOWED:
                    self.found.add(f"{caller} ({what})")
                return
            frame = frame.f_back


def planted(source: str):
    """A function that looks as if it stood in the product."""
    scope = {"torch": torch}
    exec(compile(f"def wait(norm):\n    {source}\n", str(ROOT / f"train/{source}"), "exec"), scope)
    return scope["wait"]


PLANTED = (
    "float(norm)", "bool(norm > 0)", "int(norm)", "norm.item()", "norm.tolist()", "norm.cpu()", "norm.nonzero()",
    "norm.numpy()", "assert norm < 1e9", "norm.reshape(1)[norm.reshape(1) > 0]", "torch.equal(norm, norm)",
)  # fmt: skip
IN_BACKWARD = "max(norm, norm)"


def syncs_between_log_steps(corpus: str, root: str, changes: dict, sources: tuple[str, ...] = ()):
    """Train seven steps on this rank; what waited after the report of step 3, but for later reports, and in how many
    steps. Each step also runs `sources`."""
    from train import trainer
    from train.run import Run

    syncs, report, step, watched = HostSyncs(), Run.report, trainer.train_step, []
    waits = [planted(source) for source in sources]

    def unwatched_report(self, number, *arguments):
        syncs.watching = False
        result = report(self, number, *arguments)
        syncs.watching = number < 7  # after it come validation and the last checkpoint
        return result

    def step_with_waits(*arguments):
        watched.append(syncs.watching)
        norm = step(*arguments)
        for wait in waits:
            wait(norm)
        if waits:  # backward is watched as well
            total = torch.ones(3, requires_grad=True).sum()
            total.register_hook(planted(IN_BACKWARD))
            total.backward()
        return norm

    Run.report, trainer.train_step = unwatched_report, step_with_waits
    syncs.patch()
    with syncs:
        trainer.train(make_config(Path(corpus), Path(root), run__steps=7, run__log_every=3, **changes))
    return syncs.found, sum(watched)


@pytest.mark.parametrize("changes", [
    dict(model__layer_pattern="KSCF"),
    dict(model__layer_pattern="KGKF", run__precision="bf16"),
    dict(model__layer_pattern="HPSF"),
    dict(memory__recompute="selective", memory__mlp_rows=48),
], ids=str)  # fmt: skip
def test_nothing_asks_for_values_between_log_steps(changes, corpus, tmp_path):
    ((found, watched),) = run_on_ranks(1, syncs_between_log_steps, str(corpus), str(tmp_path), changes)
    assert found == set() and watched == 4


def test_each_planted_wait_is_found(corpus, tmp_path):
    ((found, _),) = run_on_ranks(1, syncs_between_log_steps, str(corpus), str(tmp_path), {}, PLANTED)
    assert {found_at.partition(":wait (")[0] for found_at in found} == {
        f"train/{source}" for source in (*PLANTED, IN_BACKWARD)
    }


# -- on a GPU ---------------------------------------------------------------------------------------------------------


def train_without_waiting(changes: dict) -> None:
    """Warm-up steps, then steps on new samples in which an operation that waits for the device raises."""
    from tests.bench import workload

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
    see an event that is waited for, which `RankConsensus.decision` does on purpose, a step behind.
    """
    changes = dict(
        model__hidden_size=256, model__head_dim=64, model__ffn_size=512, model__vocab_size=512, model__chunk_size=8,
        model__window_chunks=16, model__layer_pattern="KKKF", seq_len=2048, run__device="cuda", run__precision="bf16",
        run__samples_per_step=2, **memory,
    )  # fmt: skip
    code = f"from tests.train.test_host_sync import train_without_waiting; train_without_waiting({changes!r})"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, text=True, capture_output=True)
    assert done.returncode == 0 and "nothing waited" in done.stdout, done.stdout + done.stderr
