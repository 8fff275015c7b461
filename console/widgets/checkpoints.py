"""The checkpoints on the axis of steps: which there are, which failed, when the next one comes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

from textual.binding import Binding, BindingType
from textual.content import Content
from textual.events import Click

from console.forecast import checkpoint_period, forecast
from console.outlook import ages, last_checkpoint, outlook
from console.palette import CHECKPOINTS, VERDICTS, Mark
from console.report import duration
from console.scored import evaluates
from console.stored import prepares
from console.times import age
from console.view import View
from console.widgets.layout import MUTED, cut, flowed, marked, short_step, size, wrapped
from console.widgets.pane import Pane
from engine.stream import Checkpoint, CheckpointFailed

Saved = Checkpoint | CheckpointFailed

_RANK = ("failed", "final", "best", "interrupt", "periodic")
"""Kinds by what an operator looks for first; where several share a cell, the first of these is seen."""
_NEXT = Mark("○", "next", "$primary")
_MADE, _TO_COME = "─", "─ "


class Checkpoints(Pane):
    """The timeline, and what is known of one checkpoint: the newest, or the one that the arrow keys chose."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("left", "choose(-1)", "earlier", show=False),
        Binding("right", "choose(1)", "later", show=False),
        Binding("pageup", "choose(-10)", "earlier", show=False),
        Binding("pagedown", "choose(10)", "later", show=False),
        Binding("home", "choose(-100000)", "first", show=False),
        Binding("end", "choose(100000)", "newest", show=False),
    ]

    def __init__(self, *, id: str | None = None, classes: str | None = None) -> None:
        super().__init__(id=id, classes=classes)
        self._chosen: Saved | None = None

    @property
    def _index(self) -> int:
        """Of the one whose details are shown; -1 where there is none."""
        marks = self.view.state.checkpoints
        return marks.index(self._chosen) if self._chosen in marks else len(marks) - 1

    def title(self) -> Content:
        """See `Pane`."""
        marks = self.view.state.checkpoints
        failed = sum(isinstance(mark, CheckpointFailed) for mark in marks)
        parts = [Content("Checkpoints")]
        good = [mark for mark in marks if isinstance(mark, Checkpoint)]
        if good and all(mark.sha256 for mark in good):
            parts.append(marked(VERDICTS["PASS"], f"{len(good):,} verified"))
        elif good:
            parts.append(Content(f"{len(good):,} saved"))
        if failed:
            parts.append(marked(CHECKPOINTS["failed"], f"{failed:,} FAILED"))
        return Content("  ").join(parts)

    def picture(self, width: int, height: int) -> Sequence[Content]:
        """See `Pane`."""
        view, index = self.view, self._index
        if index < 0:
            return [line.stylize(MUTED) for line in wrapped(_none_yet(view), width)]
        marks = view.state.checkpoints
        chosen = marks[index] if self._chosen is not None else None
        axis, labels = timeline(view, width, chosen)
        lines = [axis, labels] if height > 2 else [axis][: height - 1]
        place = f"{index + 1:,} of {len(marks):,}" if self._chosen is not None else "newest"
        told = flowed(details(marks[index], place, newest=marks[index] is last_checkpoint(view.state)[0]), width)
        room = height - len(lines)
        if len(told) > room:
            told = [*told[: room - 1], cut(Content.assemble(told[room - 1], " …"), width)]
        return [*lines, *told]

    def action_choose(self, by: int) -> None:
        """Moves by so many checkpoints; past the last one is the newest again, whatever comes."""
        marks = self.view.state.checkpoints
        if marks:
            index = max(0, self._index + by)
            self._chosen = marks[index] if index < len(marks) - 1 else None
            self.redraw()

    def on_click(self, event: Click) -> None:
        """Chooses the checkpoint next to where the timeline was clicked."""
        offset = event.get_content_offset(self)
        marks = self.view.state.checkpoints
        if offset is not None and offset.y < 2 and marks:
            width, last = self.content_size.width, _last_step(self.view)
            nearest = min(reversed(marks), key=lambda mark: abs(_cell(mark.step, last, width) - offset.x))
            self._chosen = nearest
            self.redraw()


def _none_yet(view: View) -> str:
    """What it means that there is no checkpoint."""
    run = view.state.run
    if not view.timed:
        return "No checkpoint is told of."
    if run is not None and run.mode == "smoke":
        return "A smoke keeps no checkpoints."
    if prepares(view.state):
        return "It makes no steps: what it stores is whole file by file, and stays."
    if evaluates(view.state) and view.state.answers:
        return "It makes no steps: each answer and its result is kept when it is there, and none is made twice."
    if not view.state.makes_steps:
        return "It makes no steps, and so no checkpoints."
    if outlook(view).ended:
        steps = view.state.last_step.step if view.state.last_step else 0
        return f"It ended without a checkpoint, after {steps:,} steps: there is none to resume from."
    return "No checkpoint yet: a fault now would lose everything." if view.state.last_step else "No checkpoint yet."


def kind_of(mark: Saved) -> str:
    """The one kind that a checkpoint is drawn as, of those that it has."""
    if isinstance(mark, CheckpointFailed):
        return "failed"
    kinds = mark.kind.split("+")
    return next((kind for kind in _RANK if kind in kinds), "periodic")


