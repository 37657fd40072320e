"""Run `python -m MODULE ...` without seconds of imports, by a fork of the server that also forks ranks (`tests.ranks`).

The module runs as `__main__` with its own arguments, standard streams and exit code, and receives signals. Only the
start of the interpreter and the imports are skipped. Some tests start the real command: see test_command_line.
"""

from __future__ import annotations

import os
import runpy
import sys
import tempfile
from pathlib import Path

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


def _main(module: str, arguments: list[str], streams: list[Path]) -> None:
    for number, path in enumerate(streams):
        flags = os.O_RDONLY if number == 0 else os.O_WRONLY | os.O_APPEND
        os.dup2(os.open(path, flags), number)
    sys.stdin = open(0, encoding="utf-8", closefd=False)  # multiprocessing gives its processes an empty stdin
    os.chdir(ROOT)
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)
