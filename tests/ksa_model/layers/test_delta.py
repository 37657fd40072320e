"""Gated delta nets (`G`): against the rule token by token, over documents, tensor ranks, and while decoding."""

import contextlib
import dataclasses

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from ksa_model.config import CONV_TOKENS, MemoryConfig, ModelConfigError
from ksa_model.decoding.cache import DecodingCache
from ksa_model.decoding.generate import Sampling, generate
from ksa_model.layers import delta
from ksa_model.layers.tensor_parallel import TensorParallel
from ksa_model.layout.sequence import TextLayout, build_layout
from ksa_model.loss import IGNORE_INDEX
from ksa_model.model import Decoder
from ksa_model.parallel.context import ContextParallel
from tests.ksa_model.decoding.test_cache import assert_greedy, model_for
from tests.ksa_model.ops.attention.test_joint import make_layout
from tests.ksa_model.test_model import build, random_text, small_config


def random_rows(length, heads=2, d=8, seed=0, fades=1.0):
    """q, k, v [T, H, d], decay, beta [T, H]; keys of length one, as the layer has them; `fades`: how fast."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    q, k, v = (normal(length, heads, d) for _ in range(3))
    q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
    return [q, k, v, -fades * F.softplus(normal(length, heads)), normal(length, heads).sigmoid()]


def by_hand(q, k, v, decay, beta):
    """The rule as the paper states it (equation 10), one head and token at a time, with its projection written out."""
    length, heads, d = q.shape
    out = torch.zeros(length, heads, d)
    for head in range(heads):
        s = torch.zeros(d, d)  # [value, key], as in the paper
        for t in range(length):
            key = k[t, head]
            keep = torch.eye(d) - beta[t, head] * torch.outer(key, key)
            s = decay[t, head].exp() * s @ keep + beta[t, head] * torch.outer(v[t, head], key)
            out[t, head] = s @ q[t, head] / d**0.5
    return out


def test_recurrent_is_the_papers_rule():
    rows = random_rows(11)
    out, state = delta.recurrent(*rows)
    torch.testing.assert_close(out, by_hand(*rows), rtol=1e-5, atol=1e-6)
    first, between = delta.recurrent(*(x[:4] for x in rows))
    rest, end = delta.recurrent(*(x[4:] for x in rows), between)
    torch.testing.assert_close(torch.cat([first, rest]), out)
    torch.testing.assert_close(end, state)


@pytest.mark.parametrize("fades", [0.01, 1.0, 30.0])  # hardly, as layers begin, and past what exp of the sum could hold
@pytest.mark.parametrize(
    "lengths", [[1], [63], [64], [65], [200], [1, 1, 62, 1], [63, 64, 65, 1], [5, 190, 3, 130], [1] * 70], ids=str
)
def test_blocked_is_recurrent_over_each_document(lengths, fades):
    rows = [x.requires_grad_() for x in random_rows(sum(lengths), fades=fades)]
    weight = torch.randn(rows[0].shape, generator=torch.Generator().manual_seed(9))
    number = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    want, states = zip(*(delta.recurrent(*part) for part in zip(*(x.split(lengths) for x in rows))))
    got, state = delta.blocked(*rows, number)
    torch.testing.assert_close(got, torch.cat(want), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(state, states[-1], rtol=1e-4, atol=1e-5)
    want = torch.autograd.grad((torch.cat(want) * weight).sum(), rows)
    for mine, theirs in zip(torch.autograd.grad((got * weight).sum(), rows), want):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=2e-5)


def test_convolution_stays_in_its_document():
    """Features of one head, taps 1, 10, 100, 1000 from the oldest: a document of 3 tokens, then one of 2."""
    taps = torch.tensor([1.0, 10.0, 100.0, 1000.0]).expand(3, 1, 1, 4)
    qkv = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0]).view(-1, 1, 1, 1).expand(-1, 3, 1, 1)
    position = torch.tensor([0, 1, 2, 0, 1])
    _, _, v = delta.convolve(qkv, taps, position)
    want = torch.tensor([1000.0, 2100.0, 3210.0, 4000.0, 5400.0])
    torch.testing.assert_close(v.flatten(), F.silu(want))


def layer_by_hand(module, x, config):
    """The layer over one document x [n, h], normed already, written out; before the output projection."""
    heads, d, n = config.num_heads, config.head_dim, len(x)

    def convolved(name, taps):
        y = F.pad((x @ getattr(module, name).weight.t()).t()[None], (CONV_TOKENS - 1, 0))
        return F.silu(F.conv1d(y, taps[:, None], groups=len(taps))[0].t()).unflatten(1, (heads, d))

    q, k, v = (convolved(name, taps) for name, taps in zip(("query", "key", "value"), module.convolution))
    q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
    beta = torch.sigmoid(x @ module.beta.weight.t())
    decay = -module.decay_rate.exp() * F.softplus(x @ module.decay.weight.t() + module.step_bias)
    out = by_hand(q, k, v, decay, beta)
    out = out * torch.rsqrt(out.pow(2).mean(-1, keepdim=True) + config.norm_eps) * module.output_norm.weight
    return out.reshape(n, -1) * F.silu(x @ module.gate.weight.t())


@pytest.mark.parametrize("backend", ["auto", "blocked", "reference"])
def test_layer_by_hand(world, backend):
    config = small_config(layer_pattern="G", attention_backend=backend, head_dim=16)
    decoder = build(world, config)
    block = decoder.blocks[0]
    with torch.no_grad():
        block.attention.output_norm.weight.uniform_(0.5, 1.5)
        for name in ("query", "key", "value", "gate", "beta", "decay"):
            getattr(block.attention, name).weight.mul_(20)
    pack = make_layout([13, 1, 70, 7], 4, 1, 1)
    x = torch.randn(pack.num_text, 32, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        norm = block.attention_norm.ready()
        got = block.attention(x, norm, pack, None)
        normed = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + config.norm_eps)
        real = torch.from_numpy(pack.text_is_real)
        for start in np.unique(pack.document_starts[pack.text_is_real]):
            rows = torch.from_numpy(pack.document_starts == start) & real
            want = layer_by_hand(block.attention, normed[rows], config)
            torch.testing.assert_close(got[rows], want, rtol=1e-3, atol=1e-5)
            assert want.abs().max() > 0.01
        assert not got[~real].any()


@pytest.mark.parametrize("pattern", ["G", "GGGF", "KGKF", "GKSG"])
def test_backends_agree(world, pattern):
    pack = make_layout([50, 3, 90, 17], 4, 1, 2)
    results = {}
    for backend in ("auto", "reference"):
        decoder = build(world, small_config(layer_pattern=pattern, attention_backend=backend))
        loss = decoder(*random_text(pack), pack)
        loss.backward()
        results[backend] = loss, {name: p.grad for name, p in decoder.named_parameters()}
    torch.testing.assert_close(results["auto"][0], results["reference"][0], rtol=1e-6, atol=1e-5)
    for name, want in results["reference"][1].items():
        assert want is not None and want.abs().max() > 0, name
        torch.testing.assert_close(results["auto"][1][name], want, rtol=1e-3, atol=1e-5, msg=lambda m, n=name: n + m)


def test_parameters_are_those_counted(world):
    config = small_config(layer_pattern="KGKF")
    held = {name: tuple(p.shape) for name, p in build(world, config).named_parameters()}
    assert held == {name: shape for name, (shape, _) in config.parameter_shapes().items()}
    gated = small_config(layer_pattern="G", num_layers=1).num_parameters()
    # 32 hidden, 4 heads of 8: q, k, v, gate, output; beta and decay; three convolutions of 4; rate and bias.
    assert gated["attention"] == 5 * 32 * 32 + 2 * 4 * 32 + 3 * 32 * 4 + 2 * 4


def test_flops_are_those_of_the_recurrence():
    from torch.utils.flop_counter import FlopCounterMode

    from train.batches import model_flops

    config = small_config(layer_pattern="G", num_layers=1)
    with FlopCounterMode(display=False) as counter:
        delta.recurrent(*random_rows(10, heads=4, d=8))
    # Two reads of the state; the write, an outer product of as many, is no matrix product and is not counted there.
    assert counter.get_total_flops() * 3 == config.delta_flops(10) * 2
    weights = [
        shape for name, (shape, _) in config.parameter_shapes().items() if len(shape) == 2 and "embedding" not in name
    ]
    pack = make_layout([13, 1, 22, 7], 4, 1, 3)
    dense = sum(rows * columns for rows, columns in weights) - (config.padded_vocab_size - config.vocab_size) * 32
    assert model_flops(config, pack) == 3 * (2 * dense + config.delta_flops(1)) * 43


def test_documents_do_not_see_each_other(world):
    """The logits of a document are those it has alone, and nothing it holds has a gradient from another's loss."""
    decoder = build(world, small_config(layer_pattern="GKGF"), seed=2)
    lengths = [50, 3, 90, 17]
    pack = make_layout(lengths, 4, 1, 2)
    tokens, labels = random_text(pack)
    logits = decoder.logits(tokens, pack).detach()
    starts = sorted(set(pack.document_starts[pack.text_is_real].tolist()))
    for start, length in zip(starts, lengths):
        rows = -(-length // 4) * 4
        alone = build_layout(np.array([0]), np.array([length]), rows, 4)
        want = decoder.logits(tokens[start : start + rows], alone).detach()
        torch.testing.assert_close(logits[start : start + length], want[:length], rtol=1e-4, atol=1e-5)
    third = (torch.arange(pack.num_text) >= starts[2]) & (torch.arange(pack.num_text) < starts[2] + 90)
    seen = []
    hook = decoder.embedding.register_forward_hook(lambda _, __, out: seen.append(out) or out.retain_grad())
    decoder(tokens, torch.where(third, labels, IGNORE_INDEX), pack).backward()
    hook.remove()
    grad = seen[0].grad.flatten(0, 1)
    assert grad[third][:-1].abs().sum(1).min() > 0 and not grad[~third].any()


def test_padding_is_left_alone(world):
    """Whatever stands in padding, nobody's logits change, and the layer adds nothing there."""
    decoder = build(world, small_config(layer_pattern="G"))
    pack = make_layout([13, 1, 22, 7], 4, 1, 3)
    tokens, _ = random_text(pack)
    real = torch.from_numpy(pack.text_is_real)
    other = torch.where(real, tokens, 17)
    torch.testing.assert_close(decoder.logits(tokens, pack)[real], decoder.logits(other, pack)[real], rtol=0, atol=0)


@pytest.mark.parametrize("pattern", ["G", "GGGF", "KGKF", "GKSG"])
@pytest.mark.parametrize("k", [1, 3, 8])
def test_cached_equals_uncached(world, pattern, k):
    decoder = model_for(world, layer_pattern=pattern, chunk_size=k, window_tokens=5)
    lengths = sorted({1, 2, 3, 4, max(1, k - 1), k, k + 1, 5 * k + 2, 70})
    generator = torch.Generator().manual_seed(k)
    prompts = [torch.randint(0, 61, (n,), generator=generator).tolist() for n in lengths]
    said, cache = generate(decoder, prompts, Sampling(max_tokens=50))
    for prompt, continuation in zip(prompts, said):
        assert_greedy(decoder, prompt, continuation)
    assert len({token for one in said for token in one}) >= 4, "a model that repeats itself would prove nothing"
    if pattern == "G":
        assert cache.allocated_bytes == len(lengths) * decoder.config.cache_bytes(10_000, bytes_per_value=4)


def test_logits_of_decoding(world):
    """Not only the likeliest token: every score, after prompts of any length, also on a cache that was used before."""
    decoder = model_for(world, layer_pattern="GKGF")
    tokens = torch.randint(0, 61, (90,), generator=torch.Generator().manual_seed(4)).tolist()
    pack = make_layout([90], 4, 1, 0)
    with torch.no_grad():
        want = decoder.logits(torch.tensor(tokens + [0] * (pack.num_text - 90)), pack)
    cache = DecodingCache(decoder, 1)
    for prompt in (1, 2, 6, 66):
        torch.testing.assert_close(cache.prefill([tokens[:prompt]])[0], want[prompt - 1], rtol=1e-4, atol=1e-4)
        for i in range(prompt, prompt + 20):
            torch.testing.assert_close(cache.step(torch.tensor([tokens[i]]))[0], want[i], rtol=1e-4, atol=1e-4)


def test_a_teacher_has_gated_layers_too(world):
    from ksa_model.objectives.distillation import Distillation, attend_fully

    decoder = build(world, small_config(layer_pattern="KGKF"))
    pack = make_layout([50, 3, 41, 17], 4, 1, 2)
    tokens, labels = random_text(pack)
    full = Decoder(
        dataclasses.replace(decoder.config, layer_pattern="FGFF"), decoder.tp
    )  # the teacher, as a model of its own
    full.load_state_dict({n: p for n, p in decoder.state_dict().items() if n in full.state_dict()})
    taught = decoder.logits(tokens, TextLayout(pack), attend_fully)
    torch.testing.assert_close(taught, full.logits(tokens, pack), rtol=1e-5, atol=1e-6)
    loss = decoder(tokens, labels, pack, Distillation())
    loss.backward()
    assert torch.isfinite(loss) and decoder.blocks[1].attention.query.weight.grad.abs().max() > 0


@pytest.mark.parametrize("settings", [
    dict(recompute="full"), dict(recompute="selective"), dict(recompute="selective", offload=True, mlp_rows=1000),
], ids=str)  # fmt: skip
def test_what_is_kept_changes_nothing(world, settings):
    pack = make_layout([50, 3, 90, 17], 4, 1, 2)
    found = []
    for memory in (MemoryConfig(), MemoryConfig(**settings)):
        decoder = build(world, small_config(layer_pattern="GKGF"), memory=memory)
        loss = decoder(*random_text(pack), pack)
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in decoder.parameters())])
    assert all(torch.equal(*pair) for pair in zip(*found))


