"""The head of the screen: is it alive, is it learning, when does it end, has anything failed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

import numpy as np
from textual.content import Content
from textual.geometry import Size

from console.concerns import Concern, concerns
from console.forecast import Forecast, end_text, forecast
from console.long_work import work
from console.outlook import (
    EXIT_MEANINGS,
    SILENCE_SECONDS,
    Outlook,
    ages,
    asked_and_ran,
    checkpoint_phrase,
    disagreements,
    fraction_done,
    host_now,
    last_checkpoint,
    longest_wait,
    outlook,
    steps_made,
    verdict_counts,
)
from console.palette import CHECKPOINTS, Mark, run_mark, verdict_mark
from console.report import duration
from console.run_state import RunState
from console.times import age, date
from console.view import View
from console.widgets.layout import MUTED, Part, drawn_bar, fit, marked, number, padded, size
from console.widgets.moments import moment_part
from console.widgets.pane import Pane
from console.widgets.projection import elapsed
from console.without_steps import Came, came
from engine.errors import ExitCode
from engine.text import clean

WIDE = 100
"""Columns from which on there is room for the names of everything."""
THREE = 76
"""Columns from which on three lines are enough."""
_BAR_LEAST, _BAR_MOST = 8, 100
_RECENT_STEPS = 50


class HeadLine(Pane, can_focus=False):
    """Three lines, four where there are fewer than `THREE` columns."""

    DEFAULT_CSS: ClassVar[str] = """
    HeadLine {
        height: auto;
        border: none;
        padding: 0 1;
    }
    """

    def get_content_height(self, container: Size, viewport: Size, width: int) -> int:
        """See Textual."""
        return 3 if width >= THREE else 4

    def picture(self, width: int, height: int) -> Sequence[Content]:
        """See `Pane`."""
        return head_lines(self.view, width)


def head_lines(view: View, width: int) -> list[Content]:
    """The head in lines of exactly `width` cells: three from `THREE` cells on, else four."""
    state, seen = view.state, outlook(view)
    wide, gap = width >= WIDE, 3 if width >= WIDE else 2
    standing = [Part.of(9, marked(run_mark(seen.status))), *_position(view)]
    alarm, untold = _alarm(view, seen, width)
    if alarm is not None:
        first = fit([alarm], [*standing, *(_who(view) if wide else [])], width, gap)
    elif wide:
        name = "kdconsole" if view.review is None and view.reading is None else "review"
        first = fit([Part.of(1, Content.styled(name, "bold")), *_who(view), *_where(view)], standing, width, gap)
    else:
        first = fit(standing, [*_who(view), *_where(view)], width, gap)
    verdicts, checkpoint, learning = _verdicts(view, untold), _checkpoint(state, seen.ended), _learning(state)
    exit_code = _exit(view, seen)
    coming = [] if seen.ended else _coming(view, seen, forecast(view))
    clocks = [] if seen.ended else _clocks(view)
    if width < THREE:
        second = _progress(view, seen, [*_reading(view), *coming, *_past(view, seen)], width, gap)
        third = fit(verdicts, [*(learning if seen.ended else []), *checkpoint], width, gap)
        fourth = fit(exit_code, _where(view), width, gap) if seen.ended else fit(clocks, learning, width, gap)
        return [first, second, third, fourth]
    if seen.ended:
        took, *when = _past(view, seen)
        second = _progress(view, seen, [*_why(seen), took, *exit_code], width, gap)
        return [first, second, fit(verdicts, [*learning, *when, *checkpoint], width, gap)]
    second = _progress(view, seen, [*_reading(view), *coming, *learning], width, gap)
    return [first, second, fit(verdicts, [*clocks, *checkpoint], width, gap)]


def _who(view: View) -> list[Part]:
    """What the operator calls the run, and the models."""
    run, manifest, review = view.state.run, view.manifest, view.review
    name = "" if manifest is None else clean(manifest.name or manifest.id, 80)
    if review is not None and not name:
        name = clean(review.label, 80)
    parts = [Part.of(2, Content.styled(name, MUTED))]
    if run is not None and run.student:
        student = _base(run.student)
        models = f"{_base(run.teacher)} > {student}" if run.teacher else student
        if not view.state.makes_steps and run.mode != "prepare":
            # An exported model lies in a directory of that name, below its run's.
            student = "/".join(run.student.rstrip("/").split("/")[-2:]) if student == "model" else student
            models = f"{student} against {_base(run.teacher)}" if run.teacher else student
            return [*parts, Part.of(5, Content.styled(models, "bold"), student)]
        parts.append(
            Part.of(5, Content.styled(f"{models}, no teacher" if run.teacher is None else models, "bold"), student)
        )
    return parts


def _base(path: str) -> str:
    """The last part of a model's path."""
    return path.rstrip("/").rpartition("/")[2] or path


