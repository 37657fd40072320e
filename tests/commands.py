"""Run `python -m MODULE ...` without seconds of imports, by a fork of the server that also forks ranks (`tests.ranks`).

The module runs as `__main__` with its own arguments, standard streams and exit code, and receives signals. Only the
start of the interpreter and the imports are skipped. Some tests start the real command: see test_command_line.
"""

from __future__ import annotations

import importlib.util
import io
import os
import runpy
import sys
import tempfile
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.ranks import server

ROOT = Path(__file__).resolve().parent.parent


class Command:
    """A command that runs in the background."""

    def __init__(self, module: str, *arguments: object, stdin: str = ""):
        self._folder = tempfile.TemporaryDirectory()
        streams = [Path(self._folder.name) / name for name in ("stdin", "stdout", "stderr")]
        for path in streams:
            path.write_text(stdin if path.name == "stdin" else "")
        self._stdout, self._stderr = streams[1:]
        self._process = server().Process(target=_main, args=(module, list(map(str, arguments)), streams))
        self._process.start()

    @property
    def is_running(self) -> bool:
        return self._process.is_alive()

    @property
    def stdout(self) -> str:
        return self._stdout.read_text(encoding="utf-8")

    @property
    def stderr(self) -> str:
        return self._stderr.read_text(encoding="utf-8")

    def send_signal(self, number: int) -> None:
        assert self._process.pid is not None
        os.kill(self._process.pid, number)

    def wait(self, timeout: float = 120) -> int:
        """The exit code; negative: the number of the signal that ended it. Raises after `timeout` seconds."""
        self._process.join(timeout)
        if self._process.is_alive():
            self._process.kill()
            raise AssertionError(f"still running after {timeout} s: {self.stdout}{self.stderr}")
        assert self._process.exitcode is not None
        return self._process.exitcode


def run(module: str, *arguments: object, stdin: str = "", timeout: float = 120) -> tuple[int, str, str]:
    """Run the command to its end; returns exit code, standard output and standard error."""
    command = Command(module, *arguments, stdin=stdin)
    code = command.wait(timeout)
    return code, command.stdout, command.stderr


class Worker:
    """A process that runs one command after the other, each in some milliseconds: for hundreds of refused ones.

    The process is not that of pytest, whose process groups it must not touch.
    """

    def __init__(self) -> None:
        self._pipe, other = server().Pipe()
        self._process = server().Process(target=_serve, args=(other,), daemon=True)
        self._process.start()

    def run(self, module: str, words: Sequence[str], directory: Path, interrupted: bool = False) -> tuple[int, str]:
        """Call `main` of `module`; returns exit code and standard error. `interrupted`: Ctrl-C comes when it prints."""
        self._pipe.send((module, tuple(words), str(directory), interrupted))
        assert self._pipe.poll(120), f"still running after 120 s: {module} {words}"
        return self._pipe.recv()

    def close(self) -> None:
        self._process.kill()
        self._process.join()


def main_of(module: str) -> Any:
    """The function `main` of `python -m MODULE`."""
    package = importlib.util.find_spec(module)
    assert package is not None
    return importlib.import_module(f"{module}.__main__" if package.submodule_search_locations else module).main


class _Interrupted(io.StringIO):
    def write(self, text: str) -> int:
        raise KeyboardInterrupt


def _serve(pipe: Any) -> None:
    with tempfile.TemporaryFile("w+", encoding="utf-8") as said:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(said.fileno(), 2)
        while True:
            module, words, directory, interrupted = pipe.recv()
            os.chdir(directory)
            said.seek(0)
            said.truncate()
            sys.argv = [module, *words]
            sys.stdout = _Interrupted() if interrupted else open(1, "w", encoding="utf-8", closefd=False)
            sys.stderr = open(2, "w", encoding="utf-8", closefd=False)
            code = _call(main_of(module), list(words))
            sys.stderr.flush()
            said.seek(0)
            pipe.send((code, said.read()))


def _call(main: Any, words: list[str]) -> int:
    try:
        return main(*[words] * bool(main.__code__.co_argcount)) or 0
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(bool(stop.code))
    except BaseException:
        traceback.print_exc()
        return 1


def _main(module: str, arguments: list[str], streams: list[Path]) -> None:
    for number, path in enumerate(streams):
        flags = os.O_RDONLY if number == 0 else os.O_WRONLY | os.O_APPEND
        os.dup2(os.open(path, flags), number)
    sys.stdin = open(0, encoding="utf-8", closefd=False)  # multiprocessing gives its processes an empty stdin
    os.chdir(ROOT)
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)
