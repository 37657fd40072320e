"""Parts of an attention, and the softmax that they share.

Legend: T query rows, N key rows, H query heads, G key/value heads, d head dimension.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from ksa_model.layout.ranges import KeyRanges


class Part(NamedTuple):
    """One set of keys: k and v [N, G, d], and the range of keys that each query row attends to."""

    k: torch.Tensor
    v: torch.Tensor
    ranges: KeyRanges


@dataclass
class Softmax:
    """Attention of every row over the parts computed so far: out [T, H, d] in the query's dtype, lse [H, T] fp32.

    `lse` is the log-sum-exp of a row's scores in natural logarithms. A row without any key has out 0 and lse +inf:
    exp(score - inf) = 0 keeps such a row out of every gradient without a mask.
    """

    out: torch.Tensor
    lse: torch.Tensor
