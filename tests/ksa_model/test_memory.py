"""Recomputation, offload and slices give the same numbers as keeping everything, within their limits of memory."""

import gc

import pytest
import torch

from ksa_model import memory
from ksa_model.config import MemoryConfig, MemoryConfigError
from ksa_model.layers.attention import Attention
from ksa_model.memory import BlockActivations, CheckpointedForward, HostPool, SavedOutput, in_slices
from ksa_model.ops.attention import blocked, cpu
from tests.ksa_model.ops.attention.test_joint import make_layout
from tests.ksa_model.test_model import build, random_text, small_config

EVERY_MIXER = dict(layer_pattern="KFSCK", num_layers=5, window_chunks=(1, 0, 0, 2, 0))
FULL, SELECTIVE = MemoryConfig("full"), MemoryConfig("selective")


def loss_and_gradients(world, config, **settings):
    decoder = build(world, config, memory=MemoryConfig(**settings))
    pack = make_layout([30, 9, 1], 4, config.summary_tokens, 1)
    loss = decoder(*random_text(pack), pack)
    loss.backward()
    return decoder, [loss.detach(), *(p.grad for p in decoder.parameters())]


def attend_calls(monkeypatch, backend):
    """A list of one number: how often the forward of the attention kernels has been called since."""
    module, calls = {"auto": cpu, "blocked": blocked}[backend], [0]
    attend = module.attend

    def counted(*arguments):
        calls[0] += 1
        return attend(*arguments)

    monkeypatch.setattr(module, "attend", counted)
    return calls


@pytest.mark.parametrize("backend", ["auto", "blocked", "reference"])
@pytest.mark.parametrize("settings", [
    dict(recompute="full"), dict(recompute="selective"), dict(recompute="full", offload=True),
    dict(recompute="selective", offload=True),
    dict(recompute="selective", offload=True, host_gib=1e-9),  # no tensor fits
    dict(recompute="selective", offload=True, host_gib=20e3 / 2**30),  # some tensors fit
], ids=str)  # fmt: skip
def test_recompute_and_offload_change_no_bit(world, settings, backend):
    config = small_config(attention_backend=backend, **EVERY_MIXER)
    _, want = loss_and_gradients(world, config)
    decoder, got = loss_and_gradients(world, config, **settings)
    assert all(torch.equal(a, b) for a, b in zip(got, want))
    with torch.no_grad():  # where rows are overwritten in place
        pack = make_layout([30, 9, 1], 4, config.summary_tokens, 1)
        torch.testing.assert_close(decoder(*random_text(pack), pack), want[0], rtol=1e-6, atol=1e-5)
    assert decoder.host_pool.held_bytes <= settings.get("host_gib", 1) * 2**30
    assert bool(decoder.host_pool.held_bytes) == (settings.get("host_gib", float(settings.get("offload", 0))) > 1e-9)


@pytest.mark.parametrize("backend", ["auto", "blocked"])
def test_selective_computes_attention_once(world, monkeypatch, backend):
    config = small_config(attention_backend=backend, **EVERY_MIXER)
    calls, counts = attend_calls(monkeypatch, backend), []
    for recompute in ("none", "selective", "full"):
        calls[0] = 0
        loss_and_gradients(world, config, recompute=recompute)
        counts.append(calls[0])
    assert counts == [5, 5, 10]


def test_backward_may_run_twice(world):
    """With `retain_graph`, the second recomputation starts from the same tensors as the first."""
    pack, grads = make_layout([30, 9], 4, 1, 0), []
    decoder = build(world, small_config(), memory=MemoryConfig("selective", offload=True))
    loss = decoder(*random_text(pack), pack)
    for _ in range(2):
        grads.append(torch.autograd.grad(loss, list(decoder.parameters()), retain_graph=True))
    assert all(torch.equal(a, b) for a, b in zip(*grads))


def test_host_buffers_are_reused(world):
    """Backward frees every buffer, so the second micro-batch needs no more memory than the first."""
    decoder = build(world, small_config(), memory=MemoryConfig("selective", offload=True))
    pack, held = make_layout([30, 9], 4, 1, 0), []
    gc.disable()  # buffers must not depend on the garbage collector
    try:
        for _ in range(3):
            decoder(*random_text(pack), pack).backward()
            held.append(decoder.host_pool.held_bytes)
            assert sum(len(b) for free in decoder.host_pool._free.values() for b in free) == held[-1]
    finally:
        gc.enable()
    assert held[0] == held[1] == held[2] > 0


def test_only_the_last_block_stays_on_the_device(world):
    blocks, config = [], MemoryConfig("full", offload=True)
    running = CheckpointedForward(config, HostPool(2**20))
    x = torch.randn(8, 4, requires_grad=True)
    for _ in range(4):
        x = running.run(lambda x, saved: x.sin(), x)
        blocks.append(running._last)
    assert [block._tensors[0] is None for block in blocks] == [True, True, True, False]
    x.sum().backward(retain_graph=True)
    assert all(block._tensors[0] is not None for block in blocks)


