"""Steps that are not finite are skipped on all ranks alike; a jump of the loss takes the run back, if it is told to."""

from pathlib import Path

import pytest
import torch

from tests.ranks import run_on_ranks
from tests.train.runs import losses, make_config, newest_tensors
from train.checkpoint import locate, storage, tensors
from train.config.errors import ConfigError
from train.config.sections import RunConfig
from train.health import SpikeDetector, TrainingDiverged, bad_norm, last_finite_step, next_sample, not_finite
from train.logs.metrics import read_records

RUN = dict(run__steps=16, checkpoint__every_steps=5, optim__decay_steps=8)


class NanGradient(torch.autograd.Function):
    @staticmethod
    def forward(context, x):
        return x.clone()

    @staticmethod
    def backward(context, gradient):
        return gradient * float("nan")


def train_with_bad_samples(corpus, root, changes, bad, harm, rank_only=None):
    """A run in which the samples `bad` have a loss that is NaN, five-fold, or has gradients of NaN."""
    from ksa_model.model import Decoder
    from train import build, trainer
    from train.distributed import groups

    poisoned, make, forward = set(), build.batch_maker, Decoder.forward

    def batch_maker(*arguments):
        inner = make(*arguments)

        def poison(sample):
            batch = inner(sample)
            (poisoned.add if sample.index in bad else poisoned.discard)(batch.tokens.data_ptr())
            return batch

        return poison

    def poisoned_forward(self, tokens, *rest):
        loss = forward(self, tokens, *rest)
        here = rank_only is None or groups.environment_world()[0] == rank_only
        if self.training and here and tokens.data_ptr() in poisoned:
            return {"loss": loss * float("nan"), "gradient": NanGradient.apply(loss), "jump": loss * 5}[harm]
        return loss

    build.batch_maker, Decoder.forward = batch_maker, poisoned_forward
    config = make_config(Path(corpus), Path(root), **changes)
    error = None
    try:
        trainer.train(config)
    except TrainingDiverged as problem:
        error = str(problem)
    return read_records(Path(root) / "default" / "metrics.jsonl"), error


def run(ranks, corpus, root, bad=(), harm="loss", rank_only=None, **changes):
    return run_on_ranks(
        ranks, train_with_bad_samples, str(corpus), str(root), RUN | changes, set(bad), harm, rank_only, timeout=150
    )[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    "ranks, harm, rank_only, changes",
    [
        (1, "loss", None, {}),
        (2, "gradient", 1, {}),
        (2, "gradient", 0, dict(parallel__zero=0)),
        (2, "loss", 1, dict(parallel__zero=2, run__precision="bf16")),
        (2, "gradient", 1, dict(parallel__zero=3)),
    ],
    ids=["loss", "gradient ZeRO-1", "gradient ZeRO-0", "loss ZeRO-2 bf16", "gradient ZeRO-3"],
)
def test_a_bad_step_changes_nothing_anywhere(corpus, tmp_path, ranks, harm, rank_only, changes):
    """Six steps of which the third is bad on one rank."""
    every = dict(run__steps=6, optim__decay_steps=2, checkpoint__every_steps=1, checkpoint__keep_last=20)
    records, error = run(ranks, corpus, tmp_path, range(8, 12), harm, rank_only, **every, **changes)
    assert error is None
    assert [r["step"] for r in records if "skipped_steps" in r] == [3]
    assert [r["step"] for r in records if "loss" in r] == [1, 2, 4, 5, 6]
    own = tmp_path / "default" / "checkpoints"
    before, after, end = (storage.finished(own)[step - 1] for step in (2, 3, 6))
    for name in tensors.shapes(before):
        if not name.startswith("rng/"):
            assert torch.equal(*(tensors.read_tensor(place, name) for place in (before, after))), name
    assert tensors.read_tensor(end, "optimizer/steps").item() == 5
    assert all(torch.isfinite(tensor).all() for tensor in newest_tensors(tmp_path / "default").values())


def test_too_many_in_a_row_stop_the_run_which_goes_on_past_them(corpus, tmp_path):
    bad = range(40, 48)  # two steps of four samples
    records, error = run(1, corpus, tmp_path / "a", bad, run__max_bad_steps=2)
    assert "in each of the steps 11 to 12" in error and "samples 40 to 47" in error
    assert "run.skip_samples=[[40,47]]" in error
    again, error = run(1, corpus, tmp_path / "a", bad, run__max_bad_steps=2, run__skip_samples=[[40, 47]])
    assert error is None
    never_met, _ = run(1, corpus, tmp_path / "b", run__skip_samples=[[40, 47]])
    assert losses(again) == losses(never_met) and len(losses(again)) == 16
    assert losses(records)[:10] == losses(never_met)[:10]


def test_steps_that_are_skipped_do_not_rotate_the_healthy_checkpoints_out(corpus, tmp_path):
    """From step 11 on every step is bad, as if the update of step 10 had ruined the weights."""
    changes = dict(run__max_bad_steps=5, checkpoint__every_steps=2, checkpoint__keep_last=2)
    _, error = run(1, corpus, tmp_path, range(40, 400), **changes)
    own = tmp_path / "default" / "checkpoints"
    assert [c.step for c in storage.finished(own)] == [8, 10, 14]
    state = locate.read_state(storage.finished(own)[-1])
    assert state["health"]["last_finite_step"] == 10
    assert f"resume={own}/step-00000008 run.name=NEW" in error  # step 9 trained from it; from that of step 10 none did
    # Started again it goes on in the same way, and neither the files nor the advice get worse.
    _, error = run(1, corpus, tmp_path, range(40, 400), **changes | dict(run__steps=40))
    assert [c.step for c in storage.finished(own)] == [8, 10, 18]
    assert f"resume={own}/step-00000008 run.name=NEW" in error and "in each of the steps 15 to 19" in error


