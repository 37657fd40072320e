"""Kwai Summary Attention (KSA, arXiv 2604.24432) for transformers: configuration, model and decoding cache.

An exported model contains this file and loads it with `trust_remote_code=True`. It needs only torch and transformers.

Legend: B requests, T text rows (a multiple of k), k tokens per chunk, C = T/k chunks, m summaries per chunk, W window
chunks, H query heads, G key/value heads, d head dimension, h hidden size.

KSA splits text into chunks of k tokens and adds m learned summary tokens to each. A summary attends to its own chunk
only. A text token attends, under one softmax, to
- its own chunk and the W chunks before it token by token, and to older chunks through their summaries (layers `K`),
- all earlier text (`F`),
- the last `window_tokens` tokens (`S`),
- its own chunk and the W chunks before it, and nothing older (`C`).

Summaries are internal: input ids, logits and positions are those of the text. The requests of a batch may be padded on
either side, as `attention_mask` says; chunks are counted from the first real token.
"""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional as F
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

# The name of the cache in the model's output, which differs between releases of transformers.
CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"
ROWS_PER_BLOCK = 512  # query rows per attention call, which bounds the memory of the scores


class KsaConfig(PretrainedConfig):
    """Shape of the decoder.

    `layer_pattern` has one letter per layer (see above) and is repeated to `num_hidden_layers`. `window_chunks` (W) is
    one number, or a list with one for each letter. `rotate_far`: RoPE on the summaries that text attends to, and on the
    queries that read them (a summary's attention to its chunk always has it). `rotate_full_layers`: RoPE in `F` layers.
    `mix_coeff`: weight of the summaries' own projections, below 1 in the middle of annealing; text's have the rest.
    """

    model_type = "ksa"

    def __init__(
        self, vocab_size=32000, hidden_size=2048, intermediate_size=6144, num_hidden_layers=24, num_attention_heads=16,
        num_key_value_heads=16, head_dim=128, rms_norm_eps=1e-6, rope_theta=10000.0, rope_parameters=None,
        max_position_embeddings=131072, layer_pattern="KKKF", chunk_size=8, summary_tokens=1, window_chunks=128,
        window_tokens=1024, independent_qkv=True, full_layers_update_summaries=True, qk_norm=True,
        initializer_range=0.02, use_cache=True, tie_word_embeddings=False, rotate_far=True, rotate_full_layers=True,
        mix_coeff=1.0, **kwargs,
    ):  # fmt: skip
        self.vocab_size, self.max_position_embeddings = vocab_size, max_position_embeddings
        self.hidden_size, self.intermediate_size = hidden_size, intermediate_size
        self.num_hidden_layers, self.head_dim = num_hidden_layers, head_dim
        self.num_attention_heads, self.num_key_value_heads = num_attention_heads, num_key_value_heads
        self.rms_norm_eps, self.initializer_range = rms_norm_eps, initializer_range
        self.rope_theta, self.rope_parameters = rope_theta, rope_parameters
        self.layer_pattern, self.chunk_size, self.summary_tokens = layer_pattern, chunk_size, summary_tokens
        self.window_chunks, self.window_tokens = window_chunks, window_tokens
        self.independent_qkv, self.qk_norm, self.mix_coeff = independent_qkv, qk_norm, mix_coeff
        self.full_layers_update_summaries, self.use_cache = full_layers_update_summaries, use_cache
        self.rotate_far, self.rotate_full_layers = rotate_far, rotate_full_layers
        super().__init__(tie_word_embeddings=tie_word_embeddings, **kwargs)

    @property
    def letters(self):
        """The letter of every layer."""
        return self.layer_pattern * (self.num_hidden_layers // len(self.layer_pattern))

    @property
    def windows(self):
        """The window of every layer, in chunks."""
        window = self.window_chunks
        per_letter = [window] * len(self.layer_pattern) if isinstance(window, int) else list(window)
        return per_letter * (self.num_hidden_layers // len(self.layer_pattern))


class KsaCache:
    """Keys and values of B requests: for each layer its text rows and the summaries of its complete chunks.

    Layers with a window keep their text rows in a ring buffer, `F` layers keep all of them. `lengths` [B] counts real
    tokens; `columns` counts input columns, including padding.
    """

    is_compileable = False

    def __init__(self):
        self.lengths: torch.Tensor | None = None
        self.columns = 0
        self.text: dict[int, torch.Tensor] = {}  # layer -> [2, B, G, rows, d]
        self.summaries: dict[int, torch.Tensor] = {}

    def get_seq_length(self, layer_idx=0):
        return self.columns

    def reorder_cache(self, beam_idx):
        """Make request `beam_idx[i]` the new request i."""
        self.lengths = self.lengths[beam_idx]
        for store in (self.text, self.summaries):
            for layer in store:
                store[layer] = store[layer][:, beam_idx.to(store[layer].device)]

    batch_select_indices = reorder_cache

    def batch_repeat_interleave(self, repeats):
        self.reorder_cache(torch.arange(len(self.lengths), device=self.lengths.device).repeat_interleave(repeats))

    def bytes(self):
        """Bytes of all keys and values."""
        return sum(t.numel() * t.element_size() for store in (self.text, self.summaries) for t in store.values())


def _frequencies(config, device):
    """RoPE: radians per position of each feature pair, fp64 [d/2], and the scale of cos and sin."""
    d, rope = config.head_dim, config.rope_parameters or {}
    kind, base, factor = rope.get("rope_type", "default"), rope.get("rope_theta", config.rope_theta), rope.get("factor")
    plain = base ** (-torch.arange(0, d, 2, device=device, dtype=torch.float64) / d)
    if kind in ("default", "linear"):
        return plain / (factor if kind == "linear" else 1), 1.0
    turns = rope["original_max_position_embeddings"] / (2 * math.pi)
    if kind == "llama3":
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        share, attention = ((turns * plain - low) / (high - low)).clamp(0, 1), 1.0
    elif kind == "yarn":
        low, high = (d * math.log(turns / rope[key]) / (2 * math.log(base)) for key in ("beta_fast", "beta_slow"))
        low, high = max(math.floor(low), 0), min(math.ceil(high), d - 1)
        index = torch.arange(d // 2, device=device, dtype=torch.float64)
        share, attention = 1 - ((index - low) / ((high - low) or 0.001)).clamp(0, 1), rope["attention_factor"]
    else:
        raise ValueError(f"rope_type={kind!r} is not one of default, linear, yarn, llama3")
    return plain * (share + (1 - share) / factor), attention


def _rotary(positions, config):
    """cos and sin, fp32 [..., 1, d/2]. Angles are in fp64: at position 10^6 an fp32 angle is off by 0.06 radians."""
    inverse, factor = _frequencies(config, positions.device)
    angles = positions[..., None, None] * inverse
    return (angles.cos() * factor).float(), (angles.sin() * factor).float()


def _rotate(x, table):
    """Apply RoPE to x [..., heads, d] with a table of `_rotary`."""
    cos, sin = table
    left, right = x.float().chunk(2, dim=-1)
    return torch.cat([left * cos - right * sin, right * cos + left * sin], dim=-1).to(x.dtype)


def _write(buffer, slots, k, v):
    """Write k, v [B, G, n, d] to `slots` [B, n] of buffer [2, B, G, rows, d], which grows if needed; return it."""
    missing = int(slots.max()) + 1 - buffer.shape[3]
    if missing > 0:
        room = buffer.new_zeros(*buffer.shape[:3], max(missing, buffer.shape[3] // 8), buffer.shape[4])
        buffer = torch.cat([buffer, room], dim=3)
    index = slots[:, None, :, None].expand_as(k)
    buffer[0].scatter_(2, index, k.to(buffer.dtype))
    buffer[1].scatter_(2, index, v.to(buffer.dtype))
    return buffer


class KsaRMSNorm(nn.Module):
    """RMSNorm in fp32."""

    def __init__(self, size, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x):
        return F.rms_norm(x.float(), self.weight.shape, self.weight.float(), self.eps).to(x.dtype)


class KsaMLP(nn.Module):
    """SwiGLU."""

    def __init__(self, config):
        super().__init__()
        h, f = config.hidden_size, config.intermediate_size
        self.gate_proj, self.up_proj = nn.Linear(h, f, bias=False), nn.Linear(h, f, bias=False)
        self.down_proj = nn.Linear(f, h, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class KsaAttention(nn.Module):
    """Attention of one layer for text and summaries: `prompt` takes whole prompts, `step` one new token each."""

    def __init__(self, config, index):
        super().__init__()
        self.config, self.index = config, index
        self.mixer, self.window = config.letters[index], config.windows[index]
        last = config.letters.rfind("K")
        self.carries = index <= last  # summaries enter this layer: a `K` layer from here on reads them
        updating = self.mixer == "K" or (self.mixer == "F" and config.full_layers_update_summaries)
        self.updates = index < last and updating  # this layer attends for summaries and applies its MLP to them
        self.projects = self.mixer == "K" or self.updates  # it computes their keys and values
        self.far_unrotated = self.mixer == "K" and not config.rotate_far  # far attention has queries of its own
        self.unrotated = self.mixer == "F" and not config.rotate_full_layers
        self.scale = config.head_dim**-0.5 if self.far_unrotated else None  # of scores; None: by the features of q
        ring = (self.window + 1) * config.chunk_size
        self.ring = {"F": None, "S": config.window_tokens, "K": ring, "C": ring}[self.mixer]  # cached text rows
        h, d = config.hidden_size, config.head_dim
        q, kv = config.num_attention_heads * d, config.num_key_value_heads * d
        self.q_proj, self.k_proj = nn.Linear(h, q, bias=False), nn.Linear(h, kv, bias=False)
        self.v_proj, self.o_proj = nn.Linear(h, kv, bias=False), nn.Linear(q, h, bias=False)
        if config.independent_qkv and self.updates:
            self.q_proj_summary = nn.Linear(h, q, bias=False)
        if config.independent_qkv and self.projects:
            self.k_proj_summary = nn.Linear(h, kv, bias=False)
            self.v_proj_summary = nn.Linear(h, kv, bias=False)
        if config.qk_norm:
            self.q_norm, self.k_norm = KsaRMSNorm(d, config.rms_norm_eps), KsaRMSNorm(d, config.rms_norm_eps)

    def heads(self, x, name, *tables):
        """Projection `name` of x [B, n, h] -> [B, heads, n, d], normed and rotated if there is a RoPE table; with two,
        [B, heads, n, 2d], rotated by each."""
        base = name.removesuffix("_summary")  # used where summaries have no projection of their own
        norm = getattr(self, f"{base[0]}_norm") if self.config.qk_norm and tables else nn.Identity()
        names = [name, base] if name != base and hasattr(self, name) and self.config.mix_coeff != 1 else [name]
        weights = [getattr(self, n if hasattr(self, n) else base) for n in names]
        x, *text = (norm(weight(x).unflatten(-1, (-1, self.config.head_dim))) for weight in weights)
        x = torch.lerp(*text, x, self.config.mix_coeff) if text else x  # between norm and rotation
        x, *second = [_rotate(x, table) for table in tables] or [x]
        return (torch.cat([x, *second], dim=-1) if second else x).transpose(1, 2)

    def project(self, x, s, tables):
        """x, s -> (q, k, v) of text; (k, v) of summaries for text, or None; their own (q, k, v), or None.

        If far attention has no RoPE, a query of text is [rotated | unrotated], 2d features: the first half meets near
        keys, the second far ones, which are unrotated. A summary's attention to its own chunk is rotated nonetheless.
        """
        text, summary, zero = tables[2:] * 3 if self.unrotated else tables
        far = (zero,) if self.far_unrotated else ()
        rows = self.heads(x, "q_proj", text, *far), self.heads(x, "k_proj", text), self.heads(x, "v_proj")
        if s is None or not self.projects:
            return rows, None, None
        k, v = self.heads(s, "k_proj_summary", summary, *far), self.heads(s, "v_proj_summary")
        k, k_far = k.chunk(2, dim=-1) if far else (k, k)
        return rows, (k_far, v), (self.heads(s, "q_proj_summary", summary), k, v) if self.updates else None

    def join(self, k, k_far):
        """Near and far keys under one softmax: [..., keys, d], or [..., keys, 2d] for the two halves of queries."""
        if self.far_unrotated:
            k, k_far = F.pad(k, (0, k.shape[-1])), F.pad(k_far, (k.shape[-1], 0))
        return torch.cat([k, k_far], dim=-2)

    def out(self, x):
        """[B, H, n, d] -> [B, n, h]"""
        return self.o_proj(x.transpose(1, 2).flatten(2))

    # -- a whole prompt -----------------------------------------------------------------------------------------------

    def prompt(self, x, s, tables, cache, lengths):
        """x [B, T, h], s [B, C*m, h] or None -> outputs of text, and of summaries or None. Fills `cache` if given."""
        (q, k, v), pair, own = self.project(x, s, tables)
        if cache is not None:
            self._fill(cache, k, v, pair, lengths)
        out = self.out(self._text_attention(q, k, v, pair))
        return out, None if own is None else self.out(self._summary_attention(k, v, own))

    def _text_attention(self, q, k, v, pair):
        """[B, H, T, d] in blocks of query rows; padding rows give values that no one reads."""
        if self.mixer == "F":
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        size, m, outs = self.config.chunk_size, self.config.summary_tokens, []
        block = -(-ROWS_PER_BLOCK // size) * size
        for start in range(0, q.shape[2], block):
            end = min(start + block, q.shape[2])
            row = torch.arange(start, end, device=q.device)[:, None]
            back = self.config.window_tokens - 1 if self.mixer == "S" else self.window * size
            first = max(0, start - back)
            key = torch.arange(first, end, device=q.device)[None, :]
            visible = key <= row
            if self.mixer == "S":
                visible &= row - key < self.config.window_tokens
            else:
                visible &= key // size >= row // size - self.window
            keys, values = (x[:, :, first:end].contiguous() for x in (k, v))
            if self.mixer == "K":
                far = max(0, (end - 1) // size - self.window) * m  # summaries to attend to
                chunk = torch.arange(far, device=q.device)[None, :] // m
                visible = torch.cat([visible, chunk < row // size - self.window], dim=1)
                keys, values = self.join(keys, pair[0][:, :, :far]), torch.cat([values, pair[1][:, :, :far]], dim=2)
            rule = dict(attn_mask=visible, enable_gqa=True, scale=self.scale)
            outs.append(F.scaled_dot_product_attention(q[:, :, start:end], keys, values, **rule))
        return torch.cat(outs, dim=2)

    def _summary_attention(self, k, v, own):
        """Attention of summaries, whose (q, k, v) are `own`, to text k, v of their chunk and to its summaries up to
        themselves: [B, H, C*m, d]."""
        size, m = self.config.chunk_size, self.config.summary_tokens
        k, v = (x.unflatten(2, (-1, size)) for x in (k, v))  # [B, G, chunks, rows, d]
        q, k_own, v_own = (x.unflatten(2, (-1, m)) for x in own)
        group = q.shape[1] // k.shape[1]
        keys, values = (torch.cat(both, dim=3).repeat_interleave(group, 1) for both in ((k, k_own), (v, v_own)))
        visible = torch.ones(m, size + m, dtype=torch.bool, device=q.device).tril(size)
        return F.scaled_dot_product_attention(q, keys, values, attn_mask=visible).flatten(2, 3)

    def _fill(self, cache, k, v, pair, lengths):
        """Store what later tokens can attend to: in a ring, slot i has the newest position p with p % ring == i."""
        if self.ring is None:
            cache.text[self.index] = torch.stack([k, v])
        else:
            slot = torch.arange(self.ring, device=k.device)[None, :]
            last = lengths[:, None] - 1
            position = (last - (last - slot) % self.ring).clamp(min=0)
            index = position[:, None, :, None].expand(-1, k.shape[1], -1, k.shape[3])
            cache.text[self.index] = torch.stack([k.gather(2, index), v.gather(2, index)])
        if self.mixer == "K":
            cache.summaries[self.index] = torch.stack(pair)

    # -- one new token per request ------------------------------------------------------------------------------------

    def step(self, x, s, tables, cache, position):
        """x [B, 1, h] at `position` [B] -> outputs of text, and of summaries or None.

        s [B, m, h] are the summaries of the chunk of the previous token, or None. They are valid for the requests where
        that token completed its chunk. The others write them to slots that are overwritten before they are visible.
        """
        size, m = self.config.chunk_size, self.config.summary_tokens
        (q, k, v), pair, own = self.project(x, s, tables)
        chunk, out_summary = (position - 1) // size, None
        if own is not None:  # now, because this token may overwrite a row of the chunk
            slots = chunk[:, None] * size + torch.arange(size, device=x.device)
            slots = slots if self.ring is None else slots % self.ring
            text = cache.text[self.index]
            index = slots.clamp(max=text.shape[3] - 1)[None, :, None, :, None]
            k_own, v_own = text.gather(3, index.expand(2, -1, text.shape[2], -1, text.shape[4]))
            out_summary = self.out(self._summary_attention(k_own, v_own, own))
        if self.mixer == "K" and pair is not None:
            slots = chunk[:, None] * m + torch.arange(m, device=x.device)
            cache.summaries[self.index] = _write(cache.summaries[self.index], slots, *pair)
        slot = (position if self.ring is None else position % self.ring)[:, None]
        text = cache.text[self.index] = _write(cache.text[self.index], slot, k, v)
        (keys, values), visible = text, self._visible(position[:, None], text.shape[3])
        if self.mixer == "K":
            summaries = cache.summaries[self.index]
            index = torch.arange(summaries.shape[3], device=x.device)[None, :]
            visible = torch.cat([visible, index // m < position[:, None] // size - self.window], dim=1)
            keys, values = self.join(keys, summaries[0]), torch.cat([values, summaries[1]], dim=2)
        # Query heads that share a key/value head become rows of one GEMM, so that no key is copied.
        grouped = q.unflatten(1, (k.shape[1], -1)).flatten(2, 3)
        rule = dict(attn_mask=visible[:, None, None], scale=self.scale)
        out = F.scaled_dot_product_attention(grouped, keys, values, **rule)
        return self.out(out.flatten(1, 2)[:, :, None]), out_summary

    def _visible(self, position, rows):
        """Which of the cached text `rows` the token at `position` [B, 1] attends to: bool [B, rows]."""
        slot = torch.arange(rows, device=position.device)[None, :]
        if self.ring is None:
            return slot <= position
        held = position - (position - slot) % self.ring  # the position whose row is in the slot
        if self.mixer == "S":
            return held >= 0
        return held >= (position // self.config.chunk_size - self.window).clamp(min=0) * self.config.chunk_size


class KsaLayer(nn.Module):
    """Pre-norm decoder layer; text and summaries share the norms, the output projection and the MLP."""

    def __init__(self, config, index):
        super().__init__()
        self.self_attn = KsaAttention(config, index)
        self.mlp = KsaMLP(config)
        self.input_layernorm = KsaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = KsaRMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x, s, mix):
        """x: text, s: summaries or None; `mix` computes the attention of the normed rows of both."""
        s = s if self.self_attn.carries else None
        out, out_summary = mix(self.input_layernorm(x), None if s is None else self.input_layernorm(s))
        x = x + out
        x = x + self.mlp(self.post_attention_layernorm(x))
        if out_summary is not None:
            s = s + out_summary
            s = s + self.mlp(self.post_attention_layernorm(s))
        return x, s


class KsaPreTrainedModel(PreTrainedModel):
    config_class = KsaConfig
    base_model_prefix = "model"
    _no_split_modules = ["KsaLayer"]  # noqa: RUF012
    _supports_sdpa = True

    @classmethod
    def _supports_default_dynamic_cache(cls):
        return False  # the cache is a KsaCache


class KsaModel(KsaPreTrainedModel):
    """The decoder without its head: embedding, layers and final norm."""

    def __init__(self, config):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        if "K" in config.letters:
            self.summary_embedding = nn.Embedding(config.summary_tokens, config.hidden_size)
        self.layers = nn.ModuleList(KsaLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = KsaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_init()

    def get_input_embeddings(self):
        return self.embed_tokens

    def set_input_embeddings(self, value):
        self.embed_tokens = value

    def forward(self, input_ids, attention_mask=None, cache=None):
        """input_ids [B, columns] -> hidden states [B, columns, h]. Reads and fills `cache` if given."""
        if cache is None or cache.columns == 0:
            return self._prompt(input_ids, attention_mask, cache)
        return torch.cat([self._step(column, cache) for column in input_ids.unbind(1)], dim=1)

    def _tables(self, text, chunk):
        """RoPE tables of text at positions `text` [..., n], of the summaries of `chunk` [..., c], and of position 0."""
        c = self.config
        ends = [max((a + 1) * c.chunk_size // c.summary_tokens - 1, 0) for a in range(c.summary_tokens)]
        summary = (chunk[..., None] * c.chunk_size + torch.tensor(ends, device=text.device)).flatten(-2)
        return tuple(_rotary(positions, c) for positions in (text, summary, text.new_zeros(1)))

    def _prompt(self, input_ids, attention_mask, cache):
        """Whole prompts: shift each request to start at row 0, run the layers, shift the rows back."""
        (batch, columns), device, size = input_ids.shape, input_ids.device, self.config.chunk_size
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        real = attention_mask[:, :columns].bool()
        lengths, first = real.sum(1), real.int().argmax(1)
        rows = -(-int(lengths.max()) // size) * size
        row = torch.arange(rows, device=device)[None, :]
        tokens = input_ids.gather(1, (first[:, None] + row).clamp(max=columns - 1))
        x, s = self.embed_tokens(tokens * (row < lengths[:, None])), None
        if "K" in self.config.letters:
            s = self.summary_embedding.weight.repeat(rows // size, 1)[None].expand(batch, -1, -1)
        tables = self._tables(row[0], torch.arange(rows // size, device=device))
        for layer in self.layers:
            x, s = layer(x, s, lambda a, b, attend=layer.self_attn.prompt: attend(a, b, tables, cache, lengths))
        if cache is not None:
            cache.lengths, cache.columns = lengths, columns
        back = (torch.arange(columns, device=device)[None, :] - first[:, None]).clamp(0, rows - 1)
        return self.norm(x).gather(1, back[..., None].expand(-1, -1, x.shape[2]))

    def _step(self, tokens, cache):
        """One new token per request, tokens [B] -> [B, 1, h]. Summaries run along once a chunk is complete."""
        position, size = cache.lengths, self.config.chunk_size
        x, s = self.embed_tokens(tokens[:, None]), None
        if "K" in self.config.letters and bool((position % size == 0).any()):
            s = self.summary_embedding.weight[None].expand(len(tokens), -1, -1)
        tables = self._tables(position[:, None], ((position - 1) // size)[:, None])
        for layer in self.layers:
            x, s = layer(x, s, lambda a, b, attend=layer.self_attn.step: attend(a, b, tables, cache, position))
        cache.lengths, cache.columns = position + 1, cache.columns + 1
        return self.norm(x)


class KsaForCausalLM(KsaPreTrainedModel, GenerationMixin):
    """The decoder with its language-model head."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config):
        super().__init__(config)
        self.model = KsaModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_output_embeddings(self):
        return self.lm_head

    def set_output_embeddings(self, value):
        self.lm_head = value

    def forward(
        self, input_ids=None, attention_mask=None, past_key_values=None, cache=None, labels=None, use_cache=None,
        logits_to_keep=0, return_dict=None, **kwargs,
    ):  # fmt: skip
        """Logits [B, columns, vocab_size], or of the last `logits_to_keep` columns; the loss if `labels` are given.

        `cache` and `past_key_values` are two names for the same `KsaCache`. With one, `input_ids` are new columns only.
        """
        if input_ids is None:
            raise ValueError("input_ids is required; this model does not take inputs_embeds")
        cache = past_key_values if cache is None else cache
        use_cache = self.config.use_cache if use_cache is None else use_cache
        if cache is None and use_cache and not self.training:
            cache = KsaCache()
        hidden = self.model(input_ids, attention_mask, cache)
        logits, loss = self.lm_head(hidden[:, -logits_to_keep:] if logits_to_keep else hidden), None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())
        output = CausalLMOutputWithPast(loss=loss, logits=logits, **{CACHE: cache})
        return output.to_tuple() if return_dict is False else output

    def prepare_inputs_for_generation(
        self, input_ids, past_key_values=None, cache=None, attention_mask=None, use_cache=True, **kwargs
    ):
        cache = past_key_values if cache is None else cache
        cached = 0 if cache is None else cache.get_seq_length()
        inputs = {"input_ids": input_ids[:, cached:], "attention_mask": attention_mask, "use_cache": use_cache}
        passed_on = {name: value for name, value in kwargs.items() if name == "logits_to_keep"}
        return {**inputs, CACHE: cache, **passed_on}
