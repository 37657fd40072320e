"""Every command answers every bad value with one line on standard error and exit code 2, and leaves nothing behind.

The table has a row for each command. `test_every_command_has_a_row` finds the commands by their files, so a new one
without a row fails. What a data source or a value of the training configuration can get wrong has tables of its own:
`tests/data_pipeline/test_bad_values.py` and `tests/train/test_command_line.py`.
"""

from __future__ import annotations

import re
import runpy
import shutil
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from launch.__main__ import VERBS
from launch.settings import TARGETS
from tests import commands
from tests.train.runs import write_corpus
from tests.train.test_command_line import small_overrides
from train.config.quoting import quoted

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("train", "data_pipeline", "launch")

LONG, UNICODE, DEEP, LINES = "x" * 300, "é" * 200, "x/" * 3000, "two\nlines"
NAMES = (LONG, UNICODE, DEEP, LINES, "")
VALUES = {
    "whole": ("x", "", "1.5", "1e3", "nan", "true", "10" * 3000, LINES, "0x10"),
    "items": ("x", "1.5", "nan", "-1,2", "10" * 3000, LINES),
    "count": ("x", "", "1.5", "nan", "0", "-1", LINES),
    "number": ("x", "", "nan", "inf", "-inf", "1e400", LINES),
    "choice": ("none", "", LONG, LINES),
    "choices": ("none", LONG, LINES),
    "name": ("a b", "..", "", LONG, LINES),
    "flag": ("x", "", "1", LINES),
}  # fmt: skip
PATHS = {
    "directory": (*NAMES, "absent", "file.txt", "run/config.yaml"),
    "run": (*NAMES, "absent", "file.txt", "empty", "config_empty", "config_list", "config_binary", "config_folder"),
    "checkpoints": ("no_checkpoint", "state_binary"),
    "tokenizer": ("tokenizer_binary", "tokenizer_folder"),
    "import": (*NAMES, "absent", "file.txt", "empty", "hf_binary", "hf_list", "hf_folder"),
    "launched": (*NAMES, "absent", "file.txt", "empty"),
    "file": (LONG, UNICODE, DEEP, LINES, "absent", "file.txt", "run"),
    "corpus": (*NAMES, "absent"),
    "out": (LONG, UNICODE, DEEP, "file.txt/x", "file.txt", "/proc/none/x"),
    "new file": (LONG, UNICODE, DEEP, "file.txt/x", "run", "/proc/none/x"),
}


@dataclass(frozen=True)
class Row:
    """A command: words that work, and what may stand in place of each value.

    A slot is a key, or a position; its kinds are those of VALUES and PATHS, separated by commas. A key that begins with
    `--` is one of the training configuration, in Hydra's grammar.
    """

    module: str
    words: tuple[str, ...] = ()
    slots: dict[str | int, str] = field(default_factory=dict)


