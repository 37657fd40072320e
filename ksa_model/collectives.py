"""Context parallelism: what the ranks of one sample send each other, each exchange with its own backward.

Legend: P context ranks, T text rows of the whole sample, n = T / 2P rows of a slice, h halo rows, e features of a row.

The sample is cut into 2P slices; rank r holds slices r and 2P-1-r ("zigzag"), so that causal work is even. A `K` layer
needs two things from elsewhere: a *halo*, the last rows of the slice before each of its own two, and the *summaries* of
the whole sample. An `F` layer needs all text keys and values. All of them travel as one tensor [rows, e] of keys and
values side by side, start without waiting and are waited for where they are used, so that work in between overlaps.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class ContextParallel:
    """The context ranks of this rank's sample. `received_bytes` counts by kind of exchange, forward and backward."""

    group: dist.ProcessGroup
    received_bytes: Counter[str] = field(default_factory=Counter)

    @property
    def size(self) -> int:
        return self.group.size()

    @property
    def rank(self) -> int:
        return self.group.rank()

    def peer(self, rank: int) -> int:
        """Global rank of context rank `rank`, which point-to-point calls ask for."""
        return dist.get_global_rank(self.group, rank)

    def count(self, kind: str, rows: torch.Tensor) -> None:
        self.received_bytes[kind] += rows.numel() * rows.element_size()


class Pending:
    """Keys and values (or their gradients) under way. `wait` returns both, complete."""

    def __init__(self, works: list, finish: Callable[[], torch.Tensor]):
        """`finish` makes one tensor [rows, 2G, d] of what has arrived: keys and values side by side."""
        self._works, self._finish = works, finish

    def wait(self) -> tuple[torch.Tensor, torch.Tensor]:
        for work in self._works:
            work.wait()
        k, v = self._finish().chunk(2, dim=1)
        return k, v


class Exchange:
    """How a rank's own keys and values [rows, G, d] become those its queries see, and gradients come back.

    This base class exchanges nothing.
    """

    travels = False  # whether anything is sent

    def start(self, k: torch.Tensor, v: torch.Tensor) -> Pending | Arrived:
        return Arrived(k, v)

    def start_backward(self, grad_k: torch.Tensor, grad_v: torch.Tensor) -> Pending | Arrived:
        return Arrived(grad_k, grad_v)


@dataclass(frozen=True)
class Arrived:
    """What needs no waiting."""

    k: torch.Tensor
    v: torch.Tensor

    def wait(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.k, self.v


@dataclass(frozen=True)
class Halo(Exchange):
    """This rank's two slices, each behind the last `halo_rows` rows of the slice before it.

    forward: [slice_a | slice_b] -> [halo_a | slice_a | halo_b | slice_b]; the sample's first halo is zeros,
    which no key range reaches. backward sends each halo's gradient back to the rows it is a copy of and adds it there.
    """

    travels = True

    context: ContextParallel
    halo_rows: int

    def start(self, k: torch.Tensor, v: torch.Tensor) -> Pending:
        rows = torch.cat([k, v], dim=1)
        h, n = self.halo_rows, len(rows) // 2
        first, second = rows[:n], rows[n:]
        buffer = rows.new_zeros(2 * (h + n), *rows.shape[1:])
        buffer[h : h + n], buffer[2 * h + n :] = first, second
        return self._swap(
            to_next=first[n - h :],
            to_previous=second[n - h :],
            from_previous=buffer[:h],
            from_next=buffer[h + n : 2 * h + n],
            finish=lambda: buffer,
        )

    def start_backward(self, grad_k: torch.Tensor, grad_v: torch.Tensor) -> Pending:
        grad = torch.cat([grad_k, grad_v], dim=1)
        h = self.halo_rows
        n = len(grad) // 2 - h
        rows = torch.cat([grad[h : h + n], grad[2 * h + n :]])
        from_next, from_previous = torch.zeros_like(grad[:h]), torch.zeros_like(grad[:h])

        def finish() -> torch.Tensor:
            rows[n - h : n] += from_next
            rows[2 * n - h :] += from_previous
            return rows

        return self._swap(
            to_next=grad[h + n : 2 * h + n],
            to_previous=grad[:h],
            from_previous=from_previous,
            from_next=from_next,
            finish=finish,
        )

    def _swap(self, *, to_next, to_previous, from_previous, from_next, finish) -> Pending:
        """Exchange with both neighbours. Slice r is followed by slice r+1 on the next rank; slice 2P-1-r follows slice
        2P-2-r, also on the next rank; in the middle of the sample, slices P-1 and P, both are on the last rank."""
        context, rank, last = self.context, self.context.rank, self.context.size - 1
        operations = []
        for neighbour, outgoing, incoming in ((rank - 1, to_previous, from_previous), (rank + 1, to_next, from_next)):
            if 0 <= neighbour <= last:
                peer = context.peer(neighbour)
                operations += [dist.P2POp(dist.isend, outgoing.contiguous(), peer, context.group),
                               dist.P2POp(dist.irecv, incoming, peer, context.group)]  # fmt: skip
                context.count("halo", incoming)
        if rank == last:
            from_next.copy_(to_next)
        return Pending(dist.batch_isend_irecv(operations) if operations else [], finish)


@dataclass(frozen=True)
class Gather(Exchange):
    """Every rank's rows, in the order of the sample. backward: the sum of all ranks' gradients for this rank's rows."""

    travels = True

    context: ContextParallel
    kind: str  # what the byte counter calls it

    def start(self, k: torch.Tensor, v: torch.Tensor) -> Pending:
        rows = torch.cat([k, v], dim=1)
        by_rank = rows.new_empty(self.context.size * len(rows), *rows.shape[1:])
        work = dist.all_gather_into_tensor(by_rank, rows, group=self.context.group, async_op=True)
        self.context.count(self.kind, by_rank[len(rows) :])

        def finish() -> torch.Tensor:
            slices = by_rank.unflatten(0, (self.context.size, 2, -1))
            return torch.cat([slices[:, 0], slices[:, 1].flip(0)]).flatten(0, 1)

        return Pending([work], finish)

    def start_backward(self, grad_k: torch.Tensor, grad_v: torch.Tensor) -> Pending:
        size, (rows_of_all, heads, features) = self.context.size, grad_k.shape
        by_rank = grad_k.new_empty(rows_of_all, 2 * heads, features)
        # Straight into their places: of a million rows, one more copy is gigabytes.
        places = by_rank.unflatten(0, (size, 2, -1))
        for grad, half in ((grad_k, slice(0, heads)), (grad_v, slice(heads, None))):
            slices = grad.unflatten(0, (2 * size, -1))
            for rank in range(size):
                places[rank, 0, :, half], places[rank, 1, :, half] = slices[rank], slices[2 * size - 1 - rank]
        rows = by_rank.new_empty(rows_of_all // size, 2 * heads, features)
        work = dist.reduce_scatter_tensor(rows, by_rank, group=self.context.group, async_op=True)
        self.context.count(self.kind, by_rank[len(rows) :])
        return Pending([work], lambda: rows)


def halo(context: ContextParallel | None, rows: int) -> Exchange:
    """The exchange of a part that looks `rows` rows back."""
    return Exchange() if context is None or context.size == 1 or rows == 0 else Halo(context, rows)


def gather(context: ContextParallel | None, kind: str) -> Exchange:
    """The exchange of a part that sees the whole sample."""
    return Exchange() if context is None or context.size == 1 else Gather(context, kind)
