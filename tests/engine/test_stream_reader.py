"""Many lines in one go: what is read, refused and cleaned is what one line after the other gives."""

from __future__ import annotations

import math
from collections.abc import Callable

import msgspec
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from engine.errors import StreamError
from engine.stream import (
    EVENT_DECODER,
    MAX_LINE_BYTES,
    Checkpoint,
    Event,
    Heartbeat,
    Log,
    Run,
    Step,
    decode_line,
    encode,
)
from engine.stream_reader import StreamReader
from tests.streams import RUN, run_event, smoke_events, step_event

EVENTS = smoke_events(12)


def plain(data: bytes, run: str | None) -> tuple[list[Event], int, str]:
    """The same, one line after the other, as simply as it can be said."""
    events: list[Event] = []
    size, seq = 0, -1
    for line in data.split(b"\n")[:-1]:
        try:
            if len(line) > MAX_LINE_BYTES:
                raise StreamError(f"a line of {len(line):,} bytes", expected=f"at most {MAX_LINE_BYTES:,}")
            event = decode_line(line)
            if event is not None:
                run = run or event.run
                if event.run != run:
                    raise StreamError("an event of another run", expected=run)
                if event.seq <= seq:
                    raise StreamError(f"seq {event.seq} after seq {seq}", expected="a growing seq")
                seq = event.seq
                events.append(event)
        except StreamError as error:
            return events, size, str(error)
        size += len(line) + 1
    return events, size, ""


def check(data: bytes, run: str | None = None) -> list[Event]:
    found = StreamReader(run).read(data)
    events, size, error = plain(data, run)
    assert repr(found.events) == repr(events)  # NaN is like NaN here
    assert [type(event) for event in found.events] == [type(event) for event in events]
    assert (found.size, str(found.error or "")) == (size, error)
    return events


def lines_of(count: int, begin: int = 0) -> list[bytes]:
    return [
        encode(msgspec.structs.replace(step_event(seq + 1, 5.0 - seq / 100), run=RUN, seq=seq, t=seq / 2))
        for seq in range(begin, begin + count)
    ]


def log(seq: int, message: str) -> bytes:
    return encode(Log(run=RUN, seq=seq, t=1.0, level="info", message=message))


HARMS: dict[str, Callable[[bytes], bytes]] = {
    "no v": lambda line: line.replace(b'"v":1,', b""),
    "v behind": lambda line: line.replace(b'"v":1,', b"").replace(b"}\n", b',"v":1}\n'),
    "v twice": lambda line: line.replace(b"}\n", b',"v":2}\n'),
    "v as text": lambda line: line.replace(b'"v":1,', b"").replace(b"}\n", b',"x":"v"}\n'),
    "v true": lambda line: line.replace(b'"v":1,', b'"v":true,'),
    "v 1.0": lambda line: line.replace(b'"v":1,', b'"v":1.0,'),
    "another v": lambda line: line.replace(b'"v":1,', b'"v":2,'),
    "another run": lambda line: line.replace(RUN.encode(), b"another"),
    "an empty run": lambda line: line.replace(RUN.encode(), b""),
    "run twice": lambda line: line.replace(b"}\n", b',"run":"another"}\n'),
    "a run with an escape": lambda line: line.replace(RUN.encode(), b"a\\u001bb"),
    "seq -1": lambda line: line.replace(b'"seq":', b'"seq":-'),
    "another seq": lambda line: line.replace(b"}\n", b',"seq":3}\n'),
    "short": lambda line: b'{"event":1}\n',
    "very short": lambda line: b"{}\n",
    "two in a line": lambda line: line.replace(b"}\n", b"}" + line),
    "two in a line, and an empty one": lambda line: line.replace(b"}\n", b"}" + line + b"\n"),
    "over two lines": lambda line: line.replace(b'"v":1,', b'"v":1,\n'),
    "over two lines that look whole": lambda line: line.replace(b"}\n", b',"x":[{}\n,' + line[:-1] + b"]}\n"),
    "a line within": lambda line: line.replace(b"}\n", b',"x":[{"a":1}\n' + line),
    "an event inside": lambda line: line.replace(b"}\n", b',"x":\n' + line[:-1] + b"}\n"),
    "a space before": lambda line: b" " + line,
    "a space behind": lambda line: line.replace(b"}\n", b"} \n"),
    "a carriage return": lambda line: line.replace(b"}\n", b"}\r\n"),
    "an empty line": lambda line: line + b"\n",
    "not there": lambda line: b"",
    "torn": lambda line: line[:40] + b"\n",
    "a raw newline in a text": lambda line: line.replace(b'"run":"', b'"run":"\n'),
    "of a later writer": lambda line: line.replace(b'"event":"', b'"event":"x'),
    "an unknown field": lambda line: line.replace(b"}\n", b',"x":{"v":2}}\n'),
    "an unknown text": lambda line: line.replace(b"}\n", b',"x":"\\u001b"}\n'),
    "bytes that are no text": lambda line: line.replace(b"}\n", b',"x":"\xff"}\n'),
    "not finite": lambda line: line.replace(b'"t":', b'"t":"NaN","x":'),
    "too large": lambda line: line.replace(b"}\n", b',"seq":99999999999999999999}\n'),
    "very long": lambda line: line.replace(b"}\n", b',"x":"' + b"y" * MAX_LINE_BYTES + b'"}\n'),
    "nearly too long": lambda line: line.replace(b"}\n", b',"x":"' + b"y" * (MAX_LINE_BYTES - len(line) - 6) + b'"}\n'),
    "deep": lambda line: line.replace(b"}\n", b',"x":' + b"[" * 3_000 + b"\n"),
    "another order": lambda line: line.replace(b'"event":"step","v":1,', b'"v":1,"event":"step",'),
}


