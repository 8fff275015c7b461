"""The parts of `bench/console.py` that need runs and terminals: starting, opening a run, ingest, memory."""

from __future__ import annotations

import argparse
import fcntl
import json
import math
import os
import pty
import re
import resource
import select
import shutil
import signal
import statistics
import struct
import subprocess
import sys
import tempfile
import termios
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SCREEN = (120, 40)
MIB = 1 << 20
LAST_LOSS = 1.23456
"""Of the last step: what shows on a screen that the whole run was read."""
Row = dict[str, Any]
CONSOLE = (sys.executable, "-m", "console")
SMALLEST = """
from textual.app import App
from textual.widgets import Static
class Smallest(App):
    def compose(self):
        yield Static("hello")
Smallest().run()
"""
_SEQUENCE = re.compile(rb"\x1b(?:\[[0-?]*[ -/]*[@-~]|[\]PX^_].*?(?:\x1b\\|\x07)|[ -/]*[0-~])", re.DOTALL)
_ALTERNATE = b"\x1b[?1049h"


# Terminals


class Terminal:
    """A command on a pseudo-terminal of its own; every piece it writes is kept with the moment it came.

    Args:
        command: what is started.
        home: its HOME and working directory.
    """

    def __init__(self, command: Sequence[str], home: Path) -> None:
        self.pieces: list[tuple[float, bytes]] = []
        self._master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", SCREEN[1], SCREEN[0], 0, 0))
        self.began = time.perf_counter()
        self._process = subprocess.Popen(
            command, stdin=slave, stdout=slave, stderr=slave, cwd=home, env=_environment(home), start_new_session=True
        )
        os.close(slave)

    def read(self, enough: Callable[[], bool], quiet: float, longest: float = 30.0) -> None:
        """Reads until it is enough, or nothing came for `quiet` seconds, or `longest` seconds passed."""
        until = time.perf_counter() + longest
        while not enough() and time.perf_counter() < until:
            if not select.select([self._master], [], [], quiet)[0]:
                return
            try:
                piece = os.read(self._master, 1 << 16)
            except OSError:  # it ended
                return
            self.pieces.append((time.perf_counter(), piece))

    @property
    def painted(self) -> bool:
        """Something that can be seen stands on the alternate screen."""
        _, taken, after = b"".join(piece for _, piece in self.pieces).partition(_ALTERNATE)
        return bool(taken) and bool(_SEQUENCE.sub(b"", after).strip())

    def wrote(self, text: str, since: float = 0.0) -> bool:
        """A text was written, in one go, since a moment."""
        return text.encode() in _SEQUENCE.sub(b"", b"".join(piece for at, piece in self.pieces if at >= since))

    def seconds_to(self, text: str, since: float) -> float:
        """Seconds from a moment to the piece after which a text stood on the screen; NaN if it never did."""
        import pyte

        emulator = pyte.Screen(*SCREEN)
        stream = pyte.ByteStream(emulator)
        for at, piece in self.pieces:
            stream.feed(piece)
            if at >= since and any(text in line for line in emulator.display):
                return at - since
        return math.nan

    def press(self, key: str) -> float:
        """Types a key; returns when."""
        os.write(self._master, key.encode())
        return time.perf_counter()

    def close(self) -> None:
        """Ends what is left of it."""
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        os.close(self._master)


def _environment(home: Path) -> dict[str, str]:
    kept = {name: os.environ[name] for name in ("PATH", "LANG", "LD_LIBRARY_PATH") if name in os.environ}
    return {"LANG": "C.UTF-8", **kept, "HOME": str(home), "PYTHONPATH": str(ROOT), "TERM": "xterm-256color",
            "COLORTERM": "truecolor"}  # fmt: skip


def first_paint(command: Sequence[str], home: Path) -> float:
    """Seconds from the start of a command to the first bytes of a picture on its terminal."""
    terminal = Terminal(command, home)
    terminal.read(lambda: terminal.painted, quiet=30.0)
    seconds = terminal.pieces[-1][0] - terminal.began if terminal.painted else math.nan
    terminal.close()
    return seconds


def to_the_end(command: Sequence[str], home: Path) -> float:
    """Seconds from the start of a command to its end."""
    began = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True, cwd=home, env=_environment(home))
    return time.perf_counter() - began


