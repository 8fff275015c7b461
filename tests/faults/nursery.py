"""`python nursery.py DIRECTORY`: forks engines, one after another, from this process, which has torch loaded.

It does what the supervisor does for a run's engine, and costs a second where a new interpreter takes five. One JSON
object a line: {"run_dir", "moments", "offset"} comes in, {"pid"} and then, at the engine's end, {"status"} go out. The
directory is only there so that the process, and all that it forks, can be found by it.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any

HERE = Path(__file__).absolute()
ROOT = HERE.parents[2]


class Nursery:
    """The process, from outside.

    Args:
        directory: by which it and its engines are found (`processes_of`).
    """

    def __init__(self, directory: Path) -> None:
        environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "PASSIVE"}
        self._process = subprocess.Popen(
            [sys.executable, str(HERE), str(directory)],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def fork(self, run_dir: Path, moments: list[str], offset: Path) -> int:
        """Starts an engine and returns its pid; see `hook` for the rest."""
        assert self._process.stdin is not None
        order = {"run_dir": str(run_dir), "moments": moments, "offset": str(offset)}
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        return int(self._answer()["pid"])

    def wait(self) -> int:
        """The end of the engine that was forked last: its exit code, or minus the signal that killed it."""
        return os.waitstatus_to_exitcode(self._answer()["status"])

    def close(self) -> None:
        """Ends the process; an engine must not run any more."""
        self._process.communicate()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, f"the nursery ended with {self._process.wait()}"
        return json.loads(line)


def _engine(run_dir: str, moments: list[str], offset: str) -> None:
    """In the child, which never returns."""
    code = 1
    try:
        os.setpgid(0, 0)
        log = os.open(f"{run_dir}/launch.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        for source, target in ((os.open(os.devnull, os.O_RDONLY), 0), (log, 1), (log, 2)):
            os.dup2(source, target)
        os.chdir(run_dir)
        import hook

        from engine.__main__ import main as engine

        if os.path.exists(offset):
            hook.believe(offset)
        hook.stop_at(moments)
        code = engine([run_dir])
    except BaseException:  # noqa: BLE001 - a forked child must not return into its parent's frames
        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError):
                stream.flush()
        os._exit(code)


def main() -> None:
    import torch

    import engine.trainer  # noqa: F401 - what takes an engine its first seconds

    torch.set_num_threads(1)  # threads of a pool would not be there in a forked child
    for line in sys.stdin:
        order = json.loads(line)
        child = os.fork()
        if child == 0:
            _engine(**order)
        print(json.dumps({"pid": child}), flush=True)
        _, status = os.waitpid(child, 0)
        print(json.dumps({"status": status}), flush=True)


if __name__ == "__main__":
    main()
