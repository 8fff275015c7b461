"""Feeds whatever is no log, no manifest, no stream and no directory to what reads them, for as long as it is told to.

    python tests/faults/fuzz_readers.py [--minutes M] [--seed S] [--case N] [--keep DIR]

Inputs are good ones, bent: bytes flipped, cut out, doubled, moved, other encodings, hostile texts and names. Kept must
be: nothing but a KdError comes out, and nothing of `load_run` at all; nothing that is given holds a control character;
how a log is cut into pieces changes nothing; no input takes longer than 30 s, and memory stays below 1.5 GiB.

One line of progress every ten seconds. Exit code 1: something was not kept; then seed, case and the file with its input
are printed, and the same `--seed` with `--case` makes it again.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import FrameType

sys.path.insert(0, str(Path(__file__).absolute().parents[2]))

from console.log_fold import LOG
from console.run_reader import load_run
from console.run_state import Reducer, RunState
from dispatch.evidence import find_evidence, open_evidence
from dispatch.legacy import LegacyLog, OldManifest, parse_old_manifest
from engine.errors import KdError
from engine.falsifiers import builtin_contract, parse_contract
from engine.stream import EVENT_TYPES, End, Event, decode_line, encode
from engine.text import clean
from tests import old_evidence as old
from tests.streams import RUN, smoke_contract, smoke_events, stamped, with_verdicts

SECONDS = 30.0
MEMORY = 1536 << 20
PROGRESS_SECONDS = 10.0
HUGE_EVERY = 2_000
"""Cases between two logs of many megabytes."""
OLD_CONTRACT = parse_contract(builtin_contract("predecessor"), "predecessor.yaml")
HOSTILE: list[bytes | str] = [
    *(
        b"\x1b[2J",
        b"\x1b]0;x\x07",
        b"\x9b1m",
        b"\x00",
        b"\r",
        b"\n",
        b"\r\n",
        b"\t",
        b"\xff\xfe",
        b"\xfe\xff",
        b"\xef\xbb\xbf",
    ),
    *("\u202e", "\u2028", "\u2029", "\u2192", "\u2713", "\u00e2\u2020\u2019", "\ufffd", "\U0001f600", "\u0661"),
    *(
        "NaN",
        "Infinity",
        "-Infinity",
        "1e999",
        "-1",
        "1e-5",
        "0",
        "9" * 400,
        "1" * 5_000,
        '"',
        "\\",
        "\\u0000",
        "\\ud800",
    ),
    *(
        "{",
        "}",
        "[" * 2_000,
        "null",
        "true",
        '"v":1',
        '"v":2',
        '"seq":',
        '"event":"step"',
        " ",
        "x" * 5_000,
        "x" * 70_000,
    ),
]
NAMES = [
    *(
        b"launch.log",
        b"launch-victory.txt",
        b"findings.md",
        b"dispatch.json",
        b"events.jsonl",
        b"contract.yaml",
        b"run",
    ),
    *(b"config.yaml", b"exit.json", b"supervisor.jsonl", b"SHA256SUMS", b"a\x1b[2J\n.log", b"\xff.log", b"-x.txt"),
    *("\u202egol.log".encode(), b".hidden.log", b"n" * 255, b"model.bin", b"checkpoints"),
]


class Broken(Exception):
    """Something that must be kept was not."""


def hostile(rng: random.Random) -> bytes:
    each = rng.choice(HOSTILE)
    return each if isinstance(each, bytes) else each.encode()


def bent(rng: random.Random, data: bytes, most: int = 12) -> bytes:
    """The data after a few changes; sometimes none at all."""
    raw = bytearray(data)
    for _ in range(rng.choice((0, 1, 2, rng.randrange(most + 1)))):
        at = rng.randrange(len(raw) + 1)
        to = min(len(raw), at + rng.choice((1, 2, 10, 100, rng.randrange(len(raw) + 1))))
        what = rng.randrange(7)
        if what == 0 and raw:
            raw[at % len(raw)] ^= 1 << rng.randrange(8)
        elif what == 1:
            del raw[at:to]
        elif what == 2:
            raw[at:at] = raw[at:to]
        elif what == 3:
            raw[at:at] = hostile(rng)
        elif what == 4:
            raw[at:to] = rng.randbytes(min(to - at, 5_000))
        elif what == 5:
            there = rng.randrange(len(raw) + 1)
            raw[there:there] = raw[at:to]
        else:
            del raw[at:]
    return bytes(raw[: 4 << 20])


# Inputs


def a_log(rng: random.Random) -> bytes:
    style = rng.choice(list(old.STYLES.values()))
    steps = rng.choice((1, 2, 9, 62, 300))
    first, last = (rng.choice((7.67, 0.0, 1e30, float("nan"), float("inf"))) for _ in range(2))
    more = [
        *(old.saved(3), old.not_saved(3, "error: full"), "F-A-1: PASS", "FT-B-2 FAIL", "FALSIFY-C-3 is DISCHARGED"),
        *(old.epoch(1, 3, 7.0, 2.0, 6.0), "phase import", "phase judge: steps", "COMPLETED: why (3 steps, 2.0s)"),
        *(
            old.smoke_mode(9),
            old.no_export(),
            old.output(),
            old.GPU,
            old.step(1, 9, 7.0),
            "held-out at step 3: loss 2.5",
        ),
        *(
            "PASS F-A-1: expected x < 1, observed 0",
            "smoke of a on b: cpu (c), fp32, 1,024 tokens a step",
            "warning: w",
        ),
    ]
    chosen = rng.sample(more, rng.randrange(len(more)))
    match rng.randrange(3):
        case 0:
            log = old.train_log(style, steps=steps, first=first, last=last, kernels=20, more=chosen)
        case 1:
            log = old.smoke_log(style, steps=steps, first=first, last=last, more=chosen)
        case _:
            log = old.broken_log(style, steps=steps, how=[*chosen, old.PANIC, old.PANIC_WHAT])
    return bent(rng, log)


def a_manifest(rng: random.Random) -> bytes:
    manifest = old.manifest()
    for key in rng.sample(sorted(manifest), rng.randrange(6)):
        manifest[key] = rng.choice((None, "", -1, 1e308, True, [], {}, [[1]], hostile(rng).decode("utf-8", "replace")))
    return bent(rng, json.dumps(manifest).encode(rng.choice(("utf-8", "utf-8-sig", "utf-16"))), 4)


def a_stream(rng: random.Random) -> bytes:
    events: list[Event] = smoke_events(rng.choice((1, 5, 20)))
    if rng.random() < 0.3:
        changed = rng.choice(events)
        name = rng.choice(changed.__struct_fields__)
        if isinstance(getattr(changed, name), float):
            wild = type(changed)(
                **{n: getattr(changed, n) for n in changed.__struct_fields__} | {name: rng.choice(WILD)}
            )
            events[events.index(changed)] = wild
        events = stamped(events)
    lines = [encode(event) for event in with_verdicts(events)]
    if rng.random() < 0.3:
        rng.shuffle(lines)
    for _ in range(rng.randrange(4)):
        at = rng.randrange(len(lines))
        lines[at] = bent(rng, lines[at], 3)
    return bent(rng, b"".join(lines), 2) if rng.random() < 0.3 else b"".join(lines)


WILD = (float("nan"), float("inf"), -1.0, 1e308, -1e308, 5e-324)


def a_directory(rng: random.Random, path: Path) -> None:
    path.mkdir()
    for name in rng.sample(NAMES, rng.randrange(8)):
        file = path / os.fsdecode(name)
        match rng.randrange(12):
            case 0:
                file.symlink_to(rng.choice((Path("/dev/zero"), path, path / "launch.log", Path("/nowhere"))))
            case 1:
                os.mkfifo(file)
            case 2:
                file.mkdir()
            case _:
                make = a_manifest if name == b"dispatch.json" else a_stream if name == b"events.jsonl" else a_log
                data = make(rng)
                if name == b"contract.yaml" and rng.random() < 0.7:
                    data = bent(rng, builtin_contract("smoke").encode(), 1)
                if name == b"dispatch.json" and rng.random() < 0.5:
                    data = bent(
                        rng, json.dumps({"v": rng.choice((1, 2, 3, "x")), "run": RUN, "mode": "smoke"}).encode(), 1
                    )
                file.write_bytes(data)


# What must be kept


def texts_of(value: object, depth: int = 0) -> Iterable[str]:
    """Every text in a value that was given."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, EVENT_TYPES):
        for name in value.__struct_fields__:
            yield from texts_of(getattr(value, name), depth + 1)
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from texts_of(key, depth + 1)
            yield from texts_of(inner, depth + 1)
    elif isinstance(value, (tuple, list)):
        for inner in value:
            yield from texts_of(inner, depth + 1)
    elif dataclasses.is_dataclass(value) and depth < 6:
        for each in dataclasses.fields(value):
            if each.name != "path":  # names of files are kept as they are, and cleaned where they are shown
                yield from texts_of(getattr(value, each.name), depth + 1)


