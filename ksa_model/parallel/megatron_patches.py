"""Changes to megatron-core 0.16.1, the pinned version: a faster import, and warnings that no user can act on.

Each change gives its reason and the test in `tests/ksa_model/parallel/test_megatron_patches.py` that fails when
megatron-core no longer needs it.
"""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Callable, Iterator

import torch


@contextlib.contextmanager
def lean_imports() -> Iterator[None]:
    """While modules are imported: `torch.compile` returns its function unchanged, and wandb cannot be imported.

    `megatron.core` imports all of its parts. Their decorators import torch's compiler, for fusions that are not used
    here, and one part imports wandb. Together they take 3 s of CPU time on every rank.
    Test: `test_megatron_imports_the_compiler_and_wandb`.
    """
    compiler = torch.compile
    torch.compile = _uncompiled  # type: ignore[assignment]
    hides_wandb = "wandb" not in sys.modules
    if hides_wandb:
        sys.modules["wandb"] = None  # type: ignore[assignment]  # makes `import wandb` fail
    try:
        yield
    finally:
        torch.compile = compiler
        if hides_wandb:
            del sys.modules["wandb"]


def _uncompiled(function: Callable | None = None, **_: object) -> Callable:
    """Replaces `torch.compile`, with or without options."""
    return function or (lambda function: function)


def silence_warnings() -> None:
    """Drop three warnings of megatron-core and nothing else.

    - Transformer Engine and Apex are missing, reported by four of its modules on import. Nothing here uses them.
      Test: `test_megatron_reports_missing_libraries`.
    - `RowParallelLinear` received a group and calls its own helper without it.
      Test: `test_row_parallel_linear_drops_its_group`.
    - It calls collectives by names that torch has deprecated. Test: `test_megatron_calls_deprecated_collectives`.
    """
    for message, category in (
        (".*Transformer Engine and Apex are not installed.*", UserWarning),
        (".*tp_group is None, using default tp group.*", DeprecationWarning),
        (r".*`torch\.distributed\.\w+` is deprecated.*", FutureWarning),
    ):
        warnings.filterwarnings("ignore", message=message, category=category)
