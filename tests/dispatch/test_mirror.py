"""The copy of a stream that stands elsewhere: an exact prefix at every instant, whoever dies when."""

from __future__ import annotations

import asyncio
import resource
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dispatch.mirror import MirroredTransport
from dispatch.transport import LocalTransport
from engine.errors import RunError


class Counting(LocalTransport):
    """This machine as the other host, counting what is read from it."""

    host = "gx10"

    def __init__(self) -> None:
        self.bytes = 0

    async def read(self, path: str, offset: int, limit: int, *, timeout: float = 30.0) -> bytes:
        data = await super().read(path, offset, limit, timeout=timeout)
        self.bytes += len(data)
        return data


@pytest.fixture
def sides(tmp_path: Path) -> tuple[Path, Path]:
    """The run's directory there and here."""
    there, here = tmp_path / "there", tmp_path / "here"
    there.mkdir()
    here.mkdir()
    return there, here


def read_all(transport: MirroredTransport, there: Path, piece: int = 1 << 20) -> bytes:
    """Reads as a follower does: a byte of overlap, and to the end of whole lines."""
    data = b""

    async def go() -> bytes:
        nonlocal data
        while True:
            overlap = 1 if data else 0
            got = (await transport.read(f"{there}/events.jsonl", len(data) - overlap, piece + overlap))[overlap:]
            whole = got[: got.rfind(b"\n") + 1]
            if not whole:
                return data
            data += whole

    return asyncio.run(go())


def test_what_is_read_is_kept_and_not_fetched_again(sides: tuple[Path, Path]) -> None:
    there, here = sides
    stream = b"".join(b"line %d\n" % number for number in range(5_000))
    (there / "events.jsonl").write_bytes(stream + b"half")
    first = Counting()
    with MirroredTransport(first, str(there), here) as transport:
        assert read_all(transport, there) == stream
    assert (here / "events.jsonl").read_bytes() == stream
    (there / "events.jsonl").write_bytes(stream + b"half a line\nand more\n")
    second = Counting()
    with MirroredTransport(second, str(there), here) as transport:
        assert transport.length == len(stream)
        assert read_all(transport, there) == stream + b"half a line\nand more\n"
    assert second.bytes < 100
    assert (here / "events.jsonl").read_bytes() == (there / "events.jsonl").read_bytes()


@settings(max_examples=60, deadline=None)
@given(
    lines=st.lists(st.binary(max_size=40).map(lambda b: b.replace(b"\n", b"")), max_size=60),
    torn=st.binary(max_size=10).map(lambda b: b.replace(b"\n", b"")),
    have=st.integers(0, 3_000),
    piece=st.integers(45, 500),
)
def test_from_every_prefix_the_copy_becomes_the_original(
    tmp_path_factory: pytest.TempPathFactory, lines: list[bytes], torn: bytes, have: int, piece: int
) -> None:
    root = tmp_path_factory.mktemp("mirror")
    there, here = root / "there", root / "here"
    there.mkdir()
    here.mkdir()
    whole = b"".join(line + b"\n" for line in lines)
    (there / "events.jsonl").write_bytes(whole + torn)
    (here / "events.jsonl").write_bytes((whole + torn)[:have])  # a console died while it wrote
    with MirroredTransport(LocalTransport(), str(there), here) as transport:
        transport._checked = True  # a process each time, and another test's
        assert read_all(transport, there, piece) == whole
    assert (here / "events.jsonl").read_bytes() == whole


def test_a_second_console_reads_and_leaves_the_copy_alone(sides: tuple[Path, Path]) -> None:
    there, here = sides
    (there / "events.jsonl").write_bytes(b"one\ntwo\n")
    with MirroredTransport(LocalTransport(), str(there), here) as first:
        with MirroredTransport(LocalTransport(), str(there), here) as second:
            assert not second.keeping
            assert read_all(second, there) == b"one\ntwo\n"
        assert (here / "events.jsonl").read_bytes() == b""
        assert first.keeping
        read_all(first, there)
    assert (here / "events.jsonl").read_bytes() == b"one\ntwo\n"


def test_another_stream_is_not_mixed_into_the_copy(sides: tuple[Path, Path]) -> None:
    there, here = sides
    (here / "events.jsonl").write_bytes(b"one\ntwo\n")
    (there / "events.jsonl").write_bytes(b"ONE\nTWO!THREE\n")

    async def go(transport: MirroredTransport) -> bytes:
        return await transport.read(f"{there}/events.jsonl", 7, 100)

    with (
        MirroredTransport(LocalTransport(), str(there), here) as transport,
        pytest.raises(RunError, match="differs from byte 0 on"),
    ):
        asyncio.run(go(transport))
    assert (here / "events.jsonl").read_bytes() == b"one\ntwo\n"


def test_a_copy_that_cannot_grow_stays_a_prefix_and_reading_goes_on(sides: tuple[Path, Path]) -> None:
    there, here = sides
    stream = b"".join(b"line %d\n" % number for number in range(5_000))
    (there / "events.jsonl").write_bytes(stream)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with MirroredTransport(LocalTransport(), str(there), here) as transport:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
        try:
            assert read_all(transport, there, 4_096) == stream
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert "cannot be written" in transport.problem
        assert not transport.keeping
    kept = (here / "events.jsonl").read_bytes()
    assert stream.startswith(kept)
    assert kept.endswith(b"\n")
    assert len(kept) > 4_000


@pytest.mark.parametrize("make", [lambda p: p.mkdir(), lambda p: p.symlink_to("/etc/passwd")])
def test_a_copy_that_is_no_file_of_ours_is_refused(sides: tuple[Path, Path], make: Callable[[Path], None]) -> None:
    there, here = sides
    make(here / "events.jsonl")
    with pytest.raises(RunError, match=r"events\.jsonl: cannot be opened"):
        MirroredTransport(LocalTransport(), str(there), here)
