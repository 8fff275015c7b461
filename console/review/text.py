"""A review as a person reads it: who and what, how it went, what was judged and found, and how it ended last of all."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Literal

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from console.findings.rules import NOTE, SEVERE, Finding
from console.loss_curve import picture
from console.palette import ORDER
from console.report import duration
from console.review.facts import NOT_SAID, facts
from console.review.past import (
    JUDGED,
    Judgement,
    Loss,
    Losses,
    Review,
    heldout_losses,
    known,
    train_losses,
    waited_for_checkpoints,
)
from console.without_steps import Came, came
from dispatch.evidence import Kind
from engine.errors import ExitCode
from engine.stream import Checkpoint, CheckpointFailed
from engine.text import clean

WIDE = 120
"""Columns from which on each verdict takes one line."""
CURVE_WIDTH, CURVE_HEIGHT = 100, 11
MOST_CHECKPOINTS = 12
_VERDICTS = {"PASS": ("✔", "green"), "FAIL": ("✘", "bold red"), "PENDING": ("◌", "yellow"), "UNKNOWN": ("?", "yellow")}
_FINDINGS = {SEVERE: ("✘", "bold red"), NOTE: ("·", "")}
_WARNING = ("⚠", "yellow")


class Line(Text):
    """A line that is not to be wrapped where that can be helped: a path, an id."""


def show(review: Review, console: Console) -> None:
    """Prints the report of one run; lines that are copied keep their length."""
    for part in parts(review, console.width):
        console.print(part, soft_wrap=isinstance(part, Line))


def parts(review: Review, width: int) -> Iterator[RenderableType]:
    """The report from its top to its last line, the conclusion."""
    yield Text.assemble((review.loaded.label, "bold"), "  ", (_kind(review), "dim"))
    yield _grid(facts(review))
    if (made := came(review.state)) is not None:  # it makes no steps, and nobody misses losses
        yield from _section(made.title, _figures(made))
    else:
        yield from _section("losses, nats per token", _losses(review))
    yield from _curve(review, width)
    yield from _section("checkpoints", _checkpoints(review))
    yield from _section("verdicts", [_Verdicts(review.judgements())] if review.judgements() else [])
    yield from _section("contradictions", [Text(f"≠ {line}", "bold red") for line in review.state.disagreements])
    yield from _section("not here", [Text(f"· {line}") for line in _missing(review)])
    yield from _section("found", _found(review.findings))
    yield Text("")
    yield Line(f"evidence     {clean(str(review.loaded.path), 4096)}")
    if review.checked is not None:
        yield Line(f"evidence id  {review.checked.evidence_id}")
    yield Text("")
    yield conclusion(review)


def conclusion(review: Review) -> Text:
    """The last line: status, reason, what stands behind it, and what its exit code means."""
    ended = review.conclusion
    good = ended.exit_code == ExitCode.OK
    open_ = review.open
    style = "bold green" if good else "bold yellow" if open_ or ended.status == "STOPPED" else "bold red"
    text = Text(f"{'✔' if good else '◌' if open_ else '✘'} ", style=style)
    decision = f" {review.decision}" if review.decision else ""
    text.append(f"{ended.status}{decision}", style=style)
    text.append(f"  {clean(ended.reason, 1_000)}")
    binding = [each.verdict for each in review.judgements() if each.verdict.severity != "warn"]
    if binding:
        passed = sum(verdict.verdict == "PASS" for verdict in binding)
        text.append(f"; {passed} of {len(binding)} binding verdicts PASS")
    text.append(f"; exit code {int(ended.exit_code)}: {review.meaning}")
    return text


def _kind(review: Review) -> str:
    kinds = {"run": "", "predecessor": "the predecessor's", "log": "a log alone", "manifest": "a manifest alone"}
    told = kinds[review.loaded.kind.value]
    id_ = clean(review.loaded.path.name, 200)
    return ", ".join(each for each in (id_ if id_ != review.loaded.label else "", told) if each)


def _section(title: str, content: Iterable[RenderableType]) -> Iterator[RenderableType]:
    """A title and what stands under it; nothing where there is nothing."""
    lines = list(content)
    if lines:
        yield Text("")
        yield Text(title, style="bold")
        yield from lines


def _grid(rows: Iterable[tuple[str, str]]) -> RenderableType:
    grid = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    grid.add_column(no_wrap=True)
    grid.add_column(overflow="fold")
    for name, text in rows:
        grid.add_row(Text(name, style="bold"), Text(text, style="dim" if text == NOT_SAID else ""))
    return grid


# Losses


def _losses(review: Review) -> Iterator[RenderableType]:
    rows: list[tuple[str, Losses]] = [("train", train_losses(review.state)), ("held-out", heldout_losses(review.state))]
    if not any(losses.first or losses.last for _, losses in rows):
        yield Text(NOT_SAID, style="dim")
        return
    grid = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name in ("", "", "first", "last", "change", "best", f"at {review.state.source.unit}"):
        grid.add_column(name, justify="left" if not name else "right", no_wrap=True)
    for label, losses in rows:
        for part, title in (("total", "total"), ("ce", "ce"), ("kd", "kd")):
            first, last, best = (_part(each, part) for each in (losses.first, losses.last, losses.best))
            if first is None and last is None:
                continue
            change = (last - first) / abs(first) if first and last is not None else math.nan
            at = losses.best.step if losses.best is not None and part == "total" else None
            grid.add_row(
                Text(label if part == "total" else "", style="bold"),
                title,
                *(_number(each) for each in (first, last)),
                f"{change:+.1%}" if math.isfinite(change) else "",
                _number(best) if part == "total" else "",
                "" if at is None else f"{at:,}",
            )
    yield grid
    agreed = [each.agreement for each in review.state.evals if each.agreement is not None]
    if agreed:
        what = f"{agreed[0]:.1%} to {agreed[-1]:.1%}" if len(agreed) > 1 else f"{agreed[0]:.1%}"
        yield Text(f"top-1 agreement with the teacher {what}")


def _figures(made: Came) -> Iterator[RenderableType]:
    """How true a stored teacher is; of an evaluation its controls and scores, and what it does not solve."""
    if made.figures:
        yield _grid((name, "  ".join(filter(None, (value, detail)))) for name, value, detail in made.figures)
    for head, *rows in made.tables:
        grid = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
        for name in head:
            grid.add_column(name, justify="right" if made.name == "stored" else "left", overflow="fold")
        for row in rows:
            grid.add_row(*map(Text, row))
        yield from (Text(""), grid)


def _part(loss: Loss | None, name: str) -> float | None:
    value: float | None = None if loss is None else getattr(loss, name)
    return value


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}" if math.isfinite(value) else "NaN" if math.isnan(value) else "inf"


def _curve(review: Review, width: int) -> Iterator[RenderableType]:
    drawn = picture(review.state, min(width, CURVE_WIDTH), CURVE_HEIGHT)
    if drawn:
        yield Text("")
        yield Group(*drawn)


# Checkpoints and verdicts


def _checkpoints(review: Review) -> Iterator[RenderableType]:
    marks = review.state.checkpoints
    if not marks:
        return
    failed = [mark for mark in marks if isinstance(mark, CheckpointFailed)]
    shown = list(marks)
    if len(marks) > MOST_CHECKPOINTS:
        # The first, the last, and of what failed as much as fits.
        tail = marks[-(MOST_CHECKPOINTS // 2) :]
        kept = [*marks[:2], *failed[: MOST_CHECKPOINTS // 2 - 2], *tail]
        shown = [mark for mark in marks if any(mark is each for each in kept)]
    sized = any(isinstance(mark, Checkpoint) and mark.bytes for mark in marks)
    grid = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name, justify in (("step", "right"), ("kind", "left"), ("", "left"), ("size", "right"), ("took", "right")):
        if name not in ("size", "took") or sized:
            grid.add_column(name, justify=justify, no_wrap=name != "")  # type: ignore[arg-type]
    before = -1
    for mark in shown:
        place = marks.index(mark)
        if place > before + 1:
            grid.add_row(Text("⋮"), Text(f"{place - before - 1:,} more", style="dim"))
        before = place
        grid.add_row(*_checkpoint(mark, sized))
    yield grid
    waited = waited_for_checkpoints(review.state)
    if waited is not None:
        yield Text(f"training stood still for {duration(waited)} for them", style="dim")


def _checkpoint(mark: Checkpoint | CheckpointFailed, sized: bool) -> list[Text]:
    cells = [Text(f"{mark.step:,}"), Text(clean(mark.kind, 40).replace("+", " + "))]
    if isinstance(mark, CheckpointFailed):
        return [*cells, Text(f"✘ failed: {clean(mark.error, 300)}", style="bold red")]
    if not sized:
        return [*cells, Text(f"saved: {clean(mark.path, 200)}")]
    size = f"{mark.bytes / 2**20:,.0f} MiB" if mark.bytes else ""
    took = "" if known(mark.seconds) is None else duration(mark.seconds)
    said = Text(f"✔ verified, sha256 {mark.sha256[:8]}" if mark.sha256 else "saved")
    return [*cells, said, Text(size), Text(took)]


class _Verdicts:
    """The verdicts, failures last: one line each where there is room, else two. The basis stands where it matters."""

    def __init__(self, judgements: list[Judgement]) -> None:
        self._judgements = judgements
        self._bases = any(each.basis != JUDGED for each in judgements)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        narrow = options.max_width < WIDE
        grid = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
        grid.add_column("verdict", no_wrap=True)
        if narrow:
            grid.add_column("falsifier, expected: observed", overflow="fold")
        else:
            for name in ("falsifier", "expected", "observed"):
                grid.add_column(name, overflow="fold", no_wrap=name == "falsifier")
        grid.add_column("step", justify="right", no_wrap=True)
        if self._bases:
            grid.add_column("basis")
        for each in self._judgements:
            v = each.verdict
            glyph, style = _VERDICTS.get(v.verdict, ("?", "yellow"))
            word = Text(f"{glyph} {v.verdict}" + (" (warn)" if v.severity == "warn" else ""), style=style)
            told = ": ".join(text for text in (v.expected, v.observed) if text)
            texts = [f"{v.id}\n{told}"] if narrow else [v.id, v.expected, v.observed]
            basis = [Text(each.basis)] if self._bases else []
            grid.add_row(word, *map(Text, texts), Text(f"{v.step:,}"), *basis)
        yield grid


# What was found


def _missing(review: Review) -> list[str]:
    told = list(review.loaded.remarks)
    if review.unchecked and not review.open and review.loaded.kind is Kind.RUN:
        told.append(f"not held against checksums: {review.unchecked}")
    if review.loaded.config_problem and review.loaded.manifest is not None:
        told.append(f"configuration: {review.loaded.config_problem}")
    return told


def _found(findings: Iterable[Finding]) -> Iterator[RenderableType]:
    """What was found, the worst last, where the eye is."""
    listed = [each for each in findings if each.kind != "missing"][::-1]
    if not any(each.severity != NOTE for each in listed):
        yield Text("✔ no incident", style="green")
    if not listed:
        return
    grid = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    grid.add_column(no_wrap=True)
    grid.add_column(overflow="fold")
    for each in listed:
        glyph, style = _FINDINGS.get(each.severity, _WARNING)
        grid.add_row(Text(f"{glyph} {each.kind}", style=style), Text.assemble(each.text, ("  " + where(each), "dim")))
    yield grid


def where(finding: Finding) -> str:
    """When it was, and the file that says so: `[1m 21s in, events.jsonl]`."""
    at = "" if finding.at is None else f"{duration(finding.at)} in"
    told = ", ".join(each for each in (at, finding.source) if each)
    return f"[{told}]" if told else ""


# Several runs


def block(review: Review) -> list[RenderableType]:
    """One run of several in a few lines: status, losses, worst finding."""
    losses = [f"{name} {text}" for name, text in _short_losses(review) if text]
    steps = "" if review.steps is None else f"{review.steps:,} {review.state.source.unit}s"
    steps = steps if (made := came(review.state)) is None else made.text
    took = "" if review.seconds is None else f"in {duration(review.seconds)}"
    host = f"on {review.loaded.about.host}" if review.loaded.about.host else ""
    ran = " ".join(each for each in (steps, took, host) if each)
    worst = [each for each in review.findings if each.severity != NOTE]
    lines: list[RenderableType] = [
        Text.assemble((review.loaded.label, "bold"), ("  " + _kind(review), "dim")),
        _indented(Text.assemble(status(review), "  ", clean(review.conclusion.reason, 300))),
        _indented(Text(", ".join(each for each in (*losses, ran) if each) or NOT_SAID)),
    ]
    for each in worst[:1]:
        glyph, style = _FINDINGS.get(each.severity, _WARNING)
        more = f"; and {len(worst) - 1:,} more" if len(worst) > 1 else ""
        lines.append(_indented(Text.assemble((f"{glyph} {each.kind}", style), f"  {each.text}", (more, "dim"))))
    return [*lines, Text("")]


def _indented(text: Text) -> RenderableType:
    return Padding(text, (0, 0, 0, 2))


def status(review: Review) -> Text:
    """The status in its colour."""
    good, word = review.conclusion.exit_code == ExitCode.OK, review.conclusion.status
    style = "bold green" if good else "yellow" if review.open else "bold red"
    return Text(f"{'✔' if good else '◌' if review.open else '✘'} {word}", style=style)


def _short_losses(review: Review) -> list[tuple[str, str]]:
    told = []
    for name, losses in (("train", train_losses(review.state)), ("held-out", heldout_losses(review.state))):
        ends = [_number(each.total) for each in (losses.first, losses.last) if each is not None]
        told.append((name, " to ".join(ends)))
    return told


def summary_row(review: Review, name: str) -> list[Text]:
    """One run's line of the table at the end.

    Args:
        review: of the run.
        name: what to call it, so that no other is called so.
    """
    worst = next((each for each in review.findings if each.severity != NOTE), None)
    glyph, style = _FINDINGS.get(worst.severity, _WARNING) if worst else ("✔", "green")
    found = Text(f"{glyph} {worst.kind}" if worst else "✔", style=style)
    (_, train), (_, held) = _short_losses(review)
    verdicts = [each.verdict.verdict for each in review.judgements()]
    counts = " ".join(f"{_VERDICTS[word][0]}{verdicts.count(word)}" for word in ORDER if word in verdicts)
    made = came(review.state)
    steps = "" if review.steps is None or made is not None else f"{review.steps:,}"
    train = train if made is None else made.short
    return [
        Text(name, overflow="fold"), Text(steps), Text(train), Text(held), Text(counts),
        status(review), found,
    ]  # fmt: skip


def summary(rows: Iterable[list[Text]], width: int) -> RenderableType:
    """The table at the end; on a narrow terminal without held-out losses and verdicts."""
    names = ["run", "steps", "train", "held-out", "verdicts", "status", "worst"]
    left_out = {"held-out", "verdicts"} if width < WIDE else set()
    grid = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name in names:
        if name not in left_out:
            side: Literal["left", "right"] = "right" if name == "steps" else "left"
            grid.add_column(name, justify=side, no_wrap=name != "run", overflow="fold")
    for row in rows:
        grid.add_row(*(cell for name, cell in zip(names, row, strict=True) if name not in left_out))
    return grid
