"""Incidents found in a past run, from what was loaded of it and what stands beside its stream: the worst first.

Each kind of incident has one rule, a function of a `Case`; a rule asserts what it finds and says where it is from.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from console.findings import at_end, evaluated, in_training, waits
from console.findings.finding import NOTE, SEVERE, SEVERITIES, WARNING, Case, Finding, Rule
from console.run_reader import LoadedRun
from dispatch.sums import Checked

__all__ = ["NOTE", "RULES", "SEVERE", "WARNING", "Finding", "find", "worst"]

RULES: tuple[Rule, ...] = (
    # Whether anything of it can be believed, and how it ended.
    at_end.unread,
    at_end.changed,
    at_end.disputed,
    evaluated.controls_off,
    at_end.ended_badly,
    # What it trained, and how.
    in_training.failed_export,
    in_training.teacher_is_student,
    in_training.non_finites,
    waits.stalls,
    in_training.trends,
    in_training.failed_checkpoints,
    in_training.no_checkpoint,
    in_training.steps_differ,
    at_end.verdicts,
    # What happened on the way, and around it.
    in_training.spiked,
    waits.clock_set_back,
    at_end.rebooted,
    at_end.orphans,
    waits.resumed,
    at_end.overridden,
    at_end.short_smoke,
    at_end.torn,
)
"""In the order in which they are told, the weightiest first. `verdicts` comes after all that tell of a FAIL."""


def find(loaded: LoadedRun, checked: Checked | None = None) -> tuple[Finding, ...]:
    """Everything that is found, the worst first; within a severity the weightiest kind first.

    Args:
        loaded: a run of any kind, read whole.
        checked: its files held against its checksums; None where that was not done.
    """
    case = Case(loaded, checked)
    with np.errstate(all="ignore"):  # a stream may hold any number
        found = [finding for rule in RULES for finding in rule(case)]
    return tuple(sorted(found, key=lambda each: SEVERITIES.index(each.severity)))


def worst(found: Sequence[Finding]) -> Finding | None:
    """What to say where there is room for one; None where there are notes at most."""
    return next((each for each in found if each.severity != NOTE), None)
