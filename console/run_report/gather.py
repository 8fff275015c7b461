"""From a run that was read to everything that its report says; the same evidence always says the same."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from console.differences import differences, steps_made
from console.efficiency import utilisation
from console.findings.rules import SEVERE, Finding, find
from console.outlook import CHANGED_NOTE, EXIT_MEANINGS, outlook
from console.palette import ORDER, Mark, run_mark
from console.run_index import view_of
from console.run_reader import LoadedRun
from console.run_report import proof, ran
from console.run_report.fast import efficiency_section
from console.run_report.model import NOT_SAID, Report, Said, Tone, known, said
from console.run_report.proof import Proof
from console.side_by_side import Cell
from console.without_steps import came
from dispatch.evidence import Kind
from dispatch.manifest import versions
from engine.stream import Verdict
from engine.text import clean

_WHAT = {Kind.RUN: "run", Kind.OLD: "the predecessor's run", Kind.LOG: "a log alone", Kind.MANIFEST: "a manifest alone"}


def report_of(loaded: LoadedRun) -> Report:
    """Everything that is said of a run, of any kind."""
    found = proof.proof_of(loaded)
    findings = find(loaded, found.checked)
    mark, reason = status_of(loaded, found)
    told = {
        line.label: line.cells[0]
        for section in differences((loaded,), loaded.state.last_t)
        for line in section.lines
        if section.title != "configuration"
    }
    name = clean(loaded.label, 120)
    made_by = versions(("kdconsole",))["kdconsole"] or "of unknown version"
    sections = (
        ran.what_ran(loaded, told),
        ran.stored_section(loaded),
        ran.loss_section(loaded, name),
        ran.checkpoint_section(loaded),
        proof.verdict_section(loaded),
        proof.finding_section(findings),
        efficiency_section(loaded),
        ran.projection_section(loaded, told),
        ran.asked_section(loaded),
        ran.phase_section(loaded),
        ran.attempt_section(loaded),
        proof.provenance_section(loaded, found, made_by),
        proof.checking_section(loaded, found),
        proof.configuration_section(loaded),
    )
    return Report(
        name=name,
        directory=clean(loaded.path.name, 120),
        title=_title(loaded),
        mark=mark,
        reason=clean(reason, 600),
        summary=_summary(loaded, told),
        warnings=_warnings(loaded, findings),
        sections=tuple(section for section in sections if section is not None),
        footer=f"kdconsole {made_by} · " + (f"evidence id {found.evidence_id}" if found.evidence_id else "not sealed"),
        verdicts=counted(loaded.state.judged)[0],
    )


def status_of(loaded: LoadedRun, found: Proof) -> tuple[Mark, str]:
    """The state of a run as a mark, and why; of one that goes on, as of its last event."""
    if loaded.problem:
        return Mark("?", "UNREADABLE", "bold $warning"), loaded.problem
    if loaded.kind is Kind.MANIFEST and not loaded.state.events:
        return run_mark("LOST"), "a manifest alone: nothing here tells what came of the run"
    view = view_of(loaded, loaded.state.last_t)
    told = outlook(replace(view, notes=tuple(f"{CHANGED_NOTE}{problem}" for problem in found.problems)))
    reason = told.reason or "; ".join(told.alarm)
    if told.exit_code is not None and loaded.state.source.timed:
        reason += f" (exit code {int(told.exit_code)}: {EXIT_MEANINGS[told.exit_code]})"
    return run_mark(told.status), reason or "it goes on"


def _title(loaded: LoadedRun) -> str:
    about, run = loaded.about, loaded.state.run
    if loaded.state.source.timed and run is not None:
        if (made := came(loaded.state)) is not None:
            return clean(f"{run.mode}: {made.of}, on {about.host or run.host}", 200)
        teacher = f"taught by {run.teacher}" if run.teacher else "without a teacher"
        return clean(f"{run.mode}: {run.student} {teacher}, on {about.host or run.host}", 200)
    models = f"{about.student or 'student ' + NOT_SAID} taught by {about.teacher or 'a teacher that is ' + NOT_SAID}"
    where = f", on {about.host}" if about.host else ""
    return clean(f"{_WHAT[loaded.kind]}: {models}{where}", 200)


def _summary(loaded: LoadedRun, told: Mapping[str, Cell]) -> tuple[tuple[str, Said], ...]:
    """What stands at the top: steps, losses from first to last, time, speed, verdicts."""

    def from_to(label: str) -> Said:
        first, last = told.get(f"{label}, first", Cell()), told.get(f"{label}, last", Cell())
        if first.value is None and last.value is None:
            return said(None)
        bad = "bad" if "NaN" in last.text or "inf" in last.text else ""
        return said(f"{first.text} → {last.text}", bad)  # type: ignore[arg-type]

    state = loaded.state
    made, wanted = steps_made(state), told.get("steps", Cell()).text
    counts, tone = counted(state.judged)
    speed = told.get("tokens/s", Cell())
    rate = Said(f"{speed.text} tokens/s") if speed.value is not None else ran.of_cell(told.get("steps/s", Cell()))
    if speed.value is None and rate.text != NOT_SAID:
        rate = Said(f"{rate.text} steps/s")
    used = utilisation(state.pace.mean) if state.pace.mean is not None else None
    rows: tuple[tuple[str, Said], ...] = (
        ("steps", said(wanted if made is not None else None)),
        ("train loss", from_to("train")),
        ("held-out loss", from_to("held-out")),
        ("top-1 agreement", from_to("top-1 agreement")),
        ("took", ran.of_cell(told.get("took", Cell()))),
        ("speed", rate),
        ("MFU", said("" if used is None else f"{used:.1%}")),
        ("verdicts", said(counts, tone)),
    )
    made_of = came(state)
    if made_of is not None:
        kept = tuple(row for row in rows if row[0] in ("took", "verdicts"))
        toned: Tone = "" if made_of.tone == "good" else made_of.tone
        rows = ((made_of.name, said(made_of.text, toned)), ("speed", said(made_of.speed)), *kept)
    always = ("steps", "train loss", "stored", "score", "took", "verdicts")
    return tuple(row for row in rows if row[0] in always or known([row]))


def counted(verdicts: Sequence[Verdict]) -> tuple[str, Tone]:
    """How many verdicts there are of each kind, the worst first, and their tone; a warning decides nothing."""
    words = [f"{v.verdict} (warn)" if v.verdict == "FAIL" and v.severity == "warn" else v.verdict for v in verdicts]
    order = ("FAIL", "FAIL (warn)", *ORDER[1:])
    kinds = sorted(set(words), key=lambda word: order.index(word) if word in order else 1)
    tone: Tone = "bad" if "FAIL" in words else "warn" if "FAIL (warn)" in words else ""
    return ", ".join(f"{words.count(word)} {word}" for word in kinds), tone


def _warnings(loaded: LoadedRun, findings: Sequence[Finding]) -> tuple[str, ...]:
    """What must be known before the rest is believed."""
    lines = ["The run goes on: this is how it stood at its last event."] if loaded.going_on else []
    lines += [each.text for each in findings if each.severity == SEVERE]
    if loaded.config_problem and loaded.kind is Kind.RUN:
        lines.append(f"Its configuration cannot be read: {loaded.config_problem}")
    return tuple(clean(line, 600) for line in lines)
