"""Activation memory: recomputation, offload to host memory, and the MLP in slices.

Legend: h hidden size.

Backward needs every tensor that the forward of a block made, or the block's input and time to recompute them.
`CheckpointedForward` runs the blocks of one forward and keeps what `MemoryConfig` allows: everything (`none`), only the
input of each block (`full`), or the input and the output of its attention (`selective`). Attention is the only work
that grows faster than the sample, so `selective` does not recompute it. The kept tensors can wait in host memory.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence

import torch
from torch.utils.checkpoint import checkpoint

from ksa_model.config import MemoryConfig

GIB = 2**30


class CheckpointedForward:
    """One forward of a model's blocks, bottom to top, with gradients. Offloaded tensors go to `pool`."""

    def __init__(self, config: MemoryConfig, pool: HostPool):
        self._config, self._pool = config, pool if config.offload else None
        self._last: BlockActivations | None = None

    def run(self, block: Callable[[torch.Tensor, SavedOutput | None], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        """`block(x, saved)`. Backward may run it again; `saved` holds its attention output for that recomputation."""
        if self._config.recompute == "none":
            return block(x, None)
        activations = BlockActivations(self._pool, self._last if self._pool else None)
        if self._last is not None:
            self._last.leave_device()
        self._last = activations
        saved = SavedOutput(activations) if self._config.recompute == "selective" else None
        # These hooks receive what `checkpoint` itself saves, which is x; inside the block, `checkpoint` has its own
        # hooks. A block draws no random numbers.
        offloaded = torch.autograd.graph.saved_tensors_hooks(activations.put, activations.get)
        with offloaded if self._pool else contextlib.nullcontext():
            return checkpoint(block, x, saved, use_reentrant=False, preserve_rng_state=False)


class SavedOutput:
    """The output of one attention: `put` in the forward of a block, and taken by its recomputation."""

    def __init__(self, activations: BlockActivations):
        self._activations = activations
        self._slots: list[int] = []

    def put(self, *tensors: torch.Tensor) -> None:
        self._slots = [self._activations.put(tensor) for tensor in tensors]

    def take(self) -> list[torch.Tensor] | None:
        """The tensors of `put`, as new tensors over the same memory; None in the first forward."""
        return [self._activations.get(slot).detach() for slot in self._slots] if self._slots else None


class BlockActivations:
    """The kept tensors of one block. With a pool they are copied to the host while the block runs and leave the device
    when the next block begins. They return together, one block before backward needs them.

    Copies in both directions run on the pool's own stream, so a buffer is never overwritten before it was read. The
    compute stream waits for a CUDA event before it frees or uses a tensor; the host waits for neither.
    """

    def __init__(self, pool: HostPool | None, below: BlockActivations | None):
        """`below`: the activations of the block whose backward comes next."""
        self._pool, self._below = pool, below
        self._tensors: list[torch.Tensor | None] = []  # None: only on the host
        self._copies: list[tuple[torch.Tensor, torch.Tensor] | None] = []  # (buffer, meta tensor: shape and strides)
        self._copied: torch.cuda.Event | None = None  # the last copy, in either direction

    def put(self, tensor: torch.Tensor) -> int:
        """Keep a tensor and return its slot."""
        tensor = tensor.detach()
        buffer = None if self._pool is None else self._pool.take(tensor)
        self._tensors.append(tensor)
        self._copies.append(None if buffer is None else (buffer, torch.empty_strided(
            tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta"
        )))  # fmt: skip
        if buffer is not None:
            self._copy([(_view_as(buffer, tensor), tensor)], tensor.device)
        return len(self._tensors) - 1

    def get(self, slot: int) -> torch.Tensor:
        """The tensor in `slot`, on its device. The block below starts to copy its own tensors back."""
        self._return()
        if self._copied is not None:
            torch.cuda.current_stream().wait_event(self._copied)
        if self._below is not None:
            self._below._return()
        tensor = self._tensors[slot]
        assert tensor is not None
        return tensor

    def leave_device(self) -> None:
        """Free the device memory of every tensor that has a copy on the host."""
        if self._copied is not None:
            torch.cuda.current_stream().wait_event(self._copied)
        self._tensors = [None if copy else tensor for tensor, copy in zip(self._tensors, self._copies)]

    def _return(self) -> None:
        missing = [i for i, tensor in enumerate(self._tensors) if tensor is None]
        if not missing:
            return
        assert self._pool is not None
        pairs = []
        for i in missing:
            buffer, like = self._copies[i]  # type: ignore[misc]  # a tensor that left the device has a copy
            tensor = torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device=self._pool.device)
            self._tensors[i] = tensor
            pairs.append((tensor, _view_as(buffer, tensor)))
        self._copy(pairs, self._pool.device)

    def _copy(self, pairs: list[tuple[torch.Tensor, torch.Tensor]], device: torch.device) -> None:
        """Copy each (to, from). On a GPU the copy waits for the work already queued, which made or uses this memory."""
        assert self._pool is not None
        if device.type != "cuda":
            for target, source in pairs:
                target.copy_(source)
            return
        stream = self._pool.stream
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            for target, source in pairs:
                target.copy_(source, non_blocking=True)
        self._copied = torch.cuda.Event()
        self._copied.record(stream)

    def __del__(self) -> None:
        if self._pool is not None:
            for copy in self._copies:
                if copy is not None:
                    self._pool.give_back(copy[0])


def _view_as(buffer: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    return buffer.view(tensor.dtype).view(tensor.shape)


class HostPool:
    """At most `limit` bytes of pinned host memory for tensors of one device. Freed buffers are reused."""

    def __init__(self, limit: float):
        self.limit = limit
        self.held_bytes = 0  # all buffers, in use or free
        self.device = torch.device("cpu")
        self._free: dict[int, list[torch.Tensor]] = {}
        self._registered: list[torch.Tensor] = []
        self._stream: torch.cuda.Stream | None = None

    @property
    def stream(self) -> torch.cuda.Stream:
        if self._stream is None:
            self._stream = torch.cuda.Stream(self.device)
        return self._stream

    def take(self, tensor: torch.Tensor) -> torch.Tensor | None:
        """A buffer for `tensor`, uint8 [its bytes]; None if the limit leaves no room for it."""
        size = tensor.numel() * tensor.element_size()
        if size == 0:  # `checkpoint` of older torch also saves an empty host tensor
            return None
        self.device = tensor.device
        if free := self._free.get(size):
            return free.pop()
        if self.held_bytes + size > self.limit:
            return None
        self.held_bytes += size
        buffer = torch.empty(size, dtype=torch.uint8)
        if tensor.is_cuda:
            # torch's own pinned memory is rounded up to powers of two: up to twice the bytes.
            torch.cuda.check_error(int(torch.cuda.cudart().cudaHostRegister(buffer.data_ptr(), size, 0)))
            self._registered.append(buffer)
        return buffer

    def give_back(self, buffer: torch.Tensor) -> None:
        self._free.setdefault(len(buffer), []).append(buffer)

    def __del__(self) -> None:
        if self._registered:
            self.stream.synchronize()  # the last copies may still be running
        for buffer in self._registered:
            torch.cuda.cudart().cudaHostUnregister(buffer.data_ptr())


# -- rows in slices ---------------------------------------------------------------------------------------------------


def in_slices(
    function: Callable[[torch.Tensor], torch.Tensor],
    x: torch.Tensor,
    rows: int,
    weights: Sequence[torch.Tensor],
) -> torch.Tensor:
    """`function(x)` in slices of `rows` rows, in forward and backward; `function` maps each row [n, h] -> [n, h] alone.

    Backward recomputes each slice and sums the gradients of `weights`, which must be all that `function` uses, in fp32.
    Only x is kept. It is saved before the slices are computed: the recomputation of a block stops once it has saved
    what the forward saved, so it skips the slices.
    """
    if not (torch.is_grad_enabled() and x.requires_grad):
        return torch.cat([function(part) for part in x.split(rows)])
    return _InSlices.apply(function, rows, [_Hold.apply(x)], x, *weights)


class _Hold(torch.autograd.Function):
    """Saves its input for another function's backward. The saved tensor lives as long as the returned one."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.new_empty(0)

    @staticmethod
    def backward(ctx, grad):
        raise AssertionError("the output of _Hold has no gradient")


class _InSlices(torch.autograd.Function):
    @staticmethod
    def forward(ctx, function, rows: int, held: list[torch.Tensor], x, *weights):
        ctx.function, ctx.rows, ctx.weights = function, rows, weights
        ctx.held = held  # in a list autograd does not treat it as an input
        out = torch.empty_like(x)
        for part, part_out in zip(x.split(rows), out.split(rows)):
            part_out.copy_(function(part))
        return out

    @staticmethod
    def backward(ctx, grad_out):
        held, ctx.held = ctx.held, None  # otherwise x would live as long as the whole graph
        (x,) = held[0].grad_fn.saved_tensors
        needed = ctx.needs_input_grad[4:]
        trained = [weight for weight, needs in zip(ctx.weights, needed) if needs]
        sums: list[torch.Tensor | None] = [None] * len(trained)
        grad_x = torch.empty_like(x)
        for part, part_grad, part_grad_x in zip(*(t.split(ctx.rows) for t in (x, grad_out, grad_x))):
            part = part.detach().requires_grad_()
            with torch.enable_grad():
                out = ctx.function(part)
            # A weight without a gradient here has already added it to its `main_grad`: see `ksa_model.ops.linear`.
            grad_part, *weight_grads = torch.autograd.grad(out, (part, *trained), part_grad, allow_unused=True)
            part_grad_x.copy_(grad_part)
            for i, grad in enumerate(weight_grads):
                if grad is not None:
                    total = sums[i]
                    sums[i] = grad.to(torch.float32, copy=True) if total is None else total.add_(grad)
        trained_grads = iter(total if total is None else total.to(w.dtype) for total, w in zip(sums, trained))
        return None, None, None, grad_x, *(next(trained_grads) if needs else None for needs in needed)
