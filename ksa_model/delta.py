"""Mixer `G`, a baseline layer: gated delta net (arXiv 2412.06464), a linear recurrence in the place of attention.

Legend: T text rows, H heads *of this tensor rank*, d head dimension (of keys and of values), n rows of a block.

A head keeps a matrix S [d, d] for each document, empty before its first token. A token makes it fade by exp(decay),
takes out what stands under its key and puts its value there, to the extent of beta, and reads it with its query:

    S <- exp(decay) S;   S <- S + beta k (v - S^T k)^T;   o = S^T q / sqrt(d)

Queries, keys and values go through a causal convolution over the last `CONV_TOKENS` tokens of the document first, and
queries and keys have length one. Positions are not rotated: order is in the recurrence. Summaries do not meet it.

`recurrent` states the rule token by token; `blocked` computes the same in blocks, on any device; on CUDA `auto` goes to
flash-linear-attention's kernels.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import math
import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ksa_model import rows
from ksa_model.attention import RMSNorm, RotaryTables
from ksa_model.config import CONV_TOKENS, LayerConfig, ModelConfig, ModelConfigError
from ksa_model.config import DELTA_BLOCK_ROWS as BLOCK_ROWS
from ksa_model.layout import SequenceLayout
from ksa_model.linear import Norm
from ksa_model.memory import Kept
from ksa_model.ranges import to_device
from ksa_model.tensor_parallel import TensorParallel

PACKAGE = "fla.ops.gated_delta_rule"
NEEDS = "pip install 'ksa-train[delta]'"
_MOST_FEATURES = 256  # of a head, in the package's kernels
_DECAY_RATES = (1.0, 16.0)  # where they begin, drawn evenly
_STEP_SIZES = (1e-3, 1e-1)  # likewise, drawn evenly in their logarithm
_EPS = 1e-6
_WIDE, _NARROW = ("query", "key", "value", "gate"), ("beta", "decay")  # projections: a feature each, or one a head


@dataclass
class DeltaRows:
    """What a layer's recurrence is fed: qkv [T, 3, H, d] before the convolution; decay (a logarithm, at most 0) and
    beta [T, H] fp32."""

    qkv: torch.Tensor
    decay: torch.Tensor
    beta: torch.Tensor


class DeltaNet(nn.Module):
    """Stands where `Attention` does and is called alike.

    Parameters: `query`, `key`, `value`, `gate`, `beta`, `decay`, `output`; `convolution` [3, H*d, CONV_TOKENS], its
    taps; for each head `decay_rate` (a logarithm) and `step_bias`, which the paper's code calls A_log and dt_bias.
    """

    def __init__(self, config: ModelConfig, layer: LayerConfig, tp: TensorParallel):
        super().__init__()
        self.config, self.layer, self.tp = config, layer, tp
        h, heads, size, std = config.hidden_size, config.num_heads, config.num_heads * config.head_dim, config.init_std
        self.query, self.key, self.value = (tp.column(h, size, std) for _ in range(3))
        self.gate, self.beta, self.decay = tp.column(h, size, std), tp.column(h, heads, std), tp.column(h, heads, std)
        taps = torch.empty(3, size, CONV_TOKENS).uniform_(-(CONV_TOKENS**-0.5), CONV_TOKENS**-0.5)
        self.convolution = tp.share(taps, dim=1)
        self.decay_rate = tp.share(torch.empty(heads).uniform_(*_DECAY_RATES).log())
        step = torch.empty(heads).uniform_(*map(math.log, _STEP_SIZES)).exp()
        self.step_bias = tp.share(step + torch.log(-torch.expm1(-step)))  # softplus gives the step again
        self.output_norm = RMSNorm(config.head_dim, config.norm_eps, tp, meets_all=tp.size == 1)
        self.output = tp.row(size, h, std / (2 * config.num_layers) ** 0.5)

    def forward(
        self,
        x: torch.Tensor,
        norm: Norm,
        layout: SequenceLayout,
        rotary: RotaryTables,
        mix: Callable | None = None,
        fp8: bool = False,
    ) -> torch.Tensor:
        """x: rows before the norm, with or without summaries, which are not looked at.

        Returns [T, H*d], which `output` brings back to the hidden size. `mix` replaces the recurrence itself. `fp8`:
        products in 8 bits, but for beta and decay, whose errors the state would gather and whose heads are few.
        """
        wide, narrow = ([getattr(self, name).weight for name in names] for names in (_WIDE, _NARROW))
        q, k, v, gate, beta, decay = self.tp.project(x, norm, layout.num_text, wide, exact=narrow, fp8=fp8)
        step = F.softplus(decay.float() + self.step_bias.float())
        given = DeltaRows(
            qkv=torch.stack([q, k, v], 1).unflatten(-1, (-1, self.config.head_dim)),
            decay=-self.decay_rate.float().exp() * step,
            beta=beta.float().sigmoid(),
        )
        out, _ = (mix or self.mix)(self, given, layout)
        return rows.swiglu(gate, self.output_norm(out).flatten(1))

    @property
    def taps(self) -> torch.Tensor:
        """[3, H, d, CONV_TOKENS], the newest token's last."""
        return self.convolution.unflatten(1, (-1, self.config.head_dim))

    @staticmethod
    def mix(
        delta: DeltaNet, given: DeltaRows, layout: SequenceLayout, kept: Kept | None = None
    ) -> tuple[torch.Tensor, None]:
        """The recurrence over every document of a sample: [T, H, d] in the dtype of `given.qkv`, zero for padding.

        Its work grows as the sample does, so a re-run does it again and nothing is `kept`.
        """
        return delta.over_documents(given, layout)[0], None

    def over_documents(
        self, given: DeltaRows, layout: SequenceLayout, keeps_states: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """What `mix` gives and, where asked, the state behind each document: fp32 [documents, H, d, d]."""
        backend, qkv = self.config.attention_backend, given.qkv
        check_device(self.config, qkv.device, qkv.dtype)
        documents = Documents.of(layout, qkv.device)
        # The convolution's many cheap tensors are made again in backward instead of kept.
        q, k, v = _again(convolve, qkv, self.taps, documents.position)
        inputs = q, k, v, documents.only_real(given.decay), documents.only_real(given.beta)
        states: torch.Tensor | None
        if backend in ("auto", "fused") and _packaged(qkv.device, qkv.dtype):
            out, states = _package().chunk_gated_delta_rule(
                *(x[None] for x in inputs), output_final_state=keeps_states,
                cu_seqlens=documents.starts, cu_seqlens_cpu=documents.starts_on_host,
            )  # fmt: skip
            out = out[0]
        elif backend == "reference" or keeps_states:
            rule: Callable = recurrent if backend == "reference" else blocked
            parts = zip(*(x.split(documents.starts_on_host.diff().tolist()) for x in inputs))
            outs, found = zip(*(rule(*part) for part in parts))
            out, states = torch.cat(outs), torch.stack(found)
        else:
            out, states = _again(blocked, *inputs, documents.number)[0], None
        return documents.only_real(out.to(qkv.dtype)), states


@dataclass(frozen=True)
class Documents:
    """Where the documents of a layout stand, on a device. A chunk of padding counts as a document of its own.

    `starts` int64 [documents + 1], the end of the last included; `number` and `position` int32 [T] of every row's
    document and of the row in it; `real` bool [T].
    """

    starts: torch.Tensor
    starts_on_host: torch.Tensor
    number: torch.Tensor
    position: torch.Tensor
    real: torch.Tensor

    @staticmethod
    def of(layout: SequenceLayout, device: torch.device) -> Documents:
        def compute() -> Documents:
            first = layout.text_positions == 0
            starts = np.append(np.flatnonzero(first), layout.num_text)
            number, position, real = (
                to_device(array, device) for array in (first.cumsum() - 1, layout.text_positions, layout.text_is_real)
            )
            on_device = to_device(starts, device).long()
            return Documents(on_device, torch.from_numpy(starts), number, position, real.bool())

        return layout.cached(("documents", device), compute)

    def only_real(self, x: torch.Tensor) -> torch.Tensor:
        """x [T, ...] with zeros for padding, which then neither reads nor writes nor makes anything fade."""
        return x.masked_fill(~self.real.view(-1, *[1] * (x.ndim - 1)), 0.0)


def convolve(qkv: torch.Tensor, taps: torch.Tensor, position: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """qkv [T, 3, H, d] -> q, k, v [T, H, d]: each feature convolved over the tokens of its document, silu, and length
    one for q and k. position [T] in the document, integers."""
    total = qkv * taps[..., -1]
    for back in range(1, min(CONV_TOKENS, len(qkv))):
        reaches = (position[back:] >= back).view(-1, 1, 1, 1)
        total = total + F.pad(qkv[:-back] * reaches * taps[..., -1 - back], (0, 0, 0, 0, 0, 0, back, 0))
    return finish(total)


def finish(convolved: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """What stands behind the convolution: silu, and length one for q and k."""
    q, k, v = F.silu(convolved).unbind(1)
    q, k = (x * torch.rsqrt(x.float().square().sum(-1, keepdim=True) + _EPS).to(x.dtype) for x in (q, k))
    return q, k, v.contiguous()  # else all three would be kept for it


def recurrent(q, k, v, decay, beta, state: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """The rule, token by token, fp32: q, k, v [..., T, H, d] and decay, beta [..., T, H] of one document, `state`
    [..., H, d, d] before it (None: empty) -> outputs [..., T, H, d], the state behind it."""
    q, k, v = q.float() * q.shape[-1] ** -0.5, k.float(), v.float()
    state = q.new_zeros(*q.shape[:-3], *q.shape[-2:], q.shape[-1]) if state is None else state
    out = []
    for t in range(q.shape[-3]):
        key, query, value = (x[..., t, :, :] for x in (k, q, v))
        state = state * decay[..., t, :].exp()[..., None, None]
        there = torch.einsum("...de,...d->...e", state, key)
        state = state + torch.einsum("...d,...e->...de", key, (value - there) * beta[..., t, :, None])
        out.append(torch.einsum("...de,...d->...e", state, query))
    return torch.stack(out, -3), state


def blocked(q, k, v, decay, beta, number: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """`recurrent` over every document of a pack, in blocks of `BLOCK_ROWS` rows: fp32 [T, H, d], and the state behind
    the last document.

    q, k, v [T, H, d]; decay, beta fp32 [T, H]; number (integers, [T]) of a row's document, never falling; None: one.
    Within a block the values that are really written solve a triangular system (the WY form, section 3.2 of the paper);
    between blocks only the state of the document that is going on is handed over.
    """
    length, size = len(q), BLOCK_ROWS
    padding = -length % size
    if number is None:
        number = torch.zeros(length, dtype=torch.int64, device=q.device)

    def blocks(x: torch.Tensor) -> torch.Tensor:
        """[T, H, ...] -> [blocks, H, n, ...]"""
        return F.pad(x.float(), (*[0, 0] * (x.ndim - 1), 0, padding)).unflatten(0, (-1, size)).transpose(1, 2)

    q, k, v, decay, beta = (blocks(x) for x in (q, k, v, decay, beta))
    q = q * q.shape[-1] ** -0.5
    number = torch.cat([number, number[-1:].expand(padding)]).view(-1, size)
    together = number[:, :, None] == number[:, None, :]
    earlier = (together & together.new_ones(size, size).tril()).unsqueeze(1)
    # A running sum over the block would let documents touch each other in rounding, and in gradients.
    total = (earlier.float() @ decay[..., None])[..., 0]
    # exp of what is left out would overflow: it is a fading backwards in time.
    fades = (total[..., :, None] - total[..., None, :]).masked_fill(~earlier, float("-inf")).exp()
    # Whether a row's document was going on when the block began, and whether the block's last document was.
    previous = torch.cat([number[:1, :1] - 1, number[:-1, -1:]])
    goes_on = (number == previous).unsqueeze(1)
    faded = (total.exp() * goes_on)[..., None]

    weight = beta[..., None]
    system = torch.eye(size, device=q.device) + (weight * (k @ k.mT) * fades).tril(-1)
    solved = torch.linalg.solve_triangular(system, torch.cat([weight * v, weight * k * faded], -1), upper=False)
    values, takes = solved.chunk(2, -1)
    scores = (q @ k.mT) * fades
    left = k * fades[..., -1, :, None]  # what of each key is there when the block ends
    stays = faded[..., -1:, :]
    state = q.new_zeros(q.shape[1], q.shape[-1], v.shape[-1])
    out = []
    for i in range(len(q)):
        written = values[i] - takes[i] @ state
        out.append((q[i] * faded[i]) @ state + scores[i] @ written)
        state = stays[i] * state + left[i].mT @ written
    return torch.stack(out).transpose(1, 2).flatten(0, 1)[:length], state


def _again(function: Callable, *arguments: torch.Tensor):
    """function(*arguments), whose insides are made again in backward."""
    if not torch.is_grad_enabled():
        return function(*arguments)
    return checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False)


class DeltaCache:
    """What B requests leave behind in one `G` layer; it does not grow.

    `tail` [B, CONV_TOKENS - 1, 3, H, d]: the tokens that convolutions look back to; `state` fp32 [B, H, d, d].
    """

    def __init__(self, num_requests: int, heads: int, weight: torch.Tensor, head_dim: int):
        """`weight` gives dtype and device."""
        self.tail = weight.new_zeros(num_requests, CONV_TOKENS - 1, 3, heads, head_dim)
        self.state = weight.new_zeros(num_requests, heads, head_dim, head_dim, dtype=torch.float32)

    @property
    def allocated_bytes(self) -> int:
        return sum(x.numel() * x.element_size() for x in (self.tail, self.state))

    def reserve(self, num_tokens: int) -> None:
        """Nothing: all lengths need the same."""

    def ensure(self, num_tokens: int) -> bool:
        """Whether the buffers are new ones: never."""
        return False

    def prefill(self, delta: DeltaNet, given: DeltaRows, prompts: SequenceLayout, ends: torch.Tensor) -> torch.Tensor:
        """The recurrence over prompts packed as documents, whose last tokens stand at rows `ends` int64 [B]."""
        out, states = delta.over_documents(given, prompts, keeps_states=True)
        assert states is not None
        self.state.copy_(states)
        position = Documents.of(prompts, ends.device).position[ends]
        for back in range(CONV_TOKENS - 1):
            there = (position >= back).view(-1, 1, 1, 1)
            self.tail[:, -1 - back] = given.qkv[(ends - back).clamp(min=0)] * there
        return out

    def step(self, delta: DeltaNet, given: DeltaRows) -> torch.Tensor:
        """One token a request, rows [B, ...] -> [B, H, d]. In place, so that a recorded graph finds it again."""
        seen = torch.cat([self.tail, given.qkv[:, None]], 1)
        self.tail.copy_(seen[:, 1:])
        q, k, v = finish((seen * delta.taps.permute(3, 0, 1, 2)).sum(1))
        q, k, v, decay, beta = (x[:, None] for x in (q, k, v, given.decay, given.beta))  # documents of one more token
        out, state = recurrent(q, k, v, decay, beta, self.state)
        self.state.copy_(state)
        return out[:, 0].to(given.qkv.dtype)


def _packaged(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the package's kernels are for such rows."""
    return device.type == "cuda" and dtype != torch.float32


@functools.cache
def _package():
    try:
        return importlib.import_module(PACKAGE)
    except ImportError:
        return None


def _triton_version() -> str:
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return "none"


def _triton_is_wrong(device: torch.device) -> bool:
    """Whether the package refuses to compute gradients here (its `chunk_bwd_dqkwg`), known before the first step."""
    if torch.cuda.get_device_capability(device) != (9, 0) or importlib.util.find_spec("tilelang") is not None:
        return False
    numbers = tuple(int(number) for number in re.findall(r"\d+", _triton_version())[:3])
    return (3, 4, 0) <= numbers < (3, 7, 1)


def check_device(config: ModelConfig, device: torch.device, dtype: torch.dtype) -> None:
    """Raise `ModelConfigError` where a model with `G` layers would miss the kernels that it needs on `device`."""
    if not config.has_mixer("G") or config.attention_backend not in ("auto", "fused") or not _packaged(device, dtype):
        return
    if _package() is None:
        raise ModelConfigError(
            f"model.layer_pattern={config.layer_pattern!r} has gated delta net layers (G), which on CUDA need the "
            f"package flash-linear-attention: {NEEDS}, or model.attention_backend=blocked, which is slow"
        )
    if _triton_is_wrong(device):
        raise ModelConfigError(
            f"model.layer_pattern={config.layer_pattern!r} has gated delta net layers (G), whose kernels in "
            f"flash-linear-attention Triton {_triton_version()} compiles wrongly for this device and which it "
            "refuses there; pip install tilelang, which it then uses, or Triton 3.7.1 or newer, or take "
            "model.attention_backend=blocked, which is slow"
        )
    if config.head_dim > _MOST_FEATURES:
        raise ModelConfigError(
            f"model.head_dim={config.head_dim} is above the {_MOST_FEATURES} that flash-linear-attention's kernels "
            "take for gated delta net layers (G); use smaller heads, or model.attention_backend=blocked, which is slow"
        )
