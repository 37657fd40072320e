"""Stopping and going on gives the run that never stopped: bit for bit on the same layout, closely on another."""

import json

import pytest
import torch

from tests.ranks import run_on_ranks
from tests.train.runs import losses, newest_tensors, run_training
from train.checkpoint import CheckpointError, complete

STEPS = dict(run__steps=20, checkpoint__every_steps=5, optim__decay_steps=8)


def run(ranks, corpus, root, **changes):
    return run_on_ranks(ranks, run_training, str(corpus), str(root), STEPS | changes)[0]


@pytest.fixture(scope="module")
def straight(corpus, tmp_path_factory):
    root = tmp_path_factory.mktemp("straight")
    return run(1, corpus, root), newest_tensors(root / "default")


def test_ten_and_ten_are_twenty_bit_for_bit(corpus, tmp_path, straight):
    records, tensors = straight
    run(1, corpus, tmp_path, run__stop_at_step=10)
    resumed = run(1, corpus, tmp_path)
    assert losses(resumed) == losses(records) and len(losses(records)) == 20
    assert [r["tokens"] for r in resumed if "loss" in r] == [r["tokens"] for r in records if "loss" in r]
    mine = newest_tensors(tmp_path / "default")
    assert mine.keys() == tensors.keys()
    for name, want in tensors.items():
        assert torch.equal(mine[name], want), name


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_bitwise_on_two_by_two_ranks(corpus, tmp_path, precision):
    layout = dict(parallel__tensor=2, parallel__sequence=True, run__precision=precision, run__steps=8)
    want = run(4, corpus, tmp_path / "a", **layout)
    run(4, corpus, tmp_path / "b", run__stop_at_step=4, **layout)
    got = run(4, corpus, tmp_path / "b", **layout)
    assert losses(got) == losses(want)
    tensors = newest_tensors(tmp_path / "a" / "default")
    for name, tensor in newest_tensors(tmp_path / "b" / "default").items():
        assert torch.equal(tensor, tensors[name]), name


@pytest.mark.parametrize(
    "before, after",
    [
        ((1, {}), (2, dict(parallel__tensor=2, parallel__sequence=True))),
        ((2, dict(parallel__tensor=2)), (2, {})),
        ((4, {}), (2, {})),
        ((4, dict(parallel__tensor=4, parallel__sequence=True)), (1, {})),
    ],
    ids=["one to TP2+SP", "TP2 to DP2", "DP4 to DP2", "TP4 to one"],
)
def test_another_layout_continues(corpus, tmp_path, straight, before, after):
    records, _ = straight
    run(before[0], corpus, tmp_path, run__stop_at_step=10, **before[1])
    got = run(after[0], corpus, tmp_path, **after[1])
    assert losses(got) == pytest.approx(losses(records), rel=1e-5)
    assert [r["tokens"] for r in got if "loss" in r] == [r["tokens"] for r in records if "loss" in r]


def test_steps_lost_in_a_crash_run_again_without_double_records(corpus, tmp_path, straight):
    """Stopped at 13 with its last checkpoint gone: goes on from 10, and each step stands in the records once."""
    run(1, corpus, tmp_path, run__stop_at_step=13)
    newest = complete(tmp_path / "default" / "checkpoints")[-1]
    assert newest.name == "step-00000013"
    for path in newest.iterdir():
        path.unlink()
    newest.rmdir()
    got = run(1, corpus, tmp_path)
    assert losses(got) == losses(straight[0])
    assert [r["step"] for r in got if "loss" in r] == list(range(1, 21))


def test_a_new_run_can_start_from_another_runs_checkpoint(corpus, tmp_path, straight):
    run(1, corpus, tmp_path, run__stop_at_step=10)
    got = run(1, corpus, tmp_path, run__name="branch", resume=str(tmp_path / "default"))
    assert losses(got) == losses(straight[0])[10:]


def test_keeps_the_last_checkpoints_only(corpus, tmp_path):
    run(1, corpus, tmp_path, checkpoint__keep_last=2, run__steps=16)
    assert [p.name for p in complete(tmp_path / "default" / "checkpoints")] == ["step-00000015", "step-00000016"]


class TestDamage:
    @pytest.fixture
    def stopped(self, corpus, tmp_path):
        run(1, corpus, tmp_path, run__stop_at_step=5)
        return complete(tmp_path / "default" / "checkpoints")[-1]

    def fails_to_resume(self, corpus, tmp_path, **changes):
        with pytest.raises(AssertionError) as error:
            run(1, corpus, tmp_path, **changes)
        assert CheckpointError.__name__ in str(error.value)
        return str(error.value)

    def test_flipped_byte(self, corpus, tmp_path, stopped):
        path = stopped / "__0_0.distcp"
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
        assert f"{path} is damaged" in self.fails_to_resume(corpus, tmp_path)

    def test_truncated_file(self, corpus, tmp_path, stopped):
        path = stopped / "__0_0.distcp"
        path.write_bytes(path.read_bytes()[:-1])
        assert f"{path} is damaged" in self.fails_to_resume(corpus, tmp_path)

    def test_missing_file(self, corpus, tmp_path, stopped):
        (stopped / "__0_0.distcp").unlink()
        assert "__0_0.distcp is missing" in self.fails_to_resume(corpus, tmp_path)

    def test_unknown_format(self, corpus, tmp_path, stopped):
        state = json.loads((stopped / "state.json").read_text()) | {"format": 99}
        (stopped / "state.json").write_text(json.dumps(state))
        manifest = json.loads((stopped / "manifest.json").read_text())
        from train.checkpoint import _fingerprint

        manifest["files"]["state.json"] = _fingerprint(stopped / "state.json")
        (stopped / "manifest.json").write_text(json.dumps(manifest))
        assert "has checkpoint format 99, this version reads 1" in self.fails_to_resume(corpus, tmp_path)

    def test_half_written_is_never_found(self, corpus, tmp_path, stopped):
        stopped.rename(stopped.parent / "step-00000009.incomplete")
        assert complete(stopped.parent) == []

    def test_another_model(self, corpus, tmp_path, stopped):
        said = self.fails_to_resume(
            corpus, tmp_path, run__name="other", resume=str(tmp_path / "default"), model__ffn_size=32
        )
        assert "is of another model: blocks.0.mlp.down.weight is (32, 64) there and (32, 32) here" in said

    def test_nothing_there(self, corpus, tmp_path):
        assert "neither a checkpoint" in self.fails_to_resume(corpus, tmp_path, resume=str(tmp_path / "nowhere"))
