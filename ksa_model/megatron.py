"""What is used of megatron-core: the only module that imports it.

Its package imports all of its parts, and those bring in torch's compiler, to decorate fusions that nothing here calls,
and wandb: 3 s of CPU for every rank that starts, which is more than all that is used. See `lean_imports`.
"""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Callable, Iterator

import torch


def _uncompiled(function: Callable | None = None, **_: object) -> Callable:
    """Stands for `torch.compile`, with or without options."""
    return function or (lambda function: function)


@contextlib.contextmanager
def lean_imports() -> Iterator[None]:
    """For imports: `torch.compile` leaves a function as it is, and wandb is not there unless it was imported before."""
    compiler = torch.compile
    torch.compile = _uncompiled  # type: ignore[assignment]
    hides_wandb = "wandb" not in sys.modules
    if hides_wandb:
        sys.modules["wandb"] = None  # type: ignore[assignment]  # an import of it fails
    try:
        yield
    finally:
        torch.compile = compiler
        if hides_wandb:
            del sys.modules["wandb"]


# It says this four times on import; nothing here uses either library.
warnings.filterwarnings("ignore", message=".*Transformer Engine and Apex are not installed.*", category=UserWarning)
# Its row-parallel layer calls its own helper without a group although it was given one.
warnings.filterwarnings("ignore", message=".*tp_group is None, using default tp group.*", category=DeprecationWarning)
# It still calls collectives by the names that newer torch renames.
warnings.filterwarnings("ignore", message=r".*`torch\.distributed\.\w+` is deprecated.*", category=FutureWarning)

with lean_imports():
    from megatron.core import parallel_state
    from megatron.core.model_parallel_config import ModelParallelConfig
    from megatron.core.tensor_parallel import (
        ColumnParallelLinear,
        RowParallelLinear,
        VocabParallelEmbedding,
        gather_from_tensor_model_parallel_region,
        vocab_parallel_cross_entropy,
    )
    from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
    from megatron.core.tensor_parallel.mappings import (
        copy_to_tensor_model_parallel_region,
        gather_from_sequence_parallel_region,
        reduce_from_tensor_model_parallel_region,
        reduce_scatter_to_sequence_parallel_region,
    )

__all__ = [
    "ColumnParallelLinear",
    "ModelParallelConfig",
    "RowParallelLinear",
    "VocabParallelEmbedding",
    "copy_to_tensor_model_parallel_region",
    "gather_from_sequence_parallel_region",
    "gather_from_tensor_model_parallel_region",
    "lean_imports",
    "parallel_state",
    "reduce_from_tensor_model_parallel_region",
    "reduce_scatter_to_sequence_parallel_region",
    "set_tensor_model_parallel_attributes",
    "vocab_parallel_cross_entropy",
]
