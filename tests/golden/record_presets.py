"""Record what every file of the config groups composes to: `python -m tests.golden.record_presets`.

`presets.txt` holds the default run in full, and of each preset the keys in which it differs from the default run. Run
it when a default or a preset is meant to change.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

GOLDEN = Path(__file__).with_name("presets.txt")
GROUPS = ("model", "data", "optim", "stage", "memory", "logging")  # chosen in config.yaml
ADDED = ("experiment", "evidence")  # given as +group=option


def choices() -> list[str]:
    """One override for every file of a group."""
    from train.config.compose import CONFIGS

    return [
        f"{prefix}{group}={path.stem}"
        for prefix, groups in (("", GROUPS), ("+", ADDED))
        for group in groups
        for path in sorted((CONFIGS / group).glob("[a-z]*.yaml"))
    ]


def composed() -> str:
    """A paragraph for each choice: the default run with all keys, then every preset with those that differ."""
    from train.config.compose import compose
    from train.config.conversion import flatten

    default = flatten(compose([]))
    paragraphs = [_paragraph("(the default run)", default)]
    for choice in choices():
        values = flatten(compose([choice]))
        assert values.keys() == default.keys()
        paragraphs.append(_paragraph(choice, {key: value for key, value in values.items() if value != default[key]}))
    return "\n".join(paragraphs)


def _paragraph(choice: str, values: dict[str, Any]) -> str:
    return "\n".join([choice, *(f"  {key}: {json.dumps(value)}" for key, value in values.items())]) + "\n"


if __name__ == "__main__":
    GOLDEN.write_text(composed())
