"""The dashboard as an operator has it: a real terminal, a real engine, and hostile text in everything that is shown."""

from __future__ import annotations

import base64
import json
import math
import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import msgspec
import pytest

from engine.stream import CheckpointFailed, End, Event, Log, Phase, Run, Verdict
from tests.console.run_dirs import append, ending, live_run, make_run, train_step
from tests.console.terminal_rig import Terminal
from tests.console_rig import Desk, processes_of, until
from tests.nursery import Nursery
from tests.streams import end_event, smoke_events, stamped, with_verdicts

Start = Callable[..., Terminal]

EVIL = (
    "\x1b]0;OWNED\x07\x1b]52;c;T1dORUQ=\x07\x1b[2J\x1b[31mred\x9b32m\x9d0;OWNED\x9c\x90OWNED\x9c"
    "\u202eesrever\u2066\x7f\x00\x08\r\n[bold red]markup[/] [link=http://evil]x[/link] [@click=app.leave]y[/]"
)
FORBIDDEN = (
    rb"\x1b\]0;OWNED", rb"\x1b\]52;c;T1dORUQ=", rb"\xc2[\x80-\x9f]", rb"\x1b\]8;[^\x07\x1b]*evil",
    rb"\x1b\[2J.{0,20}\x1b\[31mred", "\u202e".encode(), "\u2066".encode(), rb"\x7f", rb"\x00", rb"\x08",
)  # fmt: skip
SMALL = {
    "KDCONSOLE_TRAIN__BATCH": "2",
    "KDCONSOLE_TRAIN__SEQUENCE": "32",
    "KDCONSOLE_TRAIN__THREADS": "1",
    "KDCONSOLE_DATA__HELDOUT_WINDOWS": "4",
}
"""A smoke that takes little longer than it takes to import torch."""


@pytest.fixture
def desk(tmp_path: Path, nursery: Nursery) -> Iterator[Desk]:
    desk = Desk(tmp_path, nursery)
    try:
        yield desk
    finally:
        desk.clear()


@pytest.fixture
def start(desk: Desk, nursery: Nursery) -> Iterator[Start]:
    """Starts `kdconsole` on a terminal of its own."""
    terminals: list[Terminal] = []

    def start(*arguments: str, size: tuple[int, int] = (120, 40), **variables: str) -> Terminal:
        given = {"KDCONSOLE_EVIDENCE": str(desk.evidence), "PYTHONPATH": nursery.python_path}
        variables = {**given, **variables}
        terminals.append(Terminal(arguments, cwd=desk.cwd, home=desk.home, size=size, variables=variables))
        return terminals[-1]

    yield start
    for terminal in terminals:
        terminal.close()


# Hostile text


def hostile(event: Event) -> Event:
    """The event with hostile text in every text that a writer is free to choose."""
    changes: dict[str, object] = {}
    for name in event.__struct_fields__:
        value = getattr(event, name)
        if isinstance(value, str) and name not in ("run", "mode", "verdict", "severity", "status"):
            fixed = (isinstance(event, Phase) and name == "name") or (isinstance(event, Verdict) and name == "id")
            changes[name] = value + ("" if fixed else EVIL)
    return msgspec.structs.replace(event, **changes)


def hostile_events(steps: int = 30) -> list[Event]:
    events = with_verdicts(smoke_events(steps), end=end_event(steps))
    middle = len(events) // 2
    events[middle:middle] = [
        Log(level="error", message=EVIL, t=events[middle].t),
        CheckpointFailed(step=4, kind="periodic", error=EVIL, seconds=1.0, t=events[middle].t),
    ]
    kinds = (Run, Log, Phase, Verdict, CheckpointFailed, End)
    return stamped([hostile(e) if isinstance(e, kinds) else e for e in events])


