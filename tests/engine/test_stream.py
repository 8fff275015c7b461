"""The training stream: what is written is what is read, whatever stands in the file and whatever the disk does."""

from __future__ import annotations

import contextlib
import json
import math
import os
import resource
import stat
import subprocess
import sys
import threading
import unicodedata
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from engine.errors import StreamError
from engine.stream import (
    EVENT_TYPES,
    MAX_LINE_BYTES,
    End,
    Event,
    Heartbeat,
    Log,
    Measure,
    Run,
    Verdict,
    decode_line,
    encode,
)
from engine.stream_writer import StreamWriter
from tests.streams import RUN, smoke_events

ROOT = Path(__file__).parents[2]
TEXT = st.text(st.characters(exclude_categories=("Cs",)), max_size=30)
PLAIN = st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=30)
INTEGER = st.integers(-(2**63), 2**63 - 1)
SURFACE = {  # by what the type's name holds, the longest first
    "dict[str, float]": st.dictionaries(PLAIN, st.floats(), max_size=4),
    "dict[str, str]": st.dictionaries(PLAIN, PLAIN, max_size=4),
    "str": PLAIN,
    "int": INTEGER,
    "float": st.floats(),
    "bool": st.booleans(),
}


def any_event() -> st.SearchStrategy[Event]:
    """Every event type with every field at random, as the writer stamps it; texts need no cleaning."""
    return st.one_of([build(kind) for kind in EVENT_TYPES])


def build(kind: type[Event]) -> st.SearchStrategy[Event]:
    header = {"v": st.just(1), "run": st.just(RUN), "seq": st.integers(0, 2**53), "t": st.floats(0, 1e11)}
    fields = {f.name: field(f.type) for f in msgspec.structs.fields(kind) if f.name not in header}
    return st.builds(kind, **header, **fields)


def field(kind: Any) -> st.SearchStrategy[Any]:
    words = str(kind)
    plain = next(values for name, values in SURFACE.items() if name in words)
    return st.none() | plain if "None" in words else plain


def same(left: object, right: object) -> bool:
    if isinstance(left, Event) and isinstance(right, Event):
        return type(left) is type(right) and all(
            same(getattr(left, name), getattr(right, name)) for name in left.__struct_fields__
        )
    if isinstance(left, dict) and isinstance(right, dict):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    if isinstance(left, float) and isinstance(right, float) and math.isnan(left):
        return math.isnan(right)
    return left == right


def read(path: Path) -> list[Event]:
    content = path.read_bytes()
    assert content.endswith(b"\n") or not content
    events = [decode_line(line) for line in content.splitlines(keepends=True)]
    assert None not in events
    return [event for event in events if event is not None]


def log(message: str = "hello") -> Log:
    return Log(level="info", message=message)


def line(**changes: Any) -> bytes:
    raw = {"event": "log", "v": 1, "run": RUN, "seq": 3, "t": 1.0, "level": "info", "message": "hello"} | changes
    return json.dumps({key: value for key, value in raw.items() if value is not ...}).encode() + b"\n"


@settings(max_examples=300, deadline=None)
@given(any_event())
def test_every_event_is_read_as_it_was_written(event: Event) -> None:
    written = encode(event)
    assert written.endswith(b"\n")
    assert written.count(b"\n") == 1
    decoded = decode_line(written)
    assert decoded is not None
    assert same(decoded, event)


def test_every_event_type_is_tried() -> None:
    assert {kind.__name__.lower() for kind in EVENT_TYPES} == {
        "run", "phase", "heartbeat", "vitals", "measure", "step", "eval", "projection", "verdict", "log", "end",
        "checkpoint", "checkpointfailed", "inputs", "efficiency", "progress", "control", "problem",
    }  # fmt: skip


@pytest.mark.parametrize(("value", "text"), [(math.nan, "NaN"), (math.inf, "Infinity"), (-math.inf, "-Infinity")])
def test_what_is_no_number_travels_as_text(value: float, text: str) -> None:
    measure = encode(Measure(run=RUN, seq=0, name="x", value=value))
    end = End(run=RUN, seq=1, status="FAILED", reason="", exit_code=1, steps=1, seconds=value, summary={"a": value})
    raw, raw_end = json.loads(measure), json.loads(encode(end))
    assert raw["value"] == text
    assert (raw_end["seconds"], raw_end["summary"]["a"]) == (text, text)
    decoded, decoded_end = decode_line(measure), decode_line(encode(end))
    assert isinstance(decoded, Measure)
    assert isinstance(decoded_end, End)
    for number in (decoded.value, decoded_end.seconds, decoded_end.summary["a"]):
        assert number == value or (math.isnan(number) and math.isnan(value))


