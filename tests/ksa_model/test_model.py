"""The decoder as a whole: against a plain decoder, its invariants, and its counts."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from ksa_model import model
from ksa_model.config import ModelConfig, ModelConfigError
from ksa_model.layers.attention import RotaryTables
from ksa_model.layers.tensor_parallel import TensorParallel
from ksa_model.layout.sequence import build_layout
from ksa_model.loss import IGNORE_INDEX
from ksa_model.ops.attention import reference
from tests.ksa_model.ops.attention.test_joint import make_layout

SMALL = dict(
    hidden_size=32,
    num_layers=4,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    ffn_size=48,
    vocab_size=61,
    chunk_size=4,
    window_chunks=1,
    window_tokens=6,
    vocab_multiple=16,
)


def small_config(**changes) -> ModelConfig:
    return ModelConfig(**(SMALL | changes))


def build(world, config, seed=0, **kwargs):
    torch.manual_seed(seed)
    return model.Decoder(config, TensorParallel(world.tensor_group), **kwargs)


def spread_pooling(decoder):
    """Weights of learned pooling that differ from token to token, the same on any number of tensor ranks."""
    with torch.no_grad():
        for name, p in decoder.named_parameters():
            if "pool_" in name:
                whole = torch.sin(torch.arange(float(p.numel() * decoder.tp.size))).view(-1, *p.shape[1:])
                p.copy_(whole.chunk(decoder.tp.size)[decoder.tp.rank])


def spread_biases(decoder):
    """Biases of projections that differ from feature to feature, the same on any number of tensor ranks."""
    with torch.no_grad():
        for name, p in decoder.named_parameters():
            if name.endswith(".bias"):
                whole = torch.cos(torch.arange(float(p.numel() * decoder.tp.size)) + len(name))
                p.copy_(whole.chunk(decoder.tp.size)[decoder.tp.rank])


def random_text(pack, vocab=61, seed=0):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, vocab, (pack.num_text,), generator=generator)
    real = torch.from_numpy(pack.text_is_real)
    labels = torch.where(real, torch.randint(0, vocab, (pack.num_text,), generator=generator), IGNORE_INDEX)
    return tokens * real, labels


def plain_decoder_loss(decoder, tokens, labels, pack):
    """The same function written out with no parallelism, no streams, no kernels: one dense mask over all rows."""
    config = decoder.config
    p = dict(decoder.named_parameters())
    x = p["embedding.weight"][tokens]
    s = p["summary_embedding"].repeat(pack.num_chunks, 1) if config.has_summaries else x[:0]
    rotary = RotaryTables.build(pack, config, x.device)

    def norm(x, name):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + config.norm_eps) * p[name]

    def turn(x, table):  # complex-number form of RoPE
        cos, sin = table
        half = config.head_dim // 2
        z = torch.complex(x[..., :half], x[..., half:]) * torch.complex(cos, sin)
        return torch.cat([z.real, z.imag], -1)

    def heads(x, weight, norm_name=None, table=None):
        x = x @ p[weight].t()
        if config.qkv_bias:
            x = x + p[weight.replace(".weight", ".bias")]
        x = x.unflatten(-1, (-1, config.head_dim))
        return normed_and_turned(x, norm_name, table)

    def normed_and_turned(x, norm_name, table):
        x = norm(x, norm_name) if norm_name and config.qk_norm else x
        return turn(x, table) if table else x

    def pooled(name, xn, table):
        """Chunk by chunk and head by head: the weights of the chunk's tokens, and their sums of keys and values."""
        k, v = heads(xn, name + "key.weight"), heads(xn, name + "value.weight")
        ks, vs = (torch.zeros(pack.num_chunks, config.num_kv_heads, config.head_dim) for _ in range(2))
        for chunk in range(pack.num_chunks):
            rows = slice(chunk * config.chunk_size, (chunk + 1) * config.chunk_size)
            for head in range(config.num_kv_heads):
                weights = torch.full((config.chunk_size,), 1 / config.chunk_size)
                if name + "pool_bias" in p:
                    scores = xn[rows] @ p[name + "pool_score.weight"][head]
                    weights = torch.softmax(scores + p[name + "pool_bias"].view(-1, config.chunk_size)[head], 0)
                ks[chunk, head], vs[chunk, head] = weights @ k[rows, head], weights @ v[rows, head]
        return normed_and_turned(ks, name + "key_norm.weight", table), vs

    def mlp(x, block):
        gate, up, down = (p[f"{block}mlp.{name}.weight"].t() for name in ("gate", "up", "down"))
        return (F.silu(x @ gate) * (x @ up)) @ down

    for i, layer in enumerate(config.layers):
        b = f"blocks.{i}."
        a = b + "attention."
        own = "summary_" if config.independent_qkv else ""
        xn, sn = norm(x, b + "attention_norm.weight"), norm(s, b + "attention_norm.weight")
        turned = rotary if config.rotate_full_layers or layer.mixer != "F" else rotary.unrotated
        q = heads(xn, a + "query.weight", a + "query_norm.weight", turned.text)
        k, v = heads(xn, a + "key.weight", a + "key_norm.weight", turned.text), heads(xn, a + "value.weight")
        if layer.projects_summaries:
            ks = heads(sn, a + own + "key.weight", a + "key_norm.weight", turned.summary)
            vs = heads(sn, a + own + "value.weight")
        if layer.pools:
            ks, vs = pooled(a, xn, rotary.summary)
        if layer.has_far and not config.rotate_far:
            qf = heads(xn, a + "query.weight", a + "query_norm.weight", rotary.unrotated.text)
            kf, _ = pooled(a, xn, rotary.unrotated.summary) if layer.pools else (None, None)
            if layer.mixer == "K":
                kf = heads(sn, a + own + "key.weight", a + "key_norm.weight", rotary.unrotated.summary)
            out = reference.ksa_attention(q, k, v, kf, vs, pack, layer.window_chunks, qf)
        elif layer.has_far:
            out = reference.ksa_attention(q, k, v, ks, vs, pack, layer.window_chunks)
        else:
            window = config.window_tokens if layer.mixer == "S" else layer.window_chunks
            out = reference.text_attention(q, k, v, pack, layer.mixer, window)
        x = x + out.flatten(1) @ p[a + "output.weight"].t()
        if layer.updates_summaries:
            qs = heads(sn, a + own + "query.weight", a + "query_norm.weight", turned.summary)
            s = s + reference.summary_attention(qs, k, v, ks, vs, pack).flatten(1) @ p[a + "output.weight"].t()
            s = s + mlp(norm(s, b + "mlp_norm.weight"), b)
        x = x + mlp(norm(x, b + "mlp_norm.weight"), b)
    head = p["embedding.weight"] if config.tie_embeddings else p["head.weight"]
    logits = norm(x, "norm.weight") @ head[: config.vocab_size].t()
    return F.cross_entropy(logits, labels, ignore_index=IGNORE_INDEX, reduction="sum")