def require_safe(value: object) -> None:
    for text in texts_of(value):
        if clean(text, len(text) + 1) != text:
            raise Broken(f"a control character in {text[:200]!r}")


def fold(events: Sequence[Event], reducer: Reducer, rng: random.Random) -> RunState:
    at = 0
    while at < len(events):
        size = rng.randrange(1, 200)
        try:
            reducer.feed(events[at : at + size])
        except ArithmeticError:  # what is documented of numbers that nothing can be computed from
            break
        at += size
    state = reducer.state
    require_safe((state.log, state.judged, state.history, state.end, state.run, state.disagreements, state.checkpoints))
    return state


def feed(log: LegacyLog, data: bytes, size: Callable[[], int]) -> list[Event]:
    events: list[Event] = []
    at = 0
    while at < len(data):
        piece = size()
        events += log.feed(data[at : at + piece])
        at += piece
    return events + log.finish()


def try_log(rng: random.Random, data: bytes) -> None:
    manifest = rng.choice((None, OldManifest(steps=50, max_steps=50, host="gx10")))
    events = feed(LegacyLog(manifest), data, lambda: 1 << 18)
    require_safe(events)
    if not isinstance(events[-1], End) or [event.seq for event in events] != list(range(len(events))):
        raise Broken("no end, or a gap in seq")
    written = [encode(event) for event in events]
    small = rng.choice((1, 7, 100, 5_000))
    pieces = feed(LegacyLog(manifest), data, lambda: rng.randrange(1, small + 1))
    if [encode(event) for event in pieces] != written:
        raise Broken("how it is cut into pieces changes what is read")
    fold(events, Reducer(OLD_CONTRACT, LOG), rng)


