"""`python nursery.py SOCKET`: forks processes from this one, which has torch and transformers loaded.

A new interpreter takes five seconds of a core to load them, a fork a hundredth of one. What runs is the real thing, in
a process of its own: only the loading is shared. Two ways lead here:

- `Nursery.fork` starts a module and tells its pid, so that it can be signalled and stopped itself.
- The real command with `Nursery.python_path`: the supervisor starts `python -P -m engine RUN_DIR` as
  ever, and that process has the nursery do it, with its own descriptors, directory and variables. It passes on the
  signals that an engine knows, and ends as the engine does; if it is killed, the engine is. The processes in which an
  engine verifies an export, a publication is compared and a model imported get the same. Not for tests that look at how
  an engine starts, or that stop or kill it by its pid.

The process ends with its standard input, so with whoever started it.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import runpy
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).absolute()
ROOT = HERE.parents[1]
_ORDER_BYTES = 1 << 20
_REAP_SECONDS = 0.02
_STAND_IN = '''\
"""The `sitecustomize` of processes of which some need torch: see `nursery`. Standard library only."""

import os
import sys


def hand_over(address):
    import json
    import signal
    import socket

    connection = socket.socket(socket.AF_UNIX)
    connection.connect(address)
    _, _, _, module, *argv = sys.orig_argv
    order = {"module": module, "argv": argv, "cwd": os.getcwd(), "env": dict(os.environ), "prepare": ""}
    socket.send_fds(connection, [json.dumps(order).encode() + b"\\n"], [0, 1, 2])
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, lambda number, frame: connection.sendall(bytes([number])))
    answers = connection.makefile()
    answers.readline()  # its pid
    code = json.loads(answers.readline())["code"]
    if code < 0:
        signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)


if sys.orig_argv[1:4] in (
    ["-P", "-m", "engine"],
    ["-P", "-m", "engine.verify_export"],
    ["-P", "-m", "engine.publish_check"],
) or sys.orig_argv[1:5] in (["-P", "-m", "engine.import_stage", "write"], ["-P", "-m", "engine.import_stage", "check"]):
    hand_over(ADDRESS)
'''


def customize(directory: Path, text: str) -> None:
    """Makes this the `sitecustomize` of the directory, whatever stood there.

    A compiled module is told from a stale one by its source's size and whole seconds: two texts of one length that are
    written within a second would be one.
    """
    shutil.rmtree(directory / "__pycache__", ignore_errors=True)
    (directory / "sitecustomize.py").write_text(text)


class Nursery:
    """The process, from outside. It may still load torch when this returns; what it is asked for is done after that."""

    def __init__(self) -> None:
        self._home = Path(tempfile.mkdtemp(prefix="kdconsole-nursery-"))  # short: a socket's address has 107 bytes
        self._address = str(self._home / "socket")
        hooks = self._home / "hooks"
        self.python_path = os.pathsep.join((str(hooks), str(ROOT)))
        """The PYTHONPATH of commands whose engines are to be forked."""
        hooks.mkdir()
        customize(hooks, _STAND_IN.replace("ADDRESS", repr(self._address)))
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(self._address)
        listener.listen()
        variables = {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
        with listener:
            self._process = subprocess.Popen(
                [sys.executable, "-P", str(HERE), str(listener.fileno())],
                env=os.environ | variables | {"OMP_WAIT_POLICY": "PASSIVE"},
                stdin=subprocess.PIPE,
                pass_fds=[listener.fileno()],
                start_new_session=True,  # a Ctrl-C is for whoever started it
            )

    def fork(self, module: str, *arguments: str, cwd: Path, log: Path, prepare: str = "") -> Forked:
        """Starts `python -m MODULE ARGUMENTS`.

        Args:
            module: its name.
            arguments: its own.
            cwd: where it is to stand.
            log: what it prints is appended here.
            prepare: Python that it executes first.
        """
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(self._address)
        variables = os.environ | {"PYTHONPATH": self.python_path}
        order = {"module": module, "argv": arguments, "cwd": str(cwd), "env": variables, "prepare": prepare}
        with open(os.devnull, "rb") as nothing, log.open("ab") as written:
            streams = [nothing.fileno(), written.fileno(), written.fileno()]
            socket.send_fds(connection, [json.dumps(order).encode() + b"\n"], streams)
            lines = connection.makefile()
            return Forked(json.loads(lines.readline())["pid"], connection, lines)

    def python(self, path: Path) -> Path:
        """Writes a Python for a host there, whose engines are forked: a shell script that starts this one."""
        hooks = self.python_path.partition(os.pathsep)[0]
        more = f"PYTHONPATH='{hooks}'${{PYTHONPATH:+:$PYTHONPATH}}"
        path.write_text(f"#!/bin/sh\n{more} exec '{sys.executable}' \"$@\"\n")
        path.chmod(0o755)
        return path

    def close(self) -> None:
        """Ends the process."""
        self._process.communicate()
        shutil.rmtree(self._home)


@dataclass(frozen=True)
class Forked:
    """A process that was forked, until `wait` returns."""

    pid: int
    _connection: socket.socket
    _lines: Any

    def wait(self) -> int:
        """Its exit code, or minus the signal that killed it."""
        with self._connection, self._lines:
            return int(json.loads(self._lines.readline())["code"])


def _receive(connection: socket.socket) -> tuple[dict[str, Any], list[int]]:
    text = b""
    descriptors: list[int] = []
    while not text.endswith(b"\n"):
        more, some, _, _ = socket.recv_fds(connection, _ORDER_BYTES, 3)
        if not more:
            raise EOFError
        text, descriptors = text + more, descriptors + list(some)
    return json.loads(text), descriptors


def _obey(connection: socket.socket) -> None:
    """In the child: each byte that comes is a signal; the end of whoever asked for it is its own."""
    with contextlib.suppress(OSError):
        while number := connection.recv(1):
            os.kill(os.getpid(), number[0])
    os.kill(os.getpid(), signal.SIGKILL)


def _work(connection: socket.socket, order: dict[str, Any], descriptors: Sequence[int]) -> None:
    """The child, which never returns."""
    code = 1
    try:
        os.setpgid(0, 0)
        for target, source in enumerate(descriptors):
            os.dup2(source, target)
            os.close(source)
        os.chdir(order["cwd"])
        os.environ.clear()
        os.environ.update(order["env"])
        threading.Thread(target=_obey, args=(connection,), daemon=True).start()
        exec(order["prepare"], {"__name__": "prepare"})
        sys.argv = [order["module"], *order["argv"]]
        runpy.run_module(order["module"], run_name="__main__", alter_sys=True)
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:  # noqa: BLE001 - a forked child must not return into its parent's frames
        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError):
                stream.flush()
        os._exit(code)


def _tell(connection: socket.socket, **what: int) -> None:
    with contextlib.suppress(OSError):  # nobody waits for it any more
        connection.sendall(json.dumps(what).encode() + b"\n")


def _serve(listener: socket.socket) -> None:
    waiting = selectors.DefaultSelector()
    waiting.register(listener, selectors.EVENT_READ)
    waiting.register(sys.stdin, selectors.EVENT_READ)
    children: dict[int, socket.socket] = {}
    while True:
        ready = {key.fileobj for key, _ in waiting.select(_REAP_SECONDS if children else None)}
        if sys.stdin in ready:
            return
        if listener in ready:
            connection, _ = listener.accept()
            try:
                order, descriptors = _receive(connection)
            except (EOFError, OSError):  # it was killed before it had said what it wants
                connection.close()
                continue
            child = os.fork()
            if child == 0:
                _work(connection, order, descriptors)
            for descriptor in descriptors:
                os.close(descriptor)
            children[child] = connection
            _tell(connection, pid=child)
        for child in list(children):
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                with children.pop(child) as connection:
                    _tell(connection, code=os.waitstatus_to_exitcode(status))


def main() -> None:
    listener = socket.socket(fileno=int(sys.argv[1]))
    import torch

    import engine.trainer  # noqa: F401 - what takes an engine its first seconds

    for model in ("gpt2", "llama", "qwen2"):
        importlib.import_module(f"transformers.models.{model}.modeling_{model}")
    torch.set_num_threads(1)  # threads of a pool would not be there in a forked child
    gc.collect()
    gc.freeze()  # a collection in a child would copy every page
    _serve(listener)


if __name__ == "__main__":
    main()