@pytest.mark.parametrize(
    "changes",
    [
        dict(),
        dict(layer_pattern="F"),
        dict(layer_pattern="K", summary_tokens=2),
        dict(layer_pattern="KSCF"),
        dict(layer_pattern="FKKS", full_layers_update_summaries=False),
        dict(layer_pattern="SC", tie_embeddings=True),
        dict(layer_pattern="KF", independent_qkv=False, qk_norm=False),
        dict(layer_pattern="KK", window_chunks=(0, 3), num_kv_heads=1),
        dict(layer_pattern="HHHF"),
        dict(layer_pattern="PHSC", window_chunks=(0, 2, 0, 1)),
        dict(layer_pattern="H", num_kv_heads=1, qk_norm=False, chunk_size=3, window_chunks=0),
        dict(layer_pattern="HF", chunk_size=8, attention_backend="blocked", full_layers_update_summaries=False),
        dict(layer_pattern="PH", chunk_size=1, attention_backend="reference"),
        dict(layer_pattern="PHSF", rotate_far=False, rotate_full_layers=False),
        dict(rotate_far=False, rotate_full_layers=False),
        dict(layer_pattern="K", rotate_far=False, summary_tokens=2),
        dict(layer_pattern="FK", rotate_full_layers=False, qk_norm=False, independent_qkv=False),
        dict(qkv_bias=True, qk_norm=False),
        dict(qkv_bias=True, layer_pattern="KSCF", summary_tokens=2),
        dict(qkv_bias=True, layer_pattern="KF", independent_qkv=False),
        dict(qkv_bias=True, layer_pattern="HPHF"),
    ],
    ids=str,
)
def test_loss_and_gradients_match_a_plain_decoder(world, changes):
    config = small_config(**changes)
    pack = make_layout([13, 1, 22, 7], config.chunk_size, config.summary_tokens, 1)
    assert_like_a_plain_decoder(build(world, config), pack)


