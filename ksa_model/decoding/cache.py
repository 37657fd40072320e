"""Decoding with a compressed cache.

Legend: B requests, k tokens a chunk, m summaries a chunk, W window chunks, G key/value heads, d head dimension.

A `K` layer keeps a ring of the last `(W+1)*k` text rows and, after it in the same buffer, the summaries of closed
chunks: O(n*m/k) rows. `H` and `P` layers keep such a ring, then pooled keys and values, and sums over the open chunk
(`ksa_model.decoding.open_chunk`). `F` layers keep all text rows, `S` and `C` layers a ring, `G` layers a state
(`ksa_model.layers.delta`). The chunk that a decoded token closes is summarised in the forward of the next token, as
extra rows of that step, never in a separate step. The pooled key of the open chunk is written in every step and is
final once the chunk is closed. Requests of a batch may have any lengths; none is padded to the longest.

The model code is that of training: prefill is the training forward over all prompts packed as documents, and a decoding
step is the same forward over B rows with the cache instead of the attention kernels.

A step reads positions from the device. It has one of two shapes, with and without summaries; the host knows which from
the lengths. So nothing waits for the device, and on a GPU each shape is recorded once as a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import numpy as np
import torch

from ksa_model.config import LayerConfig, ModelConfig, ModelConfigError
from ksa_model.decoding.open_chunk import OpenChunk
from ksa_model.layers.attention import Attention, Heads
from ksa_model.layers.delta import DeltaCache
from ksa_model.layout.sequence import SequenceLayout, build_layout
from ksa_model.model import Decoder

GROWTH = 32  # a full buffer grows by 1/32: a row is copied about 32 times in its life, and at most 3 % are unused


class LayerCache:
    """Keys and values of one layer: text rows in `ring_rows` slots (None: all rows), then summary rows.

    One buffer [2, B, G, rows, d] holds both, so that a step's attention reads contiguous memory.
    """

    def __init__(self, config: ModelConfig, layer: LayerConfig, empty: torch.Tensor, kernels: ModuleType | None = None):
        """`empty` [2, B, G, 0, d] has the buffer's shape, dtype and device. `kernels`: `Backend.decode`."""
        window = (layer.window_chunks + 1) * config.chunk_size
        self.layer, self._config = layer, config
        self.ring_rows = {"F": None, "S": config.window_tokens}.get(layer.mixer, window)
        self.keeps_summaries = layer.has_far  # or pooled keys, which have the same slots
        requests, kv_heads, head_dim = empty.shape[1], empty.shape[2], empty.shape[4]
        self.open_chunk = OpenChunk(requests, kv_heads, head_dim, empty.device) if layer.pools else None
        self._buffer, self._kernels = empty, kernels
        self._arrivals = empty.new_zeros(
            empty.shape[1] * empty.shape[2], dtype=torch.int32
        )  # see `triton_decode.attend`

    @property
    def rows(self) -> int:
        """Rows allocated for each request."""
        return self._buffer.shape[3]

    @property
    def allocated_bytes(self) -> int:
        """Bytes of the buffer, and of the open chunk in a layer that pools."""
        of_chunk = 0 if self.open_chunk is None else self.open_chunk.allocated_bytes
        return self._buffer.numel() * self._buffer.element_size() + of_chunk

    def reserve(self, num_tokens: int) -> None:
        """Allocate exactly for requests of up to `num_tokens` tokens, once and before the first token. If these fit the
        text window, no summaries are kept."""
        assert self.rows == 0
        self.keeps_summaries = self.layer.has_far and self.ring_rows is not None and num_tokens > self.ring_rows
        self.open_chunk = self.open_chunk if self.keeps_summaries else None
        self._resize(self._rows_for(num_tokens))

    def ensure(self, num_tokens: int) -> bool:
        """Make room for `num_tokens` tokens or more. Returns whether the buffer was replaced."""
        need, have = self._rows_for(num_tokens), self.rows
        return self._resize(max(need, have + have // GROWTH)) if need > have else False

    def _rows_for(self, num_tokens: int) -> int:
        if self.keeps_summaries:  # the open chunk has slots too: a step may write them before it closes
            assert self.ring_rows is not None
            return self.ring_rows + -(-num_tokens // self._config.chunk_size) * self._config.summary_tokens
        return num_tokens if self.ring_rows is None else min(num_tokens, self.ring_rows)

    def _resize(self, rows: int) -> bool:
        have = self.rows
        if rows <= have:
            return False
        bigger = self._buffer.new_zeros(*self._buffer.shape[:3], rows, self._buffer.shape[4])
        bigger[:, :, :, :have] = self._buffer
        self._buffer = bigger
        return True

    def write(self, requests: torch.Tensor, slots: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        """Write k, v [n, G, d] to `slots` [n] of `requests` [n]."""
        at = requests, slice(None), slots
        self._buffer[0][at], self._buffer[1][at] = k, v

    def _rule(self, kernels: ModuleType):
        """The rule of `Step.visible`, as the kernels take it."""
        window = -1 if self.layer.mixer == "S" else self.layer.window_chunks
        own = self._config.summary_tokens if self.keeps_summaries else 0
        return kernels.Rule(self.ring_rows or 0, self._config.chunk_size, window, own)

    def text_slots(self, positions):
        """The slots of text `positions`, an array or a tensor of any shape."""
        return positions if self.ring_rows is None else positions % self.ring_rows

    def summary_slots(self, index):
        """The slots of a request's summaries number `index`, likewise."""
        return (self.ring_rows or 0) + index

    def read(self, slots: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [B, G, n, d] at `slots` [B, n]; slots beyond the buffer read some row of it."""
        at = slots.clamp(max=self.rows - 1)[None, :, None, :, None]
        rows = self._buffer.gather(3, at.expand(2, -1, self._buffer.shape[2], -1, self._buffer.shape[4]))
        return rows[0], rows[1]

    def step(self, heads: Heads, step: Step, text: torch.Tensor, summary: torch.Tensor | None) -> None:
        """Attention of a step's rows, written to `text` [B, H, d] and, if the layer updates summaries, to `summary`
        [B*m, H, d].

        Adds the keys and values of the text rows to the cache, and in a closing step those of the summaries if the
        layer keeps any.
        """
        q, k_own, v_own = heads.q_summary, heads.k_summary, heads.v_summary
        k_kept = heads.far_keys
        kernels, joined = self._kernels, None
        if kernels is not None and not kernels.can_attend(heads.q, self._buffer, heads.q_far is not None):
            kernels = None  # heads too wide for the device's tiles
        if q is not None and summary is not None:  # before this token may overwrite a slot of the chunk
            own = None if kernels is None else kernels.Summaries(q, k_own, v_own, step.chunk, summary, k_kept)
            if kernels is not None and kernels.can_join(self._buffer, self._rule(kernels), own):
                joined = own
            elif kernels is None or not kernels.summarise(self._buffer, self._rule(kernels), own):
                summary.copy_(_summarise(q, *self.read(self.text_slots(step.inside_chunk())), k_own, v_own))
                self._keep_summaries(step, k_kept, v_own)
        elif step.closing:
            self._keep_summaries(step, k_kept, v_own)
        if kernels is None:
            text.copy_(self._attend(heads, step))
        else:
            operands = heads.q, heads.k, heads.v, self._buffer, step.position, self._arrivals
            kernels.attend(*operands, self._rule(kernels), text, joined, heads.q_far)

    def pool(self, attention: Attention, heads: Heads, step: Step) -> None:
        """Add the step's rows to the open chunks of a layer that pools, and their pooled keys and values to the
        cache."""
        if self.open_chunk is None:
            return
        assert heads.unpooled is not None and heads.pooled_table is not None
        if self._kernels is not None:
            state = self.open_chunk.sums, self.open_chunk.weights
            norm, rule = attention.norm_of_keys, self._rule(self._kernels)
            self._kernels.pool_token(heads.unpooled, step.position, state, norm, heads.pooled_table, self._buffer, rule)
        else:
            k, v = self.open_chunk.add(heads.unpooled, step.position, step.chunk_size)
            self._keep_summaries(step, attention.rotate_pooled(k, heads.pooled_table), v)

    def _keep_summaries(self, step: Step, k: torch.Tensor | None, v: torch.Tensor | None) -> None:
        """Add the summary rows k, v [B*m, G, d] of a step to the cache, if the layer keeps summaries."""
        if not self.keeps_summaries or k is None or v is None:
            return
        if self._kernels is not None:
            self._kernels.store_summaries(self._buffer, step.chunk, self._rule(self._kernels), k, v)
        else:
            requests = torch.arange(step.num_text, device=k.device).repeat_interleave(step.summary_tokens)
            self.write(requests, self.summary_slots(step.summary_index()), k, v)

    def _attend(self, heads: Heads, step: Step) -> torch.Tensor:
        self.write(torch.arange(len(heads.k), device=heads.k.device), self.text_slots(step.position), heads.k, heads.v)
        visible = step.visible(self)
        keys, values = self._buffer[:, :, :, : visible.shape[1]]
        # Query heads that share a key/value head are rows of one GEMM, so no key is copied.
        q = heads.q.unflatten(1, (keys.shape[1], -1))
        if heads.q_far is None:
            found = torch.nn.functional.scaled_dot_product_attention(q, keys, values, attn_mask=visible[:, None, None])
            return found.flatten(1, 2)
        near, far = keys.tensor_split([self.ring_rows or 0], dim=2)
        q_far = heads.q_far.unflatten(1, (keys.shape[1], -1))
        scores = torch.cat([q @ near.transpose(2, 3), q_far @ far.transpose(2, 3)], dim=3).float() * q.shape[3] ** -0.5
        weights = scores.masked_fill(~visible[:, None, None], float("-inf")).softmax(-1)
        return (weights.to(values.dtype) @ values).flatten(1, 2)


class Step(SequenceLayout):
    """The rows of one decoding step: a text row for each request and, in a `closing` step, the summaries of the chunk
    of each request's previous token. In a model that pools chunks there are no summaries, and `chunk` is that of the
    step's own token, whose pooled key the step writes. Positions are on the device.

    These summaries are final only where the chunk has just closed. Elsewhere they go to slots that no row attends to
    and that are written again when the chunk closes. So shapes depend on B alone.

    Worked example, k=4, closing: request 0 is at position 8, so its second chunk has just closed; request 1 is at
    position 6. Rows: [text of 0 | text of 1 | summary of chunk 1 of 0, final | summary of chunk 1 of 1, provisional].
    """

    def __init__(self, config: ModelConfig, position: torch.Tensor, closing: bool, longest: int | None):
        """`position` int64 [B]: those of the tokens of this step. `longest`: an upper bound of the requests' lengths,
        to read fewer rows; None: read all allocated rows, always the same number."""
        k, m, batch = config.chunk_size, config.summary_tokens, len(position)
        self.position, self.closing, self._longest = position, closing, longest
        summary_positions = position[:0]
        if closing or config.has_pooled:
            self.chunk = (position - 1 if closing else position) // k
            ends = ((torch.arange(m, device=position.device) + 1) * k // m - 1).clamp(min=0)
            summary_positions = (self.chunk[:, None] * k + ends).flatten()
        super().__init__(
            num_text=batch,
            chunk_size=k,
            summary_tokens=m,
            chunk_lengths=np.full(batch if closing else 0, k),
            first_chunks=np.arange(batch if closing else 0),
            text_positions=position,  # type: ignore[arg-type]  # on the device already
            summary_positions=summary_positions,  # type: ignore[arg-type]
        )

    @property
    def num_chunks(self) -> int:
        """The number of chunks that are summarised: B in a closing step."""
        return len(self.chunk_lengths)

    def inside_chunk(self) -> torch.Tensor:
        """The positions [B, k] of the text of the summarised chunk."""
        inside = torch.arange(self.chunk_size, device=self.position.device)
        return self.chunk[:, None] * self.chunk_size + inside

    def summary_index(self) -> torch.Tensor:
        """The numbers [B*m] of that chunk's summaries within their requests."""
        index = torch.arange(self.summary_tokens, device=self.position.device)
        return (self.chunk[:, None] * self.summary_tokens + index).flatten()

    def visible(self, cache: LayerCache) -> torch.Tensor:
        """bool [B, rows]: which of a layer's cached rows each request's token attends to. Equal layers share it."""
        key = cache.layer.mixer, cache.layer.window_chunks, cache.ring_rows, cache.rows
        return self.cached(key, lambda: self._visible(cache))

    def _visible(self, cache: LayerCache) -> torch.Tensor:
        layer, ring, position = cache.layer, cache.ring_rows, self.position[:, None]
        text_rows = cache.rows if ring is None else min(ring, cache.rows)
        slot = torch.arange(self._bound(text_rows), device=position.device)[None, :]
        if ring is None:
            return slot <= position
        held = position - (position - slot) % ring  # the position of the row that is in the slot now
        if layer.mixer == "S":
            return held >= 0
        first_near = position // self.chunk_size - layer.window_chunks  # the oldest chunk that is near
        near = held >= first_near.clamp(min=0) * self.chunk_size
        far_rows = cache.rows - ring if cache.keeps_summaries else 0
        if self._longest is not None:
            oldest = max(0, (self._longest - 1) // self.chunk_size - layer.window_chunks)
            far_rows = min(far_rows, oldest * self.summary_tokens)
        if far_rows <= 0:
            return near
        near = torch.nn.functional.pad(near, (0, ring - near.shape[1]))
        index = torch.arange(far_rows, device=position.device)[None, :]
        return torch.cat([near, index < first_near * self.summary_tokens], dim=1)

    def _bound(self, rows: int) -> int:
        return rows if self._longest is None else min(rows, self._longest)


class DecodingCache:
    """The cache of B requests to one model.

    Call `logits = prefill(prompts)`, then `logits = step(tokens)` repeatedly. Both return [B, vocab_size] for the next
    token; the next call overwrites it. `max_tokens` (prompt and continuation) reserves exactly this much memory, and no
    request may exceed it; without it buffers grow as needed. `graphs`: record steps as CUDA graphs; None: if possible.
    """

    def __init__(self, model: Decoder, num_requests: int, max_tokens: int | None = None, graphs: bool | None = None):
        if model.tp.shards_rows or (model.context is not None and model.context.size > 1):
            raise ModelConfigError("decoding runs without sequence and context parallelism")
        config, weight = model.config, model.embedding.weight
        model.backend.select_for(weight)
        kernels = model.backend.decode
        kv_heads = config.num_kv_heads // model.tp.size
        self._model, self._config, self._device = model, config, weight.device
        self._layers: list[LayerCache | DeltaCache] = [
            DeltaCache(num_requests, config.num_heads // model.tp.size, weight, config.head_dim)
            if layer.mixer == "G"
            else LayerCache(config, layer, weight.new_zeros(2, num_requests, kv_heads, 0, config.head_dim), kernels)
            for layer in config.layers
        ]
        for layer in self._layers:
            if max_tokens is not None:
                layer.reserve(max_tokens)
        self._max_tokens = max_tokens
        self._lengths = np.zeros(num_requests, np.int64)
        self._prefilled = np.zeros(num_requests, np.int64)
        self._position = torch.zeros(num_requests, dtype=torch.int64, device=self._device)
        if graphs is None:
            graphs = weight.is_cuda and model.tp.size == 1 and kernels is not None
        self._recorder = _Recorder(num_requests, self._device) if graphs else None

    @property
    def lengths(self) -> list[int]:
        """The number of tokens of each request in the cache."""
        return self._lengths.tolist()

    @property
    def allocated_bytes(self) -> int:
        """Bytes of keys, values and states on this tensor rank."""
        return sum(layer.allocated_bytes for layer in self._layers)

    @torch.no_grad()
    def prefill(self, prompts: Sequence[Sequence[int]]) -> torch.Tensor:
        """Run the prompts (token ids, none empty) through the training forward and keep the rows that later tokens
        attend to."""
        k, m = self._config.chunk_size, self._config.summary_tokens
        lengths = np.array([len(prompt) for prompt in prompts], np.int64)
        if len(prompts) != len(self._lengths) or not lengths.all():
            raise ModelConfigError(
                f"prefill got {len(prompts)} prompts of {lengths.tolist()} tokens; the cache is for "
                f"{len(self._lengths)} requests of at least one token each"
            )
        rows = -(-lengths // k) * k
        starts = np.cumsum(rows) - rows
        pack = build_layout(starts, lengths, int(rows.sum()), k, m)
        tokens = np.zeros(pack.num_text, np.int64)
        for start, prompt in zip(starts, prompts):
            tokens[start : start + len(prompt)] = prompt
        request = np.repeat(np.arange(len(lengths)), lengths)
        position = np.concatenate([np.arange(length) for length in lengths])
        closed = lengths // k * m  # summary rows of closed chunks; an open chunk is summarised when it closes
        summary_request = np.repeat(np.arange(len(lengths)), closed)
        summary_index = np.concatenate([np.arange(count) for count in closed])
        self._make_room(int(lengths.max()))

        ends = starts + lengths
        last = self._upload(ends - 1)

        def core(attention: Any, heads: Any, whole: SequenceLayout):
            cache = self._layers[attention.layer.index]
            if isinstance(cache, DeltaCache):
                return cache.prefill(attention, heads, whole, last), None
            # A ring keeps only the newest position of each slot.
            kept = position >= (lengths[request] - (cache.ring_rows or lengths.max()))
            row = self._upload((starts[request] + position)[kept])
            slots = self._upload(cache.text_slots(position[kept]))
            cache.write(self._upload(request[kept]), slots, heads.k[row], heads.v[row])
            if cache.keeps_summaries:
                far_keys = heads.far_keys
                assert far_keys is not None and heads.v_summary is not None
                row = self._upload(starts[summary_request] // k * m + summary_index)
                slots = self._upload(cache.summary_slots(summary_index))
                cache.write(self._upload(summary_request), slots, far_keys[row], heads.v_summary[row])
            if cache.open_chunk is not None:
                assert heads.unpooled is not None
                cache.open_chunk.prefill(heads.unpooled, ends, lengths, k)
            return Attention.core(attention, heads, whole)

        self._lengths, self._prefilled = lengths, lengths.copy()
        self._position.copy_(torch.from_numpy(lengths))
        return self._model.logits(self._upload(tokens), pack, core, rows=last)

    @torch.no_grad()
    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        """Append one token to each request, int64 [B] -> logits [B, vocab_size]."""
        at_a_start = (self._lengths % self._config.chunk_size == 0) & (self._lengths > self._prefilled)
        closing = self._config.has_summaries and bool(at_a_start.any())
        longest = int(self._lengths.max()) + 1
        self._make_room(longest)
        self._lengths += 1
        if self._recorder is None:
            return self._forward(tokens, closing, longest)
        return self._recorder.run(closing, tokens, lambda given: self._forward(given, closing, None))

    def _forward(self, tokens: torch.Tensor, closing: bool, longest: int | None) -> torch.Tensor:
        logits = self._model.logits(tokens, Step(self._config, self._position, closing, longest), self._mix_step)
        self._position += 1
        return logits

    def _mix_step(self, attention: Any, heads: Any, step: SequenceLayout):
        assert isinstance(step, Step)
        cache = self._layers[attention.layer.index]
        if isinstance(cache, DeltaCache):
            return cache.step(attention, heads), None
        updates = step.closing and heads.q_summary is not None
        # Both streams in one tensor, so that `join_streams` need not copy them.
        text, summary = heads.q.new_empty(step.num_text + updates * step.num_summary, *heads.q.shape[1:]).tensor_split(
            [step.num_text]
        )
        cache.pool(attention, heads, step)
        cache.step(heads, step, text, summary if updates else None)
        return text, summary if updates else None

    def _make_room(self, num_tokens: int) -> None:
        """Make room for requests of `num_tokens` tokens. New buffers invalidate recorded steps, which hold
        addresses."""
        if self._max_tokens is not None and num_tokens > self._max_tokens:  # layers may have no slots for summaries
            raise ModelConfigError(
                f"a request of {num_tokens} tokens is longer than max_tokens={self._max_tokens} of its DecodingCache; "
                "make the cache with a larger max_tokens, or without one to let it grow"
            )
        if any([layer.ensure(num_tokens) for layer in self._layers]) and self._recorder is not None:
            self._recorder.forget()

    def _upload(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).to(self._device)


def _summarise(q: torch.Tensor, k_text, v_text, k_own, v_own) -> torch.Tensor:
    """One whole chunk per request: q [B*m, H, d] over text [B, G, k, d] and its summaries [B*m, G, d] up to themselves.

    `blocked.summary_attention` for rows of a cache. Every chunk is full, so its mask is constant.
    """
    batch, kv_heads, size = k_text.shape[:3]
    m = len(q) // batch

    def own(x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(0, (batch, m)).transpose(1, 2)

    keys, values = torch.cat([k_text, own(k_own)], dim=2), torch.cat([v_text, own(v_own)], dim=2)
    queries = q.unflatten(0, (batch, m)).unflatten(2, (kv_heads, -1)).permute(0, 2, 3, 1, 4)  # [B, G, group, m, d]
    group = queries.shape[2]
    mask = None  # a single summary attends to all of its chunk
    if m > 1:
        mask = torch.ones(m, size + m, dtype=torch.bool, device=q.device).tril(size).repeat(group, 1)
    out = torch.nn.functional.scaled_dot_product_attention(queries.flatten(2, 3), keys, values, attn_mask=mask)
    return out.unflatten(2, (group, m)).permute(0, 3, 1, 2, 4).flatten(2, 3).flatten(0, 1)


class _Recorder:
    """Runs each shape of a step directly the first time, records it as a CUDA graph the second time, and then replays
    it.

    A recording holds addresses, so it is valid as long as the cache's buffers are not replaced.
    """

    def __init__(self, num_requests: int, device: torch.device):
        self._tokens = torch.zeros(num_requests, dtype=torch.int64, device=device)
        self._pool = torch.cuda.graph_pool_handle()
        self._recorded: dict[bool, tuple[torch.cuda.CUDAGraph, torch.Tensor] | None] = {}

    def forget(self) -> None:
        """Drop all recordings."""
        self._recorded.clear()

    def run(self, shape: bool, tokens: torch.Tensor, forward: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """`forward(tokens)`; `shape` tells the recordings apart."""
        if shape not in self._recorded:
            self._recorded[shape] = None
            return forward(tokens)
        recorded = self._recorded[shape]
        if recorded is None:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool):
                logits = forward(self._tokens)
            recorded = self._recorded[shape] = graph, logits
        self._tokens.copy_(tokens)
        recorded[0].replay()
        return recorded[1]
