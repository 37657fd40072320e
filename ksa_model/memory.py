"""What blocks keep from forward to backward, where it waits, and the MLP in slices: memory for samples of any length.

Legend: h hidden size.

Backward needs every tensor that a block's forward has made, or the block's input and the time to make them again. A
`Pass` runs the blocks of one forward so that no more is kept than `MemoryConfig` says: nothing is left out (`none`),
only a block's input is kept (`full`), or besides it the result of its attention (`selective`), which alone grows faster
than the sample and so is what a re-run should not compute again. What is kept can wait in host memory.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch.utils.checkpoint import checkpoint

RECOMPUTE = ("none", "full", "selective")
GIB = 2**30


class MemoryConfigError(ValueError):
    """Settings that exclude each other; the message names the keys, their values and the relation they break."""


@dataclass(frozen=True)
class MemoryConfig:
    """What is kept of a block from forward to backward, and where."""

    recompute: str = "none"  # none: everything | full: its input | selective: its input and its attention's result
    offload: bool = False  # what `full` or `selective` keeps waits in host memory
    host_gib: float = 128.0  # of host memory a rank at most; blocks beyond it keep their tensors on the device
    mlp_rows: int | None = None  # rows (of this rank) that the MLP takes at a time; null: all at once

    def __post_init__(self) -> None:
        if self.recompute not in RECOMPUTE:
            raise MemoryConfigError(f"memory.recompute={self.recompute!r} is not one of {', '.join(RECOMPUTE)}")
        if self.offload and self.recompute == "none":
            raise MemoryConfigError(
                "memory.offload=true moves what a re-run starts from, and memory.recompute=none re-runs nothing; use "
                "memory.recompute=selective or full, or memory=offload for both"
            )
        if self.host_gib <= 0:
            raise MemoryConfigError(f"memory.host_gib={self.host_gib} must be positive")
        if self.mlp_rows is not None and self.mlp_rows < 1:
            raise MemoryConfigError(f"memory.mlp_rows={self.mlp_rows} must be at least 1, or null for all at once")


class Pass:
    """One forward of a model's blocks, bottom to top, under gradients. `pool` is where tensors are moved to."""

    def __init__(self, config: MemoryConfig, pool: HostPool):
        self._config, self._pool = config, pool if config.offload else None
        self._last: Shelf | None = None

    def run(self, block: Callable[[torch.Tensor, Kept | None], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        """`block(x, kept)`, whose backward may run it a second time; `kept` is for the result of its attention."""
        if self._config.recompute == "none":
            return block(x, None)
        shelf = Shelf(self._pool, self._last if self._pool else None)
        if self._last is not None:
            self._last.leave_device()
        self._last = shelf
        kept = Kept(shelf) if self._config.recompute == "selective" else None
        # The hooks see what `checkpoint` saves, which is x; inside it has hooks of its own. Nothing in a block draws
        # random numbers.
        moved = torch.autograd.graph.saved_tensors_hooks(shelf.put, shelf.get)
        with moved if self._pool else contextlib.nullcontext():
            return checkpoint(block, x, kept, use_reentrant=False, preserve_rng_state=False)


class Kept:
    """The result of one attention: put here in a block's forward, taken in its re-run instead of being computed."""

    def __init__(self, shelf: Shelf):
        self._shelf = shelf
        self._places: list[int] = []

    def put(self, *tensors: torch.Tensor) -> None:
        self._places = [self._shelf.put(tensor) for tensor in tensors]

    def take(self) -> list[torch.Tensor] | None:
        """What was `put`, as new tensors over the same memory; None in the first forward."""
        return [self._shelf.get(place).detach() for place in self._places] if self._places else None


class Shelf:
    """The kept tensors of one block. With a pool they are copied to the host while the block runs, leave the device
    when the next one begins, and come back together, one block before backward asks for them.

    Copies of both directions run on the pool's own stream, so a buffer is never written before it was read. The device
    lets go of a tensor, or uses one, behind an event of that stream: the host waits for neither.
    """

    def __init__(self, pool: HostPool | None, below: Shelf | None):
        """`below`: the shelf of the block whose backward comes next."""
        self._pool, self._below = pool, below
        self._tensors: list[torch.Tensor | None] = []  # None: on the host alone
        self._copies: list[tuple[torch.Tensor, torch.Tensor] | None] = []  # (buffer, same shape and strides, no memory)
        self._moved: torch.cuda.Event | None = None  # the last copy, in whichever direction

    def put(self, tensor: torch.Tensor) -> int:
        """Keep a tensor; returns its place."""
        tensor = tensor.detach()
        buffer = None if self._pool is None else self._pool.take(tensor)
        self._tensors.append(tensor)
        self._copies.append(None if buffer is None else (buffer, torch.empty_strided(
            tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta"
        )))  # fmt: skip
        if buffer is not None:
            self._copy([(_seen_as(buffer, tensor), tensor)], tensor.device)
        return len(self._tensors) - 1

    def get(self, place: int) -> torch.Tensor:
        """The tensor at `place`, on its device. The shelf below begins to bring back its own."""
        self._return()
        if self._moved is not None:
            torch.cuda.current_stream().wait_event(self._moved)
        if self._below is not None:
            self._below._return()
        tensor = self._tensors[place]
        assert tensor is not None
        return tensor

    def leave_device(self) -> None:
        """Give back the device memory of what the host has a copy of."""
        if self._moved is not None:
            torch.cuda.current_stream().wait_event(self._moved)
        self._tensors = [None if copy else tensor for tensor, copy in zip(self._tensors, self._copies)]

    def _return(self) -> None:
        missing = [i for i, tensor in enumerate(self._tensors) if tensor is None]
        if not missing:
            return
        assert self._pool is not None
        pairs = []
        for i in missing:
            buffer, like = self._copies[i]  # type: ignore[misc]  # what left the device has a copy
            tensor = torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device=self._pool.device)
            self._tensors[i] = tensor
            pairs.append((tensor, _seen_as(buffer, tensor)))
        self._copy(pairs, self._pool.device)

    def _copy(self, pairs: list[tuple[torch.Tensor, torch.Tensor]], device: torch.device) -> None:
        """Copy (to, from), on a GPU behind all that its stream has to do so far, which made or used this memory."""
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
        self._moved = torch.cuda.Event()
        self._moved.record(stream)

    def __del__(self) -> None:
        if self._pool is not None:
            for copy in self._copies:
                if copy is not None:
                    self._pool.give_back(copy[0])


def _seen_as(buffer: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    return buffer.view(tensor.dtype).view(tensor.shape)


class HostPool:
    """Pinned host memory of at most `limit` bytes for tensors of one device. Buffers are kept and used again."""

    def __init__(self, limit: float):
        self.limit = limit
        self.held_bytes = 0  # by all buffers, in use or not
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
        """uint8 [bytes of `tensor`], or None where the limit leaves no room for it."""
        size = tensor.numel() * tensor.element_size()
        if size == 0:  # `checkpoint` of older torch saves an empty tensor of the host's beside its input
            return None
        self.device = tensor.device
        if free := self._free.get(size):
            return free.pop()
        if self.held_bytes + size > self.limit:
            return None
        self.held_bytes += size
        buffer = torch.empty(size, dtype=torch.uint8)
        if tensor.is_cuda:
            # torch's own pinned memory comes in powers of two: up to twice what is asked for.
            torch.cuda.check_error(int(torch.cuda.cudart().cudaHostRegister(buffer.data_ptr(), size, 0)))
            self._registered.append(buffer)
        return buffer

    def give_back(self, buffer: torch.Tensor) -> None:
        self._free.setdefault(len(buffer), []).append(buffer)

    def __del__(self) -> None:
        if self._registered:
            self.stream.synchronize()  # the last copies may still run
        for buffer in self._registered:
            torch.cuda.cudart().cudaHostUnregister(buffer.data_ptr())


# -- rows in slices ---------------------------------------------------------------------------------------------------


def in_slices(
    function: Callable[[torch.Tensor], torch.Tensor],
    x: torch.Tensor,
    rows: int,
    weights: Sequence[torch.Tensor],
) -> torch.Tensor:
    """`function(x)` for one that maps rows [n, h] to rows [n, h] one by one, `rows` of them at a time, both ways.

    Backward computes each slice again and adds up the gradients of `weights`, all that `function` uses, in fp32. Only x
    is kept, and it is saved before the work begins: the re-run of a block, which ends when it has saved what the
    forward saved, leaves the work out.
    """
    if not (torch.is_grad_enabled() and x.requires_grad):
        return torch.cat([function(part) for part in x.split(rows)])
    return _InSlices.apply(function, rows, [_Hold.apply(x)], x, *weights)


class _Hold(torch.autograd.Function):
    """Saves its input, for a backward that is not its own. What it saves goes with the tensor that it returns."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.new_empty(0)

    @staticmethod
    def backward(ctx, grad):
        raise AssertionError("only what _Hold saves is used, not what it returns")


class _InSlices(torch.autograd.Function):
    @staticmethod
    def forward(ctx, function, rows: int, held: list[torch.Tensor], x, *weights):
        ctx.function, ctx.rows, ctx.weights = function, rows, weights
        ctx.held = held  # in a list it is not an input, to which a gradient would go
        out = torch.empty_like(x)
        for part, part_out in zip(x.split(rows), out.split(rows)):
            part_out.copy_(function(part))
        return out

    @staticmethod
    def backward(ctx, grad_out):
        held, ctx.held = ctx.held, None  # it would keep x until the whole graph goes
        (x,) = held[0].grad_fn.saved_tensors
        needed = ctx.needs_input_grad[4:]
        trained = [weight for weight, needs in zip(ctx.weights, needed) if needs]
        sums: list[torch.Tensor | None] = [None] * len(trained)
        grad_x = torch.empty_like(x)
        for part, part_grad, part_grad_x in zip(*(t.split(ctx.rows) for t in (x, grad_out, grad_x))):
            part = part.detach().requires_grad_()
            with torch.enable_grad():
                out = ctx.function(part)
            # A weight without a gradient has added it to its `main_grad` already: see `ksa_model.linear`.
            found, *of_weights = torch.autograd.grad(out, (part, *trained), part_grad, allow_unused=True)
            part_grad_x.copy_(found)
            for i, found in enumerate(of_weights):
                if found is not None:
                    total = sums[i]
                    sums[i] = found.to(torch.float32, copy=True) if total is None else total.add_(found)
        of_trained = iter(total if total is None else total.to(w.dtype) for total, w in zip(sums, trained))
        return None, None, None, grad_x, *(next(of_trained) if needs else None for needs in needed)
