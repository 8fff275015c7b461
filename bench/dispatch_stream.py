"""`python bench/dispatch_stream.py RUN_DIR RATE SECONDS`: a trainer that trains nothing and writes its stream.

RATE steps a second for so long, each stamped with the time of its write; 0 writes heartbeats alone, one every five
seconds, until SIGTERM. Steps are formatted here and not by the engine's writer, and all that are due are written at
once, every few milliseconds, so that as little as may be of the machine is taken from those that read.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import msgspec

from engine.stream import End, Heartbeat, Phase, Run, Step, encode
from engine.stream_writer import StreamWriter

TICK_SECONDS = 0.005
BEAT_SECONDS = 5.0
CONTRACT = """\
version: 1
name: none
falsifiers:
  - id: F-NONE-001
    claim: what is measured is small
    kind: threshold
    metric: measure.distance
    at_most: 1.0
    severity: warn
"""


def steps(path: Path, run: str, rate: float, seconds: float) -> int:
    """Writes them; returns the last one's number."""
    marks = {"seq": 7_070_707_070_707, "t": 8_080_808_080.5, "step": 9_090_909_090_909}
    step = Step(step=1, loss=2.5, ce=3.5, kd=2.25, lr=1e-4, grad_norm=1.0, tokens=8_192, seconds=3.6)
    line = encode(msgspec.structs.replace(step, run=run, **marks)).decode()
    # The four texts between the three numbers, which stand in this order.
    head, rest = line.split(str(marks["seq"]))
    middle, rest = rest.split(str(marks["t"]))
    between, tail = rest.split(str(marks["step"]))
    first = made = int(json.loads(path.read_bytes().splitlines()[-1])["seq"]) + 1
    file = os.open(path, os.O_WRONLY | os.O_APPEND)
    epoch, began = time.time() - time.monotonic(), time.monotonic()
    while (now := time.monotonic()) - began < seconds:
        due = first + int((now - began) * rate)
        stamp = f"{middle}{epoch + time.monotonic()!r}{between}"
        data = "".join([f"{head}{seq}{stamp}{seq}{tail}" for seq in range(made, due)]).encode()
        made = max(made, due)
        while data:
            data = data[os.write(file, data) :]
        time.sleep(TICK_SECONDS)
    os.close(file)
    return made


def main(run_dir: Path, rate: float, seconds: float) -> None:
    """One run."""
    told = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: told.set())
    about = json.loads((run_dir / "dispatch.json").read_bytes())
    path, began = run_dir / "events.jsonl", time.monotonic()
    stream = StreamWriter(path, about["run"])
    stream.emit(
        Run(
            attempt=1,
            mode=about["mode"],
            config=about["config_fingerprint"],
            gate=about["gate_fingerprint"],
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
            tokens_per_step=8_192,
        )
    )
    stream.emit(Phase(name="train"))
    last = 0
    if rate:
        stream.close()
        last = steps(path, about["run"], rate, seconds)
        stream = StreamWriter(path, about["run"])
    else:
        while not told.is_set():
            stream.emit(Heartbeat(phase="train", step=0, rss_bytes=1 << 20))
            told.wait(BEAT_SECONDS)
    status = "STOPPED" if told.is_set() else "COMPLETED"
    spent = time.monotonic() - began
    stream.emit(End(status=status, reason="all is written", exit_code=0, steps=last, seconds=spent))
    stream.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]), float(sys.argv[2]), float(sys.argv[3]))