def _where(view: View) -> list[Part]:
    """The host as the operator calls it, else by the name that it gives itself."""
    run, remote = view.state.run, view.manifest.remote if view.manifest else None
    if run is None:
        return [Part.of(3, remote.host)] if remote else []
    host = remote.host if remote else run.host
    return [Part.of(3, " · ".join(filter(None, (host, run.device_name))), host)]


def _position(view: View) -> list[Part]:
    """The phase, and how far it came; that it is not as far as was asked for."""
    state, odd = view.state, asked_and_ran(view)
    run, unit, made = state.run, state.source.unit, steps_made(state)
    again = f"attempt {run.attempt}" if run is not None and run.attempt > 1 else ""
    if odd:
        return [Part.of(1, again), Part.of(8, Content.styled(f"⚠ {odd}", "bold $warning"))]
    step, whole = "", work(view, host_now(view))
    if whole is not None:
        step = f"{whole.done:,} / {whole.total:,} {whole.unit}" if whole.total > 0 else f"{whole.done:,} {whole.unit}"
    elif made and run is not None:
        open_ended = (run.mode == "smoke" and run.max_steps is None) or not run.steps_asked
        step = f"{made:,} {unit}s" if open_ended else f"{made:,} / {run.steps_asked:,}"
        step = step if unit == "step" or open_ended else f"{unit} {step}"
    phase = "" if state.end is not None or (not state.phases and not view.timed) else state.phase
    return [Part.of(1, again), Part.of(7, f"{phase} {step}".strip(), step, step.replace(" / ", "/"))]


