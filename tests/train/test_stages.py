"""Stages: what each trains and hands on, alone and in chains."""

import json

import pytest
import torch

from tests.ranks import run_on_ranks
from tests.train.runs import losses, make_config, newest_tensors

SCALED = {"kind": "yarn", "factor": 2, "original_max_positions": 256}
CHAIN = [
    {"name": "full", "run.steps": 4, "model.layer_pattern": "F", "optim.decay_steps": 0},
    {"name": "distill", "stage": "distill", "run.steps": 4, "model.layer_pattern": "KKKF"},
    {"name": "anneal", "stage": "anneal", "run.steps": 5, "stage.anneal_from": 1, "stage.anneal_to": 4},
    {
        "name": "extend",
        "stage": "extend",
        "tokens": 3 * 4 * 512,
        "seq_len": 512,
        "model.rope_base": 5e4,
        "model.rope_scaling": SCALED,
        "model.rotate_far": False,
        "model.rotate_full_layers": False,
    },
]


def run_chain(corpus: str, root: str, changes: dict) -> dict:
    """Run a chain on this rank; (step, records of every stage)."""
    from pathlib import Path

    from train import chain
    from train.logs.metrics import read_records

    config = make_config(Path(corpus), Path(root), **changes)
    result = chain.run(config)
    names = [link.run.name for link in chain.links(config)]
    return {"step": result.step, "records": {n: read_records(Path(root) / n / "metrics.jsonl") for n in names}}


def train_it(config) -> int | str:
    from train.config.errors import ConfigError
    from train.trainer import train

    try:
        return train(config).step
    except ConfigError as error:
        return str(error)


def real_rows(name, tensor):
    """Without vocabulary padding, which means nothing and is not handed on."""
    return tensor[:400] if name in ("master/embedding.weight", "master/head.weight") else tensor


def state_of(run):
    return json.loads((sorted((run / "checkpoints").glob("step-*"))[-1] / "state.json").read_text())


@pytest.fixture(scope="module")
def chain(corpus, tmp_path_factory):
    root = tmp_path_factory.mktemp("chain")
    (outcome,) = run_on_ranks(1, run_chain, str(corpus), str(root), dict(stages=CHAIN))
    return root / "default", outcome


def test_a_chain_runs_every_stage_to_its_end(chain):
    root, outcome = chain
    assert [len(losses(r)) for r in outcome["records"].values()] == [4, 4, 5, 3]
    assert [p.name for p in sorted(root.iterdir())] == ["0-full", "1-distill", "2-anneal", "3-extend"]
    distilled = [r for r in outcome["records"]["default/1-distill"] if "loss_kl" in r]
    for record in distilled:
        total = record["loss_lm"] + 5 * record["loss_kl"] + 5 * record["loss_attention"]
        assert record["loss"] == pytest.approx(total, rel=1e-5)
    assert len(distilled) == 4


def test_distillation_trains_summary_parameters_alone(chain):
    root, _ = chain
    before, after = newest_tensors(root / "0-full"), newest_tensors(root / "1-distill")
    for name, tensor in after.items():
        if not name.startswith("master/"):
            continue
        if "summary" not in name:
            assert torch.equal(real_rows(name, tensor), real_rows(name, before[name])), name
        elif ".summary_" in name:  # began as text's projection
            assert not torch.equal(tensor, before[name.replace(".summary_", ".")]), name
            torch.testing.assert_close(tensor, before[name.replace(".summary_", ".")], rtol=0, atol=0.1)
    assert "master/summary_embedding" in after and "master/blocks.0.attention.summary_query.weight" in after


def test_annealed_projections_are_dropped(chain):
    root, _ = chain
    after = newest_tensors(root / "2-anneal")
    assert "master/summary_embedding" in after and not [name for name in after if ".summary_" in name]
    state = state_of(root / "2-anneal")
    assert state["own_share"] == 0 and state["config"]["model"]["independent_qkv"] is False
    assert state_of(root / "3-extend")["config"]["model"]["independent_qkv"] is False


