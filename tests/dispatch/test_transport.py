"""The local transport keeps the protocol's promises: time-outs, no shell, and errors that say what is unknown."""

from __future__ import annotations

import asyncio
import sys
import time
from pathlib import Path

import pytest

from dispatch.transport import LocalTransport, MissingFile, Transport, TransportError, TransportTimeout
from engine.errors import ExitCode

here: Transport = LocalTransport()


def test_a_command_gets_its_input_and_gives_output_errors_and_code() -> None:
    script = "import sys; print(sys.stdin.read().upper()); print('e', file=sys.stderr); sys.exit(7)"
    done = asyncio.run(here.run([sys.executable, "-I", "-c", script], stdin=b"abc"))
    assert (done.rc, done.stdout, done.stderr) == (7, b"ABC\n", b"e\n")


def test_an_argument_is_never_read_by_a_shell() -> None:
    done = asyncio.run(here.run(["echo", "$(id); `id` > x"]))
    assert done.stdout == b"$(id); `id` > x\n"


def test_a_command_that_does_not_end_is_killed_at_its_time_out(tmp_path: Path) -> None:
    begin = time.monotonic()
    script = f"import os, time; os.chdir({str(tmp_path)!r}); time.sleep(600)"
    with pytest.raises(TransportTimeout) as caught:
        asyncio.run(here.run([sys.executable, "-I", "-c", script], timeout=0.3))
    assert time.monotonic() - begin < 60
    assert caught.value.exit_code == ExitCode.TIMEOUT


def test_a_command_that_is_cancelled_is_killed(tmp_path: Path) -> None:
    async def scenario() -> None:
        task = asyncio.create_task(here.run(["sh", "-c", f"cd {tmp_path}; touch up; exec sleep 600"], timeout=600))
        while not (tmp_path / "up").exists():
            await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(scenario())  # That nothing is left behind is checked after every test.


def test_a_command_that_cannot_be_run_is_a_connection_error() -> None:
    with pytest.raises(TransportError, match="/no/such/python: cannot be run") as caught:
        asyncio.run(here.run(["/no/such/python"]))
    assert caught.value.exit_code == ExitCode.CONNECTION


def test_files_are_read_at_an_offset_and_what_is_missing_is_told_apart(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"0123456789")

    async def scenario() -> None:
        assert await here.read(str(file), 3, 4) == b"3456"
        assert await here.read(str(file), 8, 100) == b"89"
        assert await here.read(str(file), 50, 100) == b""
        found = await here.stat(str(file))
        assert found is not None
        assert (found.size, found.is_dir) == (10, False)
        assert await here.stat(str(tmp_path / "none")) is None
        assert await here.list(str(tmp_path)) == ("file",)
        with pytest.raises(MissingFile):
            await here.read(str(tmp_path / "none"), 0, 1)
        with pytest.raises(MissingFile):
            await here.list(str(tmp_path / "none"))
        with pytest.raises(TransportError, match="Is a directory"):
            await here.read(str(tmp_path), 0, 1)

    asyncio.run(scenario())
