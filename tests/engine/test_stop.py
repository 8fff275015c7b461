"""Stop requests: the first is remembered, an echo of it is the same request, a later one ends the process."""

from __future__ import annotations

import subprocess
import sys

from engine.errors import ExitCode

PROGRAM = """
import os, signal, sys, time
from engine import stop
stop.SAME_REQUEST_SECONDS = 0.2
request = stop.StopRequest()
signal.signal(signal.SIGTERM, request)
signal.signal(signal.SIGINT, request)
os.kill(os.getpid(), signal.SIGTERM)
os.kill(os.getpid(), signal.SIGINT)
print(request.signal, flush=True)
time.sleep(0.25)
os.kill(os.getpid(), signal.SIGTERM)
print("still here", flush=True)
"""


def test_an_echo_is_the_same_request_and_a_later_signal_ends_the_process() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=30, check=False)
    assert done.stdout.split("\n") == ["SIGTERM", ""]
    assert done.returncode == ExitCode.INTERRUPTED
