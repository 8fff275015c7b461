"""Incident 10: an evaluator that gives a broken model full marks."""

from __future__ import annotations

import json
from collections.abc import Iterator

from scene import Caught, Scene, Way

from tests.console_rig import Desk

PROBLEMS = (
    ("add", "def add(a, b):\n    '''The sum.'''\n", "    return a + b\n", "assert candidate(1, 2) == 3"),
    ("twice", "def twice(a):\n    '''Doubled.'''\n", "    return 2 * a\n", "assert candidate(4) == 8"),
)
EVALUATE = ("--headless", "evaluate", "builtin:student", "--suite", "own.jsonl", "--run-generated-code")
"""A model of random weights, which solves nothing."""


def broken_evaluator(scene: Scene) -> Iterator[Way]:
    """A broken model had pass@1 = 1.0, and was believed.

    Made by a suite whose tests assert nothing; inside the engine, by a judge that finds every answer right; and by one
    that finds none right, which would have hidden a good model just so.
    """
    for made, tests, spoilt, words in (
        ("a suite whose tests assert nothing", False, "", ("CONTROL OFF empty: scored 1,",)),
        (
            "the judge finds every answer right",
            True,
            "judge_that_passes_all",
            ("CONTROL OFF empty: scored 1,",),
        ),
        ("the judge finds no answer right", True, "judge_that_passes_none", ("CONTROL OFF canonical: scored 0,",)),
    ):
        desk = scene.desk()
        _suite(desk, tests=tests)
        going = scene.start(desk, *EVALUATE, spoilt=spoilt)
        outcome = going.end()
        assert outcome.rc == 5, outcome.said
        end = going.run.end
        assert end["status"] == "FAILED", end
        assert "the result is unknown" in end["reason"], end
        assert "score       UNKNOWN: controls off: " in outcome.out, outcome.said
        assert "pass@" not in outcome.out, "a score was shown\n" + outcome.said
        assert not going.run.events("problem"), "something was judged all the same"
        assert not [e for e in going.run.events("measure") if "pass_at" in e["name"]], "a score was told"
        event = next(e for e in going.run.events("control") if e["observed"] != e["expected"])
        told = going.caught(made, "control off, the result is unknown", words, event)
        yield Caught(told.made, told.by, f"{told.message}; exit code 5", told.seconds, launched=True)


def _suite(desk: Desk, *, tests: bool) -> None:
    """A file of problems; without `tests` they look at nothing that an answer returns."""
    rows = [
        {
            "task_id": f"Own/{name}",
            "prompt": prompt,
            "entry_point": name,
            "canonical_solution": answer,
            "test": f"def check(candidate):\n    {test if tests else 'pass'}\n",
        }
        for name, prompt, answer, test in PROBLEMS
    ]
    desk.write("own.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