def test_the_block_below_returns_ahead():
    pool = HostPool(2**20)
    below = BlockActivations(pool, None)
    above = BlockActivations(pool, below)
    values = torch.arange(12.0).view(3, 4).t()[:, :2]  # strides return too: [4, 2], not contiguous
    slots = below.put(values), above.put(values + 1)
    for block in (below, above):
        block.leave_device()
        assert block._tensors == [None]
    got = above.get(slots[1])
    assert torch.equal(got, values + 1) and below._tensors[0] is not None
    got = below.get(slots[0])
    assert torch.equal(got, values) and got.stride() == values.stride()


def test_a_saved_output_is_empty_before_put():
    saved = SavedOutput(BlockActivations(None, None))
    assert saved.take() is None
    out = torch.ones(3)
    saved.put(out)
    assert saved.take()[0].data_ptr() == out.data_ptr() and saved.take()[0] is not saved.take()[0]


@pytest.mark.parametrize("rows", [1, 7, 52])
@pytest.mark.parametrize("recompute", ["none", "full", "selective"])
def test_mlp_in_slices(world, rows, recompute):
    config = small_config(**EVERY_MIXER)
    _, want = loss_and_gradients(world, config)
    _, got = loss_and_gradients(world, config, recompute=recompute, mlp_rows=rows)
    for a, b in zip(got, want):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_slices_add_up_in_fp32():
    """512 slices in bf16: each adds 4 to a sum, which bf16 would round away once the sum is large."""
    weight = torch.ones(1, dtype=torch.bfloat16, requires_grad=True)
    x = torch.full((2048, 1), 1.0, dtype=torch.bfloat16, requires_grad=True)
    in_slices(lambda part: part * weight, x, 4, [weight]).sum().backward()
    assert weight.grad.dtype == torch.bfloat16 and weight.grad.item() == 2048
    assert torch.equal(x.grad, torch.ones_like(x))


def test_slices_give_frozen_weights_no_gradient():
    frozen, weight = torch.full((3,), 2.0), torch.ones(3, requires_grad=True)
    x = torch.ones(10, 3, requires_grad=True)
    in_slices(lambda part: part * frozen * weight, x, 4, [frozen, weight]).sum().backward()
    assert frozen.grad is None and weight.grad.tolist() == [20.0] * 3 and x.grad.unique().tolist() == [2.0]


def test_recomputation_skips_the_slices(world, monkeypatch):
    """Forward and backward compute each slice once. The recomputation of the block stops before the slices."""
    from ksa_model.model import MLP

    runs, of_rows = [0], MLP._of_rows

    def counted(self, x, norm, weights, reuse):
        runs[0] += 1
        return of_rows(self, x, norm, weights, reuse)

    monkeypatch.setattr(MLP, "_of_rows", counted)
    config = small_config(layer_pattern="F", num_layers=2)
    for recompute, want in (("none", 2), ("full", 4)):  # two layers: forward, recomputation
        runs[0] = 0
        loss_and_gradients(world, config, recompute=recompute)
        assert runs[0] == want
    for recompute in ("none", "full", "selective"):
        runs[0] = 0
        loss_and_gradients(world, config, recompute=recompute, mlp_rows=16)  # 52 rows: 4 slices
        assert runs[0] == 2 * 2 * 4


def test_a_replaced_mix_is_recomputed(world):
    """Decoding and distillation replace the attention; the output of a replacement is not saved."""
    pack = make_layout([30, 9], 4, 1, 0)
    grads = []
    for settings in (MemoryConfig(), SELECTIVE):
        decoder = build(world, small_config(), memory=settings)

        def doubled(attention, heads, layout):
            out, out_summary = Attention.core(attention, heads, layout)
            return 2 * out, out_summary

        decoder.hidden(random_text(pack)[0], pack, doubled).square().sum().backward()
        grads.append([p.grad for name, p in decoder.named_parameters() if name.startswith("blocks.")])
    assert all(torch.equal(a, b) for a, b in zip(*grads))


@pytest.mark.parametrize("settings, message", [
    (dict(recompute="some"), "memory.recompute='some' is not one of none, full, selective"),
    (dict(offload=True), "memory.recompute=none recomputes nothing; use memory.recompute=selective or full"),
    (dict(host_gib=0), "memory.host_gib=0 must be positive"),
    (dict(mlp_rows=0), "memory.mlp_rows=0 must be at least 1, or null"),
])  # fmt: skip
def test_settings_that_exclude_each_other(settings, message):
    with pytest.raises(MemoryConfigError, match=message):
        memory.MemoryConfig(**settings)
