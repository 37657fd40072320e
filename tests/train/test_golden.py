"""The default run's first losses, as recorded: a change that alters training shows here first."""

import json
import sys

import pytest

from tests.golden.record_losses import GOLDEN, STEPS, first_steps
from tests.ranks import run_on_ranks


def test_default_run_starts_as_recorded(tmp_path):
    ((fingerprint, steps),) = run_on_ranks(1, first_steps, str(tmp_path), str(tmp_path / "cache"))
    golden = json.loads(GOLDEN.read_text())
    if fingerprint not in golden:
        pytest.skip(
            f"no golden losses for the standard library of Python {sys.version.split()[0]} here; recorded for "
            f"{', '.join(entry['python'] for entry in golden.values())}"
        )
    assert len(steps) == STEPS
    for got, want in zip(steps, golden[fingerprint]["steps"], strict=True):
        # Matrix products round differently from one processor to the next.
        assert got["loss"] == pytest.approx(want["loss"], rel=2e-4)
        assert got["grad_norm"] == pytest.approx(want["grad_norm"], rel=2e-3)
