"""`python paced_trainer.py RUN_DIR RATE`: a trainer that trains nothing and writes its stream at a chosen rate.

A real program under the real supervisor: it goes on where an earlier attempt stopped, heeds SIGTERM as the engine does,
and says who it is in `starts`, one line an attempt. It ends when there is a file `order` with one word: `finish` or
`fail`. Up to QUICK events a second go through the engine's own writer; more are formatted here and written in pieces
that end anywhere, as those of a busy disk do.
"""

from __future__ import annotations

import fcntl
import json
import os
import signal
import sys
import time
from pathlib import Path

import msgspec

from engine.falsifiers import JUDGE_PHASE, Judge, parse_contract
from engine.stream import End, Event, Heartbeat, Log, Measure, Phase, Run, Step, decode_line, encode
from engine.stream_writer import StreamWriter

QUICK = 5_000.0
TICK_SECONDS = 0.02
PIECE_BYTES = 30_001
STARTS, ALONE, ORDER = "starts", "alone", "order"
CONTRACT = """\
version: 1
name: paced
falsifiers:
  - id: F-PACED-001
    claim: what is measured is small
    kind: threshold
    metric: measure.distance
    at_most: 1.0
    severity: gate
"""
CHECKPOINT_BYTES = 300_000
LIFE_SECONDS = 900
"""Whatever becomes of the tests, it does not fill the disk for ever."""


class Trainer:
    """One attempt.

    Args:
        run_dir: the run's directory.
    """

    def __init__(self, run_dir: Path) -> None:
        self.manifest = json.loads((run_dir / "dispatch.json").read_bytes())
        self.stopping = False
        signal.signal(signal.SIGTERM, self._stop)
        self._path = run_dir / "events.jsonl"
        self._judge = Judge(parse_contract(CONTRACT, "contract.yaml"))
        self._stream = StreamWriter(self._path, self.manifest["run"])
        self._began, self._made = time.monotonic(), 0
        self.step = 0

    def _stop(self, *_: object) -> None:
        self.stopping = True

    def emit(self, event: Event) -> int:
        """Writes an event with the verdicts that it changes; returns its `seq`."""
        seq = self._stream.emit(event).seq
        for verdict in self._judge.observe(event):
            self._stream.emit(verdict)
        return seq

    def open(self, attempt: int) -> None:
        """What comes before the first step. Steps are numbered by `seq`, so that none is made twice."""
        about = self.manifest
        fingerprints = {"config": about["config_fingerprint"], "gate": about["gate_fingerprint"]}
        self.emit(Phase(name="import"))
        self.step = self.emit(
            Run(
                attempt=attempt,
                mode=about["mode"],
                contract=about["contract_sha256"],
                teacher=None,
                student="none",
                host="gx10",
                device="cpu",
                device_name="none",
                precision="fp32",
                target_steps=1 << 40,
                temperature=1.0,
                alpha=1.0,
                tokens_per_step=1,
                **fingerprints,
            )
        )
        self.emit(Measure(name="distance", value=0.5))
        self.emit(Phase(name="train"))

    def train(self, rate: float, order: Path) -> str:
        """Steps until it is told to end; returns what it was told."""
        quick = _Quick(self._path, self.manifest["run"], self.step) if rate > QUICK else None
        beat = 0.0
        while True:
            if self.stopping:
                what = "stop"
                break
            if order.exists() and (what := order.read_text()):
                break
            now = time.monotonic()
            due = int((now - self._began) * rate) - self._made
            # After a time in which it stood still it does not make up for all of it at once.
            self._made += due
            due = min(due, max(1, int(rate * 0.2)))
            if quick is not None:
                quick.write(due)
            else:
                for _ in range(due):
                    self.step += 1
                    self.emit(_step(self.step))
                if now - beat > 0.5:
                    beat = now
                    self.emit(Heartbeat(phase="train", step=self.step, rss_bytes=1 << 20))
            time.sleep(TICK_SECONDS)
        if quick is not None:
            quick.close()
            self._stream = StreamWriter(self._path, self.manifest["run"])
            self.step = quick.step
        return what

    def end(self, what: str) -> int:
        """The last events; returns the exit code."""
        status, reason, code = {
            "finish": ("COMPLETED", "it was told to", 0),
            "fail": ("FAILED", "it was told to", 2),
            "stop": ("STOPPED", "SIGTERM", 130),
        }[what]
        if what == "finish":
            self.emit(Phase(name=JUDGE_PHASE, detail=reason))
        seconds = time.monotonic() - self._began
        self.emit(End(status=status, reason=reason, exit_code=code, steps=self.step, seconds=seconds))
        self._stream.close()
        return code