def test_other_texts_in_place_of_a_number_are_refused() -> None:
    with pytest.raises(StreamError, match="event 'measure' with seq 3"):
        decode_line(line(event="measure", name="x", value="nan"))


def test_events_and_fields_of_a_later_writer_are_skipped() -> None:
    assert decode_line(line(event="weather", watts=300)) is None
    assert decode_line(line(colour="red", nested={"a": [1, 2]})) == Log(
        run=RUN, seq=3, t=1.0, level="info", message="hello"
    )


@pytest.mark.parametrize("version", [0, 2, "1", None, True, ..., 10**30])
@pytest.mark.parametrize("event", ["log", "weather"])
def test_another_format_version_is_refused(version: Any, event: str) -> None:
    with pytest.raises(StreamError, match="format version"):
        decode_line(line(v=version, event=event))


@pytest.mark.parametrize("changes", [{"seq": ...}, {"seq": -1}, {"run": ...}, {"run": ""}])
def test_an_event_that_no_writer_stamped_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(StreamError, match="without run or seq"):
        decode_line(line(**changes))


def test_integers_that_other_languages_cannot_hold_are_refused() -> None:
    assert decode_line(line(event="heartbeat", phase="train", step=2**62, rss_bytes=0)) is not None
    for number in (2**63, 10**400, 10**4000):
        with pytest.raises(StreamError):
            decode_line(line(event="heartbeat", phase="train", step=number, rss_bytes=0))


@settings(max_examples=500, deadline=None)
@given(st.binary(max_size=200))
@example(b"")
@example(b"{")
@example(b"[" * 100_000)
@example(b'{"event":"zzz"')
@example(b'{"event":"x","v":1,"a":"\xff"}')
@example(b'{"event":"log","v":1,"level":"\xff","message":"x"}')
@example(b'{"event":"log","v":1,"message":"\\ud800","level":"a"}')
@example(b'{"event":"log","v":1,"seq":1e999}')
@example(b'{"event":["log"],"v":1}')
@example(b'"log"')
@example(b'{"event":"weather","v":1,"deep":' + b"[" * 100_000)
@example(b'{"event":"log","v":1,"level":"a","message":"b","deep":' + b"[" * 100_000)
@example(b'{"event":"log","v":1,"level":"a","message":"b","deep":' + b'{"a":' * 100_000)
def test_arbitrary_bytes_are_an_event_nothing_or_one_kind_of_error(content: bytes) -> None:
    with contextlib.suppress(StreamError):
        decode_line(content)


@settings(max_examples=200, deadline=None)
@given(
    st.sampled_from(smoke_events()),
    st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), max_size=3),
    st.integers(0, 1_000),
)
def test_a_damaged_line_is_an_event_nothing_or_one_kind_of_error(
    event: Event, damage: list[tuple[int, int]], end: int
) -> None:
    written = bytearray(encode(event))
    for place, byte in damage:
        written[place % len(written)] = byte
    with contextlib.suppress(StreamError):
        decode_line(bytes(written[:end]))


def test_a_message_about_a_bad_line_is_itself_clean() -> None:
    with pytest.raises(StreamError) as caught:
        decode_line(line(event="measure", name=["\x1b[2J"], value=1, seq="\x1b[2J"))
    assert str(caught.value).isprintable()


@settings(max_examples=200, deadline=None)
@given(TEXT)
@example("\x1b[2J\x9b31m")
@example("\u202egnp.exe")
@example("two\nlines")
def test_texts_are_clean_wherever_a_line_enters(message: str) -> None:
    decoded = decode_line(encode(Log(run=RUN, seq=0, level="info", message=message)))
    assert isinstance(decoded, Log)
    steering = [
        c for c in decoded.message if unicodedata.category(c) in ("Cc", "Zl", "Zp") or c in "\u202a\u202e\u2066"
    ]
    assert not steering
    assert decoded.message == message or not message.isprintable()


def test_keys_and_values_of_mappings_are_clean_too() -> None:
    run = next(event for event in smoke_events() if isinstance(event, Run))
    decoded = decode_line(encode(msgspec.structs.replace(run, versions={"to\x1brch": "2\u202e.13"}, student="\x9bx")))
    assert isinstance(decoded, Run)
    assert decoded.versions == {"to\\x1brch": "2\\u202e.13"}
    assert decoded.student == "\\x9bx"


def test_a_raw_escape_sequence_in_a_line_is_no_json() -> None:
    with pytest.raises(StreamError, match="not JSON"):
        decode_line(line().replace(b"hello", b"\x1b[2J"))


