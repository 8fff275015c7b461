"""How quickly evidence is read: streams, the predecessor's logs, and a list of a thousand runs.

    python bench/evidence.py [decode] [fold] [text] [memory] [list] [--json]

Needs a checkout and the `test` extra. Without a part named, all are measured. What is compared takes turns in one
process, one repeat each, so that a busy machine weighs on all of it alike. Ratios are of medians; times are CPU times
of the process, but for `memory` and `list`, where a clock on the wall is read. First the machine and the versions are
printed, then a table for each part.

decode: a stream's lines as events, in pieces of 256 KiB as they are read. `bare` is msgspec with the same typed structs
and nothing else: no check of version, run and seq, nothing cleaned, nothing refused but what it refuses itself. It is
given the lines one by one, cut before the clock starts; `in pieces` it cuts them itself, in its own way. The ratio is
of rates, to the first row.

fold: from a file to the state that panes are drawn from: read, decoded, cleaned, judged by the contract of training.
`half messages` is the same stream with a line for the operator after each step, every tenth with something to clean.

text: the predecessor's logs as events, and from a file to the same state; with one step in ten lines among those of a
compiler, as its logs are, and with steps alone.

memory: peak of a process that opens evidence of `--mib`, and of one that opens as good as nothing. The shortest steps
are the most that a line can hold: beyond a million the older ones are thinned.

list: `--runs` run directories with a hundred steps each, in a process that just started: `cold` without what an earlier
one kept, at first from the ends of the files, then exactly; `warm` with it. All files are in the kernel's cache.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from console_runs import in_turns, stream

MIB = 1 << 20
PIECE = 1 << 18
RUN = "11111111-2222-4333-8444-555555555555"
Row = dict[str, Any]


def timed(work: Callable[[], object]) -> Callable[[], float]:
    """CPU seconds that something takes."""

    def once() -> float:
        began = time.process_time()
        work()
        return time.process_time() - began

    return once


def rates(count: int, times: dict[str, list[float]], base: str) -> list[Row]:
    """Lines a second, and how many times the base's that is."""
    slowest = statistics.median(times[base])
    return [
        {"what": what, "best": count / min(seconds), "median": count / statistics.median(seconds),
         "ratio": slowest / statistics.median(seconds)}
        for what, seconds in times.items()
    ]  # fmt: skip


def pieces(lines: list[bytes]) -> list[bytes]:
    """Whole lines, about `PIECE` bytes of them at a time."""
    found, begin, size = [], 0, 0
    for at, line in enumerate(lines, 1):
        size += len(line)
        if size >= PIECE or at == len(lines):
            found.append(b"".join(lines[begin:at]))
            begin, size = at, 0
    return found


def decode_rows(options: argparse.Namespace) -> list[Row]:
    """Decoding alone, beside msgspec's."""
    from engine.stream import EVENT_DECODER, decode_line
    from engine.stream_reader import StreamReader

    lines = list(stream(options.lines))
    read = pieces(lines)
    cut = [piece.split(b"\n")[:-1] for piece in read]

    def each(decode: Callable[[bytes], object]) -> Callable[[], float]:
        # The events of a piece are gone with the next: what holds all of them is slower by a third.
        def work() -> None:
            for piece in cut:
                [decode(line) for line in piece]

        return timed(work)

    def cutting() -> None:
        for piece in read:
            [EVENT_DECODER.decode(line) for line in piece.split(b"\n")[:-1]]

    def bare_pieces() -> None:
        for piece in read:
            EVENT_DECODER.decode_lines(piece)

    def ours() -> None:
        reader = StreamReader(RUN)
        assert sum(len(reader.read(piece).events) for piece in read) == len(lines)

    times = in_turns(
        {
            "bare": each(EVENT_DECODER.decode),
            "bare, and the lines are cut": timed(cutting),
            "bare, in pieces": timed(bare_pieces),
            "kdconsole": timed(ours),
            "kdconsole, line by line": each(decode_line),
            "json.loads, no structs": each(json.loads),
        },
        options.repeats,
    )
    return rates(len(lines), times, "bare")


