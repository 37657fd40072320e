"""Run directories as a finished run leaves them, without training."""

from __future__ import annotations

import json
import struct
import zlib
from pathlib import Path

import yaml

MODEL = {"hidden_size": 64, "num_layers": 4, "num_heads": 2, "num_kv_heads": 2, "head_dim": 32, "ffn_size": 128,
         "vocab_size": 512, "layer_pattern": "KKKF", "chunk_size": 8, "window_chunks": 4}  # fmt: skip


def write_run(
    directory: Path, *, steps: int = 40, of: int = 40, held_out: bool = True, extra: str = "", **model
) -> Path:
    """A run directory with records that fall from 6 towards 3 + k/100."""
    directory.mkdir(parents=True)
    config = {"model": {**MODEL, **model}, "seq_len": 512, "run": {"name": directory.name, "root": "x", "steps": of}}
    (directory / "config.yaml").write_text(yaml.safe_dump(config))
    lines = []
    for step in range(1, steps + 1):
        loss = 3 + config["model"]["chunk_size"] / 100 + 3 * 0.9**step
        lines.append({"step": step, "tokens": 512 * step, "loss": loss, "tokens_per_second": 1000.0 + step})
        if held_out and step % 20 == 0:
            lines.append({"step": step, "tokens": 512 * step, "validation_loss": loss + 0.5})
    (directory / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines) + extra)
    return directory


def probe_record(step: int, recall: float, *lengths: int, task: str = "needle") -> dict:
    """Probes of a task after `step`, as `train.evaluate.in_loop` scores them: 6 near answers and 2 far ones."""
    scores = {
        "exact_match": 0.0,
        "token_accuracy": recall,
        "answers": 8,
        "by_distance": [[64, recall, 6], [256, recall / 2, 2]],
    }
    return {
        "step": step,
        "tokens": 512 * step,
        "probes": {task: {str(n): scores for n in lengths or (512,)}},
        "probe_seconds": 0.5,
    }


def write_records(directory: Path, records: list[dict], **config) -> Path:
    """A run directory with these records; `config` has values of its sections."""
    write_run(directory)
    (directory / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in records))
    path = directory / "config.yaml"
    saved = yaml.safe_load(path.read_text())
    for section, values in config.items():
        saved[section] = saved.get(section, {}) | values
    path.write_text(yaml.safe_dump(saved))
    return directory


def report_record(step: int, step_seconds: float | None = 2.0, ranks: int | None = 1) -> dict:
    """What a run reports after `step`; without the numbers that are None."""
    record = {"step": step, "tokens": 512 * step, "loss": 3 + 1 / step, "tokens_per_second": 256.0}
    return record | {k: v for k, v in (("step_seconds", step_seconds), ("ranks", ranks)) if v is not None}


def colors(png: bytes) -> int:
    """Distinct pixel values of a PNG, so that a blank one shows."""
    width, height, _, kind = struct.unpack(">IIBB", png[16:26])
    channels, data, at = {2: 3, 6: 4}[kind], b"", 8
    while at < len(png):
        length, name = struct.unpack(">I4s", png[at : at + 8])
        data += png[at + 8 : at + 8 + length] if name == b"IDAT" else b""
        at += 12 + length
    rows = zlib.decompress(data)
    assert len(rows) == height * (1 + width * channels)
    return len({rows[i : i + 8] for i in range(0, len(rows), 8)})