def timeline(view: View, width: int, chosen: Saved | None = None) -> tuple[Content, Content]:
    """Two lines of `width` cells: the marks on the axis from step 0 to the last one, and labels under them."""
    state, last = view.state, _last_step(view)
    cells: dict[int, Saved] = {}
    for mark in state.checkpoints:
        cell = _cell(mark.step, last, width)
        there = cells.get(cell)
        if there is None or _RANK.index(kind_of(mark)) <= _RANK.index(kind_of(there)):
            cells[cell] = mark
    if chosen is not None:
        cells[_cell(chosen.step, last, width)] = chosen
    now = _cell(state.last_step.step if state.last_step else 0, last, width)
    coming = _coming(view)
    next_cell = None if coming is None else _cell(coming[0], last, width)
    axis: list[tuple[str, str]] = []
    for cell in range(width):
        if cell in cells:
            drawn = CHECKPOINTS[kind_of(cells[cell])]
            axis.append((drawn.glyph, f"{drawn.style} reverse" if cells[cell] is chosen else drawn.style))
        elif cell == next_cell:
            axis.append((_NEXT.glyph, _NEXT.style))
        else:
            axis.append((_MADE if cell <= now else _TO_COME[(cell - now - 1) % 2], MUTED))
    wanted = [(cell, _label(mark), CHECKPOINTS[kind_of(mark)].style) for cell, mark in _by_interest(cells, chosen)]
    if coming is not None and next_cell is not None:
        wanted.insert(1 if chosen else 0, (next_cell, coming[1], MUTED))
    return Content.assemble(*axis), _placed(wanted, width)


def _last_step(view: View) -> int:
    """Where the axis ends."""
    state = view.state
    made = max((mark.step for mark in state.checkpoints), default=1)
    return max(1, state.target_steps or 0, made, state.last_step.step if state.last_step else 0)


def _cell(step: int, last: int, width: int) -> int:
    return min(width - 1, max(0, round(step / last * (width - 1))))


def _coming(view: View) -> tuple[int, tuple[str, ...]] | None:
    """The step of the next periodic checkpoint of a run that goes on, and what to write under it, the longest first."""
    state, seen = view.state, outlook(view)
    every = checkpoint_period(state)
    if not every or state.last_step is None or seen.ended or view.scrubbed:
        return None
    step = (state.last_step.step // every + 1) * every
    if state.last_step.step % every == 0 and state.last_step.step > max(mark.step for mark in state.checkpoints):
        return state.last_step.step, (f"saving {short_step(state.last_step.step)}",)
    if step >= (state.target_steps or 0):
        return None
    texts = [f"next {short_step(step)}", short_step(step)]
    expected = forecast(view)
    if seen.status == "RUNNING" and expected is not None and math.isfinite(expected.step_seconds):
        left = (step - state.last_step.step) * expected.step_seconds - (ages(view).step or 0.0)
        texts.insert(0, f"{texts[0]} in {age(max(0.0, left))}")
    return step, tuple(texts)


def _by_interest(cells: dict[int, Saved], chosen: Saved | None) -> list[tuple[int, Saved]]:
    """The marks in the order in which they get a label: the chosen one, the newest, rare kinds, the others."""
    newest = max(cells, default=0)
    return sorted(
        cells.items(),
        key=lambda each: (each[1] is not chosen, each[0] != newest, _RANK.index(kind_of(each[1])), -each[0]),
    )


def _label(mark: Saved) -> tuple[str, ...]:
    kind, step = kind_of(mark), short_step(mark.step)
    return (step,) if kind == "periodic" else (f"{step} {kind}", step)


def _placed(wanted: Sequence[tuple[int, tuple[str, ...], str]], width: int) -> Content:
    """Labels under their cells, a space apart; what finds no room in any of its forms is left out."""
    line, styles = [" "] * width, [""] * width
    for cell, texts, style in wanted:
        for text in texts:
            start = max(0, min(cell, width - len(text)))
            around = line[max(0, start - 1) : start + len(text) + 1]
            if len(text) <= width and not "".join(around).strip():
                line[start : start + len(text)] = text
                styles[start : start + len(text)] = [style] * len(text)
                break
    return Content.assemble(*zip(line, styles, strict=True))


def details(mark: Saved, place: str = "", *, newest: bool = True) -> list[Content]:
    """Everything about one checkpoint, in parts; of an older one only what was so when it was saved."""
    drawn = CHECKPOINTS[kind_of(mark)]
    head = Content.assemble((f"{mark.step:,}", "bold"), "  ", marked(drawn, mark.kind.replace("+", " + ")))
    parts = [head]
    if isinstance(mark, CheckpointFailed):
        error = Content.styled(f"FAILED: {mark.error}", drawn.style)
        parts += [error, *([Content(f"after {duration(mark.seconds)}")] if math.isfinite(mark.seconds) else [])]
    elif not mark.sha256:  # a log told of it, and of nothing but its step and its place
        parts += [Content("saved, says the log"), Content(mark.path)]
    else:
        parts += [
            # The newest always stays; older ones make room for it, of which the stream does not tell.
            marked(VERDICTS["PASS"], "verified" if newest else "verified when saved"),
            Content(size(mark.bytes)),
            Content(f"{mark.tensors:,} tensors"),
            Content(f"sha256 {mark.sha256[:8]}…"),
            Content(f"{duration(mark.seconds)} (waited {duration(mark.waited_seconds)})"),
        ]
    if place:
        parts.append(Content.styled(place, MUTED))
    return parts
