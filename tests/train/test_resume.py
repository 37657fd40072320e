"""Stopping and going on gives the run that never stopped: bit for bit on the same layout, closely on another."""

import json
import os
import shutil
import time
from pathlib import Path

import pytest
import torch

from tests.ranks import run_on_ranks
from tests.train.runs import losses, newest_tensors, run_training
from train import start, trainer
from train.checkpoint.storage import CheckpointPath, finished

STEPS = dict(run__steps=20, checkpoint__every_steps=5, optim__decay_steps=8, run__eval_every=10)


def layout(tensor=1, context=1, zero=1, **more):
    return dict(
        parallel__tensor=tensor, parallel__sequence=tensor > 1, parallel__context=context, parallel__zero=zero, **more
    )


def run(ranks, corpus, root, **changes):
    return run_on_ranks(ranks, run_training, str(corpus), str(root), STEPS | changes, timeout=150)[0]


def without_saves(records):
    """What was computed: no clocks, and no records that only tell of a checkpoint."""
    clocks = ("tokens_per_second", "step_seconds", "checkpoint_seconds")
    kept = [{key: value for key, value in record.items() if key not in clocks} for record in records]
    return [record for record in kept if record.keys() - {"step", "tokens"}]


@pytest.fixture(scope="module")
def straight(corpus, tmp_path_factory):
    root = tmp_path_factory.mktemp("straight")
    return run(1, corpus, root), newest_tensors(root / "default")


# ranks, what differs from one rank; those marked run by default, all of them with --whole-matrix
LAYOUTS = {
    "one": (1, {}, True),
    "TP2+SPxDP2": (4, layout(tensor=2), False),
    "TP2+SPxDP2 bf16": (4, layout(tensor=2, run__precision="bf16"), True),
    "CP2xDP2": (4, layout(context=2), True),
    "ZeRO-0": (2, layout(zero=0), True),
    "ZeRO-2": (2, layout(zero=2), True),
    "ZeRO-3": (2, layout(zero=3), True),
    "TP2+SPxDP2 ZeRO-3": (4, layout(tensor=2, zero=3), False),
}


def pytest_generate_tests(metafunc):
    whole = metafunc.config.getoption("--whole-matrix")
    if "parallel_layout" in metafunc.fixturenames:
        metafunc.parametrize("parallel_layout", [name for name, (*_, always) in LAYOUTS.items() if whole or always])
    if "chain" in metafunc.fixturenames:
        metafunc.parametrize("chain", [CHAIN if whole else SHORT_CHAIN], ids=["whole" if whole else "short"])


