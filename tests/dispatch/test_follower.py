"""The tail against real files: whole lines, each once, in order, whatever the writer, the disk or a stranger does."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import tempfile
import time
import uuid
from itertools import pairwise
from pathlib import Path

import pytest
from dispatch_rig import Run, until
from hypothesis import given, settings
from hypothesis import strategies as st

from dispatch import follower as module
from dispatch.follower import Batch, Follower
from dispatch.supervisor import write_atomic
from dispatch.transport import LocalTransport
from engine.errors import RunError, StreamError
from engine.stream import MAX_LINE_BYTES

ID = str(uuid.uuid4())


def line(seq: int, message: str = "hello", run: str = ID, event: str = "log") -> bytes:
    fields = {"event": event, "v": 1, "run": run, "seq": seq, "t": 1.0, "level": "info", "message": message}
    return json.dumps(fields).encode() + b"\n"


def finish(directory: Path, run: str = ID) -> None:
    record = {"v": 1, "run": run, "exit_code": 0, "signal": None, "started": 1.0, "ended": 2.0, "seconds": 1.0}
    write_atomic(directory / "exit.json", json.dumps(record).encode())


def follow(directory: Path, offset: int = 0, run: str | None = ID, poll: float = 0.005) -> list[Batch]:
    async def collect() -> list[Batch]:
        return [batch async for batch in Follower(LocalTransport(), directory, run, offset=offset).batches(poll)]

    return asyncio.run(collect())


def lines_of(batches: list[Batch]) -> list[bytes]:
    return [each for batch in batches for each in batch.lines]


@settings(max_examples=40, deadline=None)
@given(
    messages=st.lists(st.text(max_size=40), min_size=1, max_size=12),
    cuts=st.lists(st.integers(0, 2000), max_size=20),
    begin=st.integers(0, 5),
)
def test_every_line_arrives_once_and_in_order_however_the_writer_splits_it(
    messages: list[str], cuts: list[int], begin: int
) -> None:
    whole = b"".join(line(seq, message) for seq, message in enumerate(messages))
    edges = sorted({0, len(whole), *(cut % len(whole) for cut in cuts)})
    starts = [0, *(at + 1 for at, byte in enumerate(whole) if byte == 10)]
    offset = starts[min(begin, len(starts) - 1)]

    async def scenario(directory: Path) -> list[Batch]:
        stream = directory / "events.jsonl"
        stream.write_bytes(whole[:offset])
        batches: list[Batch] = []

        async def write() -> None:
            with stream.open("ab", buffering=0) as file:
                for first, last in pairwise(edges):
                    file.write(whole[max(first, offset) : max(last, offset)])
                    await asyncio.sleep(0)
            finish(directory)

        writer = asyncio.create_task(write())
        async for batch in Follower(LocalTransport(), directory, ID, offset=offset).batches(poll=0):
            batches.append(batch)
            assert batch.offset == offset + sum(len(each) + 1 for each in lines_of(batches))
        await writer
        return batches

    with tempfile.TemporaryDirectory() as directory:
        batches = asyncio.run(scenario(Path(directory)))
    assert b"".join(each + b"\n" for each in lines_of(batches)) == whole[offset:]
    seqs = [event.seq for batch in batches for event in batch.events]
    assert seqs == list(range(starts.index(offset), len(messages)))
    assert [batch.status for batch in batches].count("ended") == 1
    assert batches[-1].ended is not None


def test_a_writer_process_that_writes_byte_by_byte_is_followed_exactly(run: Run) -> None:
    whole = b"".join(line(seq, "ä" * 9, run.run) for seq in range(20))
    run.start(
        f"import os\nwhole = {whole!r}\nfd = os.open('events.jsonl', os.O_WRONLY | os.O_CREAT | os.O_APPEND)\n"
        "for at in range(len(whole)): os.write(fd, whole[at:at+1])\n"
    )
    batches = follow(run.path, run=run.run)
    assert b"".join(each + b"\n" for each in lines_of(batches)) == whole
    assert batches[-1].status == "ended"
    assert batches[-1].ended is not None
    assert batches[-1].ended.describe() == "exit code 0"


def test_a_torn_last_line_is_not_yet_written_and_may_be_cut_back_and_replaced(tmp_path: Path) -> None:
    stream = tmp_path / "events.jsonl"
    stream.write_bytes(line(0) + line(1, "this one the disk refused")[:40])

    async def scenario() -> list[bytes]:
        batches = Follower(LocalTransport(), tmp_path, ID).batches(0.005)
        first = await anext(batches)
        stream.write_bytes(line(0) + line(1, "x"))
        second = await anext(batches)
        with stream.open("ab") as file:
            file.write(b'{"torn at the end')
        finish(tmp_path)
        last = await anext(batches)
        assert (last.status, last.lines) == ("ended", ())
        assert [batch async for batch in batches] == []
        return lines_of([first, second])

    assert asyncio.run(scenario()) == [line(0)[:-1], line(1, "x")[:-1]]


@pytest.mark.parametrize(
    ("then", "complaint"),
    [
        (b"", "is shorter than what was read of it"),
        (line(0), "is shorter than what was read of it"),
        (None, "is gone"),
        (line(0, "y" * 400) + line(1), "was replaced"),
        (line(0) + line(1) + line(2, run="another"), "an event of run another"),
        (line(0) + line(1) + line(1), "seq 1 after seq 1"),
        (line(0) + line(1) + b"{}\n", "version"),
        (line(0) + line(1) + b'{"v":1,\n', "JSON"),
        (line(0) + line(1) + b"x" * (MAX_LINE_BYTES + 1), "a line without an end"),
        (line(0) + line(1) + line(2, "x" * MAX_LINE_BYTES), "a line without an end"),
    ],
)
def test_a_stream_that_cannot_be_trusted_ends_the_following_with_an_error(
    tmp_path: Path, then: bytes | None, complaint: str
) -> None:
    stream = tmp_path / "events.jsonl"
    stream.write_bytes(line(0) + line(1))

    async def scenario() -> None:
        batches = Follower(LocalTransport(), tmp_path, None).batches(0.005)
        assert len((await anext(batches)).lines) == 2
        if then is None:
            stream.unlink()
        else:
            stream.write_bytes(then)
        with pytest.raises(StreamError, match=complaint):
            await anext(batches)

    asyncio.run(scenario())


def test_lines_before_a_broken_one_are_handed_over_first(tmp_path: Path) -> None:
    (tmp_path / "events.jsonl").write_bytes(line(0) + line(1) + b"broken\n" + line(2))

    async def scenario() -> None:
        follower = Follower(LocalTransport(), tmp_path, ID)
        batches = follower.batches(0.005)
        assert (await anext(batches)).lines == (line(0)[:-1], line(1)[:-1])
        with pytest.raises(StreamError, match=f"byte {len(line(0) + line(1))}"):
            await anext(batches)
        assert follower.offset == len(line(0) + line(1))

    asyncio.run(scenario())


def test_an_offset_that_is_no_lines_beginning_is_refused(tmp_path: Path) -> None:
    (tmp_path / "events.jsonl").write_bytes(line(0) + line(1))
    with pytest.raises(StreamError, match="no line's beginning"):
        follow(tmp_path, offset=5)


def test_a_line_of_the_longest_allowed_length_is_read(tmp_path: Path) -> None:
    longest = line(0, "x" * (MAX_LINE_BYTES - len(line(0, ""))))
    assert len(longest) == MAX_LINE_BYTES
    (tmp_path / "events.jsonl").write_bytes(longest)
    finish(tmp_path)
    assert lines_of(follow(tmp_path)) == [longest[:-1]]


def test_events_of_a_later_writer_are_kept_as_lines_and_left_out_of_the_events(tmp_path: Path) -> None:
    (tmp_path / "events.jsonl").write_bytes(line(0) + line(1, event="teleport") + line(2))
    finish(tmp_path)
    batches = follow(tmp_path)
    assert len(lines_of(batches)) == 3
    assert [event.seq for batch in batches for event in batch.events] == [0, 2]


def test_an_exit_record_of_another_run_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "events.jsonl").write_bytes(line(0))
    finish(tmp_path, run="another")
    with pytest.raises(StreamError, match="of run another"):
        follow(tmp_path)


def test_a_hundred_thousand_lines_come_in_bounded_batches_and_bounded_time(tmp_path: Path) -> None:
    count = 100_000
    with (tmp_path / "events.jsonl").open("wb") as file:
        file.writelines(line(seq) for seq in range(count))
    finish(tmp_path)
    begin = time.monotonic()
    seen, largest = 0, 0

    async def scenario() -> None:
        nonlocal seen, largest
        async for batch in Follower(LocalTransport(), tmp_path, ID).batches():
            seen += len(batch.events)
            largest = max(largest, sum(len(each) + 1 for each in batch.lines))

    asyncio.run(scenario())
    assert seen == count
    assert largest <= module.READ_BYTES
    assert time.monotonic() - begin < 20, "a second or so on an idle machine"


def test_silence_is_told_by_ticks_that_say_how_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TICK_SECONDS", 0.02)
    (tmp_path / "events.jsonl").write_bytes(line(0))

    async def scenario() -> None:
        batches = Follower(LocalTransport(), tmp_path, ID).batches(0.005)
        assert (await anext(batches)).silent_seconds == 0.0
        ticks = [await anext(batches) for _ in range(3)]
        assert [tick.lines for tick in ticks] == [()] * 3
        assert 0 < ticks[0].silent_seconds < ticks[1].silent_seconds < ticks[2].silent_seconds
        with (tmp_path / "events.jsonl").open("ab") as file:
            file.write(line(1))
        assert (await anext(batches)).silent_seconds == 0.0

    asyncio.run(scenario())


def test_a_lost_run_ends_the_following_after_everything_was_read(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "STATUS_SECONDS", 0.1)
    answer = run.start(f"open('events.jsonl', 'wb').write({line(0, run=run.run)!r})\nimport time\ntime.sleep(600)")
    until(lambda: (run.path / "events.jsonl").exists() and (run.path / "events.jsonl").stat().st_size, "the stream")
    for who in ("supervisor", "trainer"):
        process = answer[who]
        assert isinstance(process, dict)
        subprocess.run(["kill", "-9", str(process["pid"])], check=True)
    batches = follow(run.path, run=run.run)
    assert len(lines_of(batches)) == 1
    assert (batches[-1].status, batches[-1].ended) == ("lost", None)


def test_following_what_is_no_run_directory_ends_with_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "STATUS_SECONDS", 0.05)
    with pytest.raises(RunError, match="not a run directory"):
        follow(tmp_path / "nothing", run=None)


def test_following_imports_neither_torch_nor_the_console() -> None:
    script = "import sys, dispatch.follower; print({'torch', 'console', 'transformers'} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
