"""Record the first losses of the default run for this interpreter's standard library:
`python -m tests.golden.record_losses`. Run it when a change is meant to alter them, and say so in the commit."""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

STEPS = 4
GOLDEN = Path(__file__).with_name("default_losses.json")


def first_steps(root: str, cache: str) -> tuple[str, list[dict]]:
    """The data fingerprint, and {loss, grad_norm} of the first steps of `python -m train` on one rank."""
    from data_pipeline.text.prepare import prepare
    from tests.bench.workload import configured
    from train.logs.metrics import read_records
    from train.trainer import train

    overrides = [f"run.root={root}", f"data.cache_dir={cache}", "run.log_every=1", f"run.stop_at_step={STEPS}"]
    overrides += ["run.eval_samples=0", "run.device=cpu", "logging.wandb=off", "logging.progress=false"]
    config = configured(overrides)
    result = train(config)
    records = [r for r in read_records(result.directory / "metrics.jsonl") if "loss" in r]
    fingerprint = prepare(config.data).fingerprint
    return fingerprint, [{"loss": r["loss"], "grad_norm": r["grad_norm"]} for r in records]


def main() -> None:
    with tempfile.TemporaryDirectory() as directory:
        fingerprint, losses = first_steps(directory, f"{directory}/cache")
    golden = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}
    golden[fingerprint] = {"python": sys.version.split()[0], "steps": losses}
    GOLDEN.write_text(json.dumps(golden, indent=1) + "\n")
    print(json.dumps(golden[fingerprint], indent=1))


if __name__ == "__main__":
    main()
