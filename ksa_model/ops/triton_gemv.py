"""GEMMs of few rows, as in decoding, with the norm before and the operation after in the same launch; and norm and
rotation of the heads of both streams.

With few rows the time of a GEMM is that of reading the weight, so each weight is read once, by programs of a few output
features each. One or two rows take the gemv kernel, more the skinny GEMM kernel. Shapes are fixed, so that CUDA graphs
can record the kernels.

Legend: n rows, h input features, f features between the GEMMs of an MLP, H query heads, G key/value heads, d head
dimension.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING, NamedTuple

import torch
import triton
import triton.language as tl

if TYPE_CHECKING:
    from ksa_model.ops.linear import Target

GEMV_ROWS = 2  # the most rows of the gemv kernel; more use the tensor cores


@triton.jit
def _features_of(weight_0, weight_1, weight_2, bias_0, bias_1, bias_2, out_0, out_1, out_2, features_0, features_1,
                 features_2, FEATURES: tl.constexpr, GATED: tl.constexpr):  # fmt: skip
    """The weight, the bias, the output and the output features of this program; the weights' features are numbered in
    sequence."""
    block, weight, bias, out, features = tl.program_id(0), weight_0, bias_0, out_0, features_0
    if not GATED:
        before = tl.cdiv(features_0, FEATURES)
        if block >= before:
            block, weight, bias, out, features = block - before, weight_1, bias_1, out_1, features_1
            before = tl.cdiv(features_1, FEATURES)
            if block >= before:
                block, weight, bias, out, features = block - before, weight_2, bias_2, out_2, features_2
    return weight, bias, out, block * FEATURES + tl.arange(0, FEATURES), features


@triton.jit
def _gemv(x, gain, residual, weight_0, weight_1, weight_2, bias_0, bias_1, bias_2, out_0, out_1, out_2, features_0,
          features_1, features_2, size, eps, NORM: tl.constexpr, GATED: tl.constexpr, ADD: tl.constexpr,
          BIAS: tl.constexpr, ROWS: tl.constexpr, FEATURES: tl.constexpr, DEPTH: tl.constexpr):  # fmt: skip
    """Some output features of one of three weights (or with GATED of two together) for one or two rows.

    Elements are multiplied one by one, without the tensor cores and the data movement they need, and summed once at the
    end. The scale of a norm is one number per row, so it multiplies the result.
    """
    weight, bias, out, feature, features = _features_of(weight_0, weight_1, weight_2, bias_0, bias_1, bias_2, out_0,
                                                        out_1, out_2, features_0, features_1, features_2, FEATURES,
                                                        GATED)  # fmt: skip
    in_features = feature < features
    line = feature.to(tl.int64)[:, None] * size
    sums = (tl.zeros([FEATURES, DEPTH // 8], tl.float32),) * ROWS
    up_sums, squares = sums, (tl.zeros([DEPTH // 8], tl.float32),) * ROWS
    for begin in range(0, size, DEPTH):
        column = begin + tl.arange(0, DEPTH)
        inside = column < size
        held = in_features[:, None] & inside[None, :]
        w = tl.load(weight + line + column[None, :], mask=held, other=0.0).to(tl.float32)
        up = w
        if GATED:
            up = tl.load(weight_1 + line + column[None, :], mask=held, other=0.0).to(tl.float32)
        factor = tl.zeros([DEPTH], tl.float32)
        if NORM:
            factor = tl.load(gain + column, mask=inside, other=0.0).to(tl.float32)
        for row in tl.static_range(ROWS):  # takes sums from the front, appends them (Triton cannot unpack tuples)
            values = tl.load(x + row * size + column, mask=inside, other=0.0).to(tl.float32)
            if NORM:
                squares = squares[1:] + (squares[0] + tl.sum(tl.reshape(values * values, [DEPTH // 8, 8]), 1),)  # noqa: RUF005
                values *= factor
            sums = sums[1:] + (sums[0] + _add_eights(w * values[None, :], FEATURES, DEPTH),)  # noqa: RUF005
            if GATED:
                up_sums = up_sums[1:] + (up_sums[0] + _add_eights(up * values[None, :], FEATURES, DEPTH),)  # noqa: RUF005
    for row in tl.static_range(ROWS):
        scale = 1.0
        if NORM:
            scale = 1 / tl.sqrt(tl.sum(squares[row], 0) / size + eps)
        total = tl.sum(sums[row], 1) * scale
        if GATED:
            total = _swiglu(total, tl.sum(up_sums[row], 1) * scale)
        at = row * features + feature
        if BIAS:
            total += tl.load(bias + feature, mask=in_features, other=0.0).to(tl.float32)
        if ADD:
            total += tl.load(residual + at, mask=in_features, other=0.0).to(tl.float32)
        tl.store(out + at, total.to(out.dtype.element_ty), mask=in_features)


@triton.jit
def _add_eights(x, FEATURES: tl.constexpr, DEPTH: tl.constexpr):
    """[FEATURES, DEPTH] -> [FEATURES, DEPTH / 8]: each thread sums what it loads at once, for an eighth of the
    registers."""
    return tl.sum(tl.reshape(x, [FEATURES, DEPTH // 8, 8]), 2)


@triton.jit
def _swiglu(gate, up):
    return gate / (1 + tl.exp(-gate)) * up


@triton.jit
def _skinny_gemm(x, gain, residual, weight_0, weight_1, weight_2, bias_0, bias_1, bias_2, out_0, out_1, out_2,
                 features_0, features_1, features_2, rows, size, eps, NORM: tl.constexpr, GATED: tl.constexpr,
                 ADD: tl.constexpr, BIAS: tl.constexpr, ROWS: tl.constexpr, FEATURES: tl.constexpr,
                 DEPTH: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    """`_gemv` for up to ROWS rows on the tensor cores: weights are loaded through shared memory in a pipeline of
    several tiles. The gain multiplies the rows, which are then rounded once."""
    weight, bias, out, feature, features = _features_of(weight_0, weight_1, weight_2, bias_0, bias_1, bias_2, out_0,
                                                        out_1, out_2, features_0, features_1, features_2, FEATURES,
                                                        GATED)  # fmt: skip
    row = tl.arange(0, ROWS)
    in_features, real = feature < features, row < rows
    line = feature.to(tl.int64)[:, None] * size
    sums = tl.zeros([FEATURES, ROWS], tl.float32)
    up_sums, squares = sums, tl.zeros([ROWS], tl.float32)
    for begin in tl.range(0, size, DEPTH, num_stages=STAGES):
        column = begin + tl.arange(0, DEPTH)
        inside = column < size
        held = in_features[:, None] & inside[None, :]
        values = tl.load(x + row[:, None] * size + column[None, :], mask=real[:, None] & inside[None, :], other=0.0)
        if NORM:
            wide = values.to(tl.float32)
            squares += tl.sum(wide * wide, 1)
            factor = tl.load(gain + column, mask=inside, other=0.0).to(tl.float32)
            values = (wide * factor[None, :]).to(values.dtype)
        w = tl.load(weight + line + column[None, :], mask=held, other=0.0)
        sums = tl.dot(w, values.T, sums, input_precision=PRECISION)
        if GATED:
            up = tl.load(weight_1 + line + column[None, :], mask=held, other=0.0)
            up_sums = tl.dot(up, values.T, up_sums, input_precision=PRECISION)
    total = sums
    scale = tl.full([ROWS], 1.0, tl.float32)
    if NORM:
        scale = 1 / tl.sqrt(squares / size + eps)
        total *= scale[None, :]
    if GATED:
        total = _swiglu(total, up_sums * scale[None, :])
    at = row[None, :] * features + feature[:, None]
    kept = in_features[:, None] & real[None, :]
    if BIAS:
        total += tl.load(bias + feature, mask=in_features, other=0.0).to(tl.float32)[:, None]
    if ADD:
        total += tl.load(residual + at, mask=kept, other=0.0).to(tl.float32)
    tl.store(out + at, total.to(out.dtype.element_ty), mask=kept)


@triton.jit
def _norm_rotate_heads(q, k, cos, sin, q_out, k_out, own_q, own_k, own_cos, own_sin, own_q_out, own_k_out, q_gain,
                       k_gain, rows, q_heads, own_q_heads, k_heads, eps, HALF: tl.constexpr, BLOCK: tl.constexpr,
                       NORM: tl.constexpr):  # fmt: skip
    """One head of one row. Programs are numbered over the heads of text rows, queries before keys, then of summary
    rows."""
    index, heads = tl.program_id(0), q_heads + k_heads
    if index >= rows * heads:
        index -= rows * heads
        q, k, cos, sin, q_out, k_out, q_heads = own_q, own_k, own_cos, own_sin, own_q_out, own_k_out, own_q_heads
        heads = q_heads + k_heads
    row, head = index // heads, index % heads
    x, gain, out, heads = q, q_gain, q_out, q_heads
    if head >= q_heads:
        x, gain, out, heads, head = k, k_gain, k_out, k_heads, head - q_heads
    column = tl.arange(0, BLOCK)
    inside = column < HALF
    at = (row * heads + head) * (2 * HALF) + column
    left = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    right = tl.load(x + at + HALF, mask=inside, other=0.0).to(tl.float32)
    if NORM:
        scale = 1 / tl.sqrt((tl.sum(left * left, 0) + tl.sum(right * right, 0)) / (2 * HALF) + eps)
        left *= scale * tl.load(gain + column, mask=inside, other=0.0).to(tl.float32)
        right *= scale * tl.load(gain + HALF + column, mask=inside, other=0.0).to(tl.float32)
        left = left.to(x.dtype.element_ty).to(tl.float32)  # rounded as the output of the norm alone
        right = right.to(x.dtype.element_ty).to(tl.float32)
    c = tl.load(cos + row * HALF + column, mask=inside, other=0.0)
    s = tl.load(sin + row * HALF + column, mask=inside, other=0.0)
    tl.store(out + at, (left * c - right * s).to(out.dtype.element_ty), mask=inside)
    tl.store(out + at + HALF, (right * c + left * s).to(out.dtype.element_ty), mask=inside)


class Stream(NamedTuple):
    """Queries [n, H, d] or None, keys [n, G, d], and the cos and sin [n, 1, d/2] fp32 of the rows' angles."""

    q: torch.Tensor | None
    k: torch.Tensor
    cos: torch.Tensor
    sin: torch.Tensor


