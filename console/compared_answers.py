"""Evaluations held against each other: scores, controls, and the problems that one solves and another does not."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

from console.answers import TRUTH, is_off, scores
from console.run_reader import LoadedRun
from console.scored import evaluates, figure, is_part, percent, score, whole_suite
from console.side_by_side import Cell, Line, Section, known, labels, line_of
from console.widgets.layout import number
from engine.measures import OF_HELDOUT, OF_HELDOUT_WITH_TEACHER, PASS_AT

MOST_PROBLEMS: Final = 60
"""Lines of single problems."""
TITLE: Final = "evaluation"
PROBLEMS: Final = "problems, solved by one and not by another"


def evaluations(runs: Sequence[LoadedRun]) -> tuple[Section, ...]:
    """Sections of runs of which any evaluates a model; nothing of others. A score that is not believed is UNKNOWN."""
    if not any(evaluates(run.state) for run in runs):
        return ()

    def pass_at(k: int, run: LoadedRun) -> Cell:
        state = run.state
        if score(state).believed is False:
            return Cell("? UNKNOWN", "UNKNOWN", "$warning") if k == 1 else Cell()
        value = scores(state.answers, (k,)).get(k)
        so_far = "" if whole_suite(state) else " so far"
        return Cell() if value is None else Cell(percent(value) + so_far, value)

    def measured(name: str, run: LoadedRun) -> Cell:
        found = run.state.measures.get(name) if evaluates(run.state) else None
        return Cell() if found is None else Cell(number(found.value), found.value)

    def control(name: str, run: LoadedRun) -> Cell:
        told = run.state.answers.controls.get(name)
        if told is None:
            return Cell()
        off = is_off(told)
        text = f"{'✘ OFF' if off else '✔'} {figure(told.observed)}"
        return Cell(text, told.observed, "bold $error" if off else "")

    def solved(run: LoadedRun) -> Cell:
        answers = run.state.answers
        if not answers.judged or score(run.state).believed is False:
            return Cell()
        part = " (a part of the suite)" if is_part(run.state) else ""
        return Cell(f"{answers.solved:,} of {len(answers.tasks):,}{part}", answers.solved)

    lines = [
        *(line_of(f"pass@{k}", runs, lambda run, k=k: pass_at(k, run), measured=True) for k in PASS_AT),  # type: ignore[misc]
        line_of("problems solved", runs, solved, measured=True),
        *(line_of(f"control {name}", runs, lambda run, name=name: control(name, run)) for name in TRUTH),  # type: ignore[misc]
        *(
            line_of(name, runs, lambda run, name=name: measured(name, run), measured=True)  # type: ignore[misc]
            for name in (*OF_HELDOUT, *OF_HELDOUT_WITH_TEACHER)
        ),
    ]
    broken = [(name, score(run.state)) for name, run in zip(labels(runs), runs, strict=True)]
    notes = [f"{name}: {told.text}" for name, told in broken if told.believed is False]
    whole = Section(TITLE, known(line for line in lines if any(_said(cell) for cell in line.cells)), "; ".join(notes))
    return tuple(each for each in (whole, _problems(runs)) if each.lines or each.note)


def _said(cell: Cell) -> bool:
    return cell.value is not None and not (isinstance(cell.value, float) and math.isnan(cell.value))


def _problems(runs: Sequence[LoadedRun]) -> Section:
    """A line a problem that is solved by some of the runs that were asked it, and not by all of them."""
    asked = [{task.name: task for task in run.state.answers.tasks} if _counts(run) else None for run in runs]
    names = dict.fromkeys(name for each in asked if each is not None for name in each)
    lines: list[Line] = []
    only = [0] * len(runs)
    for name in names:
        found = [None if each is None else each.get(name) for each in asked]
        told = {task.solved for task in found if task is not None}
        if len(told) < 2:
            continue
        solvers = [index for index, task in enumerate(found) if task is not None and task.solved]
        if len(solvers) == 1:
            only[solvers[0]] += 1
        cells = []
        for task in found:
            several = "" if task is None or task.answers == 1 else f" {task.passed:,}/{task.answers:,}"
            word = "solved" if task is not None and task.solved else task.outcome if task is not None else ""
            glyph = "✔" if word == "solved" else "✘"
            cells.append(Cell() if task is None else Cell(f"{glyph} {word}{several}", word))
        lines.append(Line(name, tuple(cells)))
    left = len(lines) - MOST_PROBLEMS
    notes = [f"{left:,} more differ"] if left > 0 else []
    if lines and sum(each is not None for each in asked) > 1:
        notes.insert(
            0, "solved by one alone: " + ", ".join(f"{name} {n:,}" for name, n in zip(labels(runs), only, strict=True))
        )
    same = any(each for each in asked) and not lines and sum(each is not None for each in asked) > 1
    note = "the same problems are solved" if same else "; ".join(notes)
    return Section(PROBLEMS, tuple(lines[:MOST_PROBLEMS]), note)


def _counts(run: LoadedRun) -> bool:
    """Whether its answers may be held against those of others."""
    return bool(run.state.answers.judged) and score(run.state).believed is True
