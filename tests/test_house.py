"""Rules of the house that no single test of a room can see."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("ksa_model", "data_pipeline", "train", "launch")

# Who may import whom, and which libraries have one door only.
FORBIDDEN = {
    "ksa_model": {"train", "data_pipeline", "launch", "hydra", "omegaconf", "deepspeed", "wandb"},
    "data_pipeline": {"train", "ksa_model", "launch", "hydra", "omegaconf", "deepspeed", "megatron", "torch", "wandb"},
    "train": {"launch"},
    "launch": {"ksa_model", "data_pipeline", "deepspeed", "megatron"},
}
ONE_DOOR = {"deepspeed": "train/engine.py", "wandb": "train/metrics.py"}


def sources(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def imported(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute here"
            names.add(node.module or "")
    return names


@pytest.mark.parametrize("package", PACKAGES)
def test_import_direction(package):
    for path in sources(package):
        wrong = {name for name in imported(path) if name.split(".")[0] in FORBIDDEN[package]}
        assert not wrong, f"{path.relative_to(ROOT)} imports {sorted(wrong)}"


@pytest.mark.parametrize("library, door", ONE_DOOR.items())
def test_one_door(library, door):
    users = {
        str(path.relative_to(ROOT))
        for package in PACKAGES
        for path in sources(package)
        if any(name.split(".")[0] == library for name in imported(path))
    }
    assert users == {door}


def test_no_host_sync_outside_metrics():
    """Waiting for the device between log steps would stall it; the places that may are few and named."""
    names = "metrics", "evaluate", "probes", "checkpoint", "generate", "report", "profiling", "parallel"
    may = {f"train/{name}.py" for name in names}
    pattern = re.compile(r"\.item\(\)|\.cpu\(\)|torch\.cuda\.synchronize|\.nonzero\(")
    for package in ("ksa_model", "train"):
        for path in sources(package):
            name = str(path.relative_to(ROOT))
            if name not in may and "/hf/" not in name:
                found = [line for line in path.read_text(encoding="utf-8").splitlines() if pattern.search(line)]
                assert not found, (name, found)


def test_tour_paths_exist():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    tour = readme.split("## The tour", 1)[1].split("\n## ", 1)[0]
    paths = re.findall(r"`([\w/]+\.(?:py|yaml|md))`", tour)
    assert len(paths) >= 6
    missing = [path for path in paths if not (ROOT / path).is_file()]
    assert not missing


def test_readme_files_exist():
    """Pictures and result files the README names are in the repository."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    named = set(re.findall(r"\]\((docs/[^)#]+)\)", readme)) | set(re.findall(r"`(docs/[\w/.-]+)`", readme))
    assert named
    missing = [path for path in named if not (ROOT / path).exists()]
    assert not missing


def test_ci_runs_the_readmes_test_command():
    assert "make test" in (ROOT / "README.md").read_text(encoding="utf-8")
    commands = [line for line in (ROOT / ".ci/run").read_text(encoding="utf-8").splitlines() if "make" in line]
    assert commands == ["exec make test"]


def test_config_keys_are_golden():
    """A new knob shows in the diff of tests/golden/config_keys.txt; write it there when it is meant."""
    from train.config import all_keys

    golden = (ROOT / "tests/golden/config_keys.txt").read_text(encoding="utf-8").split()
    assert sorted(all_keys()) == golden


def test_every_config_key_is_read():
    """A key that nothing reads is a promise nobody keeps."""
    from train.config import all_keys

    code = "\n".join(path.read_text(encoding="utf-8") for package in PACKAGES for path in sources(package))
    sections = {"model", "data", "optim", "parallel", "run", "checkpoint", "logging", "stage", "memory"}
    unread = [key for key in all_keys() if key not in sections and not re.search(rf"\.{key.split('.')[-1]}\b", code)]
    assert not unread


def test_default_yaml_names_every_key():
    """`--cfg job` shows all there is: YAML and dataclasses hold the same keys."""
    from hydra import compose, initialize_config_dir
    from omegaconf import OmegaConf

    from train.config import TrainConfig, all_keys, from_mapping

    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        for overrides in ([], ["model=hybrid_1b9", "data=jsonl", "optim=cosine", "data.path=x"]):
            values = OmegaConf.to_container(compose("config", overrides), resolve=True)
            flat = {key for key in values}
            for key, value in values.items():
                if isinstance(value, dict):
                    flat |= {f"{key}.{inner}" for inner in value}
            assert flat == set(all_keys())
            from_mapping(TrainConfig, values)
