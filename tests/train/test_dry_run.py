"""The arithmetic of the dry run against what a run allocates, offloads and receives."""

from pathlib import Path

import pytest
import torch

from ksa_model.config import ModelConfigError
from ksa_model.layers.activation_bytes import block_bytes
from tests import commands
from tests.bench.workload import configured
from tests.ranks import run_on_ranks
from tests.train.runs import make_config
from train import dry_run
from train.config.errors import ConfigError

# Wide enough that rows of features dominate numbers stored once per row.
WIDE = dict(
    model__hidden_size=128, model__head_dim=32, model__ffn_size=320, model__num_kv_heads=2, model__vocab_size=400,
    model__window_chunks=4, seq_len=1024,
)  # fmt: skip


def moved_bytes_on_a_rank(changes: dict) -> tuple[int, int, int]:
    """Bytes of host memory held after forward and after backward, and how many of them backward has freed."""
    import numpy as np

    from tests.bench.workload import sample
    from train.batches import batch_maker
    from train.build import build_engine
    from train.distributed import groups

    config = make_config(Path("corpus.jsonl"), Path("runs"), **changes)
    world = groups.initialize(config.parallel, torch.device("cpu"))
    model = build_engine(config, world).module
    make = batch_maker(config.model, world.context_group.rank(), world.context_group.size())
    batch = make(sample(config.seq_len, config.model.vocab_size, 0, [0, 3 * config.seq_len // 4]))
    loss = model(batch.tokens, batch.labels, batch.layout)
    held = model.host_pool.held_bytes
    loss.backward()
    free = sum(np.prod(b.shape) for buffers in model.host_pool._free.values() for b in buffers)
    return held, model.host_pool.held_bytes, int(free)


@pytest.mark.parametrize("ranks, changes", [
    (1, dict(memory__recompute="full")),
    (1, dict(memory__recompute="selective", run__precision="bf16", model__summary_tokens=2)),
    (1, dict(memory__recompute="selective", memory__host_gib=0.001)),  # some tensors fit, some do not
    (2, dict(memory__recompute="selective", parallel__tensor=2, parallel__sequence=True)),
    (2, dict(memory__recompute="selective", parallel__context=2, model__layer_pattern="KSCF")),
    (1, dict(memory__recompute="selective", run__precision="bf16", model__layer_pattern="HPHF")),
], ids=str)  # fmt: skip
def test_offloaded_tensors_are_counted_to_the_byte(ranks, changes):
    changes = WIDE | dict(model__layer_pattern="KKFS", run__samples_per_step=4, memory__offload=True) | changes
    config = make_config(Path("corpus.jsonl"), Path("runs"), **changes)
    counted, left = dry_run.offloaded_bytes(config)
    assert (left > 0) == (config.memory.host_gib < 1)
    for held, held_later, free in run_on_ranks(ranks, moved_bytes_on_a_rank, changes):
        assert counted == held == held_later == free


def peak_bytes(changes: dict) -> tuple[int, float]:
    """Peak bytes that forward and backward of the blocks allocate on the CPU: measured, and counted."""
    from ksa_model.layout.sequence import build_layout
    from train.build import build_engine
    from train.distributed import groups

    config = make_config(Path("corpus.jsonl"), Path("runs"), **changes)
    world = groups.initialize(config.parallel, torch.device("cpu"))
    model = build_engine(config, world).module
    pack = build_layout([0], [config.seq_len], config.seq_len, config.model.chunk_size)
    tokens = torch.zeros(config.seq_len, dtype=torch.long)
    model.hidden(tokens, pack).sum().backward()  # allocates gradients and host buffers before the measurement
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        model.hidden(tokens, pack).sum().backward()
    changes_of = [
        (e.start_ns(), e.nbytes()) for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"
    ]
    now = most = 0
    for _, change in sorted(changes_of, key=lambda event: event[0]):
        now += change
        most = max(most, now)
    blocks = [block_bytes(config.model, layer, dry_run.rank_shape(config)) for layer in config.model.layers]
    memory = dry_run.plan(config, 1).memory
    return most, memory["activations"] + max(block.transient_bytes(config.memory.recompute) for block in blocks)


PRESETS = {
    "none": dict(),
    "selective": dict(memory__recompute="selective"),
    "full": dict(memory__recompute="full"),
    "offload": dict(memory__recompute="selective", memory__offload=True),
    "offload, slices": dict(memory__recompute="selective", memory__offload=True, memory__mlp_rows=128),
}


def test_peak_memory_of_every_preset():
    """Measured on the CPU, whose kernels make copies that the plan does not count, hence the tolerance. The order of
    the presets is exact."""
    base = WIDE | dict(model__layer_pattern="KKKF", model__num_layers=12, model__ffn_size=1024, run__samples_per_step=4)
    found = {name: run_on_ranks(1, peak_bytes, base | settings)[0] for name, settings in PRESETS.items()}
    for name, (measured, counted) in found.items():
        assert counted == pytest.approx(measured, rel=0.25), (name, counted / measured)
    measured, counted = zip(*found.values())
    assert list(measured) == sorted(measured, reverse=True)
    assert list(counted) == sorted(counted, reverse=True)


@pytest.mark.parametrize("name", ["none", "selective"])
def test_peak_memory_of_pooled_layers(name):
    base = WIDE | dict(model__layer_pattern="HPHF", model__num_layers=12, model__ffn_size=1024, run__samples_per_step=4)
    measured, counted = run_on_ranks(1, peak_bytes, base | PRESETS[name])[0]
    assert counted == pytest.approx(measured, rel=0.05)


@pytest.mark.parametrize("name", PRESETS)
def test_activations_grow_with_the_sample_alone(name):
    """Twice the tokens take twice the bytes."""
    totals = []
    for seq_len in (65536, 131072):
        config = make_config(Path("c"), Path("r"), **WIDE | PRESETS[name] | dict(seq_len=seq_len))
        memory = dry_run.plan(config, 1).memory
        totals.append(memory["activations"])
    assert totals[1] == pytest.approx(2 * totals[0], rel=1e-6)


EXPERIMENTS = sorted(path.stem for path in (Path(__file__).resolve().parents[2] / "configs/experiment").glob("*.yaml"))


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_experiments_fit_their_cards(name):
    config = configured([f"+experiment={name}", "model.vocab_size=151936"])
    text = dry_run.describe(config, config.dry_run_ranks or 1, "h100-80gb")
    assert "does NOT fit" not in text and "on h100-80gb: fits" in text
    assert config.seq_len == {"8k": 8192, "32k": 32768, "128k": 131072, "1m": 1048576}[name.split("_")[1]]


def received_on_a_rank(changes: dict) -> dict[str, int]:
    """Bytes that the context exchanges of one forward and backward received on this rank."""
    import numpy as np

    from ksa_model.layout.sequence import ShardedLayout, build_layout
    from train.build import build_engine
    from train.distributed import groups

    config = make_config(Path("corpus.jsonl"), Path("runs"), **changes)
    world = groups.initialize(config.parallel, torch.device("cpu"))
    model = build_engine(config, world).module
    pack = build_layout(np.array([0]), np.array([config.seq_len]), config.seq_len, config.model.chunk_size)
    shard = ShardedLayout(pack, world.context_group.rank(), world.context_group.size())
    rows = torch.zeros(shard.num_text, dtype=torch.long)
    model(rows, rows, shard).backward()
    return dict(model.blocks[0].attention.context.received_bytes)


@pytest.mark.parametrize("pattern", ["KSCF", "HPSF"])
def test_exchanges_are_what_collectives_count(pattern):
    changes = WIDE | dict(model__layer_pattern=pattern, parallel__context=4, run__samples_per_step=4)
    counted = dry_run.plan(make_config(Path("c"), Path("r"), **changes), 4).exchange
    received = run_on_ranks(4, received_on_a_rank, changes)
    assert all(rank["summaries"] == counted["summaries"] for rank in received)
    assert all(rank["text"] == counted["text keys"] for rank in received)
    # The first and the last rank have one neighbour, the others two. The plan counts the rank with the most.
    assert max(rank["halo"] for rank in received) == counted["halo"]


def test_zero_stages_shard_the_state():
    sizes = {}
    for zero in (1, 2, 3):
        config = make_config(
            Path("c"), Path("r"), **WIDE, parallel__zero=zero, run__precision="bf16", run__samples_per_step=8
        )
        counted = dry_run.plan(config, 8)
        sizes[zero], p = counted.memory, counted.parameters_per_rank
    assert sizes[1]["weights"] == 2 * p and sizes[3]["weights"] == 2 * p / 8
    assert sizes[1]["optimizer"] == sizes[3]["optimizer"] == 12 * p / 8
    vocabulary = sizes[1]["gradients"] - 4 * p  # whose gradients arrive in bf16 before they are summed in fp32
    assert vocabulary == 2 * config.model.padded_vocab_size * config.model.hidden_size * 2
    assert sizes[2]["gradients"] == sizes[3]["gradients"] == 4 * p / 8  # fp32 sums, and a bucket for the reduction
    assert sizes[2]["gradient bucket"] == 2 * p and "gradient bucket" not in sizes[1]
    plain = make_config(Path("c"), Path("r"), **WIDE, parallel__zero=0, run__samples_per_step=8)
    found = dry_run.plan(plain, 8).memory
    assert (found["weights"], found["gradients"], found["optimizer"]) == (4 * p, 4 * p, 8 * p)


def test_command_plans_four_thousand_ranks(tmp_path):
    code, out, err = commands.run(
        "train", "dry_run=true", "model=hybrid_1b9", "model.vocab_size=151936", "seq_len=1048576",
        "run.precision=bf16", "memory=full", "parallel.tensor=2", "parallel.sequence=true",
        "parallel.context=64", "dry_run_ranks=4096", "run.samples_per_step=32", f"run.root={tmp_path}",
    )  # fmt: skip
    assert code == 0, err
    for text in ("4096 ranks = tensor 2 + sequence x context 64 x data 32", "rank 4095", "fits", "summaries"):
        assert text in out
    assert not list(tmp_path.iterdir())


def test_too_large_and_wrong_inputs():
    config = make_config(Path("c"), Path("r"), **WIDE)
    assert "does NOT fit" in dry_run.describe(make_config(Path("c"), Path("r"), **WIDE | dict(
        model__hidden_size=32768, model__ffn_size=131072)), 1, "h100-80gb")  # fmt: skip
    with pytest.raises(ConfigError, match="dry_run_gpu='gtx' is not one of"):
        dry_run.describe(config, 1, "gtx")
    with pytest.raises(ConfigError, match=r"dry_run needs model.vocab_size"):
        dry_run.plan(make_config(Path("c"), Path("r")), 1)


def test_gated_delta_nets_need_whole_samples():
    config = make_config(Path("c"), Path("r"), **WIDE, model__layer_pattern="GF", parallel__context=2)
    with pytest.raises(ModelConfigError, match=r"layer_pattern='GF' has gated delta net layers .* parallel.context=2"):
        dry_run.plan(config, 2)
