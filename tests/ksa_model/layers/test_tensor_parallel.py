"""Tensor and sequence parallelism against one rank: losses and every gradient, replicated weights included."""

import numpy as np
import pytest
import torch

from tests.ksa_model.ops.attention.test_joint import make_layout
from tests.ksa_model.test_model import random_text, small_config, spread_biases, spread_pooling
from tests.ranks import run_on_ranks

# One pack with documents, a short chunk and padding; 32 chunks, so that two and four ranks share them.
PACK = ([50, 3, 41, 17], 4, 2, 2)


def gradients_on_a_rank(tensor: int, sequence: bool, changes: dict) -> dict:
    """This rank's loss and gradients, as {name: (partition dim or None, tensor)}."""
    from ksa_model.layers.tensor_parallel import TensorParallel
    from ksa_model.model import Decoder
    from train.distributed import groups

    config = small_config(**dict(num_kv_heads=4, summary_tokens=2, vocab_multiple=32) | changes)
    world = groups.initialize(groups.ParallelConfig(tensor=tensor, sequence=sequence), torch.device("cpu"))
    torch.manual_seed(0)
    decoder = Decoder(config, TensorParallel(world.tensor_group, sequence))
    spread_pooling(decoder)
    spread_biases(decoder)
    lengths, k, _, padding = PACK
    pack = make_layout(lengths, k, config.summary_tokens, padding)
    loss = decoder(*random_text(pack), pack)
    loss.backward()
    logits = decoder.logits(random_text(pack)[0], pack).detach()
    return {
        "loss": loss.detach(),
        "logits": logits,
        "gradients": {
            name: (p.partition_dim if getattr(p, "tensor_model_parallel", False) else None, p.grad)
            for name, p in decoder.named_parameters()
        },
    }


@pytest.mark.parametrize(
    "changes",
    [
        dict(layer_pattern="KSCF"),
        dict(layer_pattern="KKFK", tie_embeddings=True),
        dict(layer_pattern="GKGG"),
        dict(layer_pattern="HPHF", summary_tokens=1),
        dict(layer_pattern="KSKF", qkv_bias=True),
    ],
    ids=str,
)
@pytest.mark.parametrize("tensor, sequence", [(2, False), (2, True), (4, True)])
def test_matches_one_rank(tensor, sequence, changes):
    (want,) = run_on_ranks(1, gradients_on_a_rank, 1, False, changes)
    ranks = run_on_ranks(tensor, gradients_on_a_rank, tensor, sequence, changes)
    for got in ranks:
        torch.testing.assert_close(got["loss"], want["loss"], rtol=1e-6, atol=1e-5)
        torch.testing.assert_close(got["logits"], want["logits"], rtol=1e-5, atol=1e-5)
    for name, (_, gradient) in want["gradients"].items():
        dim = ranks[0]["gradients"][name][0]
        shares = [rank["gradients"][name][1] for rank in ranks]
        if dim is None:
            for share in shares:  # replicated: every rank must hold the whole sum
                torch.testing.assert_close(share, gradient, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
        else:
            torch.testing.assert_close(
                torch.cat(shares, dim), gradient, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
            )


@torch.no_grad()
def test_streams_side_by_side_are_joined_without_a_copy(world):
    from ksa_model.layers.tensor_parallel import TensorParallel

    join = TensorParallel(world.tensor_group).join_streams
    text, summary = torch.arange(10.0).view(5, 2).tensor_split([3])
    joined = join(text, summary)
    assert torch.equal(joined, torch.cat([text, summary])) and joined.data_ptr() == text.data_ptr()
    # Addresses that meet by chance, as an allocator gives them: two storages, which no view can cross.
    memory = np.arange(10, dtype=np.float32).reshape(5, 2)
    text, summary = torch.from_numpy(memory[:3]), torch.from_numpy(memory[3:])
    assert text.data_ptr() + text.nbytes == summary.data_ptr()
    assert join(text, summary).tolist() == memory.tolist()
    rows = torch.arange(24.0).view(6, 4)  # halves of rows, which lie between each other
    assert join(rows[:2, :2], rows[1:3, :2])[:, 0].tolist() == [0, 4, 4, 8]
