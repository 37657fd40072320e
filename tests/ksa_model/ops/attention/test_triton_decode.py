"""Decoding kernels: by Triton's interpreter on the CPU, for real and as graphs on a GPU."""

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed: pip install -e '.[test]'")

from ksa_model.decoding.cache import DecodingCache, _summarise
from ksa_model.decoding.generate import Sampling, generate
from ksa_model.decoding.open_chunk import OpenChunk
from ksa_model.layers.tensor_parallel import TensorParallel
from ksa_model.model import Decoder
from ksa_model.ops import rows as plain_rows
from ksa_model.ops import triton_gemv, triton_rows
from ksa_model.ops.attention import triton_decode
from ksa_model.ops.attention.triton_decode import Rule, Summaries
from ksa_model.ops.linear import Norm
from ksa_model.ops.pooling import ChunkRows
from tests.ksa_model.decoding.test_cache import model_for
from tests.ksa_model.test_model import small_config

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")


def draw(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def test_store_summaries():
    buffer, k, v = torch.zeros(2, 3, 2, 11, 20, device=DEVICE), draw(6, 2, 20), draw(6, 2, 20, seed=1)
    want, chunks = buffer.clone(), [1, 0, 2]
    for i, chunk in enumerate(chunks):
        for own in range(2):
            slot = 5 + 2 * chunk + own
            want[0, i, :, slot], want[1, i, :, slot] = k[2 * i + own], v[2 * i + own]
    triton_decode.store_summaries(buffer, torch.tensor(chunks, device=DEVICE), Rule(5, 2, 1, 2), k, v)
    assert torch.equal(buffer, want)


@pytest.mark.parametrize("learned, normed", [(True, True), (False, True), (True, False)], ids=str)
@pytest.mark.parametrize("kv_heads, d, k", [(2, 8, 4), (1, 24, 3), (3, 16, 1)])
def test_a_token_is_pooled_as_in_torch(learned, normed, kv_heads, d, k):
    """Token by token over two chunks and a half, from a slot that another chunk has left its sums in."""
    batch, rule = 3, Rule(2 * k, k, 1, 1)
    tables = [table.view(batch, 1, d // 2) for table in (draw(batch * d // 2, seed=5), draw(batch * d // 2, seed=6))]
    norm = Norm(draw(d, seed=7), 1e-5) if normed else None
    bias = draw(kv_heads * k, seed=8) if learned else None
    chunks = [OpenChunk(batch, kv_heads, d, DEVICE) for _ in range(2)]
    for chunk in chunks:
        chunk.sums.copy_(draw(*chunk.sums.shape, seed=9))
        chunk.weights.copy_(draw(*chunk.weights.shape, seed=10).abs())
    got, want = (torch.full((2, batch, kv_heads, 2 * k + 6, d), 3.0, device=DEVICE) for _ in range(2))
    for step in range(2 * k + (k + 1) // 2):
        positions = torch.tensor([step, step + k, step + 2 * k], device=DEVICE)
        rows = ChunkRows(*(draw(batch, kv_heads, d, seed=100 * step + i) for i in range(2)),
                         3 * draw(batch, kv_heads, seed=100 * step + 2) if learned else None, bias)  # fmt: skip
        triton_decode.pool_token(rows, positions, (chunks[0].sums, chunks[0].weights), norm, tables, got, rule)
        pooled, value = chunks[1].add(rows, positions, k)
        pooled = plain_rows.norm_rotate(pooled, norm and norm.gain, 1e-5, *tables)
        triton_decode.store_summaries(want, positions // k, rule, pooled, value)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(chunks[0].sums, chunks[1].sums, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(chunks[0].weights, chunks[1].weights, rtol=1e-5, atol=1e-5)


def seen_rows(position, rule, rows):
    """Slots that the token at `position` sees, by following every token from the first to where it stands."""
    if not rule.ring:
        return list(range(position + 1))
    holds = {held % rule.ring: held for held in range(position + 1)}
    own_chunk = position // rule.chunk_size
    oldest = own_chunk - rule.window if rule.window >= 0 else 0
    near = [slot for slot, held in holds.items() if held // rule.chunk_size >= oldest]
    return near + [rule.ring + i for i in range(max(oldest, 0) * rule.own) if rule.window >= 0]


@pytest.mark.parametrize("heads, kv_heads, d", [(4, 2, 16), (8, 1, 24), (2, 2, 64), (6, 2, 24)])
@pytest.mark.parametrize("programs", [24, 3], ids=["several shares", "one share"])  # some of several are empty
@pytest.mark.parametrize(
    "rule, positions, has_far",
    [
        (Rule(0, 4, 0, 0), [0, 69, 32], False),  # F
        (Rule(24, 4, -1, 0), [0, 23, 61], False),  # S
        (Rule(12, 4, 2, 0), [3, 12, 50], False),  # C
        (Rule(12, 4, 2, 1), [11, 12, 1200], False),  # K
        (Rule(3, 3, 0, 2), [0, 3, 100], False),
        (Rule(1, 1, 0, 1), [0, 1, 77], False),
        (Rule(12, 4, 2, 1), [11, 12, 1200], True),  # K without RoPE in its far part
        (Rule(60, 4, 14, 2), [59, 400, 61], True),  # far rows begin within a tile
    ],
    ids=str,
)
def test_attend(monkeypatch, heads, kv_heads, d, rule, positions, programs, has_far):
    monkeypatch.setattr(triton_decode, "PROGRAMS", programs)
    rows = max(max(seen_rows(position, rule, 0)) for position in positions) + 3
    q, k, v = draw(3, heads, d), draw(3, kv_heads, d, seed=2), draw(3, kv_heads, d, seed=3)
    buffer = draw(2, 3, kv_heads, rows, d, seed=1)
    real = torch.zeros(3, rows, dtype=torch.bool, device=DEVICE)
    for i, position in enumerate(positions):
        slots = seen_rows(position, rule, rows)
        real[i, slots] = True
        buffer[:, i, :, max(slots) + 1 :] = float("nan")  # nothing beyond may be read
    filled = buffer.clone()
    for i, position in enumerate(positions):
        slot = position % rule.ring if rule.ring else position
        filled[0, i, :, slot], filled[1, i, :, slot] = k[i], v[i]
        buffer[:, i, :, slot] = 1e4  # the token's own row comes from k and v
    keys, values = (x.nan_to_num().repeat_interleave(heads // kv_heads, dim=1) for x in filled)
    mask = real[:, None, None]
    q_far = draw(3, heads, d, seed=4) if has_far else q
    queries = torch.where(torch.arange(rows, device=DEVICE)[:, None] < rule.ring, q[:, :, None], q_far[:, :, None])
    scores = ((queries * keys).sum(-1) * d**-0.5).masked_fill(~mask[:, :, 0], float("-inf"))
    want = (scores.softmax(-1)[..., None] * values).sum(2)
    arrivals, at = torch.zeros(3 * kv_heads, dtype=torch.int32, device=DEVICE), torch.tensor(positions, device=DEVICE)
    for _ in range(2):  # the second launch finds the count of arrivals as the first did
        operands = q, k, v, buffer, at, arrivals, rule, torch.full_like(q, float("nan"))
        got = triton_decode.attend(*operands, q_far=q_far if has_far else None)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
        assert not arrivals.any()
    torch.testing.assert_close(buffer, filled, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("rule, m, heads", [
    (Rule(0, 4, 0, 0), 1, 4), (Rule(12, 4, 2, 2), 2, 2), (Rule(0, 3, 0, 0), 1, 6), (Rule(1, 1, 0, 1), 1, 2),
    (Rule(12, 4, 2, 3), 3, 2),
])  # fmt: skip
def test_summarise(monkeypatch, rule, m, heads):
    """Against `cache._summarise` over rows read from the cache; the third request has no chunk yet."""
    ring, k = rule.ring, rule.chunk_size
    rows = ring + 5 * rule.own if ring else 19
    buffer, chunk = draw(2, 3, 2, rows, 24), torch.tensor([2, 4, 0], device=DEVICE)
    q, k_own, v_own = draw(3 * m, heads, 24, seed=1), draw(3 * m, 2, 24, seed=2), draw(3 * m, 2, 24, seed=3)
    k_kept = draw(3 * m, 2, 24, seed=9)
    positions = chunk[:, None] * k + torch.arange(k, device=DEVICE)
    slots = (positions % ring if ring else positions).clamp(max=rows - 1)
    at = slots[None, :, None, :, None].expand(2, -1, 2, -1, 24)
    want, filled = _summarise(q, *buffer.gather(3, at), k_own, v_own), buffer.clone()
    if rule.own:
        triton_decode.store_summaries(filled, chunk, rule, k_kept, v_own)
    summaries, before = Summaries(q, k_own, v_own, chunk, torch.empty_like(q), k_kept), buffer.clone()
    assert triton_decode.summarise(buffer, rule, summaries)
    torch.testing.assert_close(summaries.out, want, rtol=1e-4, atol=1e-5)
    assert torch.equal(buffer, filled)
    assert not triton_decode.summarise(buffer, rule._replace(chunk_size=256), summaries)
    assert triton_decode.can_join(buffer, rule, summaries) == (ring != k)
    monkeypatch.setattr(triton_decode, "_shared_memory", lambda device: 2000)
    summaries.out.fill_(7)
    assert not triton_decode.summarise(buffer, rule, summaries) and (summaries.out == 7).all()
    assert not triton_decode.can_join(buffer, rule, summaries)
    monkeypatch.undo()
    if ring == k:
        return
    # In the launch of the attention whose token follows the chunk.
    monkeypatch.setattr(triton_decode, "PROGRAMS", 12)
    text = [draw(3, n, 24, seed=4 + i) for i, n in enumerate((heads, 2, 2))]
    after, arrivals = (chunk + 1) * k, torch.zeros(6, dtype=torch.int32, device=DEVICE)
    alone, together = before.clone(), before.clone()
    want = triton_decode.attend(*text, alone, after, arrivals, rule, torch.empty_like(text[0]))
    summaries = summaries._replace(out=torch.full_like(q, float("nan")))
    got = triton_decode.attend(*text, together, after, arrivals, rule, torch.empty_like(text[0]), summaries)
    assert torch.equal(got, want)
    torch.testing.assert_close(summaries.out, _summarise(q, *before.gather(3, at), k_own, v_own), rtol=1e-4, atol=1e-5)
    if rule.own:
        triton_decode.store_summaries(alone, chunk, rule, k_kept, v_own)
    assert torch.equal(together, alone)


@pytest.mark.parametrize(
    "changes",
    [
        dict(),
        dict(layer_pattern="KSCF", window_chunks=0, summary_tokens=2),
        dict(layer_pattern="HPSF", window_chunks=0),
    ],
    ids=str,
)
@pytest.mark.parametrize("several", [True, False])
def test_a_whole_model_decodes_with_these_kernels(world, monkeypatch, changes, several):
    """Decoding through them, as on a GPU: rows for every shape a step has, read to the last allocated one."""
    decoder = model_for(world, **changes)
    prompts = [[7], [5, 9, 11, 2], list(range(13))]
    prompts, sampling = (prompts, Sampling(max_tokens=10)) if several else (prompts[-1:], Sampling(max_tokens=6))
    want, _ = generate(decoder, prompts, sampling)
    monkeypatch.setattr(triton_decode, "PROGRAMS", 12)  # the interpreter takes milliseconds for each
    backend = decoder.to(DEVICE).backend
    backend.select_for(decoder.embedding.weight)
    backend.rows, backend.gemv, backend.gemv_rows, backend.decode = triton_rows, triton_gemv, 16, triton_decode
    forward = DecodingCache._forward
    monkeypatch.setattr(
        DecodingCache, "_forward", lambda self, tokens, closing, _: forward(self, tokens, closing, None)
    )
    with torch.no_grad():
        got, _ = generate(decoder, prompts, sampling)
    assert got == want


@pytest.mark.parametrize("limit", [0, 10_000], ids=["nothing fits", "fewer rows at a time and no summaries"])
def test_decoding_where_shared_memory_is_short(world, monkeypatch, limit):
    decoder = model_for(world, chunk_size=60, window_chunks=0, layer_pattern="KF", num_layers=2)
    group, d = decoder.config.num_heads // decoder.config.num_kv_heads, decoder.config.head_dim
    assert triton_decode._rows_at_a_time(group, d, torch.float32, limit) == (16 if limit else 0)
    assert not triton_decode._fits(60, group, 1, d, torch.float32, limit)
    prompts, sampling = [list(range(59)), [3]], Sampling(max_tokens=4)
    want, _ = generate(decoder, prompts, sampling)
    monkeypatch.setattr(triton_decode, "PROGRAMS", 2)
    monkeypatch.setattr(triton_decode, "_shared_memory", lambda device: limit)
    decoder.to(DEVICE).backend.select_for(decoder.embedding.weight)
    decoder.backend.decode = triton_decode
    got, _ = generate(decoder, prompts, sampling)
    assert got == want


@pytest.mark.gpu
@pytest.mark.parametrize("batch", [1, 3, 8])
@pytest.mark.parametrize("rule", [Rule(0, 8, 0, 0), Rule(1032, 8, 128, 1)], ids=str)
def test_attend_in_bf16(batch, rule):
    """A long cache in all its shares, against a softmax over what is seen."""
    positions = torch.tensor([16_000 - 997 * i for i in range(batch)], device=DEVICE)
    seen = [seen_rows(int(position), rule, 0) for position in positions]
    rows = 1 + max(max(slots) for slots in seen)
    q, k, v = (draw(batch, heads, 128, seed=heads, dtype=torch.bfloat16) for heads in (32, 8, 8))
    buffer = draw(2, batch, 8, rows, 128, seed=1, dtype=torch.bfloat16)
    arrivals = torch.zeros(8 * batch, dtype=torch.int32, device=DEVICE)
    out = triton_decode.attend(q, k, v, buffer, positions, arrivals, rule, torch.empty_like(q))
    for i, slots in enumerate(seen):  # the buffer holds k and v by now
        keys, values = buffer[:, i][:, :, slots].double()
        scores = torch.einsum("gqd,gnd->gqn", q[i].double().unflatten(0, (8, 4)), keys) * 128**-0.5
        want = (scores.softmax(-1) @ values).flatten(0, 1)
        assert (out[i].double() - want).norm() / want.norm() < 6e-3
    assert not arrivals.any()


H100, A100, CONSUMER = 232_448, 166_912, 101_376  # bytes of shared memory that a program may have


# Bytes that Triton 3.9 says for kernels compiled ahead of time, for sm_90, sm_80 and sm_89.
@pytest.mark.parametrize("limit, dtype, k, m, d, group, taken", [
    (H100, torch.float32, 128, 1, 128, 4, 270_336), (H100, torch.float32, 64, 1, 256, 4, 278_528),
    (H100, torch.bfloat16, 128, 1, 128, 4, 69_632), (H100, torch.bfloat16, 128, 1, 256, 16, 139_264),
    (H100, torch.bfloat16, 8, 8, 128, 8, 24_576), (H100, torch.bfloat16, 128, 16, 128, 8, 163_840),
    (H100, torch.float16, 128, 16, 16, 8, 20_480), (A100, torch.bfloat16, 128, 1, 256, 4, 139_264),
    (CONSUMER, torch.bfloat16, 128, 1, 256, 4, 139_264), (CONSUMER, torch.float32, 64, 1, 128, 4, 139_264),
    (CONSUMER, torch.float32, 32, 8, 128, 8, 98_304), (CONSUMER, torch.bfloat16, 128, 16, 128, 8, 98_304),
    (CONSUMER, torch.bfloat16, 8, 1, 128, 4, 8192),
])  # fmt: skip
def test_summaries_are_made_where_their_tile_fits(limit, dtype, k, m, d, group, taken):
    assert triton_decode._bytes_of_summaries(k, group, m, d, dtype, limit) == taken + triton_decode.SLACK_BYTES
    assert triton_decode._fits(k, group, m, d, dtype, limit) == (taken <= limit)
    assert triton_decode._fits(k, group, m, d, dtype) and not triton_decode._fits(256, group, m, d, dtype)


@pytest.mark.parametrize("limit, dtype, d, group, rows, taken", [
    (H100, torch.bfloat16, 128, 4, 64, 71_680), (H100, torch.bfloat16, 256, 64, 64, 163_840),
    (H100, torch.bfloat16, 128, 128, 64, 131_072), (H100, torch.bfloat16, 512, 4, 64, 149_504),
    (H100, torch.float32, 256, 4, 64, 151_616), (CONSUMER, torch.bfloat16, 64, 4, 64, 36_864),
    (CONSUMER, torch.bfloat16, 128, 32, 64, 77_824), (CONSUMER, torch.bfloat16, 128, 128, 64, 98_304),
    (CONSUMER, torch.bfloat16, 256, 4, 64, 75_776), (CONSUMER, torch.bfloat16, 256, 64, 32, 69_632),
    (CONSUMER, torch.bfloat16, 512, 4, 32, 82_944), (CONSUMER, torch.float32, 64, 4, 64, 73_728),
    (CONSUMER, torch.float32, 128, 32, 64, 90_240), (CONSUMER, torch.float32, 256, 4, 32, 84_032),
    (CONSUMER, torch.float32, 256, 64, 0, None),
])  # fmt: skip
def test_attention_takes_as_many_rows_as_fit(limit, dtype, d, group, rows, taken):
    assert triton_decode._rows_at_a_time(group, d, dtype, limit) == rows
    assert triton_decode._rows_at_a_time(group, d, dtype) == 64
    if rows:
        found = triton_decode._bytes_of_attention(rows, group, d, dtype, limit)
        assert taken <= found <= taken + 10 * 2**10


@pytest.mark.gpu
@pytest.mark.parametrize(
    "pattern, k, window, m", [("KKKF", 8, 5, 1), ("KSCF", 3, 0, 2), ("F", 8, 0, 1), ("K", 1, 1, 1), ("HHPF", 8, 2, 1)]
)
@pytest.mark.parametrize("rotates", [True, False])
def test_graphs_say_what_the_cpu_says(world, pattern, k, window, m, rotates):
    shape = dict(layer_pattern=pattern, chunk_size=k, window_chunks=window, summary_tokens=m)
    shape |= dict(rotate_far=rotates, rotate_full_layers=rotates)
    config, on_cpu = small_config(**shape), model_for(world, **shape)
    prompts = [[7], [5, 9, 11, 2], list(range(40))]
    want, _ = generate(on_cpu, prompts, Sampling(max_tokens=300))
    on_gpu = Decoder(config, TensorParallel(world.tensor_group)).cuda().eval()
    on_gpu.load_state_dict(on_cpu.state_dict())
    got, _ = generate(on_gpu, prompts, Sampling(max_tokens=300))
    assert got == want
    # Without room reserved the buffers grow, and a recording of their old place must not be used.
    growing = DecodingCache(on_gpu, 3)
    logits = growing.prefill(prompts)
    for i in range(300):
        assert logits.argmax(-1).tolist() == [tokens[i] for tokens in want]
        logits = growing.step(logits.argmax(-1))
