"""Decoding with a compressed cache.

Legend: B requests, k tokens a chunk, m summaries a chunk, W window chunks, G key/value heads, d head dimension.

A `K` layer keeps a ring of the last `(W+1)*k` text rows and, behind it in the same buffer, the summaries of closed
chunks: O(n*m/k) rows. `F` layers keep all text rows, `S` and `C` layers a ring. A chunk that a decoded token closes is
summarised in the forward pass of the next token: its summary rows ride along as extra rows of that step, never in a
step of their own. Requests of a batch may have any lengths; none is padded to the longest.

The model code is the training code: prefill is the training forward over all prompts packed as documents, a decoding
step is the same forward over B rows, with the cache in the place of the attention kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from ksa_model import kernels, layout
from ksa_model.attention import Attention, Heads
from ksa_model.config import LayerConfig, ModelConfig, ModelConfigError
from ksa_model.layout import SequenceLayout
from ksa_model.model import Decoder

GROWTH = 32  # a full buffer grows by 1/32: a row is copied some 32 times in its life, and 3 % stand empty at most


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

    @property
    def allocated_bytes(self) -> int:
        return self._buffer.numel() * self._buffer.element_size()

    def reserve(self, num_tokens: int) -> None:
        """Make room for requests of up to `num_tokens` tokens, exactly. Where none of them can ever look past the text
        window, summaries are not kept."""
        rows = num_tokens if self.ring_rows is None else min(num_tokens, self.ring_rows)
        self.keeps_summaries = self.layer.mixer == "K" and num_tokens > rows
        if self.keeps_summaries:
            rows += num_tokens // self._config.chunk_size * self._config.summary_tokens
        self._resize(rows)

    def _resize(self, rows: int) -> None:
        have = self._buffer.shape[3]
        if rows > have:
            bigger = self._buffer.new_zeros(*self._buffer.shape[:3], rows, self._buffer.shape[4])
            bigger[:, :, :, :have] = self._buffer
            self._buffer = bigger

    def write(self, requests: np.ndarray, slots: np.ndarray, k: torch.Tensor, v: torch.Tensor) -> None:
        """Put k, v [n, G, d] into `slots` [n] of `requests` [n]."""
        if not len(slots):
            return
        have, need = self._buffer.shape[3], int(slots.max()) + 1
        if need > have:
            self._resize(max(need, have + have // GROWTH))
        at = torch.from_numpy(requests).to(k.device), slice(None), torch.from_numpy(slots).to(k.device)
        self._buffer[0][at], self._buffer[1][at] = k, v

    def text_slots(self, positions: np.ndarray) -> np.ndarray:
        return positions if self.ring_rows is None else positions % self.ring_rows

    def summary_slots(self, index: np.ndarray) -> np.ndarray:
        return (self.ring_rows or 0) + index

    def read(self, requests: np.ndarray, slots: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [n, G, d] at `slots` [n] of `requests` [n]."""
        device = self._buffer.device
        at = torch.from_numpy(requests).to(device), slice(None), torch.from_numpy(slots).to(device)
        return self._buffer[0][at], self._buffer[1][at]

    def attend(self, q: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
        """q [B, H, d] over the rows that `visible` [B, rows] names -> [B, H, d]."""
        k, v = self._buffer[:, :, :, : visible.shape[1]]
        grouped = q.shape[1] != k.shape[1]
        out = torch.nn.functional.scaled_dot_product_attention(
            q[:, :, None], k, v, attn_mask=visible[:, None, None], enable_gqa=grouped
        )
        return out[:, :, 0]


class Step(SequenceLayout):
    """The rows of one decoding step: a text row for each request, and the summaries of chunks that closed before it.

    Worked example, k=4: request 0 is at position 8, so its second chunk has just closed and rides along; request 1 is
    at position 6. Rows: [text of 0 | text of 1 | summary of chunk 1 of request 0].
    """

    def __init__(self, config: ModelConfig, positions: np.ndarray, prefilled: np.ndarray):
        """`positions` [B] of the tokens fed now; chunks below `prefilled` [B] tokens are summarised already."""
        k, m = config.chunk_size, config.summary_tokens
        closes = (positions % k == 0) & (positions > prefilled) & config.has_summaries
        self.positions = positions
        self.closing = np.flatnonzero(closes)  # requests whose last chunk has closed
        self.closed_chunks = positions[self.closing] // k - 1
        ends = [(a + 1) * k // m - 1 for a in range(m)]
        summary_positions = (self.closed_chunks[:, None] * k + np.maximum(ends, 0)[None, :]).reshape(-1)
        super().__init__(
            num_text=len(positions),
            chunk_size=k,
            summary_tokens=m,
            chunk_lengths=np.full(len(self.closing), k),
            first_chunks=np.arange(len(self.closing)),
            text_positions=positions,
            summary_positions=summary_positions,
        )

    @property
    def num_chunks(self) -> int:
        return len(self.closing)

    def visible(self, cache: LayerCache, device: torch.device) -> torch.Tensor:
        """bool [B, rows]: which of a layer's cached rows each request's token sees; the same for layers alike."""
        layer, ring = cache.layer, cache.ring_rows
        return self.cached((layer.mixer, layer.window_chunks, ring), lambda: self._visible(layer, ring, device))

    def _visible(self, layer: LayerConfig, ring: int | None, device: torch.device) -> torch.Tensor:
        position = torch.from_numpy(self.positions).to(device)[:, None]
        if ring is None:
            return torch.arange(int(self.positions.max()) + 1, device=device)[None, :] <= position
        slot = torch.arange(min(ring, int(self.positions.max()) + 1), device=device)[None, :]
        held = position - (position - slot) % ring  # the position whose row stands in the slot now
        if layer.mixer == "S":
            return held >= 0
        first_near = self.positions // self.chunk_size - layer.window_chunks  # the oldest chunk still seen as text
        oldest = torch.from_numpy(np.maximum(first_near, 0)).to(device)[:, None] * self.chunk_size
        near = held >= oldest
        summaries = np.maximum(first_near, 0) * self.summary_tokens
        if layer.mixer == "C" or not summaries.max():
            return near
        near = torch.nn.functional.pad(near, (0, ring - near.shape[1]))
        index = torch.arange(int(summaries.max()), device=device)[None, :]
        return torch.cat([near, index < torch.from_numpy(summaries).to(device)[:, None]], dim=1)


class DecodingCache:
    """Everything B requests have said so far, for one model.

    `logits = prefill(prompts)`, then `logits = step(tokens)` as often as wanted; both give [B, vocab_size] for the next
    token. `max_tokens` (prompt and continuation) reserves memory exactly; without it buffers grow as needed.
    """

    def __init__(self, model: Decoder, num_requests: int, max_tokens: int | None = None):
        if model.tp.shards_rows or (model.context is not None and model.context.size > 1):
            raise ModelConfigError("decoding runs without sequence and context parallelism")
        config, weight = model.config, model.embedding.weight
        kv_heads = config.num_kv_heads // model.tp.size
        self._model, self._config, self._device = model, config, weight.device
        self._layers = [
            LayerCache(config, layer, weight.new_zeros(2, num_requests, kv_heads, 0, config.head_dim))
            for layer in config.layers
        ]
        for layer in self._layers:
            if max_tokens is not None:
                layer.reserve(max_tokens)
        self._lengths = np.zeros(num_requests, np.int64)
        self._prefilled = np.zeros(num_requests, np.int64)

    @property
    def lengths(self) -> list[int]:
        """Tokens of each request that the cache holds."""
        return self._lengths.tolist()

    @property
    def allocated_bytes(self) -> int:
        """Bytes of keys and values on this tensor rank."""
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

        def mix(attention: Attention, heads: Heads, whole: SequenceLayout):
            cache = self._layers[attention.layer.index]
            # Of a ring only the newest position of each slot stays.
            kept = position >= (lengths[request] - (cache.ring_rows or lengths.max()))
            row = torch.from_numpy((starts[request] + position)[kept]).to(self._device)
            cache.write(request[kept], cache.text_slots(position[kept]), heads.k[row], heads.v[row])
            if cache.keeps_summaries:
                assert heads.k_summary is not None and heads.v_summary is not None
                row = torch.from_numpy(starts[summary_request] // k * m + summary_index).to(self._device)
                slots = cache.summary_slots(summary_index)
                cache.write(summary_request, slots, heads.k_summary[row], heads.v_summary[row])
            return Attention.mix(attention, heads, whole)

        self._lengths, self._prefilled = lengths, lengths.copy()
        last = torch.from_numpy(starts + lengths - 1).to(self._device)
        return self._model.logits(torch.from_numpy(tokens).to(self._device), pack, mix, rows=last)

    @torch.no_grad()
    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        """Feed one token a request, int64 [B] -> [B, vocab_size]."""
        step = Step(self._config, self._lengths.copy(), self._prefilled)
        logits = self._model.logits(tokens, step, self._mix_step)
        self._lengths += 1
        return logits

    def _mix_step(self, attention: Attention, heads: Heads, step: SequenceLayout):
        assert isinstance(step, Step)
        cache, k, m = self._layers[attention.layer.index], step.chunk_size, step.summary_tokens
        out_summary = heads.q_summary
        if len(step.closing):
            if heads.q_summary is not None:  # before this token may take a slot of the chunk
                inside = step.closed_chunks[:, None] * k + np.arange(k)[None, :]
                text = cache.read(np.repeat(step.closing, k), cache.text_slots(inside.reshape(-1)))
                out_summary = kernels.summary_attention(heads.q_summary, *text, heads.k_summary, heads.v_summary, step)
            if cache.keeps_summaries:
                assert heads.k_summary is not None and heads.v_summary is not None
                index = (step.closed_chunks[:, None] * m + np.arange(m)[None, :]).reshape(-1)
                cache.write(np.repeat(step.closing, m), cache.summary_slots(index), heads.k_summary, heads.v_summary)
        cache.write(np.arange(step.num_text), cache.text_slots(step.positions), heads.k, heads.v)
        return cache.attend(heads.q, step.visible(cache, self._device)), out_summary


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
        if self.max_tokens < 1 or self.temperature < 0 or self.top_k < 0 or not 0 < self.top_p <= 1:
            raise ModelConfigError(
                f"max_tokens={self.max_tokens} must be at least 1, temperature={self.temperature} and "
                f"top_k={self.top_k} not negative, top_p={self.top_p} above 0 and at most 1"
            )


def choose(logits: torch.Tensor, sampling: Sampling, random: torch.Generator) -> torch.Tensor:
    """logits [B, V] -> int64 [B]."""
    if sampling.temperature == 0:
        return logits.argmax(-1)
    scores, order = (logits.float() / sampling.temperature).sort(dim=-1, descending=True)
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
