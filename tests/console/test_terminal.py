"""The dashboard as an operator has it: a real terminal, a real engine, and hostile text in everything that is shown."""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest

from engine.stream import CheckpointFailed, End, Event, Log, Phase, Run, Verdict
from tests.console.run_dirs import make_run
from tests.console.terminal_rig import Terminal
from tests.console_rig import Desk, processes_of, until
from tests.streams import end_event, smoke_events, stamped, with_verdicts

Start = Callable[..., Terminal]

EVIL = (
    "\x1b]0;OWNED\x07\x1b]52;c;T1dORUQ=\x07\x1b[2J\x1b[31mred\x9b32m\x9d0;OWNED\x9c\x90OWNED\x9c"
    "\u202eesrever\u2066\x7f\x00\x08\r\n[bold red]markup[/] [link=http://evil]x[/link] [@click=app.leave]y[/]"
)
FORBIDDEN = (
    rb"\x1b\]0;OWNED", rb"\x1b\]52;", rb"\xc2\x9b", rb"\xc2\x9d", rb"\xc2\x90", rb"\x1b\]8;[^\x07\x1b]*evil",
    "\u202e".encode(), "\u2066".encode(), rb"\x7f", rb"\x00", rb"\x08",
)  # fmt: skip


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    desk = Desk(tmp_path)
    try:
        yield desk
    finally:
        desk.clear()


@pytest.fixture
def start(desk: Desk) -> Iterator[Start]:
    """Starts `kdconsole` on a terminal of its own."""
    terminals: list[Terminal] = []

    def start(*arguments: str, size: tuple[int, int] = (120, 40), **variables: str) -> Terminal:
        variables = {"KDCONSOLE_EVIDENCE": str(desk.evidence), **variables}
        terminals.append(Terminal(arguments, cwd=desk.cwd, home=desk.home, size=size, variables=variables))
        return terminals[-1]

    yield start
    for terminal in terminals:
        terminal.close()


def hostile(event: Event) -> Event:
    """The event with hostile text in every text that a writer is free to choose."""
    changes: dict[str, object] = {}
    for name in event.__struct_fields__:
        value = getattr(event, name)
        if isinstance(value, str) and name not in ("run", "mode", "verdict", "severity", "status"):
            fixed = (isinstance(event, Phase) and name == "name") or (isinstance(event, Verdict) and name == "id")
            changes[name] = value + ("" if fixed else EVIL)
    return msgspec.structs.replace(event, **changes)


def hostile_run(evidence: Path) -> Path:
    events = with_verdicts(smoke_events(30), end=end_event(30))
    middle = len(events) // 2
    events[middle:middle] = [
        Log(level="error", message=EVIL, t=events[middle].t),
        CheckpointFailed(step=4, kind="periodic", error=EVIL, seconds=1.0, t=events[middle].t),
    ]
    kinds = (Run, Log, Phase, Verdict, CheckpointFailed, End)
    return make_run(evidence, stamped([hostile(e) if isinstance(e, kinds) else e for e in events]), name=EVIL)


def test_no_hostile_byte_reaches_the_terminal(desk: Desk, start: Start) -> None:
    path = hostile_run(desk.evidence)
    manifest = json.loads((path / "dispatch.json").read_text())
    manifest["host"]["hostname"] += EVIL
    (path / "dispatch.json").write_text(json.dumps(manifest))
    odd = desk.evidence / "odd\x1b]0;OWNED\x07\u202e"
    odd.mkdir()
    (odd / "dispatch.json").write_bytes(b"\x1b]0;OWNED\x07 junk")
    second = make_run(desk.evidence, with_verdicts(smoke_events(20), end=end_event(20)), name="plain")
    terminal = start()
    terminal.until(path.name, second.name)
    terminal.press("/")
    terminal.press("[bold]x\r")
    terminal.press("/", "\x7f" * 10, "\r")
    terminal.until(path.name, second.name)
    terminal.press(" ", "j", "\x1b[B", " ", "c")
    terminal.until("≠")
    terminal.press("\x1b")
    terminal.until(second.name)
    terminal.press("?")
    terminal.until("leave")
    terminal.press("\x1b", "q")
    assert terminal.wait() == 0
    seen = terminal.raw

    terminal = start("attach", path.name)
    terminal.until("COMPLETED", "checkpoint save at step 4 failed")
    for key in (
        "2",
        "\r",
        "\x1b[B",
        "3",
        "\x1b[D",
        "4",
        "5",
        "6",
        "f",
        "z",
        "z",
        "/",
        "OWNED\r",
        "1",
        "p",
        "[",
        "]",
        "0",
    ):
        terminal.press(key)
    terminal.until("OWNED")
    terminal.press("q")
    assert terminal.wait() == 0
    seen += terminal.raw
    for pattern in FORBIDDEN:
        assert not re.search(pattern, seen), pattern
    assert b"markup[/]" in seen, "markup must be shown as it stands"


def test_two_keys_start_a_smoke_and_leaving_leaves_it_running(desk: Desk, start: Start) -> None:
    terminal = start()
    terminal.until("No runs yet")
    terminal.press("n")
    terminal.until("built-in")
    terminal.press("\r")
    terminal.until("RUNNING", "phase", seconds=90)
    terminal.press("q")
    assert terminal.wait() == 0
    name = desk.run.path.name
    assert f"{name} goes on" in terminal.shown
    assert processes_of(desk.run.path)

    terminal = start()
    terminal.until(name, "RUNNING")
    terminal.press("\r")
    terminal.until("COMPLETED", seconds=150)
    terminal.press("q")
    assert terminal.wait() == 0
    assert desk.run.end["status"] == "COMPLETED"
    until((desk.run.path / "SHA256SUMS").exists, "the checksums")
    desk.is_quiet()


@pytest.mark.parametrize("how", ["kill", "hang up"])
def test_a_run_goes_on_when_its_screen_is_lost(desk: Desk, start: Start, how: str) -> None:
    terminal = start("smoke", "--budget", "60", "--max-steps", "400", "--set", "train.batch=2")
    until(lambda: desk.run.has("phase", "import"), "the engine")
    if how == "kill":
        os.kill(terminal.process.pid, signal.SIGKILL)
    else:
        terminal.hang_up()
    terminal.process.wait(20)
    assert processes_of(desk.run.path), "the run ended with its screen"
    assert desk.call("stop", desk.run.path.name).rc == 0
    desk.is_quiet()


def test_readonly_offers_nothing_that_changes_something(desk: Desk, start: Start) -> None:
    path = make_run(desk.evidence, with_verdicts(smoke_events(20), end=end_event(20)))
    before = sorted(p.name for p in path.iterdir())
    terminal = start("--readonly")
    terminal.until(path.name)
    terminal.press("n", "\r")
    terminal.until("COMPLETED")
    terminal.press("s", "e", "q")
    assert terminal.wait() == 0
    assert sorted(p.name for p in path.iterdir()) == before
    assert list(desk.cwd.iterdir()) == []
    assert len(list(desk.evidence.iterdir())) == 1
