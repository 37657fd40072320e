"""Mixer `G`, a baseline layer: gated delta net (arXiv 2412.06464), a linear recurrence instead of attention.

Legend: T text rows, H heads *of this tensor rank*, d head dimension (of keys and of values), n rows of a block.

A head keeps a matrix S [d, d] for each document, zero before its first token. Each token multiplies S by exp(decay),
replaces the value stored under its key by its own, weighted by beta, and reads S with its query:

    S <- exp(decay) S;   S <- S + beta k (v - S^T k)^T;   o = S^T q / sqrt(d)

Before that, queries, keys and values go through a causal convolution over the last `CONV_TOKENS` tokens of the
document, and queries and keys are scaled to length one. There is no rotation, since the recurrence encodes the order.
Summary rows are ignored.

`recurrent` states the rule token by token. `blocked` computes the same in blocks, on any device. On CUDA, `auto` uses
the kernels of flash-linear-attention.
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

from ksa_model.config import CONV_TOKENS, LayerConfig, ModelConfig, ModelConfigError
from ksa_model.config import DELTA_BLOCK_ROWS as BLOCK_ROWS
from ksa_model.layers.attention import RMSNorm, RotaryTables
from ksa_model.layers.tensor_parallel import TensorParallel, weight_of
from ksa_model.layout.ranges import to_device
from ksa_model.layout.sequence import SequenceLayout
from ksa_model.memory import SavedOutput
from ksa_model.ops.backend import Backend
from ksa_model.ops.linear import Norm
from ksa_model.ops.optional import import_if_installed

PACKAGE = "fla.ops.gated_delta_rule"
NEEDS = "pip install 'ksa-train[delta]'"
_MAX_HEAD_DIM = 256  # of the package's kernels
_DECAY_RATES = (1.0, 16.0)  # initial range, uniform
_STEP_SIZES = (1e-3, 1e-1)  # initial range, uniform in the logarithm
_EPS = 1e-6
_PROJECTIONS = ("query", "key", "value", "gate", "beta", "decay")


@dataclass
class DeltaRows:
    """The inputs of a layer's recurrence: qkv [T, 3, H, d] before the convolution; decay (a logarithm, at most 0) and
    beta [T, H] fp32."""

    qkv: torch.Tensor
    decay: torch.Tensor
    beta: torch.Tensor


class DeltaNet(nn.Module):
    """Replaces `Attention` in a block and is called the same way.

    Parameters: `query`, `key`, `value`, `gate`, `beta`, `decay`, `output`; `convolution` [3, H*d, CONV_TOKENS], its
    taps; for each head `decay_rate` (a logarithm) and `step_bias`, which the paper's code calls A_log and dt_bias.
    """

    def __init__(
        self, config: ModelConfig, layer: LayerConfig, tp: TensorParallel, backend: Backend, fp8: bool = False
    ):
        """`fp8`: whether GEMMs run in 8 bits, see `weight_of`. Those of beta and decay never do: their errors would add
        up in the state, and they are small."""
        super().__init__()
        self.config, self.layer, self.tp, self.backend = config, layer, tp, backend
        h, heads, size, std = config.hidden_size, config.num_heads, config.num_heads * config.head_dim, config.init_std
        self.query, self.key, self.value, self.gate = (tp.column(h, size, std, fp8) for _ in range(4))
        self.beta, self.decay = tp.column(h, heads, std), tp.column(h, heads, std)
        taps = torch.empty(3, size, CONV_TOKENS).uniform_(-(CONV_TOKENS**-0.5), CONV_TOKENS**-0.5)
        self.convolution = tp.share(taps, dim=1)
        self.decay_rate = tp.share(torch.empty(heads).uniform_(*_DECAY_RATES).log())
        step = torch.empty(heads).uniform_(*map(math.log, _STEP_SIZES)).exp()
        self.step_bias = tp.share(step + torch.log(-torch.expm1(-step)))  # the inverse of softplus
        self.output_norm = RMSNorm(config.head_dim, config.norm_eps, tp, backend, grad_is_complete=tp.size == 1)
        self.output = tp.row(size, h, std / (2 * config.num_layers) ** 0.5, fp8)

    def forward(
        self,
        x: torch.Tensor,
        norm: Norm,
        layout: SequenceLayout,
        rotary: RotaryTables,
        core: Callable | None = None,
    ) -> torch.Tensor:
        """x: rows before the norm, with or without summaries, which are ignored.

        Returns [T, H*d]; the block multiplies it with `output`. `core` replaces the recurrence itself.
        """
        weights = [weight_of(getattr(self, name)) for name in _PROJECTIONS]
        q, k, v, gate, beta, decay = self.tp.project(self.backend, x, norm, layout.num_text, weights)
        step = F.softplus(decay.float() + self.step_bias.float())
        given = DeltaRows(
            qkv=torch.stack([q, k, v], 1).unflatten(-1, (-1, self.config.head_dim)),
            decay=-self.decay_rate.float().exp() * step,
            beta=beta.float().sigmoid(),
        )
        out, _ = (core or self.core)(self, given, layout)
        return self.backend.rows.swiglu(gate, self.output_norm(out).flatten(1))

    @property
    def taps(self) -> torch.Tensor:
        """The convolution as [3, H, d, CONV_TOKENS]; the tap of the newest token is last."""
        return self.convolution.unflatten(1, (-1, self.config.head_dim))

    @staticmethod
    def core(
        delta: DeltaNet, given: DeltaRows, layout: SequenceLayout, kept: SavedOutput | None = None
    ) -> tuple[torch.Tensor, None]:
        """The recurrence over every document of a sample: [T, H, d] in the dtype of `given.qkv`, zero for padding.

        Its cost is linear in the sample's length, so a recomputation repeats it and nothing is `kept`.
        """
        return delta.over_documents(given, layout)[0], None

    def over_documents(
        self, given: DeltaRows, layout: SequenceLayout, keeps_states: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The output of `core` and, with `keeps_states`, the state after each document: fp32 [documents, H, d, d]."""
        backend, qkv = self.config.attention_backend, given.qkv
        check_device(self.config, qkv.device, qkv.dtype)
        documents = Documents.of(layout, qkv.device)
        # The convolution's many cheap tensors are recomputed in backward instead of kept.
        q, k, v = _recomputed(convolve, qkv, self.taps, documents.position)
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
            out, states = _recomputed(blocked, *inputs, documents.number)[0], None
        return documents.only_real(out.to(qkv.dtype)), states


