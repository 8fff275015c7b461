"""What was wrong with a past evaluation: controls that are off, or that nobody heard of."""

from __future__ import annotations

from collections.abc import Iterator

from console.answers import TRUTH
from console.findings.finding import SEVERE, Case, Finding
from console.scored import evaluates, off_text

CONTROL = "F-EVALUATE-CONTROL"
"""How the falsifiers begin that look at controls."""


def controls_off(case: Case) -> Iterator[Finding]:
    """A control that did not score what it must: the evaluator is broken, and no score of it says anything."""
    answers = case.state.answers
    if not evaluates(case.state) or not answers:
        return
    told = [v for v in case.failing(CONTROL)] if answers.off else []
    for control in answers.off:
        verdict = next((v.id for v in told if control.name in f"{v.claim} {v.expected}"), told[0].id if told else "")
        text = f"control {off_text(control)}: the score is unknown"
        yield Finding("control-off", SEVERE, text, None, case.at(control.t), case.source, 1, verdict)
    if answers.untold and answers.rows and case.over:
        missing = ", ".join(name for name in TRUTH if name in answers.untold)
        text = f"answers were judged without controls ({missing}): the score is unknown"
        yield Finding("control-missing", SEVERE, text, None, None, case.source, len(answers.untold))
