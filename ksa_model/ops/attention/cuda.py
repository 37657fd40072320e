"""Attention over key ranges on CUDA: cuDNN for long causal stretches, Triton kernels (`triton_attention`) for the rest.

Legend: T query rows, N key rows, H query heads, G key/value heads, d head dimension, k text rows a chunk, C chunks.

The far part of KSA needs no mask. Text row r of chunk c attends to the summaries of the chunks before c - W: for a
fixed r this is plain causal attention over chunks, shifted by W + 1. So the queries of a document, viewed as [k, H, C,
d] (strides, not a copy), are k batches of causal attention of length C - W - 1 over the same keys, and a library kernel
runs them at full speed. `KeyRanges.causal_split` finds such stretches. Short documents and windows go to the Triton
kernels, near and far in one launch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from ksa_model.layout.ranges import CausalRun, outside, to_device, zero_outside
from ksa_model.layout.sequence import SequenceLayout
from ksa_model.ops.attention import blocked, triton_attention, triton_summary
from ksa_model.ops.attention.parts import Part, Softmax

# Steps (chunks of a far part, rows of a full layer) from which cuDNN is faster than the Triton kernels: docs/log.md.
MIN_RUN_STEPS = 2048
# Share of the query heads in one cuDNN call, with as many query as key/value heads: its workspace and temporary
# gradients take about five times the memory of its queries. With fewer key/value heads the operands are smaller, and so
# is the share. It doubles where gradients that are not allocated yet leave room. Calls of up to SMALL_CALL bytes of
# queries are not split further: at 32,768 tokens smaller calls cost 8 % of the time.
CALL_SHARE = 0.16
SMALL_CALL = 2**26


def supports(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Whether these kernels are for such rows: CUDA of compute capability 8.0 or newer, a 16-bit dtype, and a head
    dimension of at most 256 that is a multiple of 8."""
    return (
        device.type == "cuda"
        and dtype in (torch.bfloat16, torch.float16)
        and head_dim % 8 == 0
        and head_dim <= 256
        and torch.cuda.get_device_capability(device) >= (8, 0)
    )


def attend(q: torch.Tensor, parts: list[Part], before: Softmax | None = None) -> Softmax:
    """The joint softmax of q [T, H, d] over `parts`, continued from `before`. Twin: `blocked.attend`.

    Without `before`, a row without keys in the last part is padding: with several parts, every real row must attend to
    at least itself in the last one.
    """
    q, parts = _whole_heads(q), [Part(_whole_heads(k), _whole_heads(v), ranges) for k, v, ranges in parts]
    split = [ranges.causal_split(_min_run_steps(q)) for _, _, ranges in parts]
    rests = [Part(k, v, rest) for (k, v, _), (_, rest) in zip(parts, split)]
    has_runs = any(runs for runs, _ in split)
    if before is None:
        out = torch.zeros_like(q) if has_runs and len(parts) == 1 else torch.empty_like(q)
        state = Softmax(out, triton_attention.row_values(q))
        if has_runs:
            state.lse.fill_(float("inf"))
    else:
        state = before
    for (k, v, _), (runs, _) in zip(parts, split):
        for run in runs:
            for call in _calls(run, q, k, 2 * CALL_SHARE):
                out, lse = _cudnn_forward(*call.views(q, k, v), call.causal)
                if call.is_first and before is None:
                    _put(call.rows_of(state.out), call.flat(out), adding=False)
                    call.lse_of(state.lse).copy_(lse)
                else:
                    mine = state.out[:, call.heads], state.lse[call.heads]
                    triton_attention.merge(*mine, call.flat(out), lse, run.first_row, run.step_rows)
    has_state = before is not None or has_runs
    if not has_state or any(rest.ranges.visible_keys for rest in rests):
        padding = before is None and len(parts) > 1
        triton_attention.forward(q, rests, state, has_state=has_state, empty_is_padding=padding)
    return state