def start_rows(options: argparse.Namespace) -> list[Row]:
    """Start to first paint, and `--version`, beside the least that Python and Textual take; in turns."""
    python = (sys.executable, "-c")
    paints: dict[str, Sequence[str]] = {"kdconsole": CONSOLE, "Textual's smallest app": (*python, SMALLEST)}
    versions: dict[str, Sequence[str]] = {"kdconsole": (*CONSOLE, "--version"), "python -c pass": (*python, "pass")}
    if shutil.which(options.harlequin):
        paints["harlequin"] = (options.harlequin,)
        versions["harlequin"] = (options.harlequin, "--version")
    measured: dict[tuple[str, str], Callable[[], float]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        home = Path(scratch)
        for name, command in paints.items():
            measured["first paint", name] = partial(first_paint, command, home)
        for name, command in versions.items():
            measured["--version", name] = partial(to_the_end, command, home)
        times = in_turns(measured, options.repeats)
    return [
        {"what": what, "program": name, **_summary(seconds), "ratio": _ratio(seconds, times[what, "kdconsole"])}
        for (what, name), seconds in times.items()
    ]


def in_turns(measured: Mapping[Any, Callable[[], float]], repeats: int) -> dict[Any, list[float]]:
    """Each of these measured so many times, one after the other and over again, after a round that does not count."""
    times: dict[Any, list[float]] = {key: [] for key in measured}
    for repeat in range(-1, repeats):
        for key, once in measured.items():
            seconds = once()
            if repeat >= 0:
                times[key].append(seconds)
    return times


def _summary(seconds: Sequence[float]) -> Row:
    return {"best_seconds": min(seconds), "median_seconds": statistics.median(seconds)}


def _ratio(seconds: Sequence[float], base: Sequence[float]) -> float:
    return statistics.median(seconds) / statistics.median(base)


# Streams


def stream(steps: int, others: int = 0) -> Iterator[bytes]:
    """Lines of a made-up run that goes on: a heartbeat and vitals every hundred events, an evaluation every thousand.

    Args:
        steps: steps that it makes.
        others: lines for the operator in between, for each step.
    """
    from engine.stream import Eval, Event, Heartbeat, Log, Phase, Step, Vitals, encode
    from tests.streams import RUN, run_event

    seq = 0

    def line(event: type[Event], **fields: Any) -> bytes:
        nonlocal seq
        seq += 1
        return encode(event(run=RUN, seq=seq, t=1.76e9 + seq / 10, **fields))

    import msgspec

    yield encode(msgspec.structs.replace(run_event(mode="train", target_steps=steps), run=RUN, seq=0, t=1.76e9))
    yield line(Phase, name="train")
    for step in range(1, steps + 1):
        loss = 2.5 + 6.5 * math.exp(-step / 4_000) + 0.05 * math.sin(step * 1.7)
        loss = LAST_LOSS if step == steps else loss
        yield line(Step, step=step, loss=loss, ce=loss - 0.4, kd=loss + 0.2, lr=1e-4, grad_norm=1.1, tokens=8_192,
                   seconds=1.3)  # fmt: skip
        for other in range(others):
            yield line(Log, level="info", message=f"line {other} after step {step}")
        if seq // 100 != (seq - 1 - others) // 100:
            yield line(Heartbeat, phase="train", step=step, rss_bytes=1 << 30, host_free_bytes=1 << 34)
            yield line(Vitals, cpu_percent=14.0, host_free_bytes=1 << 34, host_total_bytes=1 << 36)
        if step % 1_000 == 0:
            yield line(Eval, step=step, loss=loss + 0.1, ce=loss, kd=loss, agreement=0.4, cosine=0.8, tokens=6_144,
                       seconds=0.5)  # fmt: skip


def ingest_rows(options: argparse.Namespace) -> list[Row]:
    """Events a second from a file into what panes are drawn from, and parts of that way; in turns."""
    from console.run_reader import StreamFold
    from dispatch.manifest import EVENTS
    from engine.falsifiers import builtin_contract, parse_contract
    from engine.stream import decode_line

    contract = parse_contract(builtin_contract("train"), "train.yaml")
    with tempfile.TemporaryDirectory() as scratch:
        lines = list(stream(options.events))
        (Path(scratch) / EVENTS).write_bytes(b"".join(lines))

        def timed(work: Callable[[], object]) -> Callable[[], float]:
            def once() -> float:
                began = time.process_time()
                work()
                return time.process_time() - began

            return once

        def folded() -> None:
            fold = StreamFold(Path(scratch), contract, None)
            while fold.advance():
                pass
            assert len(fold.state.steps) == options.events, fold.problem

        times = in_turns(
            {
                "read, decoded and folded": timed(folded),
                "decoded": timed(lambda: [decode_line(line) for line in lines]),
                "json.loads": timed(lambda: [json.loads(line) for line in lines]),
            },
            options.repeats,
        )
    whole = statistics.median(times["read, decoded and folded"])
    return [
        {
            "events": name,
            "best": len(lines) / min(seconds),
            "median": len(lines) / statistics.median(seconds),
            "ratio": whole / statistics.median(seconds),
        }
        for name, seconds in times.items()
    ]


def open_rows(options: argparse.Namespace) -> list[Row]:
    """Opening an ended run of 50,000 steps: in the list, from the shell, and its reading alone; in turns."""
    from console.run_reader import load_run
    from dispatch.manifest import EVENTS
    from tests.console.run_dirs import make_run
    from tests.streams import RUN, end_event, smoke_events, with_verdicts

    with tempfile.TemporaryDirectory() as scratch:
        home, evidence = Path(scratch) / "home", Path(scratch) / "evidence"
        home.mkdir()
        path = make_run(evidence, with_verdicts(smoke_events(20), end=end_event(20)), mode="train")
        uuid = json.loads((path / "dispatch.json").read_text())["run"].encode()
        whole = b"".join(stream(options.steps)).replace(RUN.encode(), uuid)
        (path / EVENTS).write_bytes(whole)
        wanted = f"total {LAST_LOSS:.3f}"

        def from_shell() -> float:
            terminal = Terminal((*CONSOLE, "attach", path.name, "--evidence", str(evidence)), home)
            return _seen(terminal, wanted, terminal.began)

        def from_list() -> float:
            terminal = Terminal((*CONSOLE, "--evidence", str(evidence)), home)
            terminal.read(lambda: terminal.wrote(path.name[-6:]), quiet=20.0)
            terminal.read(lambda: False, quiet=1.5)
            return _seen(terminal, wanted, terminal.press("\r"))

        def read() -> float:
            began = time.perf_counter()
            assert len(load_run(path).state.steps) == options.steps
            return time.perf_counter() - began

        measured = {"Enter in the list": from_list, "kdconsole attach": from_shell, "its reading alone": read}
        times = in_turns(measured, options.repeats)
    return [{"opened": name, **_summary(seconds)} for name, seconds in times.items()]


def _seen(terminal: Terminal, wanted: str, since: float) -> float:
    """Seconds to a text on the screen, once nothing comes any more."""
    try:
        terminal.read(lambda: terminal.wrote(wanted[-4:], since), quiet=8.0)
        terminal.read(lambda: False, quiet=1.5)
        return terminal.seconds_to(wanted, since)
    finally:
        terminal.close()


# Memory


def memory_rows(options: argparse.Namespace) -> list[Row]:
    """Memory that a long run takes, a process for each kind of stream."""
    rows = []
    for kind in KINDS:
        command = [sys.executable, __file__, kind, str(options.hours)]
        rows.append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
    return rows


KINDS = {
    "steps": "10 events/s, nearly all of them steps",
    "steps and chart": "the same, kept by the chart too",
    "lines": "10 events/s, a step every 3.6 s, the rest lines for the operator",
}


def _memory(kind: str, hours: float) -> Row:
    """Folds so many hours at ten events a second, a second's events at a time."""
    from console.chart.frame import Look, draw
    from console.chart.model import RunLanes, one_run
    from console.run_state import Reducer
    from engine.falsifiers import builtin_contract, parse_contract
    from engine.stream import decode_line

    total = round(hours * 36_000)
    others = 0 if kind.startswith("steps") else 35
    reducer = Reducer(parse_contract(builtin_contract("train"), "train.yaml"))
    lanes = RunLanes() if kind == "steps and chart" else None
    warm, before, middle, seen = 20_000, 0, 0, 0
    lines = stream(total + warm, others)
    while seen < total + warm:
        batch = [event for _ in range(10) if (event := decode_line(next(lines))) is not None]
        state = reducer.feed(batch)
        seen += 10
        if lanes is not None:
            lanes.update(state)
            if seen % 36_000 == 0:
                draw(one_run(lanes, "loss", live=True, now=state.last_t), Look(), *SCREEN)
        if seen == warm:  # the log and other kept lists are full, so this is where the run's own growth begins
            before = _rss()
        if seen == warm + total // 20 * 10:
            middle = _rss()
    growth = _rss() - before
    return {
        "stream": KINDS[kind],
        "events": total,
        "steps": len(reducer.state.steps),
        "growth_mib": growth / MIB,
        "second_half_mib": (growth + before - middle) / MIB,
        "bytes_per_event": growth / total,
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1_024,
    }


def _rss() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    print(json.dumps(_memory(sys.argv[1], float(sys.argv[2]))))
