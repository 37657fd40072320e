"""Decoding kernels: attention of one row per request over its cache, which also stores the row's key and value, and
attention of the summaries of a cached chunk. `ksa_model.ops.triton_gemv` has the other operations of a step.

Decoding reads every weight and every cached key once per token; everything else must be few launches. Shapes are fixed
and lengths are read from the device, so that CUDA graphs can record the kernels.

Legend: B requests, H query heads, G key/value heads, d head dimension, N rows of a cache.
"""

from __future__ import annotations

import math
from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ksa_model.ops.linear import Norm
from ksa_model.ops.pooling import ChunkRows
from ksa_model.ops.triton_gemv import precision

# Programs of the attention over a cache, each with a share of the rows: about one per multiprocessor, since merging the
# shares takes time, and twice as many where there are enough heads.
PROGRAMS = 128
MAX_SHARES = 64
BLOCK_ROWS = 64
MAX_KEYS = 256  # keys of a chunk and its summaries, in one tile
SLACK_BYTES = 1024  # shared memory besides the tiles, for exchange between threads


@triton.jit
def _store_summaries(k, v, keys, values, chunks, rows, heads, RING: tl.constexpr, OWN: tl.constexpr, D: tl.constexpr,
                     BLOCK: tl.constexpr):  # fmt: skip
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    request = row // OWN
    slot = RING + tl.load(chunks + request) * OWN + row % OWN
    column = tl.arange(0, BLOCK)
    inside = column < D
    source = (row * heads + head) * D + column
    target = ((request * heads + head) * rows + slot) * D + column
    tl.store(keys + target, tl.load(k + source, mask=inside), mask=inside)
    tl.store(values + target, tl.load(v + source, mask=inside), mask=inside)


@triton.jit
def _is_visible(row, position, RING: tl.constexpr, CHUNK: tl.constexpr, WINDOW: tl.constexpr, OWN: tl.constexpr):
    """Which rows of a cache the token at `position` attends to: see `Rule`."""
    if RING == 0:
        return row <= position
    held = position - (position - row + RING) % RING  # the position of the row that is in the slot now
    if WINDOW < 0:
        return (row < RING) & (held >= 0)
    first_near = position // CHUNK - WINDOW  # the oldest chunk that is near
    near = (row < RING) & (held >= tl.maximum(first_near, 0) * CHUNK)
    return near | ((row >= RING) & (row - RING < first_near * OWN))