def test_extension_changes_what_it_says_and_nothing_else(chain, corpus, tmp_path):
    root, _ = chain
    before, after = state_of(root / "2-anneal")["config"], state_of(root / "3-extend")["config"]
    changed = {key for key in after if after[key] != before[key]}
    assert changed == {"seq_len", "model", "run", "stage", "init_from"}
    of_model = {k for k in after["model"] if after["model"][k] != before["model"][k]}
    assert of_model == {"rope_base", "rope_scaling", "rotate_far", "rotate_full_layers"}
    assert (after["run"]["steps"], after["seq_len"]) == (3, 512)
    # Without a step of its own it is the same weights and moments, bit for bit.
    changes = dict(
        init_from=str(root / "2-anneal"), stage__kind="extend", seq_len=512, model__layer_pattern="KKKF",
        model__independent_qkv=False, model__rope_scaling=SCALED, optim__lr=1e-30, optim__weight_decay=0.0,
        run__steps=1,
    )  # fmt: skip
    run_on_ranks(1, one_run, str(corpus), str(tmp_path), changes)
    kept, there = newest_tensors(tmp_path / "default"), newest_tensors(root / "2-anneal")
    assert kept.keys() == there.keys()
    assert all(torch.equal(kept[name], there[name]) for name in kept if name.startswith("master/"))
    # After one step the second moment is 0.95 of what it was and 0.05 of the squared gradient.
    name = "exp_avg_sq/blocks.0.mlp.gate.weight"
    assert (kept[name] >= 0.9499 * there[name]).all() and there[name].max() > 0


def test_what_an_extension_takes_over_is_said(corpus, tmp_path):
    from train.config.conversion import flatten, to_mapping
    from train.config.stage import StageConfig
    from train.stages import describe_initialization

    plain, scaled = (make_config(corpus, tmp_path, model__rope_scaling=scaling) for scaling in (None, SCALED))
    unrotated = make_config(corpus, tmp_path, model__rotate_far=False, model__rotate_full_layers=False)
    for before, now, words in (
        (plain, scaled, "model.rope_scaling.factor None -> 2.0"),
        (scaled, plain, "'factor': 2.0"),
        (scaled, scaled, "same settings"),
        (plain, unrotated, "changed: model.rotate_far True -> False, model.rotate_full_layers True -> False"),
    ):
        state = {"step": 3, "config": to_mapping(before)}
        assert words in describe_initialization(StageConfig("extend"), "there", state, flatten(to_mapping(now)))


def one_run(corpus: str, root: str, changes: dict):
    from tests.train.runs import run_training

    return run_training(corpus, root, changes)


def test_a_chain_stopped_in_any_stage_goes_on_to_the_same_end(chain, corpus, tmp_path):
    """Three calls: ended in the second stage, in the middle of annealing, and left to finish, on two ranks."""
    _, outcome = chain
    for stop in ({"stages": [CHAIN[0], CHAIN[1] | {"run.stop_at_step": 2}]}, {}):
        links = stop.get("stages") or [*CHAIN[:2], CHAIN[2] | {"run.stop_at_step": 2}, CHAIN[3]]
        (stopped,) = run_on_ranks(1, run_chain, str(corpus), str(tmp_path), dict(stages=links))
        assert stopped["step"] == 2
    assert not (tmp_path / "default/3-extend").exists()
    assert state_of(tmp_path / "default/2-anneal")["own_share"] == pytest.approx(2 / 3)
    for links in (CHAIN, CHAIN):  # and once more, with nothing left to do
        end = run_on_ranks(2, run_chain, str(corpus), str(tmp_path), dict(stages=links))[0]
    for name, records in outcome["records"].items():
        assert losses(end["records"][name]) == pytest.approx(losses(records), rel=2e-5), name


@pytest.mark.parametrize("zero", [pytest.param(0, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow), 3])
def test_frozen_weights_stay_under_every_zero_stage(zero, chain, corpus, tmp_path):
    root, outcome = chain
    before = newest_tensors(root / "0-full")
    changes = dict(
        init_from=str(root / "0-full"), stage__kind="distill", model__layer_pattern="KKKF", run__steps=4,
        parallel__zero=zero, run__name=f"zero{zero}", optim__decay_steps=0,
    )  # fmt: skip
    records = run_on_ranks(2, one_run, str(corpus), str(tmp_path), changes)[0]
    assert losses(records) == pytest.approx(losses(outcome["records"]["default/1-distill"]), rel=2e-5)
    after = newest_tensors(tmp_path / f"zero{zero}")
    frozen = [name for name in after if name.startswith("master/") and "summary" not in name]
    assert frozen and all(torch.equal(real_rows(name, after[name]), real_rows(name, before[name])) for name in frozen)