@dataclass(frozen=True)
class Documents:
    """The positions of a layout's documents, on a device. A chunk of padding counts as a document of its own.

    `starts` int64 [documents + 1] includes the end of the last one. For every row, `number` int32 [T] is that of its
    document, `position` int32 [T] its position in it, and `real` bool [T] whether it holds a token.
    """

    starts: torch.Tensor
    starts_on_host: torch.Tensor
    number: torch.Tensor
    position: torch.Tensor
    real: torch.Tensor

    @staticmethod
    def of(layout: SequenceLayout, device: torch.device) -> Documents:
        """Those of `layout`, which caches them."""

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
        """x [T, ...] with zeros in padding rows, which then neither read, write nor decay the state."""
        return x.masked_fill(~self.real.view(-1, *[1] * (x.ndim - 1)), 0.0)


def convolve(qkv: torch.Tensor, taps: torch.Tensor, position: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """qkv [T, 3, H, d] -> q, k, v [T, H, d]: each feature convolved over the tokens of its document, then `finish`.
    `position`: integers [T], the positions in the documents."""
    total = qkv * taps[..., -1]
    for back in range(1, min(CONV_TOKENS, len(qkv))):
        reaches = (position[back:] >= back).view(-1, 1, 1, 1)
        total = total + F.pad(qkv[:-back] * reaches * taps[..., -1 - back], (0, 0, 0, 0, 0, 0, back, 0))
    return finish(total)


def finish(convolved: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """After the convolution: silu, and q and k scaled to length one."""
    q, k, v = F.silu(convolved).unbind(1)
    q, k = (x * torch.rsqrt(x.float().square().sum(-1, keepdim=True) + _EPS).to(x.dtype) for x in (q, k))
    return q, k, v.contiguous()  # a view would keep all three in memory


def recurrent(q, k, v, decay, beta, state: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """The rule token by token, in fp32, for one document.

    q, k, v [..., T, H, d]; decay, beta [..., T, H]; `state` [..., H, d, d] before it (None: zero) -> outputs
    [..., T, H, d] and the state after it.
    """
    q, k, v = q.float() * q.shape[-1] ** -0.5, k.float(), v.float()
    state = q.new_zeros(*q.shape[:-3], *q.shape[-2:], q.shape[-1]) if state is None else state
    out = []
    for t in range(q.shape[-3]):
        key, query, value = (x[..., t, :, :] for x in (k, q, v))
        state = state * decay[..., t, :].exp()[..., None, None]
        stored = torch.einsum("...de,...d->...e", state, key)
        state = state + torch.einsum("...d,...e->...de", key, (value - stored) * beta[..., t, :, None])
        out.append(torch.einsum("...de,...d->...e", state, query))
    return torch.stack(out, -3), state


def blocked(q, k, v, decay, beta, number: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """`recurrent` over every document of a pack, in blocks of `BLOCK_ROWS` rows: fp32 [T, H, d], and the state after
    the last document.

    q, k, v [T, H, d]; decay, beta fp32 [T, H]; `number`: integers [T], those of the rows' documents, not decreasing
    (None: one document). Within a block the values that are written solve a triangular system (the WY form, section 3.2
    of the paper); from block to block only the state of the current document is passed.
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
    # A cumulative sum over the block would mix documents in rounding and in gradients.
    total = (earlier.float() @ decay[..., None])[..., 0]
    # exp of the masked entries would overflow: they are decays backwards in time.
    decays = (total[..., :, None] - total[..., None, :]).masked_fill(~earlier, float("-inf")).exp()
    # Whether a row's document began before its block.
    previous = torch.cat([number[:1, :1] - 1, number[:-1, -1:]])
    continues = (number == previous).unsqueeze(1)
    decayed = (total.exp() * continues)[..., None]

    weight = beta[..., None]
    system = torch.eye(size, device=q.device) + (weight * (k @ k.mT) * decays).tril(-1)
    solved = torch.linalg.solve_triangular(system, torch.cat([weight * v, weight * k * decayed], -1), upper=False)
    values, takes = solved.chunk(2, -1)
    scores = (q @ k.mT) * decays
    remaining = k * decays[..., -1, :, None]  # the share of each key at the end of the block
    kept_share = decayed[..., -1:, :]
    state = q.new_zeros(q.shape[1], q.shape[-1], v.shape[-1])
    out = []
    for i in range(len(q)):
        written = values[i] - takes[i] @ state
        out.append((q[i] * decayed[i]) @ state + scores[i] @ written)
        state = kept_share[i] * state + remaining[i].mT @ written
    return torch.stack(out).transpose(1, 2).flatten(0, 1)[:length], state


def _recomputed(function: Callable, *arguments: torch.Tensor):
    """function(*arguments), recomputed in backward."""
    if not torch.is_grad_enabled():
        return function(*arguments)
    return checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False)


class DeltaCache:
    """The state of B requests in one `G` layer. Its size is constant.

    `tail` [B, CONV_TOKENS - 1, 3, H, d]: the previous tokens of the convolution; `state` fp32 [B, H, d, d].
    """

    def __init__(self, num_requests: int, heads: int, weight: torch.Tensor, head_dim: int):
        """Buffers of the dtype and on the device of `weight`."""
        self.tail = weight.new_zeros(num_requests, CONV_TOKENS - 1, 3, heads, head_dim)
        self.state = weight.new_zeros(num_requests, heads, head_dim, head_dim, dtype=torch.float32)

    @property
    def allocated_bytes(self) -> int:
        """Bytes of both buffers."""
        return sum(x.numel() * x.element_size() for x in (self.tail, self.state))

    def reserve(self, num_tokens: int) -> None:
        """Does nothing: the size does not depend on the length."""

    def ensure(self, num_tokens: int) -> bool:
        """Whether buffers were replaced: never."""
        return False

    def prefill(self, delta: DeltaNet, given: DeltaRows, prompts: SequenceLayout, ends: torch.Tensor) -> torch.Tensor:
        """The recurrence over prompts packed as documents. `ends` int64 [B]: the rows of their last tokens."""
        out, states = delta.over_documents(given, prompts, keeps_states=True)
        assert states is not None
        self.state.copy_(states)
        position = Documents.of(prompts, ends.device).position[ends]
        for back in range(CONV_TOKENS - 1):
            exists = (position >= back).view(-1, 1, 1, 1)
            self.tail[:, -1 - back] = given.qkv[(ends - back).clamp(min=0)] * exists
        return out

    def step(self, delta: DeltaNet, given: DeltaRows) -> torch.Tensor:
        """One token a request, rows [B, ...] -> [B, H, d]. Updates buffers in place, as recorded CUDA graphs
        require."""
        recent = torch.cat([self.tail, given.qkv[:, None]], 1)
        self.tail.copy_(recent[:, 1:])
        q, k, v = finish((recent * delta.taps.permute(3, 0, 1, 2)).sum(1))
        q, k, v, decay, beta = (x[:, None] for x in (q, k, v, given.decay, given.beta))  # documents of one token
        out, state = recurrent(q, k, v, decay, beta, self.state)
        self.state.copy_(state)
        return out[:, 0].to(given.qkv.dtype)


def _packaged(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the package's kernels support rows of this device and dtype."""
    return device.type == "cuda" and dtype != torch.float32


@functools.cache
def _package():
    return import_if_installed(PACKAGE, PACKAGE.partition(".")[0])


def _triton_version() -> str:
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return "none"


def _triton_is_wrong(device: torch.device) -> bool:
    """Whether the package refuses to compute gradients here (its `chunk_bwd_dqkwg`); known before the first step."""
    if torch.cuda.get_device_capability(device) != (9, 0) or importlib.util.find_spec("tilelang") is not None:
        return False
    numbers = tuple(int(number) for number in re.findall(r"\d+", _triton_version())[:3])
    return (3, 4, 0) <= numbers < (3, 7, 1)


def check_device(config: ModelConfig, device: torch.device, dtype: torch.dtype) -> None:
    """Raise `ModelConfigError` if a model has `G` layers and the kernels that they need on `device` are missing."""
    if not config.has_mixer("G") or config.attention_backend not in ("auto", "fused") or not _packaged(device, dtype):
        return
    if _package() is None:
        raise ModelConfigError(
            f"model.layer_pattern={config.layer_pattern!r} has gated delta net layers (G), which on CUDA need the "
            f"package flash-linear-attention: {NEEDS}, or model.attention_backend=blocked, which is slow"
        )
    if _triton_is_wrong(device):
        raise ModelConfigError(
            f"model.layer_pattern={config.layer_pattern!r} has gated delta net layers (G), and Triton "
            f"{_triton_version()} miscompiles their kernels in flash-linear-attention for this device, which refuses "
            "to run them; pip install tilelang, which it then uses, or Triton 3.7.1 or newer, or use "
            "model.attention_backend=blocked, which is slow"
        )
    if config.head_dim > _MAX_HEAD_DIM:
        raise ModelConfigError(
            f"model.head_dim={config.head_dim} is above the {_MAX_HEAD_DIM} that flash-linear-attention's kernels "
            "take for gated delta net layers (G); use smaller heads, or model.attention_backend=blocked, which is slow"
        )