DATA = ("source=jsonl", "path=a.jsonl", "tokenizer=t.model")
SMALL = tuple(small_overrides(Path("a.jsonl"), "new"))
TRAINED = {
    "--run.steps": "count", "--optim.lr": "number", "--run.device": "choice", "--model.num_layers": "count",
}  # fmt: skip
TABLE = (
    Row("train", SMALL, TRAINED | {
        "--data.path": "corpus", "--data.tokenizer": "file", "--run.root": "out", "--resume": "launched",
        "--init_from": "launched, checkpoints", "--checkpoint.dir": "out", "--seq_len": "count",
        "--run.samples_per_step": "count", "--run.spike_factor": "number", "--parallel.tensor": "count",
        "--data.source": "choice", "--stage.kind": "choice", "--logging.progress": "flag",
    }),
    Row("train.generate", ("run", "prompt=x"), {
        0: "run, checkpoints, tokenizer", "max_tokens": "count", "temperature": "number", "top_k": "whole",
        "top_p": "number", "seed": "whole", "stop_tokens": "items", "dtype": "choice",
    }),
    Row("train.generate", ("hf", "prompt=x"), {0: "import"}),
    Row("train.evaluate", ("run", "tasks=needle", "lengths=256", "samples=1"), {
        0: "run, checkpoints, tokenizer", "tasks": "choices", "lengths": "items", "samples": "count",
        "depths": "count", "rows": "count", "seed": "whole", "out": "out",
    }),
    Row("train.report", ("run",), {0: "run", "output": "out"}),
    Row("train.export", ("run", "out=new"), {
        0: "run, checkpoints, tokenizer", "out": "out", "format": "choice", "step": "items", "dtype": "choice",
    }),
    Row("train.import_hf", ("hf", "out=new"), {
        0: "import", "out": "out", "summary_from": "choice", "allow_pickle": "flag", "chunk_size": "count",
        "rope_base": "number", "layer_pattern": "choice",
    }),
    Row("train.checkpoint", ("list", "run"), {0: "choice", 1: "directory"}),
    Row("train.checkpoint", ("verify", "run"), {1: "directory"}),
    Row("train.checkpoint", ("reshape", "run", "out=new"), {
        1: "directory, checkpoints", "out": "out", "files": "count", "moments": "flag",
    }),
    Row("train.checkpoint", ("average", "run", "out=new"), {
        1: "directory, checkpoints", "out": "out", "last": "count",
    }),
    Row("data_pipeline.prepare", (*DATA, "out=new"), {
        "source": "choice", "path": "corpus", "tokenizer": "file", "out": "out", "shard_mb": "number",
    }),
    Row("data_pipeline.tokenizer", ("train", *DATA[:2], "vocab_size=400", "out=new.model"), {
        0: "choice", "path": "corpus", "vocab_size": "count", "out": "new file",
    }),
    Row("data_pipeline.tokenizer", ("info", "tokenizer=t.model"), {"tokenizer": "file"}),
    Row("data_pipeline.tokenizer", ("encode", "tokenizer=t.model", "text=x"), {"tokenizer": "file"}),
    Row("data_pipeline.inspect", (*DATA, "cache_dir=new"), {
        "path": "corpus", "tokenizer": "file", "seq_len": "count", "sample": "whole", "rows": "count",
        "part": "choice", "cache_dir": "out",
    }),
    Row("launch", ("target=local", "ranks_per_node=1", "launch.dry_run=true", "--", *SMALL), TRAINED | {
        "target": "choice", "nodes": "count", "ranks_per_node": "count", "gpus_per_node": "whole",
        "launch.restarts": "whole", "launch.check": "flag",
    }),
    Row("launch", ("target=slurm", "launch.partition=a", "launch.dry_run=true", "--", *SMALL), {
        "launch.time": "choice", "launch.continuation": "choice", "launch.max_requeues": "whole",
    }),
    Row("launch", ("target=kubernetes", "launch.image=a", "launch.dry_run=true", "--", *SMALL), {
        "launch.memory": "choice", "launch.restarts": "whole",
    }),
    Row("launch", ("target=ssh", "launch.hosts=a", "launch.dry_run=true", "--", *SMALL), {
        "launch.launcher": "choice", "launch.master_port": "whole",
    }),
    *(Row("launch", (verb, "run"), {1: "launched"}) for verb in VERBS),
    Row("launch.sweep", ("sweep=new", "launch.dry_run=true", "run.seed=1,2", *SMALL), TRAINED | {
        "sweep": "name", "sweep.budget": "choice", "sweep.parallel": "count", "sweep.report": "flag",
        "sweep.only": "choices",
    }),
    Row("launch.agent", ("--signals=forward",), {0: "choice"}),
)  # fmt: skip


def cells() -> Iterator[Any]:
    """(module, bad command line, the key that its message names, and the value)."""
    for row in TABLE:
        start = " ".join((row.module, *row.words[:1]))
        if row.module != "launch.agent":  # its words are torchrun's
            yield pytest.param(row.module, with_word(row, "no_such_key=1"), "no_such_key", "", id=f"{start} unknown")
            yield pytest.param(row.module, with_word(row, "no_value"), "no_value", "", id=f"{start} without_value")
        if any(isinstance(slot, str) and slot.startswith("--") for slot in row.slots):
            words = (*row.words, "data.path=${oc.env:NO_SUCH_VARIABLE}")
            yield pytest.param(row.module, words, "data.path", "NO_SUCH_VARIABLE", id=f"{start} unset variable")
        for slot, kinds in row.slots.items():
            for kind in kinds.split(", "):
                for value in VALUES.get(kind) or PATHS[kind]:
                    key = "" if isinstance(slot, int) or kind in PATHS else slot.removeprefix("--")
                    shown = f"{start} {slot}={value[:16].encode('unicode_escape').decode()}"
                    yield pytest.param(row.module, with_value(row, slot, value), key, value, id=shown)


def is_interruptible(row: Row) -> bool:
    """Whether the row's words work here, and print something."""
    return row.module != "launch.agent" and row.words[:1] not in (("logs",), ("cancel",))


def with_word(row: Row, word: str) -> tuple[str, ...]:
    """The row's command line with one more word, in front of `--` where it has one."""
    cut = row.words.index("--") if "--" in row.words else len(row.words)
    return (*row.words[:cut], word, *row.words[cut:])


def with_value(row: Row, slot: str | int, value: str) -> tuple[str, ...]:
    """The row's command line with `value` in a slot."""
    if isinstance(slot, int):
        return (*row.words[:slot], value, *row.words[slot + 1 :])
    key = slot.removeprefix("--")
    kept = replace(row, words=tuple(word for word in row.words if not word.startswith(f"{key}=")))
    if slot.startswith("--"):
        return (*kept.words, f"{key}={value if re.fullmatch(r'[-.a-z0-9]+', value) else quoted(value)}")
    return with_word(kept, f"{key}={value}")