def project(x: torch.Tensor, gain: torch.Tensor, eps: float, targets: Sequence[Target]) -> list[torch.Tensor]:
    """`linear.project` after a norm, for few rows."""
    found: list[torch.Tensor] = []
    for (start, stop, _), group in groupby(targets, key=lambda t: (t.start, t.stop, t.weight.bias is None)):
        alike = list(group)
        for first in range(0, len(alike), 3):
            weights = [target.weight for target in alike[first : first + 3]]
            biases = [weight.bias for weight in weights if weight.bias is not None]
            found += _launch(x[start:stop], [weight.matrix for weight in weights], biases, gain=gain, eps=eps)
    return found


def gated(x: torch.Tensor, gain: torch.Tensor, eps: float, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """swiglu of the normed rows' GEMMs with `gate` and `up`: [n, f]."""
    return _launch(x, [gate, up], gain=gain, eps=eps, is_gated=True)[0]


def add_gemm(x: torch.Tensor, y: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x + y @ weight.T"""
    return _launch(y, [weight], residual=x)[0]


def norm_rotate_heads(
    streams: Sequence[Stream], gains: tuple[torch.Tensor, torch.Tensor] | None, eps: float
) -> list[tuple[torch.Tensor | None, torch.Tensor]]:
    """`rows.norm_rotate` of the queries and keys of one or two streams; `gains` [d] of queries and keys, None: no
    norm."""
    streams = [stream._replace(q=None if stream.q is None else stream.q.contiguous(), k=stream.k.contiguous())
               for stream in streams]  # fmt: skip
    outs = [
        (None if stream.q is None else torch.empty_like(stream.q), torch.empty_like(stream.k)) for stream in streams
    ]
    q_heads = [0 if stream.q is None else stream.q.shape[1] for stream in streams]
    rows, (_, k_heads, d) = [len(stream.k) for stream in streams], streams[0].k.shape
    operands = []  # without queries the keys stand in for them; no program reads them as queries
    for stream, (q_out, k_out) in zip(streams, outs):
        q, q_out = (stream.k, k_out) if stream.q is None or q_out is None else (stream.q, q_out)
        operands.append([q, stream.k, stream.cos, stream.sin, q_out, k_out])
    q_gain, k_gain = gains or (streams[0].k, streams[0].k)
    _norm_rotate_heads[(sum(n * (q + k_heads) for n, q in zip(rows, q_heads)),)](
        *operands[0], *operands[-1], q_gain, k_gain, rows[0], q_heads[0], q_heads[-1], k_heads, eps, HALF=d // 2,
        BLOCK=triton.next_power_of_2(d // 2), NORM=gains is not None, num_warps=1,
    )  # fmt: skip
    return outs


def _tile(rows: int, is_normed: bool, is_gated: bool) -> dict[str, int]:
    """Tile of a GEMM: output features of a program, input features per iteration, warps, and for the tensor cores
    pipeline stages. The fastest on an H100; docs/log.md has the times."""
    if rows > GEMV_ROWS:
        if is_gated:
            return dict(FEATURES=16, DEPTH=128, num_warps=1, STAGES=4)
        if is_normed:
            return dict(FEATURES=16, DEPTH=256, num_warps=1 if rows <= 8 else 2, STAGES=3)
        return dict(FEATURES=16, DEPTH=512, num_warps=2, STAGES=3)
    if is_gated:
        return dict(FEATURES=8 if rows == 1 else 2, DEPTH=512, num_warps=1)
    if is_normed:
        return dict(FEATURES=4 if rows == 2 else 2, DEPTH=512, num_warps=1)
    return dict(FEATURES=2, DEPTH=1024, num_warps=4)


def _launch(x, weights, biases=(), gain=None, eps=0.0, residual=None, is_gated=False) -> list[torch.Tensor]:
    """The GEMMs of x [n, h] with up to three weights, which have a bias each or none."""
    x, (rows, size) = x.contiguous(), x.shape
    outs = [x.new_empty(rows, len(weight)) for weight in weights[: 1 if is_gated else 3]]
    tile = _tile(rows, gain is not None, is_gated)
    programs = sum(triton.cdiv(out.shape[1], tile["FEATURES"]) for out in outs)
    added = list(biases) or weights  # without biases the weights stand in for them; no program reads them as such
    weights, added, outs_3 = (side + side[:1] * (3 - len(side)) for side in (weights, added, outs))
    features = [out.shape[1] for out in outs] + [0] * (3 - len(outs))
    operands = (x, x if gain is None else gain, x if residual is None else residual.contiguous(), *weights, *added)
    kind = dict(NORM=gain is not None, GATED=is_gated, ADD=residual is not None, BIAS=bool(biases))
    if rows > GEMV_ROWS:
        padded = max(8, triton.next_power_of_2(rows))
        _skinny_gemm[(programs,)](
            *operands, *outs_3, *features, rows, size, eps, **kind, ROWS=padded, PRECISION=precision(x), **tile
        )
    elif rows:
        _gemv[(programs,)](*operands, *outs_3, *features, size, eps, **kind, ROWS=rows, **tile)
    return outs


def precision(x: torch.Tensor) -> str:
    """Input precision of tensor core instructions: fp32 rows are not rounded."""
    return "ieee" if x.dtype == torch.float32 else "tf32"