def test_lines_as_they_are_written_are_read_in_one_go(monkeypatch: pytest.MonkeyPatch) -> None:
    data = b"".join(encode(event) for event in EVENTS) + b"".join(lines_of(1_000, len(EVENTS)))
    monkeypatch.setattr("engine.stream_reader.decode_line", None)
    assert len(StreamReader(RUN).read(data).events) == len(EVENTS) + 1_000


@pytest.mark.parametrize("harm", HARMS)
@pytest.mark.parametrize("at", [0, 1, 57, 99])
def test_a_line_that_is_otherwise_is_what_it_is_alone(harm: str, at: int) -> None:
    lines = lines_of(100)
    lines[at] = HARMS[harm](lines[at])
    check(b"".join(lines))
    check(b"".join(lines), RUN)


def test_as_many_lines_as_events_are_not_enough() -> None:
    """Two lines that begin as events do and hold two: one over both of them, and one behind it."""
    first, second, third = lines_of(3)
    check(first[:-2] + b',"x":\n' + second[:-1] + b"}" + third)


def test_two_events_in_one_line_are_none() -> None:
    lines = lines_of(60)
    lines[20] = lines[20].rstrip()
    check(b"".join(lines))


@pytest.mark.parametrize("run", ["", "a\\u001bb"])
def test_a_run_that_no_writer_gives(run: str) -> None:
    check(b"".join(lines_of(5)).replace(RUN.encode(), run.encode()))


def test_a_character_that_json_does_not_escape_is_cleaned() -> None:
    [read] = check(log(0, "a\x7fb"))
    assert isinstance(read, Log)
    assert read.message == "a\\x7fb"


@pytest.mark.parametrize("room", range(8))
@pytest.mark.parametrize("rest", [b" ", b"  ", b"\n", b"\n\n", b" \n", b"\n ", b"{}", b"\n{}\n", b'{"event":1}\n'])
def test_what_comes_behind_the_last_line_however_it_lies(rest: bytes, room: int) -> None:
    check(log(0, "x" * room) + log(1, "") + rest)
    check(rest + log(0, "x" * room))