@pytest.mark.parametrize("kernels", ["auto", "blocked", pytest.param("fused", marks=pytest.mark.slow)])
@pytest.mark.parametrize("k, window", [(4, 3), (8, 2), (16, 4)])
def test_pooled_chunks_of_long_documents_match_a_plain_decoder(world, kernels, k, window):
    """Documents with far keys, of lengths that fill no chunk; `fused` with the Triton kernels in its interpreter."""
    config = small_config(layer_pattern="HP", num_layers=2, chunk_size=k, window_chunks=window)
    decoder = build(world, replace(config, attention_backend="auto" if kernels == "fused" else kernels))
    if kernels == "fused":
        if torch.cuda.is_available():
            pytest.skip("runs on the CPU; tests/ksa_model/ops has the kernels on a GPU")
        from ksa_model.ops import triton_pooling, triton_rows
        from ksa_model.ops.attention import cuda

        decoder.backend.attention, decoder.backend.rows = cuda, triton_rows
        decoder.backend.pooling = triton_pooling
    assert_like_a_plain_decoder(decoder, make_layout([97, 1, 131, 33], k, 1, 1), atol=1e-4)  # sums over 262 rows


def assert_like_a_plain_decoder(decoder, pack, atol=2e-5):
    with torch.no_grad():  # gains of one would hide a missing or doubled norm
        for name, p in decoder.named_parameters():
            if p.ndim == 1:
                p.copy_(torch.rand_like(p) + 0.5)
            elif "embedding" not in name:
                p.mul_(4)
    spread_pooling(decoder)
    tokens, labels = random_text(pack)
    params = list(decoder.parameters())
    loss, want = decoder(tokens, labels, pack), plain_decoder_loss(decoder, tokens, labels, pack)
    torch.testing.assert_close(loss, want, rtol=1e-6, atol=1e-5)
    with torch.no_grad():  # where rows are overwritten
        torch.testing.assert_close(decoder(tokens, labels, pack), want, rtol=1e-6, atol=1e-5)
    got = torch.autograd.grad(loss * 0.5, params)  # an outer scale must reach every gradient, the head's too
    for (name, _), g, w in zip(decoder.named_parameters(), got, torch.autograd.grad(want * 0.5, params)):
        torch.testing.assert_close(g, w, rtol=1e-4, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


def test_every_parameter_gets_a_gradient(world):
    """No parameter exists that nothing reads: ZeRO and checkpoints would carry it for ever."""
    for pattern in ("KKKF", "F", "FKSC", "SSSS", "CKKK", "HPHF"):
        decoder = build(world, small_config(layer_pattern=pattern, qkv_bias=True))
        pack = make_layout([30, 9], 4, 1, 0)
        decoder(*random_text(pack), pack).backward()
        missing = [name for name, p in decoder.named_parameters() if p.grad is None or not p.grad.any()]
        assert not missing, (pattern, missing)


@pytest.mark.parametrize("pattern", ["KKKF", "K", "KSCF", "H", "PSCF"])
def test_text_is_causal_and_documents_are_separate(world, pattern):
    """Changing one token changes no earlier row and no other document, and does change the last row of its own."""
    config = small_config(layer_pattern=pattern, num_layers=4)
    decoder = build(world, config)
    pack = make_layout([18, 41, 9], 4, 1, 0)
    tokens, _ = random_text(pack)
    changed = tokens.clone()
    row = 20 + 5
    changed[row] = (changed[row] + 1) % 61
    difference = (decoder.logits(tokens, pack) - decoder.logits(changed, pack)).abs().amax(1)
    assert (difference[:row] == 0).all() and (difference[20 + 41 :] == 0).all()
    assert difference[row] > 0 and difference[20 + 40] > 0


def test_a_far_token_is_reached_only_through_summaries(world):
    """One K layer, W=0: the last row sees the first chunk's token through the chunk's summary."""
    config = small_config(layer_pattern="K", num_layers=2, window_chunks=0)
    decoder = build(world, config)
    pack = make_layout([24], 4, 1, 0)
    tokens, _ = random_text(pack)
    changed = tokens.clone()
    changed[0] = (changed[0] + 1) % 61
    assert (decoder.logits(tokens, pack)[23] - decoder.logits(changed, pack)[23]).abs().max() > 0
    sliding = build(world, small_config(layer_pattern="C", num_layers=2, window_chunks=0))
    assert (sliding.logits(tokens, pack)[23] - sliding.logits(changed, pack)[23]).abs().max() == 0


def test_packing_does_not_change_a_document(world):
    decoder = build(world, small_config())
    together = make_layout([18, 41, 9], 4, 1, 2)
    tokens, _ = random_text(together)
    logits = decoder.logits(tokens, together)
    row = 0
    for length in (18, 41, 9):
        alone = make_layout([length], 4, 1, 0)
        got = decoder.logits(tokens[row : row + alone.num_text], alone)[:length]
        torch.testing.assert_close(got, logits[row : row + length], rtol=1e-4, atol=1e-5)
        row += alone.num_text


def test_parameter_count_is_what_is_built(world):
    for pattern, bias in [(p, b) for p in ("KKKF", "F", "FKSC", "CKKK", "HPHF", "GKGF") for b in (False, True)]:
        config = small_config(layer_pattern=pattern, vocab_size=64, qkv_bias=bias)
        built = dict(build(world, config).named_parameters())
        assert config.num_parameters()["total"] == sum(p.numel() for p in built.values()), pattern
        shapes = config.parameter_shapes()
        assert {name: tuple(p.shape) for name, p in built.items()} == {name: s for name, (s, _) in shapes.items()}
        for name, p in built.items():
            assert (p.partition_dim if getattr(p, "tensor_model_parallel", False) else None) == shapes[name][1], name


def test_wrong_layout_is_named(world):
    decoder = build(world, small_config())
    pack = build_layout(np.array([0]), np.array([8]), 8, chunk_size=8)
    with pytest.raises(ModelConfigError, match="the layout has chunk_size=8"):
        decoder(torch.zeros(8, dtype=torch.long), torch.zeros(8, dtype=torch.long), pack)


def test_learned_pooling_begins_as_mean_pooling(world):
    """The same seed gives the same other weights, so a comparison of the two begins at one loss."""
    pack = make_layout([50, 3, 41, 17], 4, 1, 0)
    tokens, labels = random_text(pack)
    learned, means = (build(world, small_config(layer_pattern=pattern)) for pattern in ("HHHF", "PPPF"))
    others = dict(means.named_parameters())
    for name, p in learned.named_parameters():
        assert (p == 0).all() if "pool_" in name else torch.equal(p, others.pop(name)), name
    assert not others
    torch.testing.assert_close(learned(tokens, labels, pack), means(tokens, labels, pack), rtol=1e-6, atol=1e-6)
    spread_pooling(learned)
    assert abs(learned(tokens, labels, pack) - means(tokens, labels, pack)) > 1e-4


def test_a_far_token_is_reached_only_through_its_pooled_chunk(world):
    """One H layer, W=0: the last row sees the first chunk's token with the weight that the chunk gives it."""
    decoder = build(world, small_config(layer_pattern="H", num_layers=1, window_chunks=0))
    pack = make_layout([24], 4, 1, 0)
    tokens, _ = random_text(pack)
    changed = tokens.clone()
    changed[1] = (changed[1] + 1) % 61
    assert (decoder.logits(tokens, pack)[23] - decoder.logits(changed, pack)[23]).abs().max() > 0
    with torch.no_grad():  # the second token of a chunk gets no weight
        decoder.blocks[0].attention.pool_bias.view(-1, 4)[:, 1] = -1e4
    assert (decoder.logits(tokens, pack)[23] - decoder.logits(changed, pack)[23]).abs().max() == 0
