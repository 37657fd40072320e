"""Decoding with a compressed cache.

Legend: B requests, k tokens a chunk, m summaries a chunk, W window chunks, G key/value heads, d head dimension.

A `K` layer keeps a ring of the last `(W+1)*k` text rows and, behind it in the same buffer, the summaries of closed
chunks: O(n*m/k) rows. `F` layers keep all text rows, `S` and `C` layers a ring, `G` layers a state of
their own kind (`ksa_model.delta`). A chunk that a decoded token closes is
summarised in the forward pass of the next token: its summary rows ride along as extra rows of that step, never in a
step of their own. Requests of a batch may have any lengths; none is padded to the longest.

The model code is the training code: prefill is the training forward over all prompts packed as documents, a decoding
step is the same forward over B rows, with the cache in the place of the attention kernels.

A step reads positions from the device and has one of two shapes, with and without summaries, which the host tells apart
from lengths it knows anyway. So nothing waits for the device, and on a GPU each shape is recorded once as a CUDA graph.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import numpy as np
import torch

from ksa_model import layout
from ksa_model.attention import Attention, Heads
from ksa_model.config import LayerConfig, ModelConfig, ModelConfigError
from ksa_model.delta import DeltaCache
from ksa_model.layout import SequenceLayout
from ksa_model.model import Decoder
from ksa_model.rows import triton_module

GROWTH = 32  # a full buffer grows by 1/32: a row is copied some 32 times in its life, and 3 % stand empty at most


def _kernels(x: torch.Tensor) -> ModuleType | None:
    """The kernels of decoding, where x is on a GPU and no gradients are asked for."""
    return None if not x.is_cuda or torch.is_grad_enabled() else triton_module("triton_decode")


class LayerCache:
    """Keys and values of one layer: text rows in `ring_rows` slots (None: all of them), then summary rows.

    One buffer [2, B, G, rows, d] holds both, so that a step's attention reads contiguous memory.
    """

    def __init__(self, config: ModelConfig, layer: LayerConfig, empty: torch.Tensor):
        """`empty` [2, B, G, 0, d] gives shape, dtype and device."""
        window = (layer.window_chunks + 1) * config.chunk_size
        self.layer, self._config = layer, config
        self.ring_rows = {"F": None, "S": config.window_tokens, "K": window, "C": window}[layer.mixer]
        self.keeps_summaries = layer.mixer == "K"
        self._buffer = empty
        self._arrivals = empty.new_zeros(empty.shape[1] * empty.shape[2], dtype=torch.int32)  # of attention's programs

    @property
    def rows(self) -> int:
        """Rows allocated for each request."""
        return self._buffer.shape[3]

    @property
    def allocated_bytes(self) -> int:
        return self._buffer.numel() * self._buffer.element_size()

    def reserve(self, num_tokens: int) -> None:
        """Make room for requests of up to `num_tokens` tokens, exactly. Where none of them can ever look past the text
        window, summaries are not kept."""
        self.keeps_summaries = self.layer.mixer == "K" and self.ring_rows is not None and num_tokens > self.ring_rows
        self._resize(self._rows_for(num_tokens))

    def ensure(self, num_tokens: int) -> bool:
        """Make room for `num_tokens` tokens and some more; returns whether the buffer is a new one."""
        need, have = self._rows_for(num_tokens), self.rows
        return self._resize(max(need, have + have // GROWTH)) if need > have else False

    def _rows_for(self, num_tokens: int) -> int:
        if self.keeps_summaries:  # the chunk that is open has its place too: a step may fill it before it closes
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
        """Put k, v [n, G, d] into `slots` [n] of `requests` [n]."""
        at = requests, slice(None), slots
        self._buffer[0][at], self._buffer[1][at] = k, v

    def _rule(self, kernels: ModuleType):
        """What `_visible` of a step computes, in the words of the kernels."""
        window = -1 if self.layer.mixer == "S" else self.layer.window_chunks
        own = self._config.summary_tokens if self.keeps_summaries else 0
        return kernels.Rule(self.ring_rows or 0, self._config.chunk_size, window, own)

    def text_slots(self, positions):
        """Slots of text `positions`, an array or a tensor of any shape."""
        return positions if self.ring_rows is None else positions % self.ring_rows

    def summary_slots(self, index):
        return (self.ring_rows or 0) + index

    def read(self, slots: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [B, G, n, d] at `slots` [B, n]; those beyond the buffer give any row."""
        at = slots.clamp(max=self.rows - 1)[None, :, None, :, None]
        rows = self._buffer.gather(3, at.expand(2, -1, self._buffer.shape[2], -1, self._buffer.shape[4]))
        return rows[0], rows[1]

    def step(self, heads: Heads, step: Step, text: torch.Tensor, summary: torch.Tensor | None) -> None:
        """Attention of a step's rows into `text` [B, H, d] and, where the layer updates them, `summary` [B*m, H, d].

        The text rows' keys and values are kept, and those of the summaries of a closing step where the layer keeps any.
        """
        q, k_own, v_own = heads.q_summary, heads.k_summary, heads.v_summary
        fast, joined = _kernels(heads.q), None
        if fast is not None and not fast.attends(heads.q, self._buffer):  # heads too wide for the device's tiles
            fast = None
        if q is not None and summary is not None:  # before this token may take a slot of the chunk
            own = None if fast is None else fast.Summaries(q, k_own, v_own, step.chunk, summary)
            if fast is not None and fast.joins(self._buffer, self._rule(fast), own):
                joined = own
            elif fast is None or not fast.summarise(self._buffer, self._rule(fast), own):
                summary.copy_(_summarise(q, *self.read(self.text_slots(step.inside_chunk())), k_own, v_own))
                self._keep_summaries(step, k_own, v_own)
        elif step.closing:
            self._keep_summaries(step, k_own, v_own)
        if fast is None:
            text.copy_(self._attend(heads, step))
        else:
            operands = heads.q, heads.k, heads.v, self._buffer, step.position, self._arrivals
            fast.attend(*operands, self._rule(fast), text, joined)

    def _keep_summaries(self, step: Step, k: torch.Tensor | None, v: torch.Tensor | None) -> None:
        """Keep the summary rows k, v [B*m, G, d] of a step, in layers that do."""
        if not self.keeps_summaries or k is None or v is None:
            return
        if (fast := _kernels(k)) is not None:
            fast.store_summaries(self._buffer, step.chunk, self._rule(fast), k, v)
        else:
            requests = torch.arange(step.num_text, device=k.device).repeat_interleave(step.summary_tokens)
            self.write(requests, self.summary_slots(step.summary_index()), k, v)

    def _attend(self, heads: Heads, step: Step) -> torch.Tensor:
        self.write(torch.arange(len(heads.k), device=heads.k.device), self.text_slots(step.position), heads.k, heads.v)
        visible = step.visible(self)
        keys, values = self._buffer[:, :, :, : visible.shape[1]]
        # Query heads that share a key/value head are rows of one product, so that no key is ever copied.
        found = torch.nn.functional.scaled_dot_product_attention(
            heads.q.unflatten(1, (keys.shape[1], -1)), keys, values, attn_mask=visible[:, None, None]
        )
        return found.flatten(1, 2)