def hostile_runs(evidence: Path) -> tuple[Path, Path]:
    """A run with hostile text in all that it says, and one that goes on in a directory with a hostile name."""
    events = hostile_events()
    ended = make_run(evidence, events, name=f"x{EVIL}")
    manifest = json.loads((ended / "dispatch.json").read_text())
    manifest["host"]["hostname"] += EVIL
    manifest["versions"]["torch"] += EVIL
    (ended / "dispatch.json").write_text(json.dumps(manifest))
    made = make_run(evidence, events[: len(events) // 2], None, living=True)
    living = made.rename(evidence / f"odd{EVIL.replace('/', '').replace(chr(0), '')}"[:120])
    manifest = json.loads((living / "dispatch.json").read_text())
    (living / "dispatch.json").write_text(json.dumps(manifest | {"id": living.name}))
    unreadable = evidence / "torn\x1b]0;OWNED\x07\u202e"
    unreadable.mkdir()
    (unreadable / "dispatch.json").write_bytes(b"\x1b]0;OWNED\x07 junk")
    return ended, living


def paste(terminal: Terminal, mark: str) -> None:
    """Pastes hostile text into the line that has the focus, and waits until the last of it stands there."""
    text = EVIL.replace("\r\n", f"{mark}\r\n")
    terminal.press(f"\x1b[200~{text}\x1b[201~")
    terminal.until(mark)


def clean(terminal: Terminal) -> None:
    """Checks that nothing hostile reached the terminal."""
    for pattern in FORBIDDEN:
        found = re.search(pattern, terminal.raw, re.DOTALL)
        assert found is None, f"{pattern!r} in {terminal.raw[max(0, found.start() - 80) : found.end() + 80]!r}"
    assert "OWNED" not in terminal.title


def test_no_hostile_byte_reaches_the_terminal_from_the_list_of_runs(desk: Desk, start: Start) -> None:
    hostile_runs(desk.evidence)
    plain = make_run(desk.evidence, with_verdicts(smoke_events(20), end=end_event(20)), name="plain")
    (desk.cwd / f"a{EVIL.replace('/', '').replace(chr(0), '')}"[:100]).with_suffix(".yaml").write_text(EVIL)
    terminal = start()
    terminal.until("4 runs", "plain", "UNREADABLE", gone="reading")
    terminal.press("s", "s", "s")
    for _ in range(4):
        terminal.press("j", "\x1b[B")
    terminal.press("/")
    terminal.until("status:failed")
    paste(terminal, "(0)")
    terminal.until("No run passes")
    terminal.press("\x1b")
    terminal.until(plain.name)
    terminal.press("\x1b[H", " ", "\x1b[B", " ", "\x1b[B", " ", "c")
    terminal.until("comparing 3 runs", gone="reading")
    terminal.press("\t", "\x1b[6~", "\x1b[6~", "\t", "\x1b")
    terminal.until("4 runs", gone="comparing")
    terminal.press("?")
    terminal.until("Keys: Home")
    terminal.press("\x1b")
    terminal.until("4 runs", gone="Keys: Home")
    terminal.press("n")
    terminal.until("contract")
    terminal.press("\x1b[B", "\x1b[B")
    terminal.until("✘")
    for mark, key in (("(1)", "o"), ("(2)", "\t")):
        terminal.press(key)
        terminal.still()
        paste(terminal, mark)
    terminal.press("\x1b", "\x1b")
    terminal.until("4 runs", "Runs")
    terminal.press("\x10")
    terminal.until("Search for commands")
    paste(terminal, "(3)")
    terminal.until("No matches found")
    terminal.press("\x1b")
    terminal.until("4 runs", gone="No matches found")
    terminal.press("q")
    assert terminal.wait() == 0
    clean(terminal)


def test_no_hostile_byte_reaches_the_terminal_from_a_run(desk: Desk, start: Start) -> None:
    ended, living = hostile_runs(desk.evidence)
    terminal = start("attach", ended.name)
    terminal.until("DISPUTED", "4 FAILED", "Falsifiers")
    terminal.press("2", "\r", "\x1b[B", "\r", "3", "\x1b[D", "4", "5", "6", "f", "z", "z")
    for question, told in (("/", "show only lines"), ("\x06", "look for this text")):
        terminal.press(question)
        terminal.until(told)
        paste(terminal, "(4)")
        terminal.press("\x05", "\x15")
        terminal.until(told)
        terminal.press("OWNED\r")
        terminal.until('"OWNED"', gone=told)
    terminal.press("n", "N", "1", "p", "[", "]", "0", "\x1b[D", "e", "6", "e", "y")
    terminal.until("written", "copied")
    terminal.press("r")
    terminal.until("Resume")
    terminal.press("y")
    terminal.until("not resumed")
    terminal.press("q")
    assert terminal.wait() == 0
    clean(terminal)
    assert b"markup[/]" in terminal.raw, "markup must be shown as it stands"

    events = hostile_events()
    terminal = start("attach", str(living))
    terminal.until("STALLED", "Falsifiers")
    append(living, events[len(events) // 2 :])
    terminal.until("COMPLETED", gone="STALLED")
    terminal.press("q")
    assert terminal.wait() == 0
    clean(terminal)


def test_no_hostile_byte_reaches_the_terminal_from_a_question_or_a_farewell(desk: Desk, start: Start) -> None:
    _, living = hostile_runs(desk.evidence)
    terminal = start("attach", str(living))
    terminal.until("STALLED")
    terminal.press("s")
    terminal.until("Stop", r"odd\x1b]0;OWNED")
    terminal.press("n")
    terminal.until("STALLED", gone="stop the run")
    terminal.press("q")
    assert terminal.wait() == 0
    assert "goes on" in terminal.shown
    clean(terminal)


# What is heard


def rung(terminal: Terminal) -> bytes:
    """What was written but for sequences that a BEL ends."""
    return re.sub(rb"\x1b\][^\x07\x1b]*\x07", b"", terminal.raw)


@pytest.mark.parametrize("wanted", [True, False])
def test_a_failed_verdict_rings_and_asks_for_a_notification_where_it_is_wanted(
    desk: Desk, start: Start, wanted: bool
) -> None:
    settings = desk.write("settings.yaml", "" if wanted else "bell: off\nnotify: off\n")
    path = live_run(desk.evidence, steps=20, last_t=time.time())
    terminal = start("attach", path.name, KDCONSOLE_SETTINGS=str(settings))
    terminal.until("RUNNING", "20 / 50,000")
    assert b"\x07" not in rung(terminal)
    last = json.loads((path / "events.jsonl").read_bytes().splitlines()[-1])
    news = stamped([train_step(21, math.nan), ending(21, 1, "NaN")], start=last["t"] + 1)
    append(path, [msgspec.structs.replace(e, seq=last["seq"] + 1 + n) for n, e in enumerate(news)])
    terminal.until("FAIL F-FINITE-001", "FAILED: NaN")
    terminal.press("y")
    terminal.until("copied")
    terminal.press("q")
    assert terminal.wait() == 0
    asked = re.findall(rb"\x1b\]9;([^\x07\x1b]*)\x07", terminal.raw)
    assert bool(asked) == wanted
    assert (b"\x07" in rung(terminal)) == wanted
    assert not wanted or any("✘ FAIL F-FINITE-001".encode() in text for text in asked)
    [copied] = re.findall(rb"\x1b\]52;c;([^\x07\x1b]*)\x07", terminal.raw)
    assert "held-out" in base64.b64decode(copied).decode()


# Owning nothing


def test_two_keys_start_a_smoke_that_goes_on_whatever_becomes_of_its_screen(desk: Desk, start: Start) -> None:
    def steps() -> int:
        return len(desk.run.events("step")) if desk.run.stream.exists() else 0

    def more_than(before: int) -> bool:
        return steps() > before

    terminal = start(**SMALL)
    terminal.until("No runs yet")
    terminal.press("n")
    terminal.until("built-in")
    terminal.press("\r")
    terminal.until("RUNNING", "train ", seconds=120)
    terminal.press("q")
    assert terminal.wait() == 0
    name, trainer = desk.run.path.name, desk.run.trainer()
    assert f"{name} goes on" in terminal.shown

    for how in ("killed", "crashed", "without a terminal"):
        terminal = start("attach", name)
        terminal.until("RUNNING", "Falsifiers")
        before = steps()
        if how == "without a terminal":
            terminal.hang_up()
        else:
            os.kill(terminal.process.pid, signal.SIGKILL if how == "killed" else signal.SIGABRT)
        assert terminal.process.wait(20) != 0
        until(partial(more_than, before), f"a step after the screen was {how}")
        assert trainer in processes_of(desk.run.path)

    terminal = start()
    terminal.until("1 running")
    terminal.press("\r")
    terminal.until("RUNNING", "Falsifiers")
    terminal.press("s")
    terminal.until(f"Stop {name}?")
    terminal.press("y")
    terminal.until("STOPPED", f"{name}: CANCELLED")
    until((desk.run.path / "SHA256SUMS").exists, "the checksums")
    terminal.press("q")
    assert terminal.wait() == 0
    assert "goes on" not in terminal.shown
    assert desk.run.end["status"] == "STOPPED"
    desk.is_quiet()


def test_readonly_offers_nothing_that_changes_something(desk: Desk, start: Start) -> None:
    path = make_run(desk.evidence, with_verdicts(smoke_events(20), end=end_event(20)))
    before = sorted(p.name for p in path.iterdir())
    terminal = start("--readonly")
    terminal.until(path.name)
    terminal.press("n", "\r")
    terminal.until("COMPLETED", "Falsifiers")
    terminal.press("s", "e", "r", "q")
    assert terminal.wait() == 0
    assert sorted(p.name for p in path.iterdir()) == before
    assert list(desk.cwd.iterdir()) == []
    assert len(list(desk.evidence.iterdir())) == 1