def _alarm(view: View, seen: Outlook, width: int) -> tuple[Part | None, list[Concern]]:
    """What is said before anything else, if there is anything, and what is wrong besides and is to be said elsewhere.

    First that this is the past, then how the run ended, that nothing is heard or done, and what is wrong with it.
    """
    wrong = concerns(view.state, None if view.scrubbed or not view.link.live else view.link)
    if view.scrubbed:
        return moment_part(view), wrong
    clauses = [seen.reason] if seen.ended and seen.status != "COMPLETED" else list(seen.alarm)
    if clauses:
        told = [each for each in wrong if each.verdict and each.verdict in seen.reason]
        wrong = [each for each in wrong if each not in told]
        # A stall is told in short clauses; a host's message may have any length, and leaves room for the step.
        if seen.status == "STALLED":
            return _block(run_mark(seen.status), _ever_fewer(clauses), 8, 24), wrong
        return _block(
            run_mark(seen.status),
            [" · ".join(clauses), *(each.text.removeprefix("FAIL ") for each in told[:1])],
            6,
            max(24, 6 * width // 10),
        ), wrong
    severe = [] if seen.ended else [each for each in wrong if each.severe]
    if not severe:
        return None, wrong
    more = [each.short for each in severe[1:]]
    forms = _ever_fewer([severe[0].text, *more])
    return _block(severe[0].mark, forms, 8, 24), [each for each in wrong if not each.severe]


def _ever_fewer(clauses: Sequence[str]) -> list[str]:
    """All clauses, then fewer and fewer of them, the first one to the end."""
    return [" · ".join(clauses[:count]) for count in range(len(clauses), 0, -1)]


def _block(mark: Mark, texts: Sequence[str], keep: int, least: int) -> Part:
    """What is wrong stands out as a block, so that it is seen without colour as well."""
    return Part.of(
        keep, *(Content.styled(f" {mark.glyph} {text} ", f"reverse {mark.style}") for text in texts), least=least
    )


def _progress(view: View, seen: Outlook, about: Sequence[Part], width: int, gap: int) -> Content:
    """How much is done, and when the rest will be, or how it went."""
    done = fraction_done(view) if view.reading is None else _share_read(*view.reading)
    percent = [] if done is None else [Part.of(9, f"{math.floor(100 * done):3d} %")]
    parts = [*percent, *about]
    spaces = " " * gap
    told = fit(parts, [], max(0, width - _BAR_LEAST - gap), gap)
    used = len(told.plain.rstrip())
    told = told[:used]
    free = width - told.cell_length - gap
    if free < _BAR_LEAST:
        return padded(told, width)
    length = min(free, _BAR_MOST)
    style = run_mark(seen.status).style.removeprefix("bold ")
    return padded(Content.assemble(drawn_bar(done or 0.0, length, style), spaces, told), width)


def _reading(view: View) -> list[Part]:
    """How far the evidence was read."""
    if view.reading is None:
        return []
    read, total = view.reading
    return [Part.of(9, f"{size(read)} of {size(total)}" if total else "")]


def _share_read(read: int, total: int) -> float | None:
    return min(1.0, read / total) if total else None


def _why(seen: Outlook) -> list[Part]:
    """Why a run ended that ended well; of another one the first line tells."""
    return [Part.of(3, seen.reason)] if seen.status == "COMPLETED" else []


def _past(view: View, seen: Outlook) -> list[Part]:
    """Of a run that is over: how long it took, and when it ended."""
    if not seen.ended:
        return []
    taken = elapsed(view)
    took = f"{'took' if view.state.end else 'after'} {duration(taken)}" if math.isfinite(taken) else "no time is told"
    ended = f"ended {date(view.state.last_t)}" if view.timed else ""
    if view.review is not None and not view.timed and view.review.about.created is not None:
        ended = f"dispatched {date(view.review.about.created)}"
    return [Part.of(8, took), Part.of(5, ended)]


def _exit(view: View, seen: Outlook) -> list[Part]:
    if seen.exit_code is None:
        return []
    meaning = EXIT_MEANINGS[seen.exit_code]
    if not view.timed:  # nobody said what its process ended with, and its verdicts are all that there is to tell
        return [Part.of(4, meaning)] if seen.exit_code in (ExitCode.OK, ExitCode.FAILED) else []
    code = f"exit {int(seen.exit_code)}"
    return [Part.of(7, f"{code}: {meaning}", code)]


def _coming(view: View, seen: Outlook, coming: Forecast | None) -> list[Part]:
    if coming is None:
        run = view.state.run
        before = run is not None and view.state.makes_steps and view.state.last_step is None and view.timed
        return [Part.of(3, Content.styled("ETA after 10 steps", MUTED))] if before else []
    p10, p50, p90 = coming.seconds
    if_only = {"STALLED": " once it goes on", "UNREACHABLE": " if it goes on"}.get(seen.status, "")
    spread = f"({duration(p10)} to {duration(p90)})" if duration(p10) != duration(p90) else ""
    eta = f"ETA {duration(p50)}"
    return [
        Part.of(8, Content.assemble((eta, "bold"), if_only), Content.styled(eta, "bold")),
        Part.of(4, spread),
        Part.of(7, f"ends {end_text(coming.ends[1], view.now)}"),
    ]


def _learning(state: RunState) -> list[Part]:
    """The first loss and where it stands: the held-out one once there are two of it; of an evaluation its score."""
    if (result := came(state)) is not None:
        return _score(result)
    said = state.end.summary if state.end is not None and not state.source.timed else {}
    if {"initial_loss", "final_loss"} <= said.keys():  # exactly, where the lines tell of every tenth step or of none
        name, first, now = "loss", said["initial_loss"], said["final_loss"]
    elif len(state.evals) > 1:
        name, first, now = "held-out", state.evals[0].loss, state.evals[-1].loss
    elif state.first_step is not None and len(state.steps) > 1:
        recent = state.steps.column("loss")[-_RECENT_STEPS:]
        # The last lines of a log are few, and each was chosen to be printed.
        now = float(np.median(recent) if state.source.timed else recent[-1])
        name, first = "loss", state.first_step.loss
    else:
        return []
    forms = (f"{name} {number(first)} → {number(now)}", f"{name} {number(now)}")
    if now <= first:
        return [Part.of(6, *forms)]
    style = "bold $warning" if math.isfinite(now) else "bold $error"
    return [Part.of(6, *(Content.styled(f"⚠ {form}", style) for form in forms))]


def _score(result: Came) -> list[Part]:
    """The score of an evaluation, or that there is none to be believed."""
    if not result.short:
        return []
    style = {"bad": "reverse bold $error", "good": "bold"}.get(result.tone, "")
    told = f"{result.name} {result.short}" if result.name == "published" or result.tone == "bad" else result.short
    text = f"⚠ {told}" if result.tone == "bad" else told
    return [Part.of(10, Content.styled(text, style))]


def _verdicts(view: View, wrong: Sequence[Concern]) -> list[Part]:
    """Verdicts counted and what else is wrong, the worst first, and whatever the operator should know of the view."""
    counts = []
    for word, count in verdict_counts(view.state):
        mark = verdict_mark(word)
        forms = [f"{mark.glyph} {count} {word}", *([] if word == "FAIL" else [f"{mark.glyph} {count}"])]
        keep = {"FAIL": 20, "UNKNOWN": 8}.get(word, 6)
        counts.append(Part.of(keep, *(Content.styled(form, mark.style) for form in forms)))
    fails = 1 if any(word == "FAIL" for word, _ in verdict_counts(view.state)) else 0
    # A verdict's name stands beside the count of those that failed; the last line has the checkpoint that did.
    named = [Content.styled(each.verdict, each.mark.style) for each in wrong if each.verdict]
    ids = [Content(", ").join(named[:most]) for most in range(len(named), 0, -1)]
    other = [
        Part.of(7, *(Content.styled(f"{each.mark.glyph} {text}", each.mark.style) for text in (each.text, each.short)))
        for each in wrong
        if not each.verdict and each.mark is not CHECKPOINTS["failed"]
    ]
    parts = [*counts[:fails], Part.of(2, *ids), *other, *counts[fails:]]
    if differ := disagreements(view):
        mark = run_mark("DISPUTED")
        parts.insert(0, Part.of(19, Content.styled(f"{mark.glyph} {len(differ)} DISPUTED", mark.style)))
    remarks = view.review.remarks if view.review is not None else ()
    notes = [clean(note, 300) for note in (*view.notes, *remarks)]
    if view.link.problem and outlook(view).ended:
        notes.append(clean(view.link.problem, 300))
    if notes:
        more = f" (and {len(notes) - 1} more)" if len(notes) > 1 else ""
        parts.append(Part.of(6, Content.styled(f"⚠ {notes[0]}{more}", "bold $warning"), least=24))
    return parts


def _clocks(view: View) -> list[Part]:
    """How old everything is: link, process, progress."""
    link, told = view.link, ages(view)
    if not link.live or view.scrubbed:
        return []
    parts = []
    if link.problem:
        since = "" if told.link is None else f" {age(told.link)}"
        parts.append(Part.of(4, *(Content.styled(f"link ⌁ down{text}", "bold $warning") for text in (since, ""))))
    else:
        speed = "" if link.latency_seconds is None else f" {1000 * link.latency_seconds:.0f} ms"
        parts.append(Part.of(3, Content.assemble("link ", ("●", "$success"), speed)))
    parts.append(_clock("heartbeat", told.heartbeat, SILENCE_SECONDS, 4))
    if view.state.last_step is not None and view.state.phase == "train":
        parts.append(_clock("last step", told.step, longest_wait(view.state), 5))
    return parts


def _checkpoint(state: RunState, ended: bool) -> list[Part]:
    """Where the run could be taken up again."""
    failed = last_checkpoint(state)[1] is not None
    phrase = checkpoint_phrase(state, ended)
    shorter = phrase.partition(",")[0] if failed else phrase.removesuffix(" verified")
    style = "bold $error" if failed else ""
    return [Part.of(10 if failed else 5, Content.styled(phrase, style), Content.styled(shorter, style))]


def _clock(name: str, seconds: float | None, most: float, keep: int) -> Part:
    if seconds is None:
        return Part.of(keep, Content.styled(f"{name} ?", MUTED))
    late = seconds > most
    text = f"{name} {age(seconds)}"
    return Part.of(keep, Content.styled(f"⚠ {text}", "bold $warning") if late else text)