class Gradient:
    """Gradients of parts under their joint softmax: `add` each group of parts, then read `grad_q` [T, H, d]."""

    def __init__(self, grad_out: torch.Tensor, q: torch.Tensor, softmax: Softmax):
        self._grad_out, self._q, self._softmax = _whole_heads(grad_out.contiguous()), _whole_heads(q), softmax
        self._delta: torch.Tensor | None = None
        self.grad_q: torch.Tensor | None = None

    def add(self, parts: list[Part]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Gradients [N, G, d] of every part's keys and values."""
        q = self._q
        parts = [Part(_whole_heads(k), _whole_heads(v), ranges) for k, v, ranges in parts]
        split = [ranges.causal_split(_min_run_steps(q)) for _, _, ranges in parts]
        grads = [_KeySums(k, v) for k, v, _ in parts]
        runs_of_all = [run for runs, _ in split for run in runs]
        # A part that is covered by runs needs nothing else. Parts without any visible key are still passed on, because
        # leaving them out would compile another kernel variant in the middle of training.
        rests = [(Part(k, v, rest), sums) for (k, v, _), (runs, rest), sums in zip(parts, split, grads)
                 if rest.visible_keys or not runs]  # fmt: skip
        # Runs come first: the Triton kernels then add to what the calls have written. But where a part has both, the
        # gradients of its keys would be in memory twice.
        rests_first = not runs_of_all or any(runs and rest.visible_keys for runs, rest in split)
        if rests_first:
            self._add_rests(rests)
        adding = self.grad_q is not None
        if self.grad_q is None:
            self.grad_q = torch.empty_like(q)
            zero_outside(self.grad_q, [run.rows for run in runs_of_all])
        share = CALL_SHARE if rests_first or not rests else 2 * CALL_SHARE
        for (k, v, _), (runs, _), sums in zip(parts, split, grads):
            for run in sorted(runs, key=lambda run: run.keys.start - run.keys.stop):  # the widest first
                sums.begin(run.keys)
                for call in _calls(run, q, k, share):
                    self._add_call(call, k, v, sums, adding or not call.is_first)
        if rests and not rests_first:
            self._add_rests(rests)
        return [sums.finish() for sums in grads]

    def _add_rests(self, rests: list[tuple[Part, _KeySums]]) -> None:
        q, grad_out, softmax, parts = self._q, self._grad_out, self._softmax, [part for part, _ in rests]
        has_state, has_delta = self.grad_q is not None, self._delta is not None
        self.grad_q = self.grad_q if self.grad_q is not None else torch.empty_like(q)
        self._delta = self._delta if self._delta is not None else triton_attention.row_values(q)
        operands = softmax, self._delta, self.grad_q
        triton_attention.backward_queries(grad_out, q, parts, *operands, has_state=has_state, has_delta=has_delta)
        found = triton_attention.backward_keys(grad_out, q, parts, softmax.lse, self._delta)
        for (_, sums), of_part in zip(rests, found):
            sums.take(*of_part)

    def _add_call(self, call: _Call, k, v, sums: _KeySums, adding: bool) -> None:
        assert self.grad_q is not None
        lse = call.lse_of(self._softmax.lse).contiguous()[..., None]
        saved = (*call.views(self._q, k, v), call.query_view(self._softmax.out), lse)
        call_q, call_k, call_v = _cudnn_backward(call.query_view(self._grad_out), *saved, call.causal)
        _put(call.rows_of(self.grad_q), call.flat(call_q), adding)
        shares_keys = call.heads.start % (self._q.shape[1] // k.shape[1]) > 0  # with heads of an earlier call
        for total, found in ((sums.k, call_k), (sums.v, call_v)):
            target, is_first = call.keys_of(total).transpose(0, 1), not (sums.adding or shares_keys)
            if is_first and len(found) > 1:
                torch.sum(found, 0, out=target)
            else:
                _put(target, found[0] if len(found) == 1 else found.sum(0), adding=not is_first)


def _put(target: torch.Tensor, found: torch.Tensor, adding: bool) -> None:
    if adding:
        target.add_(found)
    else:  # as 8-byte words: a strided copy moves one value a thread
        target.view(torch.int64).copy_(found.view(torch.int64))


class _KeySums:
    """Sums of the gradients of a part's keys and values over its runs. A run has each key in one call for every head,
    so keys of no earlier run are written: adding to zeros would be two more passes over memory."""

    def __init__(self, k: torch.Tensor, v: torch.Tensor):
        self._operands = k, v
        self._written: list[range] = []  # disjoint

    def begin(self, keys: range) -> None:
        """The next calls are those of a run that attends to `keys`."""
        if not self._written:
            self.k, self.v = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in self._operands)
        fresh = outside(keys, self._written)
        self.adding = fresh != [keys]  # whether the calls add to what is there
        for some in fresh if self.adding else []:
            self.k[some.start : some.stop].zero_()
            self.v[some.start : some.stop].zero_()
        self._written += fresh

    def take(self, k: torch.Tensor, v: torch.Tensor) -> None:
        """Take over the gradients of all keys and values, before those of any run."""
        assert not self._written
        self.k, self.v, self._written = k, v, [range(len(k))]

    def finish(self) -> tuple[torch.Tensor, torch.Tensor]:
        for total in (self.k, self.v):
            zero_outside(total, self._written)
        return self.k, self.v


def summary_attention(q, k_text, v_text, k_summary, v_summary, layout: SequenceLayout) -> torch.Tensor:
    """`blocked.summary_attention` in one kernel each way, where a chunk fits a program's tiles."""
    fits = triton_summary.fits(q, k_text.shape[1], layout.chunk_size, layout.summary_tokens)
    if not (fits and layout.num_chunks):
        return blocked.summary_attention(q, k_text, v_text, k_summary, v_summary, layout)
    device = q.device
    lengths = layout.cached(("int32 lengths", device), lambda: to_device(layout.chunk_lengths, device))
    rows = (_whole_heads(x) for x in (k_text, v_text, k_summary, v_summary))
    return triton_summary.SummaryAttention.apply(q, *rows, lengths, layout.chunk_size)


# -- cuDNN ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Call:
    """One attention problem without a mask: the rows of a run, some heads, and some of its keys."""

    run: CausalRun
    heads: slice  # query heads
    kv_heads: slice
    keys: slice
    causal: bool
    is_first: bool  # the run's first call for these heads

    def query_view(self, x: torch.Tensor) -> torch.Tensor:
        """[T, H, d] -> [step rows, heads, steps, d], a view."""
        return self.rows_of(x).unflatten(0, (self.run.num_steps, self.run.step_rows)).permute(1, 2, 0, 3)

    def views(self, q, k, v) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        batch = self.run.step_rows
        keys = (self.keys_of(x).transpose(0, 1)[None].expand(batch, -1, -1, -1) for x in (k, v))
        return self.query_view(q), *keys  # type: ignore[return-value]

    def rows_of(self, x: torch.Tensor) -> torch.Tensor:
        return x[self.run.first_row : self.run.first_row + self.run.num_rows, self.heads]

    def keys_of(self, x: torch.Tensor) -> torch.Tensor:
        return x[self.keys, self.kv_heads]

    def lse_of(self, x: torch.Tensor) -> torch.Tensor:
        """[H, T] -> [step rows, heads, steps], a view."""
        rows = x[self.heads, self.run.first_row : self.run.first_row + self.run.num_rows]
        return rows.unflatten(1, (self.run.num_steps, self.run.step_rows)).permute(2, 0, 1)

    @staticmethod
    def flat(x: torch.Tensor) -> torch.Tensor:
        """[step rows, heads, steps, d] as cuDNN returns it (in the memory order of the query) -> [rows, heads, d]."""
        return x.permute(2, 0, 1, 3).flatten(0, 1)


def _calls(run: CausalRun, q: torch.Tensor, k: torch.Tensor, share: float) -> Iterator[_Call]:
    """The run as problems that are small enough, some heads at a time: the triangle once for every key of a step, since
    queries attend to all keys of a step at once, then the rectangle. A run without keys of a step has no triangle."""
    heads, group = q.shape[1], q.shape[1] // k.shape[1]
    small = SMALL_CALL // (run.num_rows * q.shape[-1] * q.element_size())
    limit = min(heads, max(1, small, int(heads * share * (1 + 1 / group) / 2)))
    # The heads of a call fill their key/value heads or share one. Calls have equal sizes, unless that would double
    # their number.
    fit = [n for n in range(1, limit + 1) if n % group == 0 or group % n == 0]
    at_once = max([n for n in fit if heads % n == 0 and 2 * n > fit[-1]] or fit)
    end = run.triangle_key + run.num_steps * run.step_keys
    for first in range(0, heads, at_once):
        some = slice(first, min(first + at_once, heads))
        theirs = slice(some.start // group, -(-some.stop // group))
        for offset in range(run.step_keys):
            yield _Call(run, some, theirs, slice(run.triangle_key + offset, end, run.step_keys), True, offset == 0)
        if run.rectangle_key < run.triangle_key:
            yield _Call(run, some, theirs, slice(run.rectangle_key, run.triangle_key), False, run.step_keys == 0)


def _cudnn_forward(q, k, v, causal: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """q [B, H, n, d] over k, v [B, G, m, d] -> out [B, H, n, d], lse [B, H, n] fp32."""
    out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
        q, k, v, None, True, 0.0, causal, False, scale=q.shape[-1] ** -0.5
    )
    return out, lse[..., 0]


def _cudnn_backward(grad_out, q, k, v, out, lse, causal: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of one part of a softmax: `out` and lse [B, H, n, 1] are the joint ones."""
    unused = torch.zeros((), dtype=torch.int64, device=q.device)  # the dropout's seed and offset
    return torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
        grad_out, q, k, v, out, lse, unused, unused, None, None, None, q.shape[2], k.shape[2], 0.0, causal,
        scale=q.shape[-1] ** -0.5,
    )  # fmt: skip


def _min_run_steps(q: torch.Tensor) -> int:
    """The shortest run for cuDNN, whose kernels end at d = 128 on most devices."""
    return MIN_RUN_STEPS if q.shape[-1] <= 128 else 2**62


def _whole_heads(x: torch.Tensor) -> torch.Tensor:
    """x [rows, heads, d] with the heads of a row side by side. Rows may be further apart (a slice of a wider
    tensor)."""
    aligned = x.stride(0) % 8 == 0 and x.data_ptr() % 16 == 0  # the copy engine reads 16 bytes
    return x if x.stride(2) == 1 and x.stride(1) == x.shape[2] and aligned else x.contiguous()
