"""Context parallelism: the exchanges between the ranks that share a sample, each with its own backward.

Legend: P context ranks, T text rows of the whole sample, n = T / 2P rows of a slice, h halo rows, G key/value heads, d
head dimension.

The sample is cut into 2P slices. Rank r holds slices r and 2P-1-r ("zigzag"), which balances causal work. A `K` layer
needs two things from other ranks: a *halo*, the last rows of the slice before each of its own two, and the *summaries*
of the whole sample. An `F` layer needs all text keys and values. An exchange starts without waiting and is waited for
where its result is used, so that it overlaps with the work in between.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class ContextParallel:
    """The ranks that share this rank's sample. `received_bytes` counts by kind of exchange, forward and backward."""

    group: dist.ProcessGroup
    received_bytes: Counter[str] = field(default_factory=Counter)

    @property
    def size(self) -> int:
        return self.group.size()

    @property
    def rank(self) -> int:
        return self.group.rank()

    def swap(self, rank: int, outgoing: list[torch.Tensor], incoming: list[torch.Tensor], kind: str) -> list:
        """The operations that send `outgoing` to context rank `rank` and receive its tensors into `incoming`."""
        peer = dist.get_global_rank(self.group, rank)
        self.received_bytes[kind] += sum(x.numel() * x.element_size() for x in incoming)
        sends = [dist.P2POp(dist.isend, x.contiguous(), peer, self.group) for x in outgoing]
        return sends + [dist.P2POp(dist.irecv, x, peer, self.group) for x in incoming]


Pair = tuple[torch.Tensor, torch.Tensor]  # keys and values, or their gradients, [rows, G, d] each


class PendingKeys:
    """Keys and values that are being received."""

    def __init__(self, works: list, arriving: Pair):
        self._works, self._arriving = works, arriving

    def wait(self) -> Pair:
        for work in self._works:
            work.wait()
        return self._arriving


class PendingGradients:
    """Gradients that are being received for this rank's own rows."""

    def __init__(self, works: list, add: Callable[[Pair | None], Pair]):
        self._works, self._add = works, add

    def add_to(self, total: Pair | None) -> Pair:
        """`total` plus the received gradients, added in place; the received gradients alone if `total` is None."""
        for work in self._works:
            work.wait()
        return self._add(total)


class Exchange:
    """Turns a rank's own keys and values [rows, G, d] into those its queries need, and returns their gradients.

    This base class exchanges nothing.
    """

    communicates = False

    def start(self, k: torch.Tensor, v: torch.Tensor) -> PendingKeys:
        return PendingKeys([], (k, v))

    def start_backward(self, grad_k: torch.Tensor, grad_v: torch.Tensor) -> PendingGradients:
        return PendingGradients([], lambda total: _sum(total, (grad_k, grad_v)))


@dataclass(frozen=True)
class Halo(Exchange):
    """The last `halo_rows` rows of the slice before each of this rank's two slices.

    Forward: [slice_a | slice_b] -> [halo_a | halo_b]. The halo before the sample is zeros, which no key range reaches.
    Backward sends the gradient of each halo back to the rows that it copies; `add_to` needs a total.
    """

    communicates = True

    context: ContextParallel
    halo_rows: int

    def start(self, k: torch.Tensor, v: torch.Tensor) -> PendingKeys:
        h, n = self.halo_rows, len(k) // 2
        halos = k.new_zeros(2 * h, *k.shape[1:]), v.new_zeros(2 * h, *v.shape[1:])
        works = self._swap(
            to_next=[x[n - h : n] for x in (k, v)],
            to_previous=[x[2 * n - h :] for x in (k, v)],
            from_previous=[x[:h] for x in halos],
            from_next=[x[h:] for x in halos],
        )
        return PendingKeys(works, halos)

    def start_backward(self, grad_k: torch.Tensor, grad_v: torch.Tensor) -> PendingGradients:
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

        return PendingGradients(works, add)

    def _swap(self, *, to_next, to_previous, from_previous, from_next) -> list:
        """Exchange with both neighbours. Slice r comes before slice r+1, and slice 2P-1-r after slice 2P-2-r; both of
        these are on the next rank. The slices in the middle of the sample, P-1 and P, are both on the last rank."""
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
    """The rows of all ranks, in the order of the sample. Backward sums all ranks' gradients for this rank's rows.

    Each slice is received directly where it belongs. An all-gather would leave slices in rank order, and reordering a
    million rows is a pass over gigabytes, three times per step.
    """

    communicates = True

    context: ContextParallel
    kind: str  # the name in `received_bytes`

    def start(self, k: torch.Tensor, v: torch.Tensor) -> PendingKeys:
        size = self.context.size
        gathered = tuple(x.new_empty(size * len(x), *x.shape[1:]) for x in (k, v))
        operations: list = []
        for rank in range(size):
            targets = [target for x in gathered for target in self._slices_of(rank, x)]
            own = [half for x in (k, v) for half in x.chunk(2)]
            if rank == self.context.rank:
                for target, half in zip(targets, own):
                    target.copy_(half)
            else:
                operations += self.context.swap(rank, own, targets, self.kind)
        return PendingKeys(dist.batch_isend_irecv(operations), gathered)  # type: ignore[arg-type]

    def start_backward(self, grad_k: torch.Tensor, grad_v: torch.Tensor) -> PendingGradients:
        size, grads = self.context.size, (grad_k, grad_v)
        arriving = [x.new_empty(size - 1, len(x) // size, *x.shape[1:]) for x in grads]
        operations: list = []
        for index, rank in enumerate(rank for rank in range(size) if rank != self.context.rank):
            outgoing = [half for x in grads for half in self._slices_of(rank, x)]
            incoming = [half for x in arriving for half in x[index].chunk(2)]
            operations += self.context.swap(rank, outgoing, incoming, self.kind)
        works = dist.batch_isend_irecv(operations)

        def add(total: Pair | None) -> Pair:
            sums = [x.sum(0) if size > 2 else x[0] for x in arriving]
            for rows, grad in zip(sums, grads):
                for half, own in zip(rows.chunk(2), self._slices_of(self.context.rank, grad)):
                    half += own
            return _sum(total, (sums[0], sums[1]))

        return PendingGradients(works, add)

    def _slices_of(self, rank: int, x: torch.Tensor) -> list[torch.Tensor]:
        """The two slices of `rank` in x, which holds the rows of the whole sample."""
        slices = x.chunk(2 * self.context.size)
        return [slices[rank], slices[2 * self.context.size - 1 - rank]]


def _sum(total: Pair | None, more: Pair) -> Pair:
    """`total` plus `more`, added in place; `more` if `total` is None."""
    if total is None:
        return more
    for rows, added in zip(total, more):
        rows += added
    return total


def gather_exchange(context: ContextParallel | None, kind: str) -> Exchange:
    """The exchange of a part that attends to the whole sample."""
    return Exchange() if context is None or context.size == 1 else Gather(context, kind)