def test_annealing_on_split_rows_heads_and_weights_is_that_of_one_rank(chain, corpus, tmp_path):
    """Each rank norms its own heads of own and base projections, and both add to the gradient of one gain."""
    root, outcome = chain
    changes = dict(
        init_from=str(root / "1-distill"), stage__kind="anneal", model__layer_pattern="KKKF", run__steps=5,
        stage__anneal_from=1, stage__anneal_to=4, optim__decay_steps=0, run__name="anneal", memory__recompute="full",
        parallel__tensor=2, parallel__sequence=True, parallel__context=2, parallel__zero=3,
    )  # fmt: skip
    records = run_on_ranks(4, one_run, str(corpus), str(tmp_path), changes)[0]
    assert losses(records) == pytest.approx(losses(outcome["records"]["default/2-anneal"]), rel=2e-5)


def test_an_annealed_model_is_loaded_as_it_was_saved(chain, world):
    from train.generate import load_run

    root, _ = chain
    model, _ = load_run(root / "2-anneal", world)
    assert not model.config.independent_qkv and model.blocks[0].attention.summary_projection_weight == 1


def test_an_annealed_run_is_not_brought_back(chain, corpus, tmp_path):
    """A longer run would give its projections, which no checkpoint has, a share again."""

    def config(steps):
        anneal = dict(stage__kind="anneal", init_from=str(chain[0] / "1-distill"), model__layer_pattern="KKKF")
        return make_config(corpus, tmp_path, run__name="annealed", run__steps=steps, optim__decay_steps=0, **anneal)

    (finished,) = run_on_ranks(1, train_it, config(5))
    assert finished == 5
    (refused,) = run_on_ranks(1, train_it, config(9))
    assert "annealed away at step 5, and with run.steps=9 they would have a weight of 0.44" in refused


def chain_or_refusal(corpus: str, root: str, changes: dict):
    from train.config.errors import ConfigError

    try:
        return run_chain(corpus, root, changes)["step"]
    except ConfigError as error:
        return str(error)


def test_a_finished_chain_does_not_call_stale_stages_done(corpus, tmp_path):
    """Its first stage is lengthened, renamed, or has lost its checkpoints."""
    first, second = {"name": "a", "run.steps": 2}, {"name": "b", "run.steps": 3, "stage": "extend"}

    def again(*stages):
        return run_on_ranks(1, chain_or_refusal, str(corpus), str(tmp_path), dict(stages=list(stages)))[0]

    assert again(first, second) == 3
    before = sorted(str(p) for p in tmp_path.rglob("step-*"))
    said = again(first | {"run.steps": 4}, second)
    assert "stage 1 (default/0-a) is at step 2 of run.steps=4, and default/1-b began with its end" in said
    assert "remove" not in said and "delete" not in said
    assert "default/1-b began with 0-a, and its stage before is now default/0-c" in again(first | {"name": "c"}, second)
    assert sorted(str(p) for p in tmp_path.rglob("step-*")) == before
    assert again(first, second | {"run.steps": 5}) == 5  # the last may be longer
    kept = (tmp_path / "default/0-a/metrics.jsonl").read_bytes()
    (tmp_path / "default/0-a/checkpoints").rename(tmp_path / "elsewhere")
    assert again(first, second | {"run.steps": 6}) == 6  # the first is not trained again
    assert (tmp_path / "default/0-a/metrics.jsonl").read_bytes() == kept
    (tmp_path / "elsewhere").rename(tmp_path / "default/0-a/checkpoints")
    (tmp_path / "default/1-b").rename(tmp_path / "default/1-b.old")  # as the message says
    assert again(first | {"run.steps": 4}, second) == 3
    assert state_of(tmp_path / "default/0-a")["step"] == 4


def test_some_keys_of_a_group_leave_the_others(corpus, tmp_path):
    from train import chain as chains

    scaling = {"kind": "linear", "factor": 2}
    stages = [{"name": "a", "run.steps": 3, "optim": {"lr": 0.5}, "model.rope_scaling": SCALED},
              {"name": "b", "run.steps": 3, "model": {"rope_scaling": scaling}}]  # fmt: skip
    first, second = chains.links(make_config(corpus, tmp_path, stages=stages))
    assert (first.optim.lr, first.optim.warmup_steps, first.optim.decay_steps) == (0.5, 2, 5)
    assert second.model.rope_scaling.kind == "linear" and second.model.rope_scaling.original_max_positions is None
    assert second.model.hidden_size == 32