@pytest.mark.slow
def test_half_and_half_are_the_whole_bit_for_bit(corpus, tmp_path, parallel_layout):
    """Ten and ten steps are twenty on one rank, four and four are eight on several."""
    ranks, changes, _ = LAYOUTS[parallel_layout]
    steps = 20 if ranks == 1 else 8
    changes = changes | dict(run__steps=steps, run__eval_every=steps // 2)
    want = run(ranks, corpus, tmp_path / "straight", **changes)
    run(ranks, corpus, tmp_path / "resumed", **changes, run__stop_at_step=steps // 2)
    got = run(ranks, corpus, tmp_path / "resumed", **changes)
    assert len(losses(want)) == steps
    saved = {r["step"] for r in got if "checkpoint_seconds" in r}
    assert steps // 2 in saved, "the second half went on from a checkpoint"
    # Stopping half-way is one more reason to save there; everything else is the same.
    assert without_saves(got) == without_saves(want)
    tensors = newest_tensors(tmp_path / "straight" / "default")
    mine = newest_tensors(tmp_path / "resumed" / "default")
    assert mine.keys() == tensors.keys()
    for name, tensor in mine.items():
        assert torch.equal(tensor, tensors[name]), name


# Each segment of a run goes on from what the one before saved, on another layout.
CHAIN = [
    ("one rank", 1, layout()),
    ("TP 1 to 2", 2, layout(tensor=2)),
    ("TP 2 to 1, DP 1 to 2", 2, layout()),
    ("DP 2 to 4", 4, layout()),
    ("DP 4 to 2, ZeRO 1 to 3", 2, layout(zero=3)),
    ("ZeRO 3 to 1, CP 1 to 2", 2, layout(context=2)),
    ("CP 2 to TP2 x DP2 under ZeRO 3", 4, layout(tensor=2, zero=3)),
    ("ZeRO 3 to 0, TP 2 to 4", 4, layout(tensor=4, zero=0)),
    ("ZeRO 0 to 2 under CP2 x DP2", 4, layout(context=2, zero=2)),
    ("back to one rank", 1, layout()),
]
# One step each way of those that differ in kind: what runs by default.
SHORT_CHAIN = [
    ("one rank", 1, layout()),
    ("TP 1 to 2", 2, layout(tensor=2)),
    ("TP 2 to 1, DP 1 to 2, ZeRO 1 to 3", 2, layout(zero=3)),
    ("ZeRO 3 to 1, CP 1 to 2", 2, layout(context=2)),
    ("CP 2 to TP2 x DP2 under ZeRO 2", 4, layout(tensor=2, zero=2)),
    ("back to one rank, ZeRO 0", 1, layout(zero=0)),
]


@pytest.mark.slow
def test_every_change_of_layout_continues(chain, corpus, tmp_path, straight):
    """Two steps on each layout of the chain; the losses of all are those of one rank throughout."""
    records, _ = straight
    for i, (what, ranks, changes) in enumerate(chain):
        got = run(ranks, corpus, tmp_path, run__stop_at_step=2 * (i + 1), **changes)
        assert losses(got) == pytest.approx(losses(records)[: 2 * (i + 1)], rel=1e-5), what
    tokens = [r["tokens"] for r in records if "loss" in r]
    assert [r["tokens"] for r in got if "loss" in r] == tokens[: 2 * len(chain)]


def test_steps_lost_in_a_crash_run_again_without_double_records(corpus, tmp_path, straight):
    """Stopped at 13 with its last checkpoint gone: goes on from 10, and each step stands in the records once."""
    run(1, corpus, tmp_path, run__stop_at_step=13)
    newest = finished(tmp_path / "default" / "checkpoints")[-1]
    assert newest.name == "step-00000013"
    newest.remove()
    got = run(1, corpus, tmp_path)
    assert losses(got) == losses(straight[0])
    assert [r["step"] for r in got if "loss" in r] == list(range(1, 21))


def test_a_checkpoint_whose_replacement_was_cut_short_is_resumed(corpus, tmp_path, straight):
    """The process died between two renames, so no rank finds a checkpoint until the start has restored it."""
    first = run(1, corpus, tmp_path, run__stop_at_step=5)
    own = tmp_path / "default" / "checkpoints"
    (own / "step-00000005").rename(own / "step-00000005.replaced")
    got = run(1, corpus, tmp_path)
    assert losses(got) == losses(straight[0])
    assert got[: len(first)] == first  # with their times: the first steps did not run again


def test_a_validation_that_was_lost_is_made_up_for(corpus, tmp_path, straight):
    """The run was ended after saving step 10, before its validation."""
    records = tmp_path / "default" / "metrics.jsonl"
    run(1, corpus, tmp_path, run__stop_at_step=10)
    kept = [line for line in records.read_text().splitlines(keepends=True) if "validation_loss" not in line]
    records.write_text("".join(kept))
    got = run(1, corpus, tmp_path)
    want = [r["validation_loss"] for r in straight[0] if "validation_loss" in r]
    assert [r["validation_loss"] for r in got if "validation_loss" in r] == want and len(want) == 2


def test_a_new_run_can_start_from_another_runs_checkpoint_and_be_interrupted(corpus, tmp_path, straight):
    run(1, corpus, tmp_path, run__stop_at_step=10)
    branch = dict(run__name="branch", resume=str(tmp_path / "default"))
    run(1, corpus, tmp_path, run__stop_at_step=13, **branch)
    got = run(1, corpus, tmp_path, **branch)  # the same command again goes on, it does not start over
    assert losses(got) == losses(straight[0])[10:]


def test_a_run_goes_on_from_its_own_checkpoints_when_the_path_it_began_with_is_gone(corpus, tmp_path, straight):
    run(1, corpus, tmp_path, run__stop_at_step=10)
    branch = dict(run__name="branch", resume=str(tmp_path / "default"))
    run(1, corpus, tmp_path, run__stop_at_step=13, **branch)
    shutil.rmtree(tmp_path / "default")
    got = run(1, corpus, tmp_path, **branch)
    assert losses(got) == losses(straight[0])[10:]


def train_while_another_run_saves(corpus, root, changes, saves):
    """Train on this rank. Between the look of rank 0 for a checkpoint and that of the others, the run `saves` saves."""
    rank, looked, find = int(os.environ["RANK"]), Path(root) / "looked", start.find_start

    def find_late(config):
        if rank == 0:
            found = find(config)
            save_again(saves)
            looked.touch()
            return found
        while not looked.exists():
            time.sleep(0.01)
        return find(config)

    start.find_start = trainer.find_start = find_late
    return run_training(corpus, root, changes)


def save_again(run_directory):
    """The run has saved once more, five steps later."""
    newest = finished(Path(run_directory) / "checkpoints")[-1]
    shutil.copytree(newest.path, newest.parent / f"step-{newest.step + 5:08d}")


@pytest.mark.parametrize("key", ["init_from", "resume"])
def test_all_ranks_begin_with_the_checkpoint_that_rank_0_found(corpus, tmp_path, key):
    run(1, corpus, tmp_path, run__stop_at_step=5)
    changes = STEPS | {"run__name": "branch", "run__stop_at_step": 6, key: str(tmp_path / "default")}
    want = run(2, corpus, tmp_path / "quiet", **changes)
    arguments = (str(corpus), str(tmp_path), changes, str(tmp_path / "default"))
    got = run_on_ranks(2, train_while_another_run_saves, *arguments, timeout=150)[0]
    assert len(finished(tmp_path / "default/checkpoints")) == 2
    assert losses(got) == losses(want)


def states_read(corpus, root, changes):
    """Train on this rank; returns how often it has read a state.json."""
    count, read = [], CheckpointPath.read

    def counted(path):
        count.append(path.name == "state.json")
        return read(path)

    CheckpointPath.read = counted
    run_training(corpus, root, changes)
    return sum(count)


def test_a_start_reads_the_state_of_its_checkpoint_once(corpus, tmp_path):
    run(1, corpus, tmp_path, run__stop_at_step=2)
    changes = STEPS | dict(run__stop_at_step=3)
    assert run_on_ranks(1, states_read, str(corpus), str(tmp_path), changes) == [1]
    for stage in (dict(), dict(stage__kind="extend", seq_len=512)):
        inherits = changes | dict(init_from=str(tmp_path / "default"), run__name="branch") | stage
        assert run_on_ranks(1, states_read, str(corpus), str(tmp_path / str(len(stage))), inherits) == [1]


def test_a_second_run_in_a_shared_directory_is_refused_and_the_first_is_whole(corpus, tmp_path):
    """Another RoPE base under the same name: it neither goes on with the first run's weights nor prunes them."""
    shared = dict(checkpoint__dir=str(tmp_path / "shared"), run__steps=6, checkpoint__every_steps=3)
    run(1, corpus, tmp_path / "a", **shared)
    kept = [c.name for c in finished(tmp_path / "shared/default")]
    with pytest.raises(AssertionError, match=r"was written by another run: model.rope_base was .* and is now 50000"):
        run(1, corpus, tmp_path / "b", **shared, model__rope_base=5e4)
    assert [c.name for c in finished(tmp_path / "shared/default")] == kept
    assert not (tmp_path / "b/default").exists()


def test_data_under_another_path_and_a_moved_run_go_on(corpus, tmp_path, straight):
    run(1, corpus, tmp_path, run__stop_at_step=10)
    (tmp_path / "default").rename(tmp_path / "moved")
    copy = tmp_path / "copy.jsonl"
    copy.write_bytes(corpus.read_bytes())
    again = dict(run__name="moved", data__path=str(copy))
    assert losses(run(1, corpus, tmp_path, **again)) == losses(straight[0])
    with open(copy, "a", encoding="utf-8") as file:
        file.write(json.dumps({"text": "another document " * 99}) + "\n")
    own = dict(data__tokenizer=str(tmp_path / "moved/tokenizer.model"))
    with pytest.raises(AssertionError, match=r"corpus was .* and is"):
        run(1, corpus, tmp_path, **again, **own, run__steps=25)


def test_going_back_sets_later_checkpoints_aside(corpus, tmp_path, straight):
    run(1, corpus, tmp_path, run__stop_at_step=12, checkpoint__keep_last=5)
    own = tmp_path / "default" / "checkpoints"
    got = run(1, corpus, tmp_path, resume=str(own / "step-00000005"), checkpoint__keep_last=5)
    assert losses(got) == losses(straight[0])
    assert (own / "step-00000012.abandoned").is_dir() and (own / "step-00000010.abandoned").is_dir()


def test_starting_afresh_in_a_used_directory_is_not_undone_by_the_next_start(corpus, tmp_path, straight):
    run(1, corpus, tmp_path, run__stop_at_step=12)
    run(1, corpus, tmp_path, run__stop_at_step=3, resume="never")
    got = run(1, corpus, tmp_path)
    assert losses(got) == losses(straight[0])


def test_keeps_what_it_is_told_to_keep(corpus, tmp_path):
    run(1, corpus, tmp_path, checkpoint__keep_last=2, checkpoint__keep_every=6, checkpoint__every_steps=3)
    kept = [p.name for p in finished(tmp_path / "default" / "checkpoints")]
    assert kept == [f"step-{step:08d}" for step in (6, 12, 18, 20)]


def test_saves_by_the_clock(corpus, tmp_path):
    clock = dict(checkpoint__every_steps=None, checkpoint__every_minutes=1e-6, checkpoint__asynchronous=False)
    records = run(2, corpus, tmp_path, run__steps=4, **clock)
    assert [r["step"] for r in records if "checkpoint_seconds" in r] == [1, 2, 3, 4]


def two_runs_of_one_process(corpus, root, changes):
    """A memory file system lasts as long as its process."""
    import fsspec

    run_training(corpus, root, changes | dict(run__stop_at_step=10))
    store = fsspec.filesystem("memory")
    store.pipe("/bucket/default/step-00000015-00000000/__0_0.distcp", b"cut off")  # a save that never ended

    def saved():
        names = {path.rsplit("/", 1)[1] for path in store.ls("/bucket/default", detail=False)}
        return sorted(names - {"owner.json"})

    after_first = saved()
    return run_training(corpus, root, changes), after_first, saved()


def test_checkpoints_behind_a_url(corpus, tmp_path, straight):
    changes = STEPS | dict(checkpoint__dir="memory://bucket")
    ((records, before, after),) = run_on_ranks(1, two_runs_of_one_process, str(corpus), str(tmp_path), changes)
    assert losses(records) == losses(straight[0])
    assert [name[:13] for name in before] == ["step-00000005", "step-00000010", "step-00000015"]
    assert [name[:13] for name in after] == ["step-00000015", "step-00000020"]
    assert "step-00000015-00000000" not in after
    assert not (tmp_path / "default" / "checkpoints").exists()


def test_state_says_where_it_came_from(corpus, tmp_path, straight):
    run(2, corpus, tmp_path, run__stop_at_step=5)
    newest = finished(tmp_path / "default" / "checkpoints")[-1]
    state = json.loads((newest / "state.json").read())
    assert state["step"] == 5 and state["layout"] == {"ranks": 2, "tensor": 1}
    assert {"torch", "python", "deepspeed", "megatron-core"} <= state["versions"].keys()
    assert len(state["tokenizer_sha256"]) == 64 and state["config"]["run"]["steps"] == 20