def test_what_cannot_be_is_refused(world, monkeypatch):
    from ksa_model.hf.configs import exported_config

    config = small_config(layer_pattern="GF")

    class Two(ContextParallel):
        size = 2

    with pytest.raises(ModelConfigError, match=r"parallel.context=2 would split it; use parallel.context=1"):
        Decoder(config, TensorParallel(world.tensor_group), Two(world.context_group))
    with pytest.raises(ModelConfigError, match="use format=safetensors to export weights"):
        exported_config(config, 64, None, "float32")
    cuda = torch.device("cuda")
    monkeypatch.setattr(delta, "PACKAGE", "a_package_that_is_not_there.ops")
    delta._package.cache_clear()
    with pytest.raises(ModelConfigError, match=r"need the package flash-linear-attention: pip install 'ksa-train"):
        delta.check_device(config, cuda, torch.bfloat16)
    monkeypatch.setattr(delta, "PACKAGE", "torch.that_is_not_there")
    delta._package.cache_clear()
    with pytest.raises(ModelConfigError, match=r"torch is installed, but torch.that_is_not_there cannot be imported"):
        delta.check_device(config, cuda, torch.bfloat16)
    delta.check_device(config, cuda, torch.float32)  # plain torch computes it
    delta.check_device(config, torch.device("cpu"), torch.bfloat16)
    delta.check_device(dataclasses.replace(config, attention_backend="blocked"), cuda, torch.bfloat16)
    delta.check_device(small_config(), cuda, torch.bfloat16)
    delta._package.cache_clear()
    monkeypatch.setattr(delta, "_package", lambda: delta)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    for version, refused in (("3.3.1", False), ("3.6.0", True), ("3.7.0", True), ("3.7.1", False), ("3.10.0", False)):
        monkeypatch.setattr(delta, "_triton_version", lambda version=version: version)
        with pytest.raises(ModelConfigError, match="tilelang") if refused else contextlib.nullcontext():
            delta.check_device(config, cuda, torch.bfloat16)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(delta, "_triton_version", lambda: "3.6.0")
    delta.check_device(config, cuda, torch.bfloat16)