@pytest.mark.parametrize("kind, qk_norm, refused", [
    ("scratch", True, True), ("anneal", True, True), ("extend", True, True), ("extend", False, True),
    ("scratch", False, False), ("anneal", False, False),
])  # fmt: skip
def test_a_run_begins_amid_annealing_only_where_mixed_projections_are_exact(kind, qk_norm, refused):
    from tests.ksa_model.test_model import small_config
    from train import stages
    from train.config.errors import ConfigError
    from train.config.stage import StageConfig

    model = small_config(qk_norm=qk_norm)
    before = {name: getattr(model, name) for name in type(model).__dataclass_fields__}
    for share in (0.0, 1.0):
        stages.check_inherited(StageConfig(kind), model, "runs/a", before, share)
    if not refused:
        stages.check_inherited(StageConfig(kind), model, "runs/a", before, 0.4)
        return
    with pytest.raises(ConfigError, match=rf"runs/a is from the middle of annealing: .* stage.kind={kind} cannot"):
        stages.check_inherited(StageConfig(kind), model, "runs/a", before, 0.4)


def test_what_cannot_be_is_refused_in_one_line(chain, corpus, tmp_path):
    from train import chain as chains
    from train.config.errors import ConfigError
    from train.config.schema import validate
    from train.trainer import train

    root, _ = chain

    def config(**changes):
        return make_config(corpus, tmp_path, **changes)

    for changes, message in (
        (dict(stage__kind="extend"), "stage.kind=extend continues an earlier run: give init_from=runs/NAME"),
        (dict(stage__kind="distill", init_from="x", model__layer_pattern="F"), "'F' has no K layer"),
        (dict(stage__kind="anneal", init_from="x", model__independent_qkv=False), "nothing to anneal away"),
        (dict(stage__kind="anneal", init_from="x", stage__anneal_from=5), "no step of run.steps=5"),
        (dict(stage__train="summary"), "stage.train=summary does not train the other weights"),
    ):
        with pytest.raises(ConfigError, match=message):
            validate(config(**changes), 1)
    with pytest.raises(ConfigError, match=r"stage.kind='melt' is not one of scratch, distill"):
        config(stage__kind="melt")
    extend = dict(stage__kind="extend", init_from=str(root / "3-extend"), model__layer_pattern="KKKF")
    with pytest.raises(ConfigError, match=r"model.chunk_size was 4 in .* and is now 8"):
        train(config(**extend, model__rope_base=2.0, model__independent_qkv=False, model__chunk_size=8))
    own = dict(init_from=str(root / "1-distill"), stage__kind="extend", model__layer_pattern="KKKF")
    with pytest.raises(ConfigError, match=r"has summary projections .* anneal them away first"):
        train(config(**own, model__independent_qkv=False))
    full = dict(init_from=str(root / "0-full"), stage__kind="distill", model__layer_pattern="KKKF")
    with pytest.raises(
        ConfigError, match=r"RoPE in other layers than .*: set model.rotate_full_layers=true, or train all"
    ):
        train(config(**full, model__rotate_full_layers=False))
    with pytest.raises(ConfigError, match=r"other layers than the stage before b has, .*: train all weights first"):
        a = {"name": "a", "run.steps": 9, "model.layer_pattern": "F", "model.rotate_full_layers": False}
        b = {"name": "b", "stage": "distill", "run.steps": 1, "model.layer_pattern": "KKKF"}
        chains.links(config(stages=[a, b]))
    with pytest.raises(ConfigError, match=r"model.window_chunks was 2 in the stage before b and is now 4"):
        b = {"name": "b", "stage": "extend", "run.steps": 1, "model.window_chunks": 4}
        chains.links(config(stages=[{"name": "a", "run.steps": 9}, b]))
    with pytest.raises(ConfigError, match=r"the stage before b is from the middle of annealing: .* with 0.25 of their"):
        a = {"name": "a", "stage": "anneal", "run.steps": 6, "stage.anneal_to": 8, "model.layer_pattern": "KKKF"}
        chains.links(config(init_from="x", stages=[a, {"name": "b", "stage": "extend", "run.steps": 1}]))
    with pytest.raises(ConfigError, match=r"init_from=nowhere: neither a checkpoint"):
        train(config(init_from="nowhere"))
    for stages, message in (
        ([{"name": "a"}], r"stages\[0\] \(a\): give its length as either tokens or run.steps"),
        ([{"name": "a b", "tokens": 1}], "name='a b' must be a word"),
        ([{"name": "a", "tokens": "many"}], "tokens='many' must be a number"),
        (
            [{"name": "a", "run.steps": 1, "optim.lrr": 1}],
            "optim.lrr is not a configuration key; did you mean optim.lr",
        ),
    ):
        with pytest.raises(ConfigError, match=message):
            chains.links(config(stages=stages))
    with pytest.raises(ConfigError, match="resume=runs/x does not tell which of the 1 stages"):
        chains.links(config(stages=CHAIN[:1], resume="runs/x"))
