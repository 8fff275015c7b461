"""The two files of an evaluation: appended whole or not at all, and cut where a process left them half."""

from __future__ import annotations

import os
import resource
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.answers import Answer, AnswersError, Result, Rows, plan
from tests.engine.evaluate_rig import PROBLEMS_OF_OURS, rows_of


def answer(number: int, text: str = "    return 1\n") -> Answer:
    return Answer(task=f"t/{number}", sample=0, completion=text, tokens=4, finish="stop", seed=7)


@pytest.fixture
def rows(tmp_path: Path) -> Iterator[Rows[Answer]]:
    made = Rows(tmp_path / "completions.jsonl", Answer)
    yield made
    made.close()


def test_what_was_added_is_read_back_whatever_it_says(tmp_path: Path, rows: Rows[Answer]) -> None:
    said = [answer(0, "\n\r\x00\x1b\u2028 \"'\\ \ufffd 😀"), answer(1, "")]
    rows.add(said[:1])
    rows.add(said[1:])
    path = tmp_path / "completions.jsonl"
    assert rows_of(path, Answer) == rows.rows == said
    assert path.stat().st_mode & 0o777 == 0o600
    again = Rows(path, Answer)
    again.add([answer(2)])
    again.close()
    assert rows_of(path, Answer) == [*said, answer(2)]


@settings(max_examples=40)
@given(st.integers(0, 400), st.integers(0, 3))
def test_wherever_a_process_was_killed_whole_rows_stay_and_the_next_one_goes_on(
    tmp_path_factory: pytest.TempPathFactory, size: int, keep: int
) -> None:
    path = tmp_path_factory.mktemp("rows") / "completions.jsonl"
    three = [answer(number) for number in range(3)]
    first = Rows(path, Answer)
    first.add(three)
    first.close()
    size = min(size, path.stat().st_size)
    whole = path.read_bytes()[:size].count(b"\n")
    os.truncate(path, size)
    second = Rows(path, Answer)
    assert second.rows == three[:whole]
    if keep < whole:
        second.cut(keep)
    second.add(three[min(keep, whole) :])
    second.close()
    assert rows_of(path, Answer) == three


def test_a_disk_that_takes_half_of_the_rows_has_none_of_them(tmp_path: Path, rows: Rows[Answer]) -> None:
    rows.add([answer(0)])
    path = tmp_path / "completions.jsonl"
    before = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 30, limits[1]))
        with pytest.raises(AnswersError, match=r"completions\.jsonl: cannot be written: .*free space, and resume"):
            rows.add([answer(1), answer(2)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert path.read_bytes() == before
    rows.add([answer(1)])
    assert rows_of(path, Answer) == rows.rows == [answer(0), answer(1)]


def test_rows_are_on_the_disk_before_anybody_goes_on(rows: Rows[Answer], monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    plain = os.fsync

    def noted(fd: int) -> None:
        synced.append(os.fstat(fd).st_size)
        plain(fd)

    monkeypatch.setattr(os, "fsync", noted)
    rows.add([answer(0), answer(1)])
    assert synced == [rows._ends[-1]]


def test_what_is_no_file_of_rows_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "folder").mkdir()
    (tmp_path / "deep").write_bytes(b"[" * 100_000 + b"\n")
    for name in ("pipe", "link", "folder", "deep"):
        with pytest.raises(AnswersError, match=f"^{name}"):
            Rows(tmp_path / name, Result)
    assert not (tmp_path / "elsewhere").exists()


def test_the_plan_is_every_sample_of_a_problem_and_then_the_next() -> None:
    assert plan(PROBLEMS_OF_OURS[:2], 2) == [("own/double", 0), ("own/double", 1), ("own/first", 0), ("own/first", 1)]
