"""Context parallelism: what the ranks of one sample send each other, each exchange with its own backward.

Legend: P context ranks, T text rows of the whole sample, n = T / 2P rows of a slice, h halo rows, G key/value heads, d
head dimension.

The sample is cut into 2P slices; rank r holds slices r and 2P-1-r ("zigzag"), so that causal work is even. A `K` layer
needs two things from elsewhere: a *halo*, the last rows of the slice before each of its own two, and the *summaries* of
the whole sample. An `F` layer needs all text keys and values. Exchanges start without waiting and are waited for where
they are used, so that work in between overlaps.
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

    def swap(self, rank: int, outgoing: list[torch.Tensor], incoming: list[torch.Tensor], kind: str) -> list:
        """The operations of sending `outgoing` to context rank `rank` and receiving as much into `incoming`."""
        peer = dist.get_global_rank(self.group, rank)
        self.received_bytes[kind] += sum(x.numel() * x.element_size() for x in incoming)
        sends = [dist.P2POp(dist.isend, x.contiguous(), peer, self.group) for x in outgoing]
        return sends + [dist.P2POp(dist.irecv, x, peer, self.group) for x in incoming]


Pair = tuple[torch.Tensor, torch.Tensor]  # keys and values, or their gradients, [rows, G, d] each


class Pending:
    """Keys and values under way."""

    def __init__(self, works: list, arriving: Pair):
        self._works, self._arriving = works, arriving

    def wait(self) -> Pair:
        for work in self._works:
            work.wait()
        return self._arriving


class Returning:
    """Gradients on their way back to the rows that they belong to."""

    def __init__(self, works: list, add: Callable[[Pair | None], Pair]):
        self._works, self._add = works, add

    def add_to(self, total: Pair | None) -> Pair:
        """What has arrived, added to `total` in place where there is one."""
        for work in self._works:
            work.wait()
        return self._add(total)


class Exchange:
    """How a rank's own keys and values [rows, G, d] become those its queries see, and gradients come back.

    This base class exchanges nothing.
    """

    travels = False  # whether anything is sent

    def start(self, k: torch.Tensor, v: torch.Tensor) -> Pending:
        return Pending([], (k, v))

    def start_backward(self, grad_k: torch.Tensor, grad_v: torch.Tensor) -> Returning:
        return Returning([], lambda total: _sum(total, (grad_k, grad_v)))


@dataclass(frozen=True)
class Halo(Exchange):
    """The last `halo_rows` rows of the slices before this rank's two.

    forward: [slice_a | slice_b] -> [halo_a | halo_b]; the sample's first halo is zeros, which no key range reaches.
    backward sends each halo's gradient back to the rows it is a copy of; there must be a total to add it to.
    """

    travels = True

    context: ContextParallel
    halo_rows: int

    def start(self, k: torch.Tensor, v: torch.Tensor) -> Pending:
        h, n = self.halo_rows, len(k) // 2
        halos = k.new_zeros(2 * h, *k.shape[1:]), v.new_zeros(2 * h, *v.shape[1:])
        works = self._swap(
            to_next=[x[n - h : n] for x in (k, v)],
            to_previous=[x[2 * n - h :] for x in (k, v)],
            from_previous=[x[:h] for x in halos],
            from_next=[x[h:] for x in halos],
        )
        return Pending(works, halos)

    def start_backward(self, grad_k: torch.Tensor, grad_v: torch.Tensor) -> Returning:
        h, grads = self.halo_rows, (grad_k, grad_v)
        from_next, from_previous = ([torch.zeros_like(x[:h]) for x in grads] for _ in range(2))
        works = self._swap(
            to_next=[x[h:] for x in grads],
            to_previous=[x[:h] for x in grads],
            from_previous=from_previous,
            from_next=from_next,
        )

        def add(total: Pair | None) -> Pair:
            assert total is not None
            n = len(total[0]) // 2
            for rows, first, second in zip(total, from_next, from_previous):
                rows[n - h : n] += first
                rows[2 * n - h :] += second
            return total

        return Returning(works, add)

    def _swap(self, *, to_next, to_previous, from_previous, from_next) -> list:
        """Exchange with both neighbours. Slice r is followed by slice r+1 on the next rank; slice 2P-1-r follows slice
        2P-2-r, also on the next rank; in the middle of the sample, slices P-1 and P, both are on the last rank."""
        rank, last = self.context.rank, self.context.size - 1
        operations: list = []
        for neighbour, outgoing, incoming in ((rank - 1, to_previous, from_previous), (rank + 1, to_next, from_next)):
            if 0 <= neighbour <= last:
                operations += self.context.swap(neighbour, outgoing, incoming, "halo")
        if rank == last:
            for target, source in zip(from_next, to_next):
                target.copy_(source)
        return dist.batch_isend_irecv(operations) if operations else []


@dataclass(frozen=True)
class Gather(Exchange):
    """Every rank's rows, in the order of the sample. backward: the sum of all ranks' gradients for this rank's rows.

    Slices go from rank to rank, each straight into its place: a gathering collective leaves them in the order of the
    ranks, and to put them in order of a million rows is a pass over gigabytes, three times in a step.
    """

    travels = True

    context: ContextParallel
    kind: str  # what the byte counter calls it

    def start(self, k: torch.Tensor, v: torch.Tensor) -> Pending:
        size = self.context.size
        gathered = tuple(x.new_empty(size * len(x), *x.shape[1:]) for x in (k, v))
        operations: list = []
        for rank in range(size):
            places = [place for x in gathered for place in self._slices_of(rank, x)]
            own = [half for x in (k, v) for half in x.chunk(2)]
            if rank == self.context.rank:
                for place, half in zip(places, own):
                    place.copy_(half)
            else:
                operations += self.context.swap(rank, own, places, self.kind)
        return Pending(dist.batch_isend_irecv(operations), gathered)  # type: ignore[arg-type]

    def start_backward(self, grad_k: torch.Tensor, grad_v: torch.Tensor) -> Returning:
        size, grads = self.context.size, (grad_k, grad_v)
        arriving = [x.new_empty(size - 1, len(x) // size, *x.shape[1:]) for x in grads]
        operations: list = []
        for place, rank in enumerate(rank for rank in range(size) if rank != self.context.rank):
            outgoing = [half for x in grads for half in self._slices_of(rank, x)]
            incoming = [half for x in arriving for half in x[place].chunk(2)]
            operations += self.context.swap(rank, outgoing, incoming, self.kind)
        works = dist.batch_isend_irecv(operations)

        def add(total: Pair | None) -> Pair:
            sums = [x.sum(0) if size > 2 else x[0] for x in arriving]
            for rows, grad in zip(sums, grads):
                for half, own in zip(rows.chunk(2), self._slices_of(self.context.rank, grad)):
                    half += own
            return _sum(total, (sums[0], sums[1]))

        return Returning(works, add)

    def _slices_of(self, rank: int, x: torch.Tensor) -> list[torch.Tensor]:
        """Of rows of the whole sample, the two slices that `rank` holds."""
        slices = x.chunk(2 * self.context.size)
        return [slices[rank], slices[2 * self.context.size - 1 - rank]]


def _sum(total: Pair | None, more: Pair) -> Pair:
    """`more`, added to `total` in place where there is one."""
    if total is None:
        return more
    for rows, some in zip(total, more):
        rows += some
    return total


def gather(context: ContextParallel | None, kind: str) -> Exchange:
    """The exchange of a part that sees the whole sample."""
    return Exchange() if context is None or context.size == 1 else Gather(context, kind)
