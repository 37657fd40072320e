"""Counted activation bytes against what autograd keeps; `tests/train/test_dry_run.py` compares the peak."""

from pathlib import Path

import pytest
import torch

from ksa_model.layers.activation_bytes import block_bytes
from tests.ranks import run_on_ranks
from tests.train.runs import make_config
from tests.train.test_dry_run import WIDE
from train.dry_run import rank_shape


def kept_bytes_on_a_rank(changes: dict) -> float:
    """Bytes of the distinct tensors that the blocks keep from forward to backward, without weights and RoPE tables."""
    import numpy as np

    from ksa_model.layout.sequence import ShardedLayout, build_layout
    from ksa_model.parallel.context import ContextParallel
    from train.build import build_engine
    from train.distributed import groups

    config = make_config(Path("corpus.jsonl"), Path("runs"), **changes)
    world = groups.initialize(config.parallel, torch.device("cpu"))
    model = build_engine(config, world).module
    model.anneal(config.stage.summary_projection_weight(1, 2))
    k = config.model.chunk_size
    pack = build_layout(np.array([0]), np.array([config.seq_len]), config.seq_len, k, config.model.summary_tokens)
    tokens = torch.zeros(config.seq_len, dtype=torch.long)
    context = ContextParallel(world.context_group)
    if context.size > 1:
        pack = ShardedLayout(pack, context.rank, context.size)
        tokens = tokens[: pack.num_text]
    known = {p.untyped_storage().data_ptr() for p in model.parameters()}
    storages: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known and tensor.dtype != torch.int64:
            storages[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.hidden(tokens, pack)
    tables = 1 if config.model.rotates_everything else 2
    rotary = tables * 2 * 4 * (pack.num_text + pack.num_summary) * config.model.head_dim // 2
    return sum(storage.nbytes() for storage in storages.values()) - rotary


@pytest.mark.parametrize("ranks, changes", [
    (1, dict(model__layer_pattern="F")),
    (1, dict(model__layer_pattern="KKKF")),
    (1, dict(model__layer_pattern="KSCK", run__precision="bf16")),
    (1, dict(model__layer_pattern="GKGG")),
    (1, dict(model__layer_pattern="G", run__precision="bf16")),
    (2, dict(model__layer_pattern="KGFG", parallel__tensor=2, parallel__sequence=True)),
    (1, dict(model__layer_pattern="KKKF", model__qk_norm=False, model__summary_tokens=2)),
    (1, dict(model__layer_pattern="KKKF", model__qk_norm=False, model__qkv_bias=True)),
    (1, dict(model__layer_pattern="KKFK", stage__kind="anneal", model__summary_tokens=4, model__head_dim=256,
             model__chunk_size=1, model__ffn_size=64, run__precision="bf16")),
    (1, dict(model__layer_pattern="KKKF", model__rotate_far=False, model__rotate_full_layers=False)),
    (1, dict(model__layer_pattern="KKKF", model__rotate_far=False, run__precision="bf16")),
    (2, dict(model__layer_pattern="KKFK", model__rotate_far=False, parallel__context=2)),
    (1, dict(model__layer_pattern="P", model__rotate_far=False)),
    (1, dict(model__layer_pattern="H")),
    (1, dict(model__layer_pattern="H", run__precision="bf16")),
    (1, dict(model__layer_pattern="H", model__qk_norm=False)),
    (1, dict(model__layer_pattern="P", run__precision="bf16")),
    (2, dict(model__layer_pattern="HPHF", parallel__tensor=2, parallel__sequence=True)),
    (2, dict(model__layer_pattern="HPHH", parallel__context=2)),
    (2, dict(model__layer_pattern="KKFK", parallel__tensor=2, parallel__sequence=True)),
    (2, dict(model__layer_pattern="KKFK", parallel__context=2, run__precision="bf16")),
    (1, dict(model__layer_pattern="KKKF", memory__mlp_rows=256)),
    (2, dict(model__layer_pattern="KKFK", parallel__tensor=2, parallel__sequence=True, memory__mlp_rows=256)),
], ids=str)  # fmt: skip
def test_activations_are_what_autograd_keeps(ranks, changes):
    changes = WIDE | dict(run__samples_per_step=4) | changes
    kept = run_on_ranks(ranks, kept_bytes_on_a_rank, changes)[0]
    config = make_config(Path("corpus.jsonl"), Path("runs"), **changes)
    shape = rank_shape(config)
    counted = sum(block_bytes(config.model, layer, shape).saved for layer in config.model.layers)
    assert counted == pytest.approx(kept, rel=0.1), counted / kept
