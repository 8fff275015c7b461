"""The filter of the list of runs: what each word asks for, and what is said of one that nobody understands."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from console.palette import RUNS
from console.row import Row
from console.row_filter import HINT, KEYS, parse_query
from console.run_list import matches
from engine.text import clean

NOW = datetime(2026, 11, 21, 12, tzinfo=UTC).timestamp()


def at(*moment: int) -> float:
    return datetime(*moment, tzinfo=UTC).timestamp()  # type: ignore[arg-type, misc]


def row_of(**fields: object) -> Row:
    return Row(path=Path("/e/r"), id="r", **fields)  # type: ignore[arg-type]


def passes(query: str, now: float = NOW, **fields: object) -> bool:
    return matches(row_of(**fields), parse_query(query), now)


@pytest.mark.parametrize(
    ("query", "found"),
    [
        ("", True),
        ("gx", True),
        ("GX10 completed", True),
        ("status:COMP host:gx", True),
        ("mode:train", True),
        ("mode:smoke", False),
        ("host:box", False),
        ("gx10 nothing", False),
        ("f-no-stall", True),
        ("1.234", True),
        ("12:34", False),
        ("✘1", True),
        ("model:1.5B", True),
        ("model:0.5b model:1.5b", True),
        ("model:7b", False),
        ("qwen-0.5b", True),
        ("phase:3B", True),
        ("phase:3", False),
        ("pmat-699", True),
    ],
)
def test_a_query_asks_for_every_word(query: str, found: bool) -> None:
    fields = {
        "status": "COMPLETED",
        "host": "gx10",
        "mode": "train",
        "loss": 1.234,
        "phase": "3b",
        "ticket": "PMAT-699",
    }
    fields |= {"teacher": "/models/qwen-1.5b", "student": "/models/qwen-0.5b"}
    assert passes(query, verdicts={"FAIL": 1}, failing=("F-NO-STALL-001",), **fields) is found


JUDGED = {"F-DISTILL-V2-001": "FAIL", "F-SMOKE-001": "PASS", "F-KD-002": "UNKNOWN"}
COUNTS = {"FAIL": 1, "UNKNOWN": 1, "PASS": 1}


@pytest.mark.parametrize(
    ("query", "judged", "counts", "found"),
    [
        ("verdict:fail", JUDGED, COUNTS, True),
        ("verdict:unknown", JUDGED, COUNTS, True),
        ("verdict:pending", JUDGED, COUNTS, False),
        ("verdict:pass", JUDGED, COUNTS, False),
        ("verdict:pass", {"F-SMOKE-001": "PASS"}, {"PASS": 1}, True),
        ("verdict:pass", {}, {}, False),
        ("verdict:fail", {}, {}, False),
        ("verdict:f-distill-v2-001", JUDGED, COUNTS, True),
        ("verdict:F-DISTILL-V2-001=FAIL", JUDGED, COUNTS, True),
        ("verdict:F-DISTILL-V2-001=pass", JUDGED, COUNTS, False),
        ("verdict:F-OTHER-001", JUDGED, COUNTS, False),
    ],
)
def test_verdicts_are_asked_for_by_word_and_by_falsifier(
    query: str, judged: dict[str, str], counts: dict[str, int], found: bool
) -> None:
    assert passes(query, judged=judged, verdicts=counts, exact=True) is found


@pytest.mark.parametrize(
    ("query", "first", "last"),
    [
        ("date:2026-11", at(2026, 11, 1), at(2026, 12, 1)),
        ("date:2026-12", at(2026, 12, 1), at(2027, 1, 1)),
        ("date:2024-02", at(2024, 2, 1), at(2024, 3, 1)),
        ("date:2026-11-21", at(2026, 11, 21), at(2026, 11, 22)),
        ("date:2024", at(2024, 1, 1), at(2025, 1, 1)),
        ("date:>2026-11-01", at(2026, 11, 2), None),
        ("date:>=2026-11-01", at(2026, 11, 1), None),
        ("date:<2026-11", None, at(2026, 11, 1)),
        ("date:<=2026-11", None, at(2026, 12, 1)),
        ("date:7d", NOW - 7 * 86_400, None),
        ("date:12h", NOW - 12 * 3_600, None),
        ("date:2w", NOW - 14 * 86_400, None),
    ],
)
def test_a_date_is_a_span_of_utc(query: str, first: float | None, last: float | None) -> None:
    if first is not None:
        assert (passes(query, created=first), passes(query, created=first - 1)) == (True, False)
    if last is not None:
        assert (passes(query, created=last - 1), passes(query, created=last)) == (True, False)


@pytest.mark.parametrize("query", ["date:2026", "date:<2026", "date:>2000", "date:7d"])
def test_a_run_of_no_known_date_has_none(query: str) -> None:
    assert not passes(query, created=0.0)


@pytest.mark.parametrize(
    ("phase", "asked", "found"),
    [("3", "3", True), ("3b", "3", False), ("Phase-3b", "3b", True), ("stage C", "c", True), ("", "3", False)],
)
def test_a_phase_is_asked_for_by_its_exact_name(phase: str, asked: str, found: bool) -> None:
    assert passes(f"phase:{asked}", phase=phase) is found


@pytest.mark.parametrize(
    ("query", "said"),
    [
        ("statsu:failed", "statsu:failed: unknown key; did you mean status:?"),
        ("zzzzzz:x", "zzzzzz:x: unknown key; expected one of status:, host:, mode:, model:, verdict:, date:, phase:"),
        ("status:faild", "status:faild: did you mean failed?"),
        ("mode:trian", "mode:trian: did you mean train?"),
        ("mode:", "mode:: expected smoke, train, prepare, evaluate or publish"),
        ("verdict:fial", "verdict:fial: did you mean fail?"),
        ("verdict:f-x=fial", "verdict:f-x=fial: did you mean fail?"),
        ("verdict:zzz", "expected fail, unknown, pending, pass"),
        ("date:yesterday", "expected a day or month in UTC such as 2026-11-21"),
        ("date:2026-13", "no such date"),
        ("date:2026-02-30", "no such date"),
        ("date:0000", "no such date"),
        ("phase:", "3b (check of scale)"),
    ],
)
def test_what_nobody_understands_is_said_and_passes_nothing(query: str, said: str) -> None:
    [problem] = parse_query(f"host:gx10 {query}").problems
    assert said in problem
    assert not passes(f"host:gx10 {query}", host="gx10", status="FAILED", mode="train", created=NOW)


def test_everything_that_is_wrong_is_said_at_once() -> None:
    assert len(parse_query("statsu:x mode:x text date:x").problems) == 3


def test_the_hint_and_every_state_are_understood() -> None:
    assert parse_query(HINT.partition("or ")[2]).problems == ()
    assert {word.partition(":")[0] for word in HINT.partition("or ")[2].split()} == set(KEYS)
    for status in RUNS:
        assert passes(f"status:{status}", status=status)


@given(st.text(max_size=60), st.sampled_from(["", "date:", "verdict:", "phase:", "status:", "model:", "x:"]))
def test_no_text_breaks_the_filter(text: str, key: str) -> None:
    query = parse_query(key + text)
    assert all(clean(problem) == problem for problem in query.problems)
    matches(row_of(created=NOW, phase="3", judged=JUDGED, verdicts=COUNTS), query, NOW)