@pytest.mark.parametrize("text", ["x" * 100_000, "\x01" * 100_000, "\u2603" * 100_000, "\U0001f600" * 60_000])
def test_over_long_texts_are_cut_and_marked(text: str) -> None:
    verdict = Verdict(
        run=RUN, seq=0, id="F-A", verdict="FAIL", severity="gate", claim=text, expected=text, observed=text, step=1
    )
    written = encode(verdict)
    assert len(written) <= MAX_LINE_BYTES
    decoded = decode_line(written)
    assert isinstance(decoded, Verdict)
    assert decoded.claim.endswith("… (cut)")
    assert decoded.id == "F-A"


def test_over_long_mappings_are_cut() -> None:
    end = End(
        status="FAILED", reason="", exit_code=1, steps=1, seconds=1.0, summary={f"k{i}": 1.0 for i in range(9_000)}
    )
    decoded = decode_line(encode(msgspec.structs.replace(end, run=RUN, seq=0)))
    assert isinstance(decoded, End)
    assert 1_000 < len(decoded.summary) < 9_000


def test_a_line_of_the_largest_size_is_left_whole() -> None:
    room = MAX_LINE_BYTES - len(encode(Log(run=RUN, seq=0, level="info", message="")))
    written = encode(Log(run=RUN, seq=0, level="info", message="x" * room))
    assert len(written) == MAX_LINE_BYTES
    assert len(encode(Log(run=RUN, seq=0, level="info", message="x" * (room + 1)))) < MAX_LINE_BYTES


def test_a_file_name_that_is_not_utf8_can_be_told(tmp_path: Path) -> None:
    writer = StreamWriter(tmp_path / "events.jsonl", RUN)
    writer.emit(log(os.fsdecode(b"/models/caf\xe9")))
    writer.close()
    [event] = read(tmp_path / "events.jsonl")
    assert isinstance(event, Log)
    assert event.message == "/models/caf\\udce9"


def test_the_file_can_be_read_by_its_owner_alone(tmp_path: Path) -> None:
    previous = os.umask(0)
    try:
        StreamWriter(tmp_path / "events.jsonl", RUN).close()
    finally:
        os.umask(previous)
    assert stat.S_IMODE((tmp_path / "events.jsonl").stat().st_mode) == 0o600


def test_the_writer_stamps_run_version_time_and_a_seq_without_a_gap(tmp_path: Path) -> None:
    writer = StreamWriter(tmp_path / "events.jsonl", RUN)
    stamped = [writer.emit(log(str(i))) for i in range(5)]
    writer.close()
    assert read(tmp_path / "events.jsonl") == stamped
    assert [event.seq for event in stamped] == [0, 1, 2, 3, 4]
    assert {(event.v, event.run) for event in stamped} == {(1, RUN)}
    assert all(a.t <= b.t for a, b in pairwise(stamped))


@pytest.mark.parametrize("torn", [b"", b'{"event":"log","v":1', b"\0" * 300, b'{"event":"log"}' * 2_000])
def test_a_torn_tail_is_cut_and_seq_goes_on(tmp_path: Path, torn: bytes) -> None:
    path = tmp_path / "events.jsonl"
    with_close(path, ["a", "b"])
    whole = path.read_bytes()
    path.write_bytes(whole + torn)
    with_close(path, ["c"])
    assert path.read_bytes().startswith(whole)
    assert [event.seq for event in read(path)] == [0, 1, 2]


