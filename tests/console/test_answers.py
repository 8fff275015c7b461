"""An evaluation's answers as they are folded: each counts once, and nothing is believed whose controls are off."""

from __future__ import annotations

import math
import tracemalloc
from itertools import product

import msgspec
import pytest
from answer_runs import (
    GOOD,
    answered,
    beginning,
    controls,
    ending,
    evaluation,
    generating,
    outcome,
    problems_contract,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from console import answers as module
from console.answers import OUTCOMES, Answers, AnswersBuffer, natural, outcome_of
from console.concerns import concerns
from console.conclusion import conclude
from console.run_state import Reducer, RunState
from console.scored import document, figures, score, unsolved_table
from console.without_steps import came
from engine.human import human_lines
from engine.pass_at_k import mean_pass_at_k
from engine.stream import Control, Event, Measure, Phase, Problem
from tests.streams import run_event, stamped, with_verdicts


def folded(events: list[Event]) -> RunState:
    return Reducer(problems_contract()).feed(stamped(events))


def begun(scores: dict[str, float] = GOOD, problems: int = 4) -> list[Event]:
    return [*beginning(problems, scores), *generating(problems, 1, problems), Phase(name="run")]


def ended(events: list[Event], exit_code: int = 0, status: str = "COMPLETED") -> RunState:
    judged = with_verdicts(stamped(events), problems_contract(), ending("so", exit_code, status))
    return Reducer(problems_contract()).feed(judged)


ROWS = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 3), st.sampled_from(OUTCOMES[:-1])), max_size=40)


@settings(max_examples=200, deadline=None)
@given(ROWS)
def test_each_answer_counts_once_and_as_it_was_told_last(rows: list[tuple[int, int, str]]) -> None:
    buffer = AnswersBuffer()
    for task, sample, end in rows:
        told = Problem(task=f"T/{task}", sample=sample, passed=end == "passed", outcome=end, tokens=1, seconds=0.0)
        buffer.answer(told)
    found = buffer.snapshot()
    last = {(task, sample): end for task, sample, end in rows}
    assert found.judged == len(last)
    assert found.by_outcome == {name: n for name in OUTCOMES if (n := list(last.values()).count(name))}
    for one in found.tasks:
        number = int(one.name.partition("/")[2])
        ends = [end for (each, _), end in last.items() if each == number]
        assert (one.answers, one.passed) == (len(ends), ends.count("passed"))
        assert one.solved == ("passed" in ends)
        assert one.newest is not None
        assert one.newest.outcome == [end for each, _, end in rows if each == number][-1]
    solved = [(task.answers, task.passed) for task in found.tasks]
    for k in (1, 2, 10):
        enough = bool(solved) and min(n for n, _ in solved) >= k
        assert found.pass_at(k) == (pytest.approx(mean_pass_at_k(solved, k)) if enough else None)


def test_an_earlier_moment_has_what_was_known_then_and_the_snapshot_never_changes() -> None:
    events = stamped([*begun(), *answered(4, 1)])
    reducer = Reducer(problems_contract())
    early = reducer.feed(events[:-2])
    before = early.answers.tasks
    late = reducer.feed(events[-2:])
    assert early.answers.tasks == before
    assert (early.answers.judged, late.answers.judged) == (2, 4)
    assert late.at(early.last_t).answers.judged == 2
    assert [task.name for task in late.at(early.last_t).answers.tasks] == ["HumanEval/0", "HumanEval/1"]
    assert late.at(events[5].t - 0.1).answers.controls == {}
    again = late.answers
    assert reducer.feed(stamped([Phase(name="judge")])).answers is again


def test_a_hundred_thousand_answers_take_megabytes_and_are_counted_quickly() -> None:
    buffer = AnswersBuffer()
    tracemalloc.start()
    try:
        for problem, sample in product(range(1_000), range(100)):
            end = outcome(problem, sample)
            told = Problem(
                task=f"T/{problem}", sample=sample, passed=end == "passed", outcome=end,
                detail=f"a detail of its own {problem} {sample} " * 4, tokens=9, seconds=0.1,
            )  # fmt: skip
            buffer.answer(told)
        kept = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert kept < 6 << 20
    found = buffer.snapshot()
    assert found.judged == 100_000
    assert found.pass_at(100) == 1.0
    assert found.pass_at(10) == pytest.approx(mean_pass_at_k([(100, task.passed) for task in found.tasks], 10))