def try_manifest(rng: random.Random, data: bytes) -> None:
    try:
        require_safe(parse_old_manifest(data, rng.choice(("dispatch.json", "a\x1b"))))
    except KdError as error:
        require_safe(str(error))


def try_stream(rng: random.Random, data: bytes) -> None:
    events: list[Event] = []
    for line in data.split(b"\n"):
        try:
            event = decode_line(line)
        except KdError as error:
            require_safe(str(error))
            continue
        if event is not None:
            require_safe(event)
            events.append(event)
    fold(events, Reducer(smoke_contract()), rng)


def try_directory(path: Path) -> None:
    for each in [path, *find_evidence([path.parent]), *path.iterdir()]:
        known = True
        try:
            found = open_evidence(each)
            require_safe((found.remarks, found.old))
        except KdError as error:
            require_safe(str(error))
            known = False
        if each == path:
            loaded = load_run(each)
            require_safe((loaded.problem, loaded.remarks, loaded.config_problem, loaded.about, loaded.state.log))
            if not known and not loaded.problem:
                raise Broken("what is no evidence was read without a word")


def try_huge(rng: random.Random) -> None:
    """A log of many megabytes that comes in pieces, and nothing of which is kept."""
    endless = rng.choice((b"x" * (1 << 18), rng.randbytes(1 << 18)))
    lines = rng.choice((b"\n" * (1 << 16), bent(rng, old.smoke_log(), 200)))
    piece, total = rng.choice(((endless, 64 << 20), (lines, 4 << 20)))
    log = LegacyLog()
    for _ in range(total // max(1 << 12, len(piece))):
        log.feed(piece)
    log.finish()


# The loop


def run_case(seed: int, number: int, folder: Path) -> str:
    """Makes one case and tries it; its kind."""
    rng = random.Random(f"{seed}-{number}")
    if number % HUGE_EVERY == HUGE_EVERY - 1:
        try_huge(rng)
        return "huge"
    kind = rng.choice(("log", "log", "manifest", "stream", "directory"))
    inputs = folder / "input"
    if kind == "directory":
        a_directory(rng, inputs)
        try_directory(inputs)
        return kind
    make = {"log": a_log, "manifest": a_manifest, "stream": a_stream}[kind]
    data = make(rng)
    inputs.write_bytes(data)
    {"log": try_log, "manifest": try_manifest, "stream": try_stream}[kind](rng, data)
    return kind


def clear(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def limit(seconds: float) -> None:
    """Of processor time, and ten times that of any time, for whatever waits. 0: none."""
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    signal.setitimer(signal.ITIMER_REAL, 10 * seconds)


def too_slow(number: int, frame: FrameType | None) -> None:
    raise Broken(f"took longer than {SECONDS:g} s of processor time, or ten times as long in all")


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--case", type=int, default=None, help="this case alone")
    parser.add_argument("--keep", type=Path, default=None, help="where an input that breaks something is put")
    options = parser.parse_args(argv)
    seed = random.SystemRandom().randrange(1 << 32) if options.seed is None else options.seed
    keep = options.keep or Path(tempfile.gettempdir())
    print(f"seed {seed}", flush=True)
    before = [signal.signal(number, too_slow) for number in (signal.SIGALRM, signal.SIGVTALRM)]
    try:
        return go_on(options, seed, keep)
    finally:
        limit(0)
        for number, handler in zip((signal.SIGALRM, signal.SIGVTALRM), before, strict=True):
            signal.signal(number, handler)


def go_on(options: argparse.Namespace, seed: int, keep: Path) -> int:
    """Case after case, until one breaks something or time is over."""
    begun = told = time.monotonic()
    counts: Counter[str] = Counter()
    number = options.case or 0
    with tempfile.TemporaryDirectory(prefix="fuzz-readers-") as name:
        folder = Path(name)
        while True:
            limit(SECONDS)
            try:
                counts[run_case(seed, number, folder)] += 1
                if peak() > MEMORY:
                    raise Broken(f"{peak() >> 20:,} MiB of memory")
            except Exception:  # noqa: BLE001 - whatever it is, it is what is looked for
                limit(0)
                traceback.print_exc()
                kept = keep / f"fuzz-{seed}-{number}"
                if (folder / "input").exists():
                    shutil.move(folder / "input", kept)
                print(f"FAILED: seed {seed}, case {number}; its input: {kept}", flush=True)
                return 1
            limit(0)
            clear(folder / "input")
            number += 1
            now = time.monotonic()
            over = options.case is not None or now - begun >= 60 * options.minutes
            if over or now - told >= PROGRESS_SECONDS:
                told = now
                kinds = ", ".join(f"{kind} {count:,}" for kind, count in sorted(counts.items()))
                print(
                    f"{(now - begun) / 60:.1f} min: {counts.total():,} inputs ({kinds}), {peak() >> 20} MiB", flush=True
                )
            if over:
                return 0


if __name__ == "__main__":
    sys.exit(main())