def test_a_torn_first_line_is_cut_and_seq_begins_at_0(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_bytes(b'{"event":"log","v":1,"run":"')
    with_close(path, ["a"])
    assert [event.seq for event in read(path)] == [0]


@pytest.mark.parametrize(
    "last",
    [
        line(run="another"),
        line(seq=...),
        line(seq=-1),
        line(seq=True),
        b"not json\n",
        b"\xff\xfe\n",
        b"[" * 5_000 + b"\n",
        b"x" * 200_000,
    ],
)
def test_a_file_that_is_not_of_this_run_is_refused_and_left_alone(tmp_path: Path, last: bytes) -> None:
    path = tmp_path / "events.jsonl"
    content = last + b'{"torn'
    path.write_bytes(content)
    with pytest.raises(StreamError):
        StreamWriter(path, RUN)
    assert path.read_bytes() == content


def test_events_of_many_threads_are_whole_lines_in_the_order_of_seq(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    writer = StreamWriter(path, RUN)

    def work(name: int) -> None:
        for i in range(200):
            writer.emit(log(f"{name} {i} " + "x" * (i % 50)))

    threads = [threading.Thread(target=work, args=(name,)) for name in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    writer.close()
    events = read(path)
    assert [event.seq for event in events] == list(range(1_600))


def test_closing_twice_is_closing_once_and_nothing_can_be_emitted_then(tmp_path: Path) -> None:
    writer = StreamWriter(tmp_path / "events.jsonl", RUN)
    writer.close()
    writer.close()
    with pytest.raises(ValueError, match="closed"):
        writer.emit(log())


FULL_DISK = """
import json, os, sys
from pathlib import Path
from engine.stream import Log, Heartbeat
from engine.stream_writer import StreamWriter

path, run, make_room = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
writer = StreamWriter(path, run)
while not writer.failed_writes:
    writer.emit(Log(level="info", message="x" * 1000))
    content = path.read_bytes()
    assert content.endswith(b"\\n"), content[-50:]
for i in range(20):
    stamped = writer.emit(Log(level="info", message=f"while full {i}" + "y" * 1000))
full = {"pending": writer.pending, "failed": writer.failed_writes, "whole": path.read_bytes().endswith(b"\\n")}
try:
    writer.sync()
    full["sync"] = "passed"
except OSError:
    full["sync"] = "refused"
exec(make_room)
last = writer.emit(Log(level="info", message="after"))
writer.close()
print(json.dumps(full | {"seq": last.seq, "left": writer.pending}))
"""


def fill(path: Path, make_room: str, **options: Any) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(path), RUN, make_room],
        cwd=ROOT, capture_output=True, text=True, timeout=60, check=False, **options,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    told: dict[str, Any] = json.loads(done.stdout)
    return told


def check_filled(told: dict[str, Any], path: Path) -> None:
    assert told["pending"] == 21
    assert told["failed"] >= 21
    assert told["whole"]
    assert told["sync"] == "refused"
    assert told["left"] == 0
    events = read(path)
    assert [event.seq for event in events] == list(range(told["seq"] + 1))
    assert isinstance(events[-1], Log)
    assert events[-1].message == "after"


def test_a_file_size_limit_tears_no_line_and_loses_no_event(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    limit, unlimited = 50_123, resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    told = fill(
        path,
        f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({unlimited}, {unlimited}))",
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, unlimited)),
    )
    check_filled(told, path)


def test_half_a_line_that_could_not_be_cut_at_once_is_cut_before_the_next_write(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    # The one thing that no real disk does on demand: refuse to cut as well, once.
    refuse_once = (
        "cut = os.ftruncate; refused = []\n"
        "def ftruncate(fd, size):\n"
        "    if not refused: refused.append(size); raise OSError(5, 'refused')\n"
        "    cut(fd, size)\n"
        "os.ftruncate = ftruncate\n"
    )
    program = FULL_DISK.replace('    assert content.endswith(b"\\n"), content[-50:]\n', "    pass\n")
    assert program != FULL_DISK
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    done = subprocess.run(
        [
            sys.executable, "-c", program.replace("path, run", refuse_once + "path, run", 1), str(path), RUN,
            f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({unlimited}, {unlimited}))",
        ],
        cwd=ROOT, capture_output=True, text=True, timeout=60, check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (50_123, unlimited)),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    check_filled(told, path)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 256 KiB."""
    place = tmp_path / "disk"
    place.mkdir()
    if os.geteuid() != 0:
        pytest.skip("only root can mount a file system")
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(place)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"no tmpfs here: {mounted.stderr.decode().strip()}")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_full_disk_tears_no_line_and_loses_no_event(small_disk: Path) -> None:
    ballast = small_disk / "ballast"
    ballast.write_bytes(b"x" * 128 * 1024)
    check_filled(fill(small_disk / "events.jsonl", f"os.unlink({str(ballast)!r})"), small_disk / "events.jsonl")


def test_a_stream_that_the_disk_never_took_says_so_when_it_is_closed(tmp_path: Path) -> None:
    writer = StreamWriter(Path("/dev/full"), RUN) if Path("/dev/full").exists() else pytest.skip("no /dev/full")
    writer.emit(log())
    assert (writer.pending, writer.failed_writes) == (1, 1)
    with pytest.raises(OSError, match="1 events"):
        writer.close()
    writer.close()


def test_while_the_disk_is_full_heartbeats_alone_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full")
    monkeypatch.setattr(StreamWriter, "max_backlog", 3)
    writer = StreamWriter(Path("/dev/full"), RUN)
    beat = Heartbeat(phase="train", step=1, rss_bytes=1)
    assert [writer.emit(event).seq for event in (log(), beat, log(), beat, log(), beat)] == [0, 1, 2, -1, 3, -1]
    assert writer.pending == 4
    with pytest.raises(OSError, match="could not be written"):
        writer.close()


def with_close(path: Path, messages: list[str]) -> None:
    writer = StreamWriter(path, RUN)
    for message in messages:
        writer.emit(log(message))
    writer.close()