class Step(SequenceLayout):
    """The rows of one decoding step: a text row for each request and, in a `closing` step, the summaries of the chunk
    that holds the token before, likewise for each. Positions live on the device.

    Only where that chunk has just closed are its summaries final; elsewhere they fill a place that nobody looks at and
    that is filled again when the chunk closes. So the shapes depend on B alone.

    Worked example, k=4, closing: request 0 is at position 8, so its second chunk has just closed; request 1 is at
    position 6. Rows: [text of 0 | text of 1 | summary of chunk 1 of 0, final | summary of chunk 1 of 1, provisional].
    """

    def __init__(self, config: ModelConfig, position: torch.Tensor, closing: bool, longest: int | None):
        """`position` int64 [B] of the tokens fed now. `longest`: an upper bound of their lengths where the host may use
        it to read less; None: every allocated row may be looked at, always the same number."""
        k, m, batch = config.chunk_size, config.summary_tokens, len(position)
        self.position, self.closing, self._longest = position, closing, longest
        summary_positions = position[:0]
        if closing:
            self.chunk = (position - 1) // k
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
        return len(self.chunk_lengths)

    def inside_chunk(self) -> torch.Tensor:
        """Positions [B, k] of the text of the chunk that is summarised."""
        inside = torch.arange(self.chunk_size, device=self.position.device)
        return self.chunk[:, None] * self.chunk_size + inside

    def summary_index(self) -> torch.Tensor:
        """Numbers [B*m] of that chunk's summaries within their requests."""
        index = torch.arange(self.summary_tokens, device=self.position.device)
        return (self.chunk[:, None] * self.summary_tokens + index).flatten()

    def visible(self, cache: LayerCache) -> torch.Tensor:
        """bool [B, rows]: which of a layer's cached rows each request's token sees. The same for layers alike."""
        key = cache.layer.mixer, cache.layer.window_chunks, cache.ring_rows, cache.rows
        return self.cached(key, lambda: self._visible(cache))

    def _visible(self, cache: LayerCache) -> torch.Tensor:
        layer, ring, position = cache.layer, cache.ring_rows, self.position[:, None]
        text_rows = cache.rows if ring is None else min(ring, cache.rows)
        slot = torch.arange(self._bound(text_rows), device=position.device)[None, :]
        if ring is None:
            return slot <= position
        held = position - (position - slot) % ring  # the position whose row stands in the slot now
        if layer.mixer == "S":
            return held >= 0
        first_near = position // self.chunk_size - layer.window_chunks  # the oldest chunk still seen as text
        near = held >= first_near.clamp(min=0) * self.chunk_size
        far_rows = cache.rows - ring if layer.mixer == "K" and cache.keeps_summaries else 0
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
    """Everything B requests have said so far, for one model.

    `logits = prefill(prompts)`, then `logits = step(tokens)` as often as wanted; both give [B, vocab_size] for the next
    token, which the next call overwrites. `max_tokens` (prompt and continuation) reserves memory exactly, and no
    request may grow beyond it; without it buffers grow as needed. `graphs`: record steps as CUDA graphs; None: where
    that is possible.
    """

    def __init__(self, model: Decoder, num_requests: int, max_tokens: int | None = None, graphs: bool | None = None):
        if model.tp.shards_rows or (model.context is not None and model.context.size > 1):
            raise ModelConfigError("decoding runs without sequence and context parallelism")
        config, weight = model.config, model.embedding.weight
        kv_heads = config.num_kv_heads // model.tp.size
        self._model, self._config, self._device = model, config, weight.device
        self._layers: list[LayerCache | DeltaCache] = [
            DeltaCache(num_requests, config.num_heads // model.tp.size, weight, config.head_dim)
            if layer.mixer == "G"
            else LayerCache(config, layer, weight.new_zeros(2, num_requests, kv_heads, 0, config.head_dim))
            for layer in config.layers
        ]
        for layer in self._layers:
            if max_tokens is not None:
                layer.reserve(max_tokens)
        self._max_tokens = max_tokens
        self._lengths = np.zeros(num_requests, np.int64)
        self._prefilled = np.zeros(num_requests, np.int64)
        self._position = torch.zeros(num_requests, dtype=torch.int64, device=self._device)
        can = weight.is_cuda and model.tp.size == 1 and triton_module("triton_decode") is not None
        self._recorder = _Recorder(num_requests, self._device) if (can if graphs is None else graphs) else None

    @property
    def lengths(self) -> list[int]:
        """Tokens of each request that the cache holds."""
        return self._lengths.tolist()

    @property
    def allocated_bytes(self) -> int:
        """Bytes of keys, values and states on this tensor rank."""
        return sum(layer.allocated_bytes for layer in self._layers)

    @torch.no_grad()
    def prefill(self, prompts: Sequence[Sequence[int]]) -> torch.Tensor:
        """Run the prompts (token ids, none empty) through the training forward and keep what later tokens can see."""
        k, m = self._config.chunk_size, self._config.summary_tokens
        lengths = np.array([len(prompt) for prompt in prompts], np.int64)
        if len(prompts) != len(self._lengths) or not lengths.all():
            raise ModelConfigError(
                f"prefill got {len(prompts)} prompts of {lengths.tolist()} tokens; the cache is for "
                f"{len(self._lengths)} requests of at least one token each"
            )
        rows = -(-lengths // k) * k
        starts = np.cumsum(rows) - rows
        pack = layout.build(starts, lengths, int(rows.sum()), k, m)
        tokens = np.zeros(pack.num_text, np.int64)
        for start, prompt in zip(starts, prompts):
            tokens[start : start + len(prompt)] = prompt
        request = np.repeat(np.arange(len(lengths)), lengths)
        position = np.concatenate([np.arange(length) for length in lengths])
        closed = lengths // k * m  # summary rows of closed chunks; that of an open chunk is made again when it closes
        summary_request = np.repeat(np.arange(len(lengths)), closed)
        summary_index = np.concatenate([np.arange(count) for count in closed])
        self._make_room(int(lengths.max()))

        last = self._upload(starts + lengths - 1)

        def mix(attention: Any, heads: Any, whole: SequenceLayout):
            cache = self._layers[attention.layer.index]
            if isinstance(cache, DeltaCache):
                return cache.prefill(attention, heads, whole, last), None
            # Of a ring only the newest position of each slot stays.
            kept = position >= (lengths[request] - (cache.ring_rows or lengths.max()))
            row = self._upload((starts[request] + position)[kept])
            slots = self._upload(cache.text_slots(position[kept]))
            cache.write(self._upload(request[kept]), slots, heads.k[row], heads.v[row])
            if cache.keeps_summaries:
                assert heads.k_summary is not None and heads.v_summary is not None
                row = self._upload(starts[summary_request] // k * m + summary_index)
                slots = self._upload(cache.summary_slots(summary_index))
                cache.write(self._upload(summary_request), slots, heads.k_summary[row], heads.v_summary[row])
            return Attention.mix(attention, heads, whole)

        self._lengths, self._prefilled = lengths, lengths.copy()
        self._position.copy_(torch.from_numpy(lengths))
        return self._model.logits(self._upload(tokens), pack, mix, rows=last)

    @torch.no_grad()
    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        """Feed one token a request, int64 [B] -> [B, vocab_size]."""
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
        # Both streams in one tensor, which `join_streams` then need not make.
        text, summary = heads.q.new_empty(step.num_text + updates * step.num_summary, *heads.q.shape[1:]).tensor_split(
            [step.num_text]
        )
        cache.step(heads, step, text, summary if updates else None)
        return text, summary if updates else None

    def _make_room(self, num_tokens: int) -> None:
        """Buffers for requests of `num_tokens` tokens; recordings of a step hold addresses, so new ones end them."""
        if self._max_tokens is not None and num_tokens > self._max_tokens:  # layers may have no place for summaries
            raise ModelConfigError(
                f"a request of {num_tokens} tokens is longer than max_tokens={self._max_tokens} of its DecodingCache; "
                "make the cache with a larger max_tokens, or without one to let it grow"
            )
        if any([layer.ensure(num_tokens) for layer in self._layers]) and self._recorder is not None:
            self._recorder.forget()

    def _upload(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).to(self._device)


def _summarise(q: torch.Tensor, k_text, v_text, k_own, v_own) -> torch.Tensor:
    """One whole chunk a request: q [B*m, H, d] over text [B, G, k, d] and summaries [B*m, G, d] up to itself.

    `kernels.summary_attention` for rows that stand in a cache; every chunk is full, so that its mask is a constant.
    """
    batch, kv_heads, size = k_text.shape[:3]
    m = len(q) // batch

    def own(x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(0, (batch, m)).transpose(1, 2)

    keys, values = torch.cat([k_text, own(k_own)], dim=2), torch.cat([v_text, own(v_own)], dim=2)
    queries = q.unflatten(0, (batch, m)).unflatten(2, (kv_heads, -1)).permute(0, 2, 3, 1, 4)  # [B, G, group, m, d]
    group = queries.shape[2]
    seen = None  # a single summary sees all of it
    if m > 1:
        seen = torch.ones(m, size + m, dtype=torch.bool, device=q.device).tril(size).repeat(group, 1)
    out = torch.nn.functional.scaled_dot_product_attention(queries.flatten(2, 3), keys, values, attn_mask=seen)
    return out.unflatten(2, (group, m)).permute(0, 3, 1, 2, 4).flatten(2, 3).flatten(0, 1)


class _Recorder:
    """Runs a step of each shape as it is the first time, records it the second time, and replays it from then on.

    A recording holds addresses: it is good as long as the cache's buffers stay where they are.
    """

    def __init__(self, num_requests: int, device: torch.device):
        self._tokens = torch.zeros(num_requests, dtype=torch.int64, device=device)
        self._pool = torch.cuda.graph_pool_handle()
        self._recorded: dict[bool, tuple[torch.cuda.CUDAGraph, torch.Tensor] | None] = {}

    def forget(self) -> None:
        self._recorded.clear()

    def run(self, shape: bool, tokens: torch.Tensor, forward: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
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


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. `temperature=0` takes the likeliest; `top_k=0` and `top_p=1` cut nothing off."""

    max_tokens: int = 64
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    stop_tokens: tuple[int, ...] = field(default=())

    def __post_init__(self) -> None:
        if self.max_tokens < 1 or not 0 <= self.temperature < math.inf or self.top_k < 0 or not 0 < self.top_p <= 1:
            raise ModelConfigError(
                f"max_tokens={self.max_tokens} must be at least 1, temperature={self.temperature} finite and, like "
                f"top_k={self.top_k}, not negative, top_p={self.top_p} above 0 and at most 1"
            )


def choose(logits: torch.Tensor, sampling: Sampling, random: torch.Generator) -> torch.Tensor:
    """logits [B, V] -> int64 [B]."""
    if sampling.temperature == 0:
        return logits.argmax(-1)
    scores, order = logits.float().sort(dim=-1, descending=True)
    # The likeliest is 0 at any temperature; one below what fp32 can divide by chooses as the least that it can.
    scores = (scores - scores[:, :1]) / max(sampling.temperature, 1e-30)
    if sampling.top_k:
        scores[:, sampling.top_k :] = float("-inf")
    weights = torch.softmax(scores, dim=-1)
    # A token stays when those before it do not reach top_p yet, so the first always does.
    weights[weights.cumsum(-1) - weights >= sampling.top_p] = 0.0
    return order.gather(1, torch.multinomial(weights, 1, generator=random))[:, 0]


def generate(
    model: Decoder,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    on_tokens: Callable[[list[int | None]], None] | None = None,
) -> tuple[list[list[int]], DecodingCache]:
    """Continue every prompt; returns the new tokens of each (a stop token ends it and is left out) and the cache.

    `on_tokens` is called after every step with each request's new token, None for a finished one: text as it comes.
    """
    longest = max(len(prompt) for prompt in prompts)
    cache = DecodingCache(model, len(prompts), max_tokens=longest + sampling.max_tokens)
    logits = cache.prefill(prompts)
    random = torch.Generator(device=logits.device).manual_seed(sampling.seed)
    said: list[list[int]] = [[] for _ in prompts]
    running = [True] * len(prompts)
    for step in range(sampling.max_tokens):
        tokens = choose(logits, sampling, random)
        new: list[int | None] = []
        for i, token in enumerate(tokens.tolist()):
            running[i] = running[i] and token not in sampling.stop_tokens
            new.append(token if running[i] else None)
            if running[i]:
                said[i].append(token)
        if on_tokens is not None:
            on_tokens(new)
        if not any(running) or step + 1 == sampling.max_tokens:
            break
        logits = cache.step(tokens)
    return said, cache