def _step(step: int) -> Step:
    loss = 2.0 + 1.0 / (1 + step % 1000)
    return Step(step=step, loss=loss, ce=loss + 1, kd=loss, lr=1e-4, grad_norm=1.0, tokens=1, seconds=1e-3)


class _Quick:
    """Many steps a second: one line is encoded, and the others differ in three numbers."""

    def __init__(self, path: Path, run: str, step: int) -> None:
        self.step = step
        self._epoch = time.time() - time.monotonic()
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND)
        last = path.read_bytes().splitlines()[-1]
        self._seq = json.loads(last)["seq"]
        marks = {"seq": 7_070_707_070_707, "t": 8_080_808_080.5, "step": 9_090_909_090_909}
        line = encode(msgspec.structs.replace(_step(1), run=run, **marks)).decode()
        self._line = line.replace("%", "%%")
        for name, mark in marks.items():
            assert self._line.count(str(mark)) == 1
            self._line = self._line.replace(str(mark), f"%({name})r")
        assert decode_line((self._line % {"seq": 1, "t": 0.5, "step": 1}).encode()) is not None
        for name in ("seq", "t", "step"):
            self._line = self._line.replace(f"%({name})r", "%r")
        self._order = sorted(marks, key=lambda name: line.index(str(marks[name])))
        self._rest = b""

    def write(self, count: int) -> None:
        """So many steps; the last piece may end in half a line, which the next call completes."""
        t = self._epoch + time.monotonic()
        lines = []
        for _ in range(count):
            self._seq += 1
            self.step += 1
            values = {"seq": self._seq, "t": t, "step": self.step}
            lines.append(self._line % tuple(values[name] for name in self._order))
        data = self._rest + "".join(lines).encode()
        whole = len(data) // PIECE_BYTES * PIECE_BYTES
        for begin in range(0, whole, PIECE_BYTES):
            os.write(self._file, data[begin : begin + PIECE_BYTES])
        self._rest = data[whole:]

    def close(self) -> None:
        os.write(self._file, self._rest)
        os.close(self._file)


def _who_am_i(run_dir: Path) -> tuple[int, bool]:
    """Says in `starts` that one more trainer was started; returns its number, and whether it is the only one."""
    alone = os.open(run_dir / ALONE, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(alone, fcntl.LOCK_EX | fcntl.LOCK_NB)
        only = True
    except BlockingIOError:
        only = False
    with (run_dir / STARTS).open("ab", buffering=0) as file:
        file.write(f"{os.getpid()} {'alone' if only else 'TWICE'}\n".encode())
    return len((run_dir / STARTS).read_bytes().splitlines()), only


def _save(run_dir: Path, attempt: int) -> None:
    """A file that is worth fetching; it appears whole."""
    directory = run_dir / "checkpoints" / f"ckpt-step-{attempt:06d}"
    made = directory.with_name(f".{directory.name}")
    made.mkdir(parents=True, exist_ok=True)
    (made / "model.safetensors").write_bytes(os.urandom(CHECKPOINT_BYTES))
    made.rename(directory)


def main(arguments: list[str]) -> int:
    signal.alarm(LIFE_SECONDS)
    run_dir, rate = Path(arguments[0]), float(arguments[1])
    attempt, only = _who_am_i(run_dir)
    if not only:
        return 2
    order = run_dir / ORDER
    order.unlink(missing_ok=True)
    trainer = Trainer(run_dir)
    trainer.open(attempt)
    _save(run_dir, attempt)
    trainer.emit(Log(level="info", message=f"pid {os.getpid()}"))
    trainer.step += 8  # more than the events that came since it was set
    return trainer.end(trainer.train(rate, order))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