@pytest.fixture(scope="session")
def given(tmp_path_factory):
    """A run, an export of it, and damaged copies of both."""
    root = tmp_path_factory.mktemp("given")
    corpus = write_corpus(root / "a.jsonl")
    code, _, err = commands.run("train", *small_overrides(corpus, root, run__name="run", run__steps=2))
    assert code == 0, err
    shutil.rmtree(root / "cache", ignore_errors=True)
    shutil.copy(root / "run/tokenizer.model", root / "t.model")
    from train import export

    assert export.main([str(root / "run"), f"out={root}/hf"]) == 0
    (root / "file.txt").write_text("text")
    (root / "empty").mkdir()

    def copy(source, name, file, content):
        shutil.copytree(root / source, root / name)
        for path in (root / name).glob(file):
            path.unlink()
            path.mkdir() if content is None else path.write_bytes(content)

    for kind, content in (("empty", b""), ("list", b"[1, 2]"), ("binary", bytes(range(256))), ("folder", None)):
        copy("run", f"config_{kind}", "config.yaml", content)
        if kind != "empty":
            copy("hf", f"hf_{kind}", "config.json", content)
    for kind, content in (("binary", bytes(range(256))), ("folder", None)):
        copy("run", f"tokenizer_{kind}", "tokenizer.model", content)
    copy("run", "state_binary", "checkpoints/step-*/state.json", bytes(range(256)))
    shutil.copytree(root / "run", root / "no_checkpoint")
    shutil.rmtree(root / "no_checkpoint/checkpoints")
    return root


@pytest.fixture(scope="module")
def worker():
    worker = commands.Worker()
    yield worker
    worker.close()


def tree(root: Path) -> set[str]:
    return {str(path.relative_to(root)) for path in root.rglob("*")}


@pytest.fixture
def made(given):
    """A function that returns what the test has made in the directory `given`; it is removed in the end."""
    before = tree(given)
    yield lambda: sorted(tree(given) - before)
    for name in sorted(tree(given) - before):
        path = given / name
        shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


@pytest.mark.parametrize(("module", "words", "key", "value"), cells())
def test_a_bad_value_is_one_line_and_exit_code_2(given, made, worker, module, words, key, value):
    code, said = worker.run(module, words, given)
    assert code == 2 and "Traceback" not in said, said
    lines = said.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), said
    shown = lines[0].replace("\\n", "\n")
    value = "inf" if value == "1e400" and module in ("train", "launch", "launch.sweep") else value  # as YAML reads it
    assert key in shown and max(value.split("/"), key=len)[:40] in shown, lines[0]
    assert not made()


def names_of_commands(package: str) -> set[str]:
    """The modules of a package that are commands, by the line at their end."""
    files = [path for path in (ROOT / package).rglob("*.py") if 'if __name__ == "__main__":' in path.read_text("utf-8")]
    return {str(path.relative_to(ROOT).with_suffix("")).replace("/", ".").removesuffix(".__main__") for path in files}


def test_every_command_has_a_row():
    found = {name for package in PACKAGES for name in names_of_commands(package)}
    assert found == {row.module for row in TABLE}
    first = {(row.module, row.words[0]) for row in TABLE}
    for module in found:
        for verb in commands.main_of(module).__globals__.get("VERBS", ()):
            assert (module, verb) in first, f"{module} {verb} has no row"
    assert {("launch", f"target={target}") for target in TARGETS} <= first


INTERRUPTIBLE = [row for row in TABLE if is_interruptible(row)]


@pytest.mark.parametrize("row", INTERRUPTIBLE, ids=[" ".join((row.module, *row.words[:1])) for row in INTERRUPTIBLE])
def test_ctrl_c_is_one_line(given, made, worker, row):
    """It comes when the command prints its results."""
    code, said = worker.run(row.module, row.words, given, interrupted=True)
    assert code == 128 + signal.SIGINT and "Traceback" not in said, said
    assert said.splitlines()[-1].startswith("stopped by SIGINT; the same command goes on")


@pytest.mark.parametrize("module", sorted(names_of_commands("tests/bench")))
def test_a_benchmark_refuses_a_key_that_it_does_not_know(given, made, monkeypatch, capfd, module):
    monkeypatch.chdir(given)
    monkeypatch.setattr(sys, "argv", [module, "no_such_key=1"])
    monkeypatch.delitem(sys.modules, module, raising=False)
    with pytest.raises(SystemExit) as stop:
        runpy.run_module(module, run_name="__main__")
    (line,) = capfd.readouterr().err.splitlines()
    assert stop.value.code == 2 and line.startswith("error: ") and "no_such_key" in line
    assert not made()
