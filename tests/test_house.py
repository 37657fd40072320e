"""Rules of the house that no single test of a room can see."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("ksa_model", "data_pipeline", "train", "launch")

# Libraries with one door only: the files that may import them.
ONE_DOOR = {
    "deepspeed": {"train/distributed/deepspeed_patches.py"},
    "wandb": {"train/logs/tracker.py"},
    "megatron": {"ksa_model/parallel/megatron.py"},
}
# Which packages and libraries a package never imports.
FORBIDDEN = {
    "ksa_model": {"train", "data_pipeline", "launch", "hydra", "omegaconf", "deepspeed", "wandb"},
    "data_pipeline": {"train", "ksa_model", "launch", "hydra", "omegaconf", "deepspeed", "megatron", "torch", "wandb"},
    "train": {"launch"},
    "launch": {"ksa_model", "data_pipeline", "deepspeed", "megatron"},
}
# The rooms of each package, folders and modules, lowest first. A room imports itself and rooms before it, nothing else.
ROOMS = {
    "ksa_model": "config memory layout parallel ops layers loss model decoding objectives hf",
    "data_pipeline": "errors commands values config store packing text corpora open cli prepare tokenizer inspect",
    "train": "config batches optim health stages distributed cadence checkpoint logs hf generate evaluate report "
    "export import_hf dry_run build start state run trainer chain __main__",
    "launch": "errors settings config processes agent runs check local ssh kubernetes slurm sweep_plan sweep __main__",
}


def sources(package: str, root: Path = ROOT) -> list[Path]:
    return sorted((root / package).rglob("*.py"))


def imported(path: Path) -> set[str]:
    """Every module that a file imports at any depth, functions included; `from a import b` counts as `a` and `a.b`."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute here"
            names |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def import_graph(root: Path = ROOT, packages: tuple[str, ...] = PACKAGES) -> dict[str, set[str]]:
    """Module -> the modules of these packages that it imports; without `__init__.py` files, which only offer names."""
    modules = {
        ".".join(path.relative_to(root).with_suffix("").parts): path
        for package in packages
        for path in sources(package, root)
        if path.name != "__init__.py"
    }
    return {name: (imported(path) & modules.keys()) - {name} for name, path in modules.items()}


def circles(graph: dict[str, set[str]]) -> list[str]:
    """The modules that import themselves through others."""

    def reachable(start: str) -> set[str]:
        seen: set[str] = set()
        waiting = list(graph[start])
        while waiting:
            module = waiting.pop()
            if module not in seen:
                seen.add(module)
                waiting += graph[module]
        return seen

    return sorted(module for module in graph if module in reachable(module))


def upward_imports(graph: dict[str, set[str]], rooms: dict[str, str]) -> list[str]:
    """Imports from a room that stands later in its package's list, and modules in a room that is not listed."""
    order = {f"{package}.{room}": i for package, names in rooms.items() for i, room in enumerate(names.split())}
    found = []
    for module, imports in sorted(graph.items()):
        room = ".".join(module.split(".")[:2])
        if room not in order:
            found.append(f"{module}: the room {room} is not in ROOMS")
            continue
        for other in sorted(imports):
            other_room = ".".join(other.split(".")[:2])
            if other_room.split(".")[0] == room.split(".")[0] and order.get(other_room, -1) > order[room]:
                found.append(f"{module} imports {other}, and {other_room} stands above {room}")
    return found


@pytest.mark.parametrize("package", PACKAGES)
def test_import_direction_of_packages(package):
    for path in sources(package):
        wrong = {name for name in imported(path) if name.split(".")[0] in FORBIDDEN[package]}
        assert not wrong, f"{path.relative_to(ROOT)} imports {sorted(wrong)}"


def test_import_direction_of_rooms():
    assert upward_imports(import_graph(), ROOMS) == []
    for package, names in ROOMS.items():
        missing = [
            n for n in names.split() if not ((ROOT / package / n).is_dir() or (ROOT / package / f"{n}.py").is_file())
        ]
        assert not missing, f"{package}: ROOMS names {missing}, which are not there"


def test_no_import_circles():
    assert circles(import_graph()) == []


def test_the_import_tests_find_a_planted_circle(tmp_path):
    """A circle hidden in a function, and an import upwards, are both found."""
    (tmp_path / "p/low").mkdir(parents=True)
    (tmp_path / "p/low/a.py").write_text("from p.low import b\n")
    (tmp_path / "p/low/b.py").write_text("def late():\n    import p.high\n")
    (tmp_path / "p/high.py").write_text("from p.low.a import x\n")
    graph = import_graph(tmp_path, ("p",))
    assert circles(graph) == ["p.high", "p.low.a", "p.low.b"]
    assert upward_imports(graph, {"p": "low high"}) == ["p.low.b imports p.high, and p.high stands above p.low"]
    assert upward_imports(graph, {"p": "high"})[0] == "p.low.a: the room p.low is not in ROOMS"


@pytest.mark.parametrize("library, doors", ONE_DOOR.items())
def test_one_door(library, doors):
    users = {
        str(path.relative_to(ROOT))
        for package in PACKAGES
        for path in sources(package)
        if any(name.split(".")[0] == library for name in imported(path))
    }
    assert users == doors


STARTED = """
import sys, torch
compiler = torch.compile
import train.__main__, train.dry_run, train.report.records
assert "megatron" not in sys.modules, "a configuration is checked without megatron-core"
import train.trainer
brought = {"torch._inductor.compile_fx", "wandb"} & set(sys.modules)
assert not brought, f"the trainer imports {brought}"
assert torch.compile is compiler
import wandb
"""


def test_what_starting_costs():
    """Imports that nothing needs cost every rank seconds; see `ksa_model.parallel.megatron`."""
    done = subprocess.run([sys.executable, "-c", STARTED], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


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
    from train.config.conversion import all_keys
    from train.config.schema import TrainConfig

    golden = (ROOT / "tests/golden/config_keys.txt").read_text(encoding="utf-8").split()
    assert sorted(all_keys(TrainConfig)) == golden


def test_every_key_is_composed():
    """`--cfg job` shows every key, and each can be overridden without `+`."""
    from train.config.compose import compose
    from train.config.conversion import all_keys, from_mapping
    from train.config.schema import TrainConfig

    for overrides in ([], ["model=hybrid_1b9", "data=jsonl", "optim=cosine", "data.path=x"], ["stage=published_1b9"]):
        values = compose(overrides)
        flat = {key for key in values}
        for key, value in values.items():
            if isinstance(value, dict):
                flat |= {f"{key}.{inner}" for inner in value}
        assert flat == set(all_keys(TrainConfig))
        from_mapping(TrainConfig, values)
