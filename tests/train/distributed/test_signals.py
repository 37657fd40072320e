"""What a signal does before the first step, during the steps, and the second time."""

import os
import signal
import subprocess
import sys

import pytest

from train.distributed.signals import REQUEUE, StopRequest

TWICE = """
import os, signal
from train.distributed.signals import StopRequest
with StopRequest() as request:
    request.begin_steps()
    os.kill(os.getpid(), signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGUSR1)
"""


HANGUPS = """
import os, signal
from train.distributed.signals import StopRequest
with StopRequest() as request:
    request.begin_steps()
    for number in (signal.SIGHUP, signal.SIGHUP, signal.SIGTERM, signal.SIGHUP):
        os.kill(os.getpid(), number)
    print(request.is_due, request.reason, flush=True)
    os.kill(os.getpid(), signal.SIGTERM)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP])
def test_before_the_first_step_there_is_nothing_to_save(number):
    with pytest.raises(SystemExit) as ended, StopRequest():
        os.kill(os.getpid(), number)
    assert ended.value.code == REQUEUE


def test_during_the_steps_it_is_a_request():
    before = signal.getsignal(signal.SIGTERM)
    with StopRequest() as request:
        request.begin_steps()
        assert not request.is_due
        os.kill(os.getpid(), signal.SIGTERM)
        assert request.is_due and request.reason == "SIGTERM"
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_second_one_ends_the_process():
    assert subprocess.run([sys.executable, "-c", TWICE]).returncode == 128 + signal.SIGUSR1


AFTER_THE_LIMIT = """
import os, signal
from train.distributed.signals import StopRequest
with StopRequest(1e-9) as request:
    request.begin_steps()
    assert request.is_due
    os.kill(os.getpid(), signal.SIGUSR1)
    print("saved", request.reason)
"""


def test_a_scheduler_that_warns_after_the_time_limit_lets_the_run_save():
    ended = subprocess.run([sys.executable, "-c", AFTER_THE_LIMIT], capture_output=True, text=True)
    assert (ended.stdout, ended.returncode) == ("saved SIGUSR1\n", 0)


def test_a_terminal_that_closes_asks_once_however_many_tell_it():
    """The kernel, the shell, torchrun (SIGHUP) and `python -m launch` (SIGTERM) all pass it on."""
    ended = subprocess.run([sys.executable, "-c", HANGUPS], capture_output=True, text=True)
    assert (ended.stdout, ended.returncode) == ("True SIGTERM\n", 128 + signal.SIGTERM)


def test_under_nohup_a_terminal_that_closes_changes_nothing():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopRequest() as request:
            request.begin_steps()
            os.kill(os.getpid(), signal.SIGHUP)
            assert not request.is_due
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


BLOCKED = """
import ctypes, os, signal, sys, threading, time
from train.distributed.signals import StopRequest

def send():
    for _ in range(int(sys.argv[1])):
        time.sleep(0.3)
        os.kill(os.getpid(), signal.SIGTERM)

with StopRequest() as request:
    if int(sys.argv[1]) == 2:
        request.begin_steps()
    threading.Thread(target=send, daemon=True).start()
    mutex = ctypes.create_string_buffer(64)
    for _ in range(2):  # waits for itself in a library, for ever
        ctypes.CDLL(None).pthread_mutex_lock(mutex)
"""


@pytest.mark.parametrize("signals, code", [(1, REQUEUE), (2, 128 + signal.SIGTERM)], ids=["before the steps", "twice"])
def test_a_process_that_waits_in_a_library_ends_too(signals, code):
    done = subprocess.run([sys.executable, "-c", BLOCKED, str(signals)], capture_output=True, text=True, timeout=60)
    assert done.returncode == code, done.stderr
    assert ("asked to stop (SIGTERM) before the first step" in done.stderr) == (signals == 1)


def test_the_time_limit_counts_from_the_first_step():
    request = StopRequest(max_minutes=1e-9)
    assert not request.is_due
    request.begin_steps()
    assert request.is_due and request.reason == "run.max_minutes"