def test_without_a_healthy_checkpoint_the_message_says_so(corpus, tmp_path):
    changes = dict(run__max_bad_steps=3, checkpoint__every_steps=1)
    _, error = run(1, corpus, tmp_path, range(0, 400), **changes)
    assert "no checkpoint is known to be healthy" in error and "resume=" not in error


def test_a_jump_finds_a_checkpoint_from_before_though_saves_come_more_often_than_reports(corpus, tmp_path):
    changes = dict(run__spike_factor=2.5, run__log_every=2, checkpoint__every_steps=1, run__steps=20)
    records, error = run(1, corpus, tmp_path, range(48, 56), "jump", **changes | dict(checkpoint__keep_last=1))
    assert error is None and len(losses(records)) == 10
    never_met, _ = run(1, corpus, tmp_path / "b", run__skip_samples=[[48, 55]], **changes)
    assert losses(records) == losses(never_met)


def test_a_jump_goes_back_past_its_samples(corpus, tmp_path):
    changes = dict(run__spike_factor=2.5)
    records, error = run(1, corpus, tmp_path / "a", range(40, 48), "jump", **changes)
    assert error is None
    never_met, _ = run(1, corpus, tmp_path / "b", run__skip_samples=[[40, 47]])
    assert losses(records) == losses(never_met) and len(losses(records)) == 16
    assert [r["step"] for r in records if "loss" in r] == list(range(1, 17))


def test_a_jump_right_after_a_start_goes_back_too(corpus, tmp_path):
    changes = dict(run__spike_factor=2.5)
    run(1, corpus, tmp_path, run__stop_at_step=10, **changes)
    records, error = run(1, corpus, tmp_path, range(40, 48), "jump", **changes)
    never_met, _ = run(1, corpus, tmp_path / "b", run__skip_samples=[[40, 47]])
    assert error is None and losses(records) == losses(never_met)


def stopped_in_step_11(corpus, root, *arguments):
    from train.distributed.signals import StopRequest

    asked = iter(range(1, 100))
    StopRequest.is_due = property(lambda self: next(asked) >= 11)
    return train_with_bad_samples(corpus, root, *arguments)


def test_a_jump_in_the_step_of_a_stop_leaves_the_checkpoint_from_before(corpus, tmp_path):
    arguments = RUN | dict(run__spike_factor=2.5), set(range(40, 48)), "jump"
    ((records, error),) = run_on_ranks(1, stopped_in_step_11, str(corpus), str(tmp_path), *arguments)
    assert error is None and losses(records)[-1] == losses(records)[9] and len(losses(records)) == 10
    newest = storage.finished(tmp_path / "default" / "checkpoints")[-1]
    assert newest.name == "step-00000010" and locate.read_state(newest)["step"] == 10
    assert tensors.read_tensor(newest, "optimizer/steps").item() == 10


def test_a_jump_that_keeps_coming_back_stops_the_run(corpus, tmp_path):
    _, error = run(1, corpus, tmp_path, range(40, 400), "jump", run__spike_factor=2.5)
    assert "the loss jumped 4 times after step 10" in error and "lower optim.lr" in error


def test_the_last_finite_step_is_counted_over_restarts():
    assert last_finite_step(12, bad_steps=0, counted_from=10, before=7) == 12
    assert last_finite_step(14, bad_steps=1, counted_from=10, before=7) == 13
    assert last_finite_step(14, bad_steps=4, counted_from=10, before=7) == 7
    assert last_finite_step(10, bad_steps=0, counted_from=10, before=7) == 7


def test_next_sample():
    assert next_sample(0, 4, []) == 0
    assert next_sample(0, 4, [(4, 9)]) == 0
    assert next_sample(4, 4, [(4, 9)]) == 10
    assert next_sample(2, 4, [(5, 5)]) == 6  # a step that would meet it begins behind it
    assert next_sample(2, 4, [(20, 30), (7, 8), (5, 5)]) == 9
    assert next_sample(9, 4, [(5, 8)]) == 9


def test_spike_detector():
    off = SpikeDetector(None, [1.0] * 9)
    assert not off.is_spike(100.0)
    watch = SpikeDetector(2.0)
    assert not any(watch.is_spike(loss) for loss in (9.0, 4.0, 3.0, 3.0))  # too few to judge by
    assert not watch.is_spike(6.9) and watch.is_spike(8.1)
    assert watch.recent[-1] == 6.9  # a jump is no measure for the next


def test_flags_are_of_every_kind_of_number():
    device = torch.device("cpu")
    norms = [1.0, 0.0, -1.0, float("inf"), float("nan"), None]
    assert [bad_norm(norm, device).item() for norm in norms] == [0, 0, 1, 1, 1, 0]
    assert [bad_norm(torch.tensor(norm), device).item() for norm in norms[:-1]] == [0, 0, 1, 1, 1]
    assert [not_finite(torch.tensor(x)).item() for x in (1.0, -0.1, float("nan"), float("inf"))] == [0, 0, 1, 1]


def test_refused():
    for changes in (dict(skip_samples=((5, 4),)), dict(spike_factor=1.0), dict(max_bad_steps=0)):
        with pytest.raises(ConfigError):
            RunConfig(**changes)
