"""What is said of a run beside its stream, whoever wrote it: the same few facts of every kind of evidence."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from console.run_state import RunState
from dispatch.manifest import Manifest
from dispatch.old_manifest import OldManifest

_PHASES = {"train": "4", "evaluate": "5", "publish": "6"}
LONG_SEQUENCE = 256
"""Tokens of a window from which on a smoke is the campaign's check of scale."""


@dataclass(frozen=True)
class About:
    """Empty or None where nobody said it. `created` in Unix seconds; `steps_asked` is what was wanted, not what ran."""

    name: str = ""
    mode: str = ""
    host: str = ""
    created: float | None = None
    teacher: str = ""
    student: str = ""
    phase: str = ""
    """Of the campaign; see `campaign_phase`."""
    ticket: str = ""
    falsifier: str = ""
    steps_asked: int | None = None


def about(manifest: Manifest | None, old: OldManifest | None, state: RunState, config: Mapping[str, object]) -> About:
    """The facts of a run.

    Args:
        manifest: ours, if there is one.
        old: the predecessor's, if there is one.
        state: as far as the stream or log was read.
        config: full key paths and values; empty where none was kept.
    """
    run = state.run
    mode = manifest.mode if manifest else run.mode if run else ""
    teacher, student = (run.teacher or "", run.student) if run else ("", "")
    if old is not None:
        return About(
            name=old.run_name,
            mode=mode,
            host=old.host,
            created=old.created,
            teacher=old.teacher or teacher,
            student=old.student or student,
            phase=old.phase,
            ticket=old.ticket,
            falsifier=old.falsifier,
            steps_asked=old.steps,
        )
    ours = state.source.timed
    return About(
        name=(manifest.name or "") if manifest else "",
        mode=mode,
        host=manifest.where if manifest else run.host if run else "",
        created=manifest.created_unix if manifest else state.first_t if ours and state.events else None,
        teacher=teacher,
        student=student,
        phase=campaign_phase(mode, config.get("train.sequence")) if ours else "",
        steps_asked=state.target_steps,
    )


def campaign_phase(mode: str, sequence: object) -> str:
    """The phase of a campaign that a run of ours belongs to; empty where its mode is not known.

    The phases are 1 (teacher backend), 2 (student and KD step), 3 (end-to-end smoke), 3b (check of scale, windows of
    256 tokens or more), 4 (production run), 5 (HumanEval) and 6 (publish); of these a smoke is 3 or 3b, a training 4,
    an evaluation 5 and a publication 6. A preparation belongs to none.
    """
    if mode in _PHASES:
        return _PHASES[mode]
    if mode != "smoke":  # what stores a teacher serves all of them
        return ""
    return "3b" if isinstance(sequence, int) and sequence >= LONG_SEQUENCE else "3"
