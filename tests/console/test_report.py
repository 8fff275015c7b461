"""The end of a run, for people and for programs."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import Any

import msgspec
import pytest
from rich.console import Console

from console.report import SCHEMA, Result, document, duration, show, table
from console.run_state import Reducer
from engine.errors import ExitCode
from engine.stream import Event, Verdict
from tests.streams import RUN, end_event, smoke_contract, smoke_events, with_verdicts


def result(events: list[Event] | None = None, **changes: Any) -> Result:
    state = Reducer(smoke_contract()).feed(with_verdicts(smoke_events(12)) if events is None else events)
    fields: dict[str, Any] = {
        "id": "20261015-120000-smoke-abcdef",
        "mode": "smoke",
        "state": state,
        "exit_code": ExitCode.OK,
        "status": "COMPLETED",
        "reason": "the time budget is reached",
        "evidence": Path("/somewhere/evidence/20261015-120000-smoke-abcdef"),
        "launch_seconds": 0.4,
    }
    return Result(**fields | changes)


def rendered(what: Result, width: int, terminal: bool = False) -> str:
    output = io.StringIO()
    console = Console(file=output, width=width, force_terminal=terminal, highlight=False, color_system=None)
    show(what, console)
    return output.getvalue()


FAILED = with_verdicts(
    smoke_events(12, loss=lambda step: 5.0 + step), end=end_event(12, status="FAILED", exit_code=1, reason="no")
)
BROKEN_OFF = with_verdicts(smoke_events(12))[:12]


def test_the_document_has_what_a_program_looks_for() -> None:
    told = document(result())
    assert told["schema"] == SCHEMA == "kdconsole.run/1"
    assert (told["run"], told["status"], told["exit_code"], told["decision"]) == (RUN, "COMPLETED", 0, "GO")
    assert (told["steps"], told["seconds"]) == (10, 40.0)
    assert (told["initial_loss"], told["final_loss"]) == (4.9, pytest.approx(3.8))
    assert (told["heldout_initial"], told["heldout_final"]) == (5.0, pytest.approx(3.8))
    assert (told["throughput"], told["tokens_per_second"]) == (0.5, 4_096.0)
    assert told["evidence"] == "/somewhere/evidence/20261015-120000-smoke-abcdef"
    assert {"target_steps", "p10_seconds", "p50_seconds", "p90_seconds"} <= set(told["projection"])
    assert told["projection"]["p50_seconds"] == 25_000.0
    for verdict in told["verdicts"]:
        assert {"id", "verdict", "expected", "observed", "step"} <= set(verdict)
    assert {v["id"] for v in told["verdicts"]} == {v.id for v in result().state.judged}
    assert told["train_initial"] == {
        "total": 4.9, "ce": 5.9, "kd": pytest.approx(3.9),
    }  # fmt: skip
    assert (told["agreement_initial"], told["agreement_final"]) == (0.05, 0.3)
    assert [phase["name"] for phase in told["phases"]][:2] == ["import", "self-check"]
    assert told["disagreements"] == []


@pytest.mark.parametrize("events", [[], BROKEN_OFF, FAILED, with_verdicts(smoke_events(3))])
def test_the_document_has_every_key_whatever_happened(events: list[Event]) -> None:
    assert document(result(events)).keys() == document(result()).keys()


def test_numbers_that_are_none_travel_as_text() -> None:
    bad = with_verdicts(
        smoke_events(12, loss=lambda step: math.nan),
        end=end_event(summary={"final_loss": math.nan, "tokens_per_second": math.inf, "steps_per_second": -math.inf}),
    )
    text = json.dumps(document(result(bad)), allow_nan=False)
    told = json.loads(text)
    assert (told["final_loss"], told["tokens_per_second"], told["throughput"]) == ("NaN", "Infinity", "-Infinity")
    assert told["heldout_last"]["kd"] == "NaN"


@pytest.mark.parametrize("width", [40, 80, 120, 200])
@pytest.mark.parametrize("events", [None, [], BROKEN_OFF, FAILED, with_verdicts(smoke_events(12, teacher=None))])
def test_the_table_renders_at_every_width_and_names_every_verdict(width: int, events: list[Event] | None) -> None:
    told = result(events)
    text = rendered(told, width)
    assert "GO" in text
    if width >= 80:
        for verdict in told.state.judged:
            assert verdict.id in text
        assert Path(told.evidence).name in text


@pytest.mark.parametrize("width", [80, 120])
def test_no_figure_of_the_losses_is_cut_off(width: int) -> None:
    lines = rendered(result(), width).splitlines()
    total = next(line for line in lines if line.startswith("held-out  "))
    assert total.split() == ["held-out", "total", "5.0000", "3.8000", "-24.0%", "5.0%", "to", "30.0%"]
    kd = [line.split() for line in lines if line.split()[:1] == ["kd"] and line.split()[-1].endswith("%")]
    assert kd == [["kd", "3.9000", "2.8000", "-28.2%"], ["kd", "5.0000", "3.8000", "-24.0%"]]


def test_lines_that_are_grepped_and_paths_that_are_copied_stay_whole_on_a_narrow_terminal() -> None:
    lines = rendered(result(), 60, terminal=True).splitlines()
    assert "[SMOKE] 10 steps in 20.00s: initial_loss=4.9000, final_loss=4.0000, throughput=0.50 step/s" in lines
    assert "[SMOKE] projected full-run wall time (50000 steps): 6.94h / 416.7 min / 25000.0s" in lines
    assert "evidence  /somewhere/evidence/20261015-120000-smoke-abcdef" in lines


def test_go_and_no_go_are_the_last_thing_said_with_what_stands_against_them() -> None:
    good = rendered(result(), 100).rstrip().splitlines()[-1]
    assert good.startswith("✔ GO ")
    assert "binding verdicts PASS" in good
    last = rendered(result(FAILED, exit_code=ExitCode.FAILED, status="FAILED"), 140).rstrip().splitlines()[-3:]
    assert last[0].startswith("✘ NO-GO ")
    assert "FAIL F-DISTILL-SMOKE-001  expected eval.loss falls, observed " in last[1]
    assert "FAIL F-DISTILL-PIPELINE-001" in last[2]
    undecided = rendered(result(with_verdicts(smoke_events(9)), exit_code=ExitCode.UNDECIDED), 140)
    assert "✘ NO-GO" in undecided
    assert "? UNKNOWN FT-SMOKE-003" in undecided.rstrip().splitlines()[-1]


def test_failed_verdicts_stand_last_next_to_the_decision() -> None:
    rows = [line for line in rendered(result(FAILED), 120).splitlines() if " F" in line and line[:1] in "✔✘?◌"]
    words = [line.split()[1] for line in rows]
    assert words[-2:] == ["FAIL", "FAIL"]
    assert set(words[:-2]) == {"PASS"}


def test_a_disagreement_is_shown() -> None:
    events = [
        msgspec.structs.replace(e, verdict="FAIL") if isinstance(e, Verdict) and e.id == "F-FINITE-001" else e
        for e in with_verdicts(smoke_events(12))
    ]
    told = result(events)
    assert "✘ verdicts disagree: F-FINITE-001: the engine says FAIL, the stream says PASS" in rendered(told, 120)
    assert document(told)["disagreements"] == ["F-FINITE-001: the engine says FAIL, the stream says PASS"]


def test_what_comes_from_a_run_is_shown_as_text_and_never_as_markup() -> None:
    events = with_verdicts(smoke_events(12, student="/models/[red]x[/]", device_name="[/nothing] GPU"))
    told = result(events, reason="[bold]no", evidence=Path("/evidence/[blink]\x1b[2J"))
    text = rendered(told, 200)
    for shown in ("/models/[red]x[/]", "[/nothing] GPU", "[bold]no", "/evidence/[blink]\\x1b[2J"):
        assert shown in text
    assert "\x1b" not in text


def test_a_full_run_is_no_go_or_no_go() -> None:
    text = rendered(result(mode="train"), 100)
    assert "COMPLETED" in text
    assert "GO " not in text
    assert "[SMOKE]" not in text


def test_the_table_is_one_renderable_too() -> None:
    output = io.StringIO()
    Console(file=output, width=140).print(table(result()))
    assert "F-DISTILL-SMOKE-001" in output.getvalue()


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0, "0.0 s"),
        (12.34, "12.3 s"),
        (59.94, "59.9 s"),
        (59.96, "1m 00s"),
        (200, "3m 20s"),
        (3599.4, "59m 59s"),
        (3599.6, "1h 00m"),
        (90_240, "25h 04m"),
        (4_000_000, "1,111h 06m"),
        (math.nan, "nan"),
        (math.inf, "inf"),
    ],
)
def test_durations_are_told_in_the_two_units_that_matter(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_on_a_narrow_terminal_what_was_expected_stays_readable() -> None:
    lines = [line.strip() for line in rendered(result(), 80).splitlines()]
    assert "ce gradient error <= 1e-05: 1e-07" in lines
    assert "a step within 30 s or 20 mean steps: longest wait 0.5 s" in lines
