"""Process trees: descendants are found, orphans are adopted, and none is left behind."""

import subprocess
import sys
import time

from launch.processes import children, descendants
from tests.launch.conftest import ROOT

# A child that leaves a grandchild behind: the process adopts it, and kills it at the end.
ORPHAN = """
import os, subprocess, time
from launch.processes import adopt_orphans, children, descendants, end_descendants
adopt_orphans()
shell = subprocess.run(["sh", "-c", "sleep 600 >/dev/null & echo $!"], stdout=subprocess.PIPE, text=True)
orphan = int(shell.stdout)
assert orphan in children(os.getpid()) and orphan in descendants()
end_descendants()
assert descendants() == []
"""

# The parent ends while its child, for which it is the supervisor, sleeps.
SUPERVISED = """
import os, subprocess, sys
from launch.processes import SUPERVISOR
code = "import time, launch.processes as p; p.end_with_supervisor(); print(flush=True); time.sleep(600)"
environment = {**os.environ, SUPERVISOR: str(os.getpid())}
child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, env=environment)
child.stdout.readline()
print(child.pid)
"""


def test_children_and_grandchildren_are_found():
    child = subprocess.Popen(["sh", "-c", "sleep 600 & wait"])
    try:
        deadline = time.monotonic() + 10
        while not children(child.pid) and time.monotonic() < deadline:
            time.sleep(0.01)
        (grandchild,) = children(child.pid)
        assert descendants(child.pid) == [grandchild] and {child.pid, grandchild} <= set(descendants())
    finally:
        subprocess.run(["kill", *map(str, [*children(child.pid), child.pid])])
        child.wait()


def test_orphans_are_adopted_and_ended():
    done = subprocess.run([sys.executable, "-c", ORPHAN], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_process_ends_with_its_supervisor():
    done = subprocess.run([sys.executable, "-c", SUPERVISED], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    deadline = time.monotonic() + 10
    while is_running(int(done.stdout)) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not is_running(int(done.stdout))


def is_running(pid: int) -> bool:
    """Whether the process exists and is not a zombie."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8") as stat:
            return stat.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