@triton.jit
def _attend(q, k, v, keys, values, positions, parts, weights, arrivals, out, q_own, k_own, v_own, chunks, out_own,
            k_kept, q_far, rows, heads, scale, RING: tl.constexpr, CHUNK: tl.constexpr, WINDOW: tl.constexpr,
            OWN: tl.constexpr, GROUP: tl.constexpr, ROWS_Q: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
            BLOCK: tl.constexpr, SHARES: tl.constexpr, PRECISION: tl.constexpr, SUMMARIES: tl.constexpr,
            QUERIES: tl.constexpr, KEYS: tl.constexpr, GROUP_2: tl.constexpr, FAR: tl.constexpr):  # fmt: skip
    """The query heads of one key/value head of one request over one share of its rows: output and log-sum-exp. The
    program whose share has the token's own row takes it from k and v and stores it for later tokens. The last program
    of a (request, head) pair to finish merges the shares and resets the count of arrivals. With SUMMARIES one more
    program computes the summaries of a chunk. With FAR, rows after the ring have queries of their own."""
    request, head = (tl.program_id(0) // heads).to(tl.int64), tl.program_id(0) % heads
    share = tl.program_id(1)
    if SUMMARIES > 0:
        if share == SHARES:
            _summarise_chunk(q_own, keys, values, k_own, v_own, chunks, out_own, k_kept, rows, heads, scale, request,
                             head, RING, GROUP, CHUNK, SUMMARIES, QUERIES, KEYS, D, BLOCK_D, PRECISION,
                             OWN > 0)  # fmt: skip
            return
    position = tl.load(positions + request)
    stop, slot = position + 1, position
    if RING > 0:
        stop, slot = tl.minimum(stop, RING), position % RING
        far = (position // CHUNK - WINDOW) * OWN
        if far > 0:
            stop = RING + far
    stop = tl.minimum(stop, rows)
    each = tl.cdiv(tl.cdiv(stop, SHARES), BLOCK) * BLOCK
    first = share * each
    last = tl.minimum(first + each, stop)
    column, query_row = tl.arange(0, BLOCK_D), tl.arange(0, ROWS_Q)
    in_column = column < D
    pair = request * heads + head
    at_query = (pair * GROUP + query_row[:, None]) * D + column[None, :]
    real_query = (query_row < GROUP)[:, None] & in_column[None, :]
    query = tl.load(q + at_query, mask=real_query, other=0.0)
    if FAR:
        query_far = tl.load(q_far + at_query, mask=real_query, other=0.0)
    top = tl.full([ROWS_Q], float("-inf"), tl.float32)
    total = tl.zeros([ROWS_Q], tl.float32)
    acc = tl.zeros([ROWS_Q, BLOCK_D], tl.float32)
    for begin in range(first, last, BLOCK):
        row = begin + tl.arange(0, BLOCK)
        inside = row < last
        cells = (pair * rows + row)[:, None] * D + column[None, :]
        held = inside[:, None] & in_column[None, :]
        key = tl.load(keys + cells, mask=held, other=0.0)
        value = tl.load(values + cells, mask=held, other=0.0)
        visible = inside & (row != slot) & _is_visible(row, position, RING, CHUNK, WINDOW, OWN)
        scores = tl.dot(query, tl.trans(key), input_precision=PRECISION) * scale
        if FAR:
            if begin + BLOCK > RING:
                scores_far = tl.dot(query_far, tl.trans(key), input_precision=PRECISION) * scale
                scores = tl.where((row >= RING)[None, :], scores_far, scores)
        scores = tl.where(visible[None, :], scores, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, 1))
        shift = tl.where(higher == float("-inf"), 0.0, higher)
        weight = tl.exp(scores - shift[:, None])
        shrink = tl.exp(top - shift)
        total = total * shrink + tl.sum(weight, 1)
        acc = acc * shrink[:, None] + tl.dot(weight.to(value.dtype), value, input_precision=PRECISION)
        top = higher
    if (slot >= first) & (slot < last):
        new_key = tl.load(k + pair * D + column, mask=in_column, other=0.0)
        new_value = tl.load(v + pair * D + column, mask=in_column, other=0.0)
        tl.store(keys + (pair * rows + slot) * D + column, new_key, mask=in_column)
        tl.store(values + (pair * rows + slot) * D + column, new_value, mask=in_column)
        score = tl.sum(query.to(tl.float32) * new_key.to(tl.float32)[None, :], 1) * scale
        higher = tl.maximum(top, score)
        weight, shrink = tl.exp(score - higher), tl.exp(top - higher)
        total = total * shrink + weight
        acc = acc * shrink[:, None] + weight[:, None] * new_value.to(tl.float32)[None, :]
        top = higher
    at = (pair * SHARES + share) * GROUP + query_row
    kept = query_row < GROUP
    has_keys = total > 0
    tl.store(weights + at, tl.where(has_keys, top + tl.log(tl.where(has_keys, total, 1.0)), float("-inf")), mask=kept)
    normed = acc / tl.where(has_keys, total, 1.0)[:, None]
    tl.store(parts + at[:, None] * D + column[None, :], normed, mask=kept[:, None] & in_column[None, :])
    tl.debug_barrier()  # all threads store the share before the arrival is counted
    if tl.atomic_add(arrivals + pair, 1, sem="acq_rel") == SHARES - 1:
        tl.store(arrivals + pair, 0)
        _merge(parts, weights, out, pair, GROUP, GROUP_2, SHARES, D, BLOCK_D)


@triton.jit
def _merge(parts, weights, out, pair, GROUP: tl.constexpr, GROUP_2: tl.constexpr, SHARES: tl.constexpr, D: tl.constexpr,
           BLOCK_D: tl.constexpr):  # fmt: skip
    """Merge the shares of a pair's query heads. Other multiprocessors wrote them, so loads bypass the L1 cache.

    Each thread sums its own features, so many loads are in flight and no thread waits for others.
    """
    share, member, column = tl.arange(0, SHARES), tl.arange(0, GROUP_2), tl.arange(0, BLOCK_D)
    real = member < GROUP
    held = real[:, None] & (column < D)[None, :]
    at = (pair * SHARES + share[None, :]) * GROUP + member[:, None]
    weight = tl.load(weights + at, mask=real[:, None], other=float("-inf"), cache_modifier=".cg")
    top = tl.max(weight, 1)
    top = tl.where(top == float("-inf"), 0.0, top)
    total = tl.sum(tl.exp(weight - top[:, None]), 1)
    merged = tl.zeros([GROUP_2, BLOCK_D], tl.float32)
    for one in tl.range(0, SHARES, loop_unroll_factor=min(SHARES, 16)):
        at_one = (pair * SHARES + one) * GROUP + member
        part = tl.load(parts + at_one[:, None] * D + column[None, :], mask=held, other=0.0, cache_modifier=".cg")
        its_weight = tl.exp(tl.load(weights + at_one, mask=real, other=float("-inf"), cache_modifier=".cg") - top)
        merged += part * its_weight[:, None]
    merged /= tl.where(total > 0, total, 1.0)[:, None]
    tl.store(out + (pair * GROUP + member)[:, None] * D + column[None, :], merged.to(out.dtype.element_ty), mask=held)


@triton.jit
def _summarise_chunk(q, keys, values, k_own, v_own, chunks, out, k_kept, rows, heads, scale, request, head,
                     RING: tl.constexpr, GROUP: tl.constexpr, CHUNK: tl.constexpr, OWN: tl.constexpr,
                     QUERIES: tl.constexpr, KEYS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
                     PRECISION: tl.constexpr, KEEP: tl.constexpr):  # fmt: skip
    """The OWN summaries of one chunk, for the query heads of one key/value head of one request. With KEEP the keys
    `k_kept` and their values are stored after the ring."""
    column, query, key = tl.arange(0, BLOCK_D), tl.arange(0, QUERIES), tl.arange(0, KEYS)
    in_column, member, own = column < D, query % GROUP, query // GROUP
    real = own < OWN
    at_query = ((request * OWN + own) * heads * GROUP + head * GROUP + member)[:, None] * D + column[None, :]
    queries = tl.load(q + at_query, mask=real[:, None] & in_column[None, :], other=0.0)
    is_text, summary = key < CHUNK, key - CHUNK
    slot = tl.load(chunks + request) * CHUNK + key
    if RING > 0:
        slot %= RING
    slot = tl.minimum(tl.maximum(slot, 0), rows - 1)  # provisional summaries may read any row
    at_text = ((request * heads + head) * rows + slot)[:, None] * D + column[None, :]
    at_own = ((request * OWN + summary) * heads + head)[:, None] * D + column[None, :]
    text = is_text[:, None] & in_column[None, :]
    is_own = ((summary >= 0) & (summary < OWN))[:, None] & in_column[None, :]
    k = tl.load(keys + at_text, mask=text, other=0.0) + tl.load(k_own + at_own, mask=is_own, other=0.0)
    v = tl.load(values + at_text, mask=text, other=0.0) + tl.load(v_own + at_own, mask=is_own, other=0.0)
    scores = tl.dot(queries, tl.trans(k), input_precision=PRECISION) * scale
    scores = tl.where(is_text[None, :] | (summary[None, :] <= own[:, None]), scores, float("-inf"))
    weight = tl.exp(scores - tl.max(scores, 1)[:, None])
    found = tl.dot(weight.to(v.dtype), v, input_precision=PRECISION) / tl.sum(weight, 1)[:, None]
    tl.store(out + at_query, found.to(out.dtype.element_ty), mask=real[:, None] & in_column[None, :])
    if KEEP:
        for one in tl.static_range(OWN):
            source = ((request * OWN + one) * heads + head) * D + column
            kept_at = RING + tl.load(chunks + request) * OWN + one
            target = ((request * heads + head) * rows + kept_at) * D + column
            tl.store(keys + target, tl.load(k_kept + source, mask=in_column), mask=in_column)
            tl.store(values + target, tl.load(v_own + source, mask=in_column), mask=in_column)


@triton.jit
def _summarise(q, keys, values, k_own, v_own, chunks, out, k_kept, rows, heads, scale, RING: tl.constexpr,
               GROUP: tl.constexpr, CHUNK: tl.constexpr, OWN: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
               D: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr, KEEP: tl.constexpr):  # fmt: skip
    _summarise_chunk(q, keys, values, k_own, v_own, chunks, out, k_kept, rows, heads, scale,
                     tl.program_id(0).to(tl.int64), tl.program_id(1), RING, GROUP, CHUNK, OWN, QUERIES, KEYS, D,
                     BLOCK_D, PRECISION, KEEP)  # fmt: skip


@triton.jit
def _pool_token(k, v, scores, bias, positions, sums, weights, gain, cos, sin, keys, values, rows, heads, eps,
                RING: tl.constexpr, CHUNK: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr, LEARNED: tl.constexpr,
                NORM: tl.constexpr):  # fmt: skip
    """One head of one request: the sums with the token added, and the pooled key and value of its chunk so far. The
    features of a head are in two halves, which RoPE rotates together."""
    request, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    pair = request * heads + head
    column = tl.arange(0, BLOCK)
    inside = column < HALF
    position = tl.load(positions + request)
    first = position % CHUNK == 0
    score = 0.0
    if LEARNED:
        score = tl.load(scores + pair).to(tl.float32) + tl.load(bias + head * CHUNK + position % CHUNK).to(tl.float32)
    top = tl.load(weights + 2 * pair)
    highest = tl.where(first, score, tl.maximum(top, score))
    decay, weight = tl.where(first, 0.0, tl.exp(top - highest)), tl.exp(score - highest)
    total = tl.load(weights + 2 * pair + 1) * decay + weight
    tl.store(weights + 2 * pair, highest)
    tl.store(weights + 2 * pair + 1, total)
    at, held = pair * 2 * HALF + column, sums + pair * 4 * HALF + column
    left = tl.load(held, mask=inside, other=0.0) * decay + tl.load(k + at, mask=inside, other=0.0) * weight
    right = (
        tl.load(held + HALF, mask=inside, other=0.0) * decay + tl.load(k + at + HALF, mask=inside, other=0.0) * weight
    )
    tl.store(held, left, mask=inside)
    tl.store(held + HALF, right, mask=inside)
    # Rounded where the operations in torch round: after the mean, after the norm and after the rotation.
    left = (left / total).to(k.dtype.element_ty).to(tl.float32)
    right = (right / total).to(k.dtype.element_ty).to(tl.float32)
    if NORM:
        scale = 1 / tl.sqrt((tl.sum(left * left, 0) + tl.sum(right * right, 0)) / (2 * HALF) + eps)
        left *= scale * tl.load(gain + column, mask=inside, other=0.0).to(tl.float32)
        right *= scale * tl.load(gain + HALF + column, mask=inside, other=0.0).to(tl.float32)
        left = left.to(k.dtype.element_ty).to(tl.float32)
        right = right.to(k.dtype.element_ty).to(tl.float32)
    c = tl.load(cos + request * HALF + column, mask=inside, other=0.0)
    s = tl.load(sin + request * HALF + column, mask=inside, other=0.0)
    target = (pair * rows + RING + position // CHUNK) * 2 * HALF + column
    tl.store(keys + target, (left * c - right * s).to(keys.dtype.element_ty), mask=inside)
    tl.store(keys + target + HALF, (right * c + left * s).to(keys.dtype.element_ty), mask=inside)
    for half in tl.static_range(2):
        to = half * HALF
        value = tl.load(held + 2 * HALF + to, mask=inside, other=0.0) * decay
        value += tl.load(v + at + to, mask=inside, other=0.0) * weight
        tl.store(held + 2 * HALF + to, value, mask=inside)
        tl.store(values + target + to, (value / total).to(values.dtype.element_ty), mask=inside)


class Rule(NamedTuple):
    """The slots of a layer's rows in its cache, and which of them a token attends to.

    A text row is in the slot of its position modulo `ring`, or with ring 0 of its position; attention is causal. A ring
    has the newest position of each slot; a token attends to its own chunk and the `window` chunks before it, or to all
    rows (-1). After the ring come `own` summaries of every chunk (0: none are kept); a token attends to those of chunks
    before its window.
    """

    ring: int
    chunk_size: int
    window: int
    own: int


class Summaries(NamedTuple):
    """The m summaries of chunk `chunk` [B] (int64) of each request: q [B*m, H, d], k and v [B*m, G, d], out like q.

    `k_kept` [B*m, G, d]: their keys as the cache keeps them. They differ from `k` in a layer whose far part has no
    RoPE.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    chunk: torch.Tensor
    out: torch.Tensor
    k_kept: torch.Tensor

    def for_kernel(self) -> Summaries:
        """With contiguous inputs."""
        inputs = ("q", "k", "v", "k_kept")
        return self._replace(**{name: getattr(self, name).contiguous() for name in inputs})


def store_summaries(buffer: torch.Tensor, chunks: torch.Tensor, rule: Rule, k: torch.Tensor, v: torch.Tensor) -> None:
    """Store k, v [B*m, G, d] of the m summaries of chunk `chunks` [B] (int64) of each request in buffer
    [2, B, G, N, d], after the ring of text."""
    count, heads, d = k.shape
    _store_summaries[(count, heads)](
        k.contiguous(), v.contiguous(), buffer[0], buffer[1], chunks, buffer.shape[3], heads, RING=rule.ring,
        OWN=count // buffer.shape[1], D=d, BLOCK=triton.next_power_of_2(d), num_warps=1,
    )  # fmt: skip


def pool_token(
    rows: ChunkRows,
    positions: torch.Tensor,
    state: tuple[torch.Tensor, torch.Tensor],
    norm: Norm | None,
    table: tuple[torch.Tensor, torch.Tensor],
    buffer: torch.Tensor,
    rule: Rule,
) -> None:
    """Add a token of each request at `positions` int64 [B] to its open chunk, and store the pooled key and value of
    that chunk so far in buffer [2, B, G, N, d], after the ring of text: `OpenChunk.add`, the norm and rotation of the
    pooled key by `table` and `store_summaries` in one launch.

    rows: k, v [B, G, d] and of `H` scores [B, G]. `state`: `OpenChunk.sums` and `OpenChunk.weights`.
    """
    k, v = rows.k.contiguous(), rows.v.contiguous()
    learned = rows.scores is not None and rows.bias is not None
    scores = rows.scores.contiguous() if rows.scores is not None else k  # otherwise never read
    batch, heads, d = k.shape
    _pool_token[(batch, heads)](
        k, v, scores, rows.bias if learned else k, positions, *state, k if norm is None else norm.gain, *table,
        buffer[0], buffer[1], buffer.shape[3], heads, 0.0 if norm is None else norm.eps, RING=rule.ring,
        CHUNK=rule.chunk_size, HALF=d // 2, BLOCK=triton.next_power_of_2(d // 2), LEARNED=learned,
        NORM=norm is not None, num_warps=1,
    )  # fmt: skip


def summarise(buffer: torch.Tensor, rule: Rule, summaries: Summaries) -> bool:
    """Attention of the summaries of one whole chunk per request, each over the chunk's text and summaries up to itself.

    The text is in buffer [2, B, G, N, d] by `rule`; keys and values of the summaries are stored there if it keeps any.
    Returns False and does nothing if a chunk is too long for one tile, or the tile too large for the device.
    """
    if not _fits_device(buffer, rule, summaries):
        return False
    q, k, v, chunk, out, k_kept = summaries.for_kernel()
    (batch, kv_heads), (total, heads, d) = buffer.shape[1:3], q.shape
    group, m = heads // kv_heads, total // batch
    _summarise[(batch, kv_heads)](
        q, buffer[0], buffer[1], k, v, chunk, out, k_kept, buffer.shape[3], kv_heads, d**-0.5, RING=rule.ring,
        GROUP=group, CHUNK=rule.chunk_size, OWN=m, D=d, BLOCK_D=_padded(d), PRECISION=precision(q), KEEP=rule.own > 0,
        **_tile_of_summaries(rule.chunk_size, group, m),
    )  # fmt: skip
    return True


def can_join(buffer: torch.Tensor, rule: Rule, summaries: Summaries) -> bool:
    """Whether `attend` can compute these summaries too: its token must not overwrite a slot that they read."""
    return rule.ring != rule.chunk_size and _fits_device(buffer, rule, summaries)


def can_attend(q: torch.Tensor, buffer: torch.Tensor, has_far: bool = False) -> bool:
    """Whether `attend` of q [B, H, d] over buffer [2, B, G, N, d] fits the device; `has_far`: with queries of the far
    part."""
    return _rows_at_a_time(q.shape[1] // buffer.shape[2], q.shape[2], q.dtype, _shared_memory(q.device), has_far) > 0


def _fits_device(buffer: torch.Tensor, rule: Rule, summaries: Summaries) -> bool:
    (total, heads, d), (batch, kv_heads) = summaries.q.shape, buffer.shape[1:3]
    limit = _shared_memory(buffer.device)
    return _fits(rule.chunk_size, heads // kv_heads, total // batch, d, buffer.dtype, limit)


@cache
def _shared_memory(device: torch.device) -> float:
    """The most bytes of shared memory of a program; Triton's interpreter has no limit."""
    if device.type != "cuda":
        return math.inf
    properties = torch.cuda.get_device_properties(device)
    return properties.shared_memory_per_block_optin  # type: ignore[attr-defined]  # torch's stubs lack it


def _fits(chunk_size: int, group: int, m: int, d: int, dtype: torch.dtype, limit: float = math.inf) -> bool:
    """Whether a chunk and its m summaries fit one tile in `limit` bytes of shared memory."""
    return chunk_size + m <= MAX_KEYS and _bytes_of_summaries(chunk_size, group, m, d, dtype, limit) <= limit


def _rows_at_a_time(group: int, d: int, dtype: torch.dtype, limit: float = math.inf, has_far: bool = False) -> int:
    """The largest tile, in rows of a cache, that fits `limit` bytes of shared memory; 0: none."""
    rows = (BLOCK_ROWS, BLOCK_ROWS // 2, BLOCK_ROWS // 4)
    return next((count for count in rows if _bytes_of_attention(count, group, d, dtype, limit, has_far) <= limit), 0)


def _bytes_of_summaries(chunk_size: int, group: int, m: int, d: int, dtype: torch.dtype, limit: float) -> int:
    """Shared memory of `_summarise`: queries, keys and values. Values reuse the memory of the keys if these are in
    registers by then."""
    queries, keys = _tile_of_summaries(chunk_size, group, m).values()
    tiles = 2 if dtype.itemsize > 2 or _in_place(queries, limit) else 1
    return (queries + tiles * keys) * _padded(d) * dtype.itemsize + SLACK_BYTES


def _bytes_of_attention(rows: int, group: int, d: int, dtype: torch.dtype, limit: float, has_far: bool = False) -> int:
    """Shared memory of `_attend` without summaries: queries, keys and values of the pipeline's stages, and weights,
    unless each warp has its own query rows."""
    queries, stages = _padded(group), _stages(d, dtype)
    if dtype.itemsize > 2 or not _in_place(queries, limit):
        stages -= 1  # the one in use is in registers
    weights = 0 if dtype.itemsize <= 2 and queries >= 128 else queries * rows
    return ((queries * (1 + has_far) + 2 * stages * rows) * _padded(d) + weights) * dtype.itemsize + SLACK_BYTES


def _in_place(queries: int, limit: float) -> bool:
    """Whether 16-bit matrix instructions read operands from shared memory: from 64 rows on, on GPUs with 227 KiB of it
    (Hopper and later data-centre GPUs; others have at most 163)."""
    return queries >= 64 and limit > 200 * 2**10


def _padded(size: int) -> int:
    """The size of a tile's dimension in a matrix instruction."""
    return max(16, triton.next_power_of_2(size))


def _tile_of_summaries(chunk_size: int, group: int, m: int) -> dict[str, int]:
    return dict(QUERIES=_padded(group * m), KEYS=_padded(chunk_size + m))


def _stages(d: int, dtype: torch.dtype) -> int:
    """Stages of the pipeline over a cache: with longer rows a third tile would not fit shared memory."""
    return 3 if d * dtype.itemsize <= 256 else 2


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    buffer: torch.Tensor,
    positions: torch.Tensor,
    arrivals: torch.Tensor,
    rule: Rule,
    out: torch.Tensor,
    summaries: Summaries | None = None,
    q_far: torch.Tensor | None = None,
) -> torch.Tensor:
    """Store k, v [B, G, d] of the tokens at `positions` [B] (int64) in buffer [2, B, G, N, d]; then attention of q
    [B, H, d] over the buffer's rows by `rule`, into out [B, H, d]. Rows after the last visible one are not read. Needs
    `can_attend`.

    arrivals: int32 [B*G] zeros, which are zeros again afterwards; concurrent launches need one each.
    summaries: also computed as by `summarise`, in the same launch. Needs `can_join`.
    q_far: like q, for the rows after the ring; None: q.
    """
    batch, heads, d = q.shape
    kv_heads, group = buffer.shape[2], heads // buffer.shape[2]
    pairs = batch * kv_heads
    programs = PROGRAMS if 4 * pairs <= PROGRAMS else 2 * PROGRAMS
    shares = triton.next_power_of_2(max(1, min(MAX_SHARES, programs // pairs)))
    parts = torch.empty(pairs, shares, group, d, dtype=torch.float32, device=q.device)
    weights = torch.empty(pairs, shares, group, dtype=torch.float32, device=q.device)
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    own, m = Summaries(q, k, v, positions, out, k), 0  # never read
    has_far, q_far = q_far is not None, q if q_far is None else q_far.contiguous()
    block = _rows_at_a_time(group, d, q.dtype, _shared_memory(q.device), has_far)
    if summaries is not None:
        own, m = summaries.for_kernel(), len(summaries.q) // batch
    _attend[(pairs, shares + (m > 0))](
        q, k, v, buffer[0], buffer[1], positions, parts, weights, arrivals, out, *own, q_far, buffer.shape[3],
        kv_heads, d**-0.5, RING=rule.ring, CHUNK=rule.chunk_size, WINDOW=rule.window, OWN=rule.own, GROUP=group,
        ROWS_Q=_padded(group), D=d, BLOCK_D=_padded(d), BLOCK=block, SHARES=shares, PRECISION=precision(q),
        SUMMARIES=m, num_stages=_stages(d, q.dtype), GROUP_2=triton.next_power_of_2(group), FAR=has_far,
        **_tile_of_summaries(rule.chunk_size, group, m),
    )  # fmt: skip
    return out
