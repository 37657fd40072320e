"""Greedy decoding with the cache against the uncached forward, token for token."""

import pytest
import torch

from ksa_model.config import ModelConfig, ModelConfigError
from ksa_model.decoding.cache import DecodingCache
from ksa_model.decoding.generate import Sampling, generate
from tests.ksa_model.ops.attention.test_joint import make_layout
from tests.ksa_model.test_model import build, small_config, spread_biases, spread_pooling


def model_for(world, **changes):
    torch.manual_seed(1)
    decoder = build(world, small_config(**changes), seed=3)
    with torch.no_grad():  # spread the logits, so that the most likely token depends on the text
        for name, p in decoder.named_parameters():
            if p.ndim == 2 and "embedding" not in name:
                p.mul_(6)
    spread_pooling(decoder)
    spread_biases(decoder)
    with torch.no_grad():
        decoder.embedding.weight.mul_(20)
        if decoder.config.has_summaries:
            decoder.summary_embedding.mul_(20)
    return decoder.eval()


def assert_greedy(decoder, prompt, continuation):
    """One uncached forward over the whole text would have chosen the same token at every position."""
    text = list(prompt) + continuation
    pack = make_layout([len(text)], decoder.config.chunk_size, decoder.config.summary_tokens, 0)
    tokens = torch.zeros(pack.num_text, dtype=torch.long)
    tokens[: len(text)] = torch.tensor(text)
    with torch.no_grad():
        chosen = decoder.logits(tokens, pack).argmax(-1)[len(prompt) - 1 : len(text) - 1]
    wrong = (chosen != torch.tensor(continuation)).nonzero().flatten().tolist()
    assert not wrong, f"differs first at new token {wrong[0]} of {len(continuation)}, {len(wrong)} times"


@pytest.mark.parametrize("pattern", ["KKKF", "K", "F", "KSCF", "FKKS", "H", "HPSF"])
@pytest.mark.parametrize("k, window", [(k, w) for k in (1, 3, 8) for w in (0, 1, 5)])
def test_cached_equals_uncached(world, pattern, k, window):
    decoder = model_for(world, layer_pattern=pattern, chunk_size=k, window_chunks=window, window_tokens=5)
    lengths = sorted({1, max(1, k - 1), k, k + 1, 5 * k + 2})
    generator = torch.Generator().manual_seed(k)
    prompts = [torch.randint(0, 61, (n,), generator=generator).tolist() for n in lengths]
    generated, _ = generate(decoder, prompts, Sampling(max_tokens=50))
    for prompt, continuation in zip(prompts, generated):
        assert len(continuation) == 50
        assert_greedy(decoder, prompt, continuation)


@pytest.mark.parametrize("pattern, far, full", [("KKKF", False, False), ("KF", True, False), ("HPSF", False, True)])
def test_cached_equals_uncached_without_rope(world, pattern, far, full):
    decoder = model_for(world, layer_pattern=pattern, chunk_size=3, rotate_far=far, rotate_full_layers=full)
    prompts = [[7], list(range(17)), list(range(30, 42))]
    generated, _ = generate(decoder, prompts, Sampling(max_tokens=50))
    for prompt, continuation in zip(prompts, generated):
        assert_greedy(decoder, prompt, continuation)


@pytest.mark.parametrize("pattern", ["KKKF", "KS", "HPSF"])
def test_cached_equals_uncached_with_biases(world, pattern):
    decoder = model_for(world, layer_pattern=pattern, chunk_size=3, qkv_bias=True, qk_norm=False, window_tokens=5)
    prompts = [[7], list(range(17)), list(range(30, 42))]
    generated, _ = generate(decoder, prompts, Sampling(max_tokens=50))
    for prompt, continuation in zip(prompts, generated):
        assert_greedy(decoder, prompt, continuation)
        assert len(set(continuation)) >= 4, "a model that repeats itself would prove nothing"


@pytest.mark.parametrize("changes", [dict(summary_tokens=2), dict(rotate_far=False), dict(qk_norm=False)], ids=str)
def test_cached_equals_uncached_amid_annealing(world, changes):
    decoder = model_for(world, layer_pattern="KFKK", chunk_size=3, **changes)
    decoder.anneal(0.3)
    prompts = [[7], list(range(17)), list(range(30, 42))]
    generated, _ = generate(decoder, prompts, Sampling(max_tokens=50))
    for prompt, continuation in zip(prompts, generated):
        assert_greedy(decoder, prompt, continuation)