def test_a_hostile_stream_makes_us_keep_no_more_than_we_can(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_TASKS", 3)
    monkeypatch.setattr(module, "MAX_ANSWERS", 5)
    events = [*begun(), *answered(9, 2)]
    events.append(Problem(task="HumanEval/0", sample=-1, passed=True, outcome="passed", tokens=1, seconds=0.0))
    state = folded(events)
    assert (state.answers.judged, len(state.answers.tasks)) == (5, 3)
    assert state.answers.left_out == 14
    assert "14 answers are not counted here" in score(state).text


@pytest.mark.parametrize(
    ("passed", "told", "kept"),
    [(True, "passed", "passed"), (True, "wrong", "unknown"), (False, "passed", "unknown"), (False, "luck", "unknown")],
)
def test_an_outcome_that_contradicts_itself_is_no_success(passed: bool, told: str, kept: str) -> None:
    assert outcome_of(passed, told) == kept


def test_texts_of_a_model_are_cleaned_and_bounded() -> None:
    told = Problem(task="T\x1b[2J" + "x" * 999, passed=False, outcome="wrong", detail="a\x1b]0;b\x07\n" * 99,
                   tokens=1, seconds=0.0)  # fmt: skip
    state = folded([*begun(), told])
    [task] = state.answers.tasks
    assert "\x1b" not in task.name
    assert len(task.name) <= 210
    assert task.newest is not None
    assert "\x1b" not in task.newest.detail
    assert len(task.newest.detail) <= 310


def test_names_are_in_the_order_of_their_numbers() -> None:
    names = ["HumanEval/10", "HumanEval/9", "a", "HumanEval/2", "7", "HumanEval/9b", "HumanEval/" + "9" * 99]
    assert sorted(names, key=natural)[:5] == ["7", "HumanEval/2", "HumanEval/9", "HumanEval/9b", "HumanEval/10"]


# Whether it can be believed


@pytest.mark.parametrize("off", ["empty", "pass", "constant", "canonical"])
def test_a_score_whose_control_is_off_is_never_shown_as_one(off: str) -> None:
    scores = GOOD | {off: 0.25}
    for state in (folded([*begun(scores), *answered(4, 1)]), ended([*begun(scores), *answered(4, 1)], 5, "FAILED")):
        told, made = score(state), came(state)
        assert told.believed is False
        assert made is not None
        assert (told.short, made.tone) == ("UNKNOWN", "bad")
        assert told.text.startswith(f"UNKNOWN: controls off: {off} scored 0.25, must be ")
        assert not [name for name, _, _ in figures(state) if name.startswith("pass@")]
        assert unsolved_table(state) == []
        said = document(state)
        assert said is not None
        assert (said["believed"], said["pass_at"]) == (False, {})
        assert [each["name"] for each in said["controls"] if not each["holds"]] == [off]
        worst = concerns(state)[0]
        assert worst.severe
        assert worst.text.startswith(f"control off: {off} scored 0.25")


def test_a_stream_that_expects_something_else_of_a_control_is_not_believed() -> None:
    events = [*begun(), *answered(4, 1)]
    forged = [
        msgspec.structs.replace(e, expected=1.0, observed=1.0) if isinstance(e, Control) and e.name == "empty" else e
        for e in events
    ]
    state = folded(forged)
    assert score(state).believed is False
    assert "empty scored 1.0, must be 0, and it was held against 1.0" in score(state).text


def test_answers_without_their_controls_are_not_believed() -> None:
    events = [e for e in [*begun(), *answered(4, 1)] if not (isinstance(e, Control) and e.name == "canonical")]
    state = folded(events)
    assert score(state).text == "UNKNOWN: controls canonical not told"
    assert score(state).believed is False


def test_a_control_with_no_problems_behind_it_holds_nothing() -> None:
    state = folded([*begun(problems=0), *answered(2, 1)])
    assert score(state).believed is False


def test_a_later_attempt_tries_its_controls_anew() -> None:
    first = [*begun(), *answered(2, 1)]
    second = beginning(4, GOOD, attempt=2)
    state = folded([*first, *second[:2]])
    assert score(state).believed is False
    assert "not told" in score(state).text
    whole = folded([*first, *second, Phase(name="run"), *answered(4, 1, first=2)])
    assert score(whole).believed is True
    assert whole.answers.judged == 4


def test_a_figure_that_the_answers_do_not_give_is_disputed() -> None:
    events = [*begun(), *answered(4, 1), Measure(name="pass_at_1", value=0.99), Phase(name="judge")]
    state = ended(events)
    assert state.disagreements == ["pass_at_1: it says 0.99, its answers say 0.5"]
    assert conclude(state, None).status == "DISPUTED"
    assert score(state).believed is False
    assert "0.99" in score(state).text
    good = ended([*events[:-2], Measure(name="pass_at_1", value=0.5), Phase(name="judge")])
    assert (good.disagreements, conclude(good, None).status) == ([], "COMPLETED")


def test_a_control_that_its_measure_tells_otherwise_is_disputed() -> None:
    events = [*begun(), *answered(4, 1), Measure(name="control_empty", value=0.5), Phase(name="judge")]
    assert ended(events, 5, "FAILED").disagreements[0] == "control_empty: it says 0.5, its answers say 0"


# What is said


def test_what_a_score_says_on_the_way_and_in_the_end() -> None:
    waiting = folded(beginning(4, GOOD)[:-2])
    assert score(waiting).text == "the controls are being tried: canonical not told yet"
    ready = folded(begun())
    assert score(ready).text == "the controls hold; no answer is judged yet"
    half = folded([*begun(), *answered(2, 1)])
    assert score(half).text == "pass@1 50.0 % so far: 1 of 2 judged problems solved"
    assert score(half).short == "pass@1 50.0 % …"
    whole = Reducer(problems_contract()).feed(evaluation(20, 10))
    assert score(whole).text == "pass@1 40.0 %, pass@10 100 %: 20 of 20 problems solved, 80 of 200 answers right"
    assert score(whole).short == "pass@1 40.0 %"
    part = Reducer(problems_contract()).feed(evaluation(20, part=True))
    assert score(part).text == "pass@1 40.0 % of a part of the suite: 8 of 20 problems solved"
    assert score(part).short == "pass@1 40.0 % of 20"


def test_a_score_of_more_problems_than_are_kept_is_not_that_of_the_suite(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_TASKS", 5)
    state = folded(evaluation(10))
    told, written = score(state), document(state)
    assert "of a part of the suite" in told.text
    assert "5 answers are not counted here" in told.text
    assert told.short.endswith(" of 5")
    assert written is not None
    assert written["part"]


def test_the_lines_of_an_evaluation() -> None:
    lines = [
        line for event in [*controls(GOOD | {"empty": 0.5}, 4), *answered(2, 1)] for line in human_lines(event, None)
    ]
    assert lines == [
        "CONTROL OFF empty: scored 0.5, must be 0 (4 problems): HumanEval/3 (passed), HumanEval/7 (passed) and 23 more",
        "control pass: scored 0, must be 0 (4 problems)",
        "control constant: scored 0, must be 0 (4 problems)",
        "control canonical: scored 1, must be 1 (4 problems)",
        "  HumanEval/0 answer 0: passed",
        "  HumanEval/1 answer 0: memory: MemoryError",
    ]


def test_figures_that_are_no_numbers_are_not_believed() -> None:
    events = [*beginning(4, GOOD)[:2], Measure(name="heldout_loss", value=math.nan)]
    assert score(folded(events)).believed is False


@pytest.mark.parametrize(
    ("figures_told", "text", "short", "tone"),
    [
        ((0.0, 0.0), "what came back is what was sent", "as sent", "good"),
        ((1.0, 0.0), "what came back is NOT what was sent: files that differ 1, ", "NOT AS SENT", "bad"),
        (
            (0.0, math.inf),
            "what came back is NOT what was sent: files that differ 0, larg",
            "NOT AS SENT",
            "bad",
        ),
        ((), "phase compare", "", ""),
    ],
)
def test_a_publication_says_whether_what_came_back_is_what_was_sent(
    figures_told: tuple[float, ...], text: str, short: str, tone: str
) -> None:
    names = ("publish_files_differ", "publish_logit_error")
    told = [Measure(name=name, value=value) for name, value in zip(names, figures_told, strict=False)]
    state = folded([Phase(name="import"), run_event(mode="publish"), Phase(name="compare"), *told])
    made = came(state)
    assert made is not None
    assert made.text.startswith(text)
    assert (made.name, made.short, made.tone, made.of) == ("published", short, tone, "builtin:student")
    assert (state.makes_steps, state.target_steps) == (False, None)


def test_no_answers_is_no_evaluation_on_problems() -> None:
    assert not Answers()
    assert document(RunState()) is None