def test_what_is_torn_is_left_alone() -> None:
    check(b"".join(lines_of(3)) + b"  ")
    check(b"".join(lines_of(3)) + b'{"event":"step"')
    check(b"torn")


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, len(EVENTS) - 1), st.sampled_from([None, None, None, *HARMS])), max_size=12),
    st.sampled_from([None, RUN, "another"]),
)
@example([], None)
def test_whatever_stands_in_the_lines(chosen: list[tuple[int, str | None]], run: str | None) -> None:
    lines = []
    for seq, (at, harm) in enumerate(chosen):
        line = encode(msgspec.structs.replace(EVENTS[at], seq=seq))
        lines.append(HARMS[harm](line) if harm else line)
    check(b"".join(lines), run)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 1 << 16), st.binary(max_size=3)), max_size=4))
def test_damage_anywhere_is_found_where_it_is(damage: list[tuple[int, bytes]]) -> None:
    data = b"".join(lines_of(40))
    for place, what in damage:
        place %= len(data)
        data = data[:place] + what + data[place + 1 :]
    check(data[: data.rfind(b"\n") + 1])


@settings(max_examples=200, deadline=None)
@given(st.lists(st.text(max_size=12), max_size=20))
@example(["\x1b[2J", "plain", "\u202egnp.exe", "\x7f", "ü", "two\nlines"])
def test_texts_are_as_clean_as_line_by_line(messages: list[str]) -> None:
    events = check(b"".join(log(seq, message) for seq, message in enumerate(messages)))
    assert not any(c in "\x1b\n\x7f\u202e" for event in events if isinstance(event, Log) for c in event.message)


def test_the_keys_of_a_mapping_are_cut_where_they_are_cleaned_and_only_there() -> None:
    long = "k" * 300
    other = Log(run=RUN, seq=1, t=1.0, level="info", message="ü")
    run = msgspec.structs.replace(run_event(), run=RUN, seq=0, versions={long: "1"})
    [read, _] = check(encode(run) + encode(other))
    assert isinstance(read, Run)
    assert list(read.versions) == [long]


def test_a_heartbeat_s_phase_and_a_checkpoint_s_path_are_cleaned() -> None:
    beat = Heartbeat(run=RUN, seq=0, phase="\x1btrain", step=1, rss_bytes=1)
    kept = Checkpoint(
        run=RUN, seq=1, step=1, kind="best", path="a\u202eb", bytes=1, tensors=1, sha256="", seconds=1, waited_seconds=1
    )
    read = check(encode(beat) + encode(kept))
    assert (read[0].phase, read[1].path) == ("\\x1btrain", "a\\u202eb")  # type: ignore[attr-defined]


def test_one_number_that_is_not_finite_leaves_the_other_lines_quick(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = lines_of(2_000)
    lines[1_234] = encode(msgspec.structs.replace(step_event(1_235, math.nan), run=RUN, seq=1_234, t=617.0))
    alone = []

    def counting(line: bytes) -> Event | None:
        alone.append(line)
        return decode_line(line)

    monkeypatch.setattr("engine.stream_reader.decode_line", counting)
    events = StreamReader().read(b"".join(lines)).events
    assert len(events) == 2_000
    assert isinstance(events[1_234], Step)
    assert math.isnan(events[1_234].loss)
    assert 0 < len(alone) < 50


def test_pieces_go_on_with_the_run_and_seq_of_those_before() -> None:
    reader, lines = StreamReader(), lines_of(30)
    assert len(reader.read(b"".join(lines[:10])).events) == 10
    assert (reader.run, reader.seq) == (RUN, 9)
    assert len(reader.read(b"".join(lines[10:20])).events) == 10
    again = reader.read(b"".join(lines[19:]))
    assert (again.events, again.size) == ([], 0)
    assert "seq 19 after seq 19" in str(again.error)


def test_the_decoder_alone_would_take_what_is_refused() -> None:
    """Why the lines are looked at: this is what they would pass as."""
    line = lines_of(1)[0]
    for harm in ("no v", "two in a line, and an empty one", "over two lines"):
        assert EVENT_DECODER.decode_lines(HARMS[harm](line))