@pytest.mark.gpu
@pytest.mark.parametrize("lengths", [[1], [64], [1, 63, 200, 3], [4096, 17, 4000]], ids=str)
def test_packaged_kernels_against_the_rule(lengths):
    """flash-linear-attention in bf16 against fp32, outputs and gradients, over documents."""
    package = pytest.importorskip(delta.PACKAGE)
    if delta._triton_is_wrong(torch.device("cuda")):
        pytest.skip(f"flash-linear-attention refuses Triton {delta._triton_version()} on this device")
    rows = [x.cuda().requires_grad_() for x in random_rows(sum(lengths), heads=4, d=64)]
    weight = torch.randn(rows[0].shape, generator=torch.Generator().manual_seed(9)).cuda()
    ends = np.cumsum([0, *lengths])
    number = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).cuda()
    want, last = delta.blocked(*rows, number)
    wanted = torch.autograd.grad((want * weight).sum(), rows)
    given = [x.detach().bfloat16().requires_grad_() if x.ndim == 3 else x for x in rows]
    got, states = package.chunk_gated_delta_rule(
        *(x[None] for x in given), output_final_state=True,
        cu_seqlens=torch.from_numpy(ends).cuda(), cu_seqlens_cpu=torch.from_numpy(ends),
    )  # fmt: skip
    assert (got[0].float() - want).norm() < 1e-2 * want.norm()
    assert (states[-1] - last).norm() < 1e-2 * last.norm()
    for mine, theirs in zip(torch.autograd.grad((got[0] * weight).sum(), given), wanted):
        assert (mine.float() - theirs).norm() < 2e-2 * theirs.norm()