def messages(steps: int) -> Iterator[bytes]:
    """The same stream with a message after each step."""
    for at, line in enumerate(stream(steps, 1)):
        yield line if at % 20 else line.replace(b"after step", "nach Schritt → ".encode())


def fold_rows(options: argparse.Namespace) -> list[Row]:
    """From a stream's file to the state that panes are drawn from."""
    from console.run_reader import StreamFold
    from dispatch.manifest import EVENTS
    from engine.falsifiers import builtin_contract, parse_contract

    contract = parse_contract(builtin_contract("train"), "train.yaml")
    rows: list[Row] = []
    kinds: dict[str, tuple[Callable[[int], Iterator[bytes]], int]] = {
        "steps": (stream, options.lines), "half messages": (messages, options.lines // 2),
    }  # fmt: skip
    for kind, (made, steps) in kinds.items():
        with tempfile.TemporaryDirectory() as scratch:
            lines = list(made(steps))
            (Path(scratch) / EVENTS).write_bytes(b"".join(lines))

            def folded(scratch: str = scratch, steps: int = steps) -> None:
                fold = StreamFold(Path(scratch), contract, None)
                while fold.advance():
                    pass
                assert len(fold.state.steps) == steps, fold.problem

            rows += rates(len(lines), in_turns({kind: timed(folded)}, options.repeats), kind)
    return rows


def text_log(lines: int, each: int) -> Iterator[bytes]:
    """A log of the predecessor, with a step in so many lines."""
    steps = max(1, lines // each)
    for at in range(lines):
        step = at // each + 1
        if at % each or step > steps:
            yield b"[FWD-CACHE] OK 'model.layers.%d.self_attn.q_proj.weight' [%d, 896] %d us\n" % (
                at % 24,
                at % 4096,
                at,
            )
        else:
            yield b"  Step %d/%d: loss: %.4f\n" % (step, steps, 9 - 6 * step / steps)
    closing = f"initial_loss=8.9999 → final_loss=3.0000 ({steps} steps, {1.5 * steps:.1f}s)"
    yield f"✓ Distillation complete: {closing}\n".encode()


def text_rows(options: argparse.Namespace) -> list[Row]:
    """The predecessor's logs: parsed alone, and from the file to the state."""
    from console.run_reader import RunReader
    from dispatch.legacy import LegacyLog

    rows: list[Row] = []
    for kind, each in {"one step in ten lines": 10, "steps alone": 1}.items():
        with tempfile.TemporaryDirectory() as scratch:
            path = Path(scratch) / "launch.log"
            data = b"".join(text_log(options.lines, each))
            path.write_bytes(data)

            def parsed(data: bytes = data) -> None:
                log = LegacyLog()
                for at in range(0, len(data), PIECE):
                    log.feed(data[at : at + PIECE])
                log.finish()

            def folded(path: Path = path, steps: int = options.lines // each) -> None:
                reader = RunReader(path)
                while reader.advance():
                    pass
                assert len(reader.state.steps) == steps, reader.loaded().problem

            measured = {f"{kind}, parsed": timed(parsed), f"{kind}, from file to state": timed(folded)}
            rows += rates(data.count(b"\n"), in_turns(measured, options.repeats), f"{kind}, parsed")
    return rows


# Memory


def shortest() -> Iterator[bytes]:
    """The shortest steps that a stream can have."""
    line = b'{"event":"step","v":1,"run":"x","seq":%d,"t":%d,"step":%d,"loss":%d,"ce":1,"kd":1,"lr":1,"grad_norm":1,' \
           b'"tokens":1,"seconds":1}\n'  # fmt: skip
    for number in itertools.count(1):
        yield line % (number, number, number, number % 7)


def cut_at(size: int, lines: Iterator[bytes]) -> Iterator[bytes]:
    """The first lines, about so many bytes."""
    left = size
    while left > 0 and (line := next(lines, b"")):
        left -= len(line)
        yield line


MADE: dict[str, tuple[str, Callable[[int], Iterator[bytes]]]] = {
    "a stream": ("events.jsonl", lambda size: cut_at(size, stream(size // 240))),
    "a stream of the shortest steps": ("events.jsonl", lambda size: cut_at(size, shortest())),
    "a text log": ("launch.log", lambda size: cut_at(size, text_log(size // 60, 10))),
}


def opened(path: str) -> Row:
    """Opens evidence; what that took of this process."""
    from console.run_reader import RunReader

    began = time.perf_counter()
    reader = RunReader(Path(path))
    while reader.advance():
        pass
    state = reader.state
    assert reader.offset == reader.total
    return {
        "seconds": time.perf_counter() - began,
        "steps": state.last_step.step if state.last_step else 0,
        "rows": len(state.steps),
        "thinned": state.steps.thinned,
        "peak_mib": _peak() / MIB,
    }


def _peak() -> int:
    """Bytes; of this process alone, which `getrusage` mixes with the one that started it."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM"))


def memory_rows(options: argparse.Namespace) -> list[Row]:
    """Peak memory of opening a large file, in a process each."""
    rows: list[Row] = []
    for kind, (name, made) in MADE.items():
        for size in (1 << 16, round(options.mib * MIB)):
            with tempfile.TemporaryDirectory(dir=options.directory) as scratch:
                path = Path(scratch) / name
                with path.open("wb") as file:
                    count = sum(file.write(line) > 0 for line in made(size))
                found = _alone("opened", scratch)
                what = f"{kind}, as good as nothing" if size == 1 << 16 else kind
                rows.append({"what": what, "mib": path.stat().st_size / MIB, "lines": count,
                             "rate": count / found["seconds"], **found})  # fmt: skip
    return rows


# Lists


def listed(evidence: str, cache: str) -> Row:
    """A list of all runs, at first and exactly; the rows are kept."""
    from console.row_cache import RowCache
    from console.run_index import RunIndex

    began = time.perf_counter()
    index = RunIndex([Path(evidence)], time.time, RowCache(Path(cache)))
    for _ in index.look():
        pass
    first, left = time.perf_counter() - began, index.to_fold
    while index.fold_next():
        pass
    exact = time.perf_counter() - began
    index.keep()
    return {"runs": len(index.rows()), "to_fold": left, "first_seconds": first, "exact_seconds": exact}


def list_rows(options: argparse.Namespace) -> list[Row]:
    """Listing many runs, without and with what an earlier process kept; in turns."""
    from tests.console.run_dirs import make_run
    from tests.streams import EPOCH, end_event, smoke_events, with_verdicts

    found: dict[str, list[Row]] = {"cold": [], "warm": []}
    with tempfile.TemporaryDirectory(dir=options.directory) as scratch:
        evidence, cache = Path(scratch) / "evidence", Path(scratch) / "rows"
        events = with_verdicts(smoke_events(100), end=end_event(100))
        for number in range(options.runs):
            make_run(evidence, events, created=EPOCH + 60 * number)
        time.sleep(2.5)  # what changed just now is not kept
        for _ in range(options.repeats):
            cache.unlink(missing_ok=True)
            for name in found:
                found[name].append(_alone("listed", str(evidence), str(cache)))
    rows = []
    for name, seen in found.items():
        row: Row = {"what": name, "runs": seen[0]["runs"], "to_fold": seen[0]["to_fold"]}
        for key in ("first_seconds", "exact_seconds"):
            values = [each[key] for each in seen]
            row |= {key: statistics.median(values), f"best_{key}": min(values)}
        rows.append(row)
    return rows


def _alone(what: str, *given: str) -> Row:
    """The result of a function here, called in a process of its own."""
    command = [sys.executable, __file__, f"--alone={what}", *given]
    result: Row = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
    return result


PARTS: dict[str, Callable[[argparse.Namespace], list[Row]]] = {
    "decode": decode_rows,
    "fold": fold_rows,
    "text": text_rows,
    "memory": memory_rows,
    "list": list_rows,
}
ALONE: dict[str, Callable[..., Row]] = {"opened": opened, "listed": listed}
_RATES = (("what", "", ""), ("best", "best lines/s", ",.0f"), ("median", "median lines/s", ",.0f"),
          ("ratio", "ratio", ".2f"))  # fmt: skip
COLUMNS: dict[str, tuple[tuple[str, str, str], ...]] = {
    "decode": _RATES,
    "fold": _RATES[:3],
    "text": _RATES[:3],
    "memory": (("what", "", ""), ("mib", "MiB", ",.0f"), ("lines", "lines", ",d"), ("seconds", "seconds", ".1f"),
               ("rate", "lines/s", ",.0f"), ("steps", "steps", ",d"), ("rows", "rows kept", ",d"),
               ("thinned", "steps an older row", ",d"), ("peak_mib", "peak MiB", ",.0f")),
    "list": (("what", "", ""), ("runs", "runs", ",d"), ("first_seconds", "listed after s", ".3f"),
             ("best_first_seconds", "best", ".3f"), ("to_fold", "not exact yet", ",d"),
             ("exact_seconds", "exact after s", ".3f"), ("best_exact_seconds", "best", ".3f")),
}  # fmt: skip


def table(part: str, rows: list[Row]) -> str:
    """Rows as a Markdown table."""
    columns = COLUMNS[part]
    lines = [f"| {' | '.join(heading for _, heading, _ in columns)} |"]
    lines.append(f"|{'|'.join(' --- ' if not form else ' ---: ' for _, _, form in columns)}|")
    lines += [f"| {' | '.join(format(row[key], form) for key, _, form in columns)} |" for row in rows]
    return "\n".join(lines)


def machine() -> Row:
    """What it was measured on, and with which versions."""
    model = next((line.partition(":")[2].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
                  if line.startswith("model name")), platform.machine())  # fmt: skip
    found: Row = {"cpu": model, "cores": len(os.sched_getaffinity(0)), "load": round(os.getloadavg()[0], 1)}
    return found | {name: metadata.version(name) for name in ("msgspec", "numpy")} | {"python": sys.version.split()[0]}


def main() -> None:
    """Prints the tables, or one JSON document."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, usage="%(prog)s [PART ...] [options]"
    )
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)} (all)")
    parser.add_argument("--lines", type=int, default=100_000, help="decode, fold, text: lines, about (%(default)s)")
    parser.add_argument("--mib", type=float, default=1_024, help="memory: size of a file (%(default)s)")
    parser.add_argument("--runs", type=int, default=1_000, help="list: run directories (%(default)s)")
    parser.add_argument("--repeats", type=int, default=7, help="of each measurement (%(default)s)")
    parser.add_argument("--directory", type=Path, help="memory, list: on the disk to measure with")
    parser.add_argument("--json", action="store_true", help="one JSON document instead of tables")
    parser.add_argument("--alone", choices=ALONE, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.alone:
        print(json.dumps(ALONE[options.alone](*options.parts)))
        return
    if unknown := set(options.parts) - set(PARTS):
        parser.error(f"{', '.join(sorted(unknown))}: expected {', '.join(PARTS)}")
    results: Row = {"schema": 1, "machine": machine()}
    if not options.json:
        print("; ".join(f"{name} {value}" for name, value in results["machine"].items()), end="\n\n", flush=True)
    for part in options.parts or PARTS:
        results[part] = PARTS[part](options)
        if not options.json:
            print(f"{part}\n\n{table(part, results[part])}\n", flush=True)
    if options.json:
        print(json.dumps(results))


if __name__ == "__main__":
    main()
