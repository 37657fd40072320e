"""The loss of the decoder: what it keeps, rows without labels, and 16-bit logits on a GPU."""

import pytest
import torch

from ksa_model import loss
from ksa_model.config import LOSS_ROWS
from ksa_model.layers.tensor_parallel import TensorParallel
from ksa_model.loss import IGNORE_INDEX
from ksa_model.ops.backend import Backend
from tests.ksa_model.ops.attention.test_joint import make_layout
from tests.ksa_model.test_model import build, random_text, small_config


def test_loss_keeps_no_logits(world):
    """2,500 rows of 60,000 words would be 600 MB of logits; at most a slice of rows exists at a time."""
    config = small_config(vocab_size=60_000, layer_pattern="F", num_layers=1)
    pack = make_layout([2500], 4, 1, 0)
    decoder = build(world, config)
    largest = 0

    def see(saved):
        nonlocal largest
        largest = max(largest, saved.numel())
        return saved

    with torch.autograd.graph.saved_tensors_hooks(see, lambda x: x):
        decoder(*random_text(pack, vocab=60_000), pack)
    assert largest <= LOSS_ROWS * config.padded_vocab_size < 2500 * config.padded_vocab_size


def test_rows_without_any_label_give_zero_and_finite_gradients(world):
    pack = make_layout([10], 4, 1, 0)
    decoder = build(world, small_config())
    tokens, labels = random_text(pack)
    loss = decoder(tokens, torch.full_like(labels, IGNORE_INDEX), pack)
    loss.backward()
    assert loss == 0 and all(p.grad is not None and (p.grad == 0).all() for p in decoder.parameters())


@pytest.mark.gpu
def test_cross_entropy_in_bf16(world):
    """`loss.cross_entropy` as the model calls it, against the plain path in fp32."""
    tp = TensorParallel(world.tensor_group)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(5000, 64, generator=generator).cuda().bfloat16().requires_grad_()
    weight = torch.randn(1024, 64, generator=generator).cuda().bfloat16().requires_grad_()
    labels = torch.randint(0, 1000, (5000,), generator=generator)
    labels[::5] = IGNORE_INDEX
    labels = labels.cuda()
    half, full = (Backend(device=hidden.device, dtype=dtype) for dtype in (torch.bfloat16, torch.float32))
    assert half.loss is not None and full.loss is None
    got = loss.cross_entropy(half, hidden, weight, labels, 1000, tp)
    exact = [x.detach().float().requires_grad_() for x in (hidden, weight)]
    want = loss.cross_entropy(full, *exact, labels, 1000, tp)
    assert abs(got - want) / want < 2e-3
    for g, w in zip(torch.autograd.grad(got * 0.5, (hidden, weight)), torch.autograd.grad(want * 0.5, exact)):
        assert (g.float() - w).norm() / w.norm() < 1e-2