@pytest.mark.slow
@pytest.mark.parametrize("pattern, k, window, m, tokens", [
    ("KKKF", 8, 5, 1, 2000), ("KSCF", 3, 1, 2, 600), ("PHFH", 4, 3, 1, 600),
])  # fmt: skip
def test_many_tokens(world, pattern, k, window, m, tokens):
    decoder = model_for(world, layer_pattern=pattern, chunk_size=k, window_chunks=window, summary_tokens=m)
    prompts = [[7], [5, 9, 11, 2], list(range(40))]
    generated, cache = generate(decoder, prompts, Sampling(max_tokens=tokens))
    assert cache.lengths == [tokens, tokens + 3, tokens + 39]  # the last token is never fed
    for prompt, continuation in zip(prompts, generated):
        assert_greedy(decoder, prompt, continuation)
        assert len(set(continuation)) >= 8, "a model that repeats itself would prove nothing"


def test_growing_gives_the_same_and_wastes_little(world):
    decoder = model_for(world)
    reserved, growing = DecodingCache(decoder, 1, max_tokens=700), DecodingCache(decoder, 1)
    logits = [cache.prefill([[3, 4, 5]]) for cache in (reserved, growing)]
    for _ in range(697):
        assert torch.equal(*logits)
        logits = [cache.step(x.argmax(-1)) for cache, x in zip((reserved, growing), logits)]
    assert growing.allocated_bytes <= 1.05 * reserved.allocated_bytes


@pytest.mark.parametrize("pattern, window", [("KKKF", 1), ("F", 0), ("K", 3), ("KSCF", 2), ("HHPF", 1)])
def test_bytes_are_the_formula(world, pattern, window):
    config = small_config(layer_pattern=pattern, window_chunks=window)
    cache = DecodingCache(build(world, config), 2, max_tokens=2000)
    assert cache.allocated_bytes == pytest.approx(2 * config.cache_bytes(2000, bytes_per_value=4), rel=0.05)


def test_bytes_at_the_4b_shape():
    """36 layers, 8 key/value heads of 128, k=8, W=128, bf16, 131,072 tokens: what would be allocated."""
    shape = dict(hidden_size=2560, num_layers=36, num_heads=32, num_kv_heads=8, head_dim=128, ffn_size=9728)
    from ksa_model.decoding.cache import LayerCache

    sizes = {}
    for pattern in ("KKKF", "F"):
        config = ModelConfig(**shape, layer_pattern=pattern)
        empty = torch.empty(2, 1, 8, 0, 128, dtype=torch.bfloat16, device="meta")
        layers = [LayerCache(config, layer, empty) for layer in config.layers]
        for layer in layers:
            layer.reserve(131_072)
        sizes[pattern] = sum(layer.allocated_bytes for layer in layers)
        assert sizes[pattern] == pytest.approx(config.cache_bytes(131_072), rel=0.05)
    assert sizes["F"] / sizes["KKKF"] >= 2.8


def test_a_request_may_not_outgrow_what_was_reserved(world):
    """7 tokens stay within the window of 8, so no slots are kept for summaries."""
    decoder = model_for(world, chunk_size=4, window_chunks=1)
    message = r"a request of {} tokens is longer than max_tokens=7 .* make the cache with a larger max_tokens, or with"
    with pytest.raises(ModelConfigError, match=message.format(8)):
        DecodingCache(decoder, 2, max_tokens=7).prefill([[1], [2] * 8])
    cache = DecodingCache(decoder, 2, max_tokens=7)
    cache.prefill([[1], [2] * 6])
    cache.step(torch.tensor([3, 4]))
    with pytest.raises(ModelConfigError, match=message.format(8)):
        cache.step(torch.tensor([5, 6]))
    assert cache.lengths == [2, 7]


def test_new_buffers_end_recordings(world):
    """A recorded step holds the addresses of the old ones, whoever made the new ones."""

    class Recorder:
        forgot = 0

        def forget(self):
            self.forgot += 1

        def run(self, closing, tokens, forward):
            return forward(tokens)

    cache = DecodingCache(model_for(world, layer_pattern="F"), 1)
    cache._recorder = recorder = Recorder()
    counts = []
    for length in (3, 2, 64):
        cache.prefill([[1] * length])
        counts.append(recorder.forgot)
    cache.step(torch.tensor([1]))
    cache.step(torch.tensor([1]))  # fits what the first step allocated
    assert [*counts, recorder.forgot] == [1, 1, 2, 3]


def test_bad_requests_are_named(world):
    decoder = model_for(world)
    with pytest.raises(ModelConfigError, match="2 requests of at least one token each"):
        DecodingCache(decoder, 2).prefill([[1], []])
