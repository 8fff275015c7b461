"""What a run without steps came to: of an evaluation whether it can be believed, its score, and every problem."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, Final

from textual import work
from textual.binding import Binding, BindingType
from textual.content import Content
from textual.events import Click

from console.answer_text import AnswerText, read_answer
from console.answers import OUTCOMES, TRUTH, Answers, Task
from console.long_work import work as work_of
from console.outlook import host_now
from console.palette import VERDICTS, Mark
from console.run_state import RunState
from console.scored import control_word, percent, score
from console.view import View
from console.widgets.layout import MUTED, cut, drawn_bar, flowed, padded, wrapped
from console.widgets.pane import Pane
from console.without_steps import Came, came

MARKS: Final = {
    "passed": Mark("✔", "passed", "$success"),
    "wrong": Mark("✘", "wrong", "$error"),
    "error": Mark("!", "error", "$warning"),
    "time": Mark("◷", "time", "$warning"),
    "memory": Mark("▣", "memory", "$warning"),
    "gone": Mark("∅", "gone", "$warning"),
    "unknown": Mark("?", "unknown", "bold $error"),
}
"""What became of an answer: a shape and a colour each."""
_SOME: Final = Mark("◐", "some", "$success")
"""Of several answers to a problem some solve it."""
_TO_COME: Final = "·"
_BAR: Final = 24


class ScorePane(Pane):
    """The score first, then what it rests on, and a grid with a mark a problem.

    Arrows choose a problem, Enter shows its answer as it was generated; Enter again goes back.

    Args:
        directory: the run's; answers are read from it when they are asked for.
        id: see Textual.
        classes: see Textual.
    """

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("left", "choose(-1)", "problem before", show=False),
        Binding("right", "choose(1)", "next problem", show=False),
        Binding("up", "up_or_down(-1)", "up", show=False),
        Binding("down", "up_or_down(1)", "down", show=False),
        Binding("pageup", "up_or_down(-10)", "page up", show=False),
        Binding("pagedown", "up_or_down(10)", "page down", show=False),
        Binding("home", "choose(-100000)", "first", show=False),
        Binding("end", "choose(100000)", "last", show=False),
        Binding("shift+left", "sample(-1)", "answer before", show=False),
        Binding("shift+right", "sample(1)", "next answer", show=False),
        Binding("enter", "answer", "its answer", show=False),
    ]

    def __init__(self, directory: Path, *, id: str | None = None, classes: str | None = None) -> None:
        super().__init__(id=id, classes=classes)
        self._directory = directory
        self._chosen: str | None = None
        self._opened: tuple[str, int] | None = None
        self._answer: AnswerText | None = None
        self._top = 0
        self._across, self._gap, self._first_row, self._grid_top = 1, 1, 0, 0

    def title(self) -> Content:
        """See `Pane`."""
        result = came(self.view.state)
        if result is None:
            return Content("Result")
        name = result.name.capitalize()
        mark = {"bad": VERDICTS["FAIL"], "good": VERDICTS["PASS"]}.get(result.tone)
        if mark is None or not self.view.state.answers:
            return Content(name)
        said = "controls hold" if result.tone == "good" else "not to be believed"
        return Content.assemble(f"{name}  ", (f"{mark.glyph} {said}", mark.style))

    def picture(self, width: int, height: int) -> Sequence[Content]:
        """See `Pane`."""
        state = self.view.state
        result = came(state)
        if result is None:
            return [line.stylize(MUTED) for line in wrapped("It has not told yet what it is.", width)]
        if self._opened is not None:
            return self._answer_lines(width, height)
        lines = [*headline(state, result, width), *_working(self.view, width)]
        if not state.answers:
            return [*lines, *_figures(result, width)]
        lines += _controls(state, width)
        tasks = state.answers.tasks
        if not tasks:
            return lines
        lines += _outcomes(state, width)
        told = _chosen_lines(self._pointed(tasks), width, self._several(state.answers))
        room = height - len(lines) - len(told) - 2
        if room < 1:
            return lines[:height]
        self._grid_top = len(lines) + 1
        grid = self._grid(state, tasks, width, room)
        return [*lines, Content(""), *grid, Content(""), *told]

    # The grid

    def _grid(self, state: RunState, tasks: Sequence[Task], width: int, room: int) -> list[Content]:
        total = max(len(tasks), state.answers.asked or 0)
        self._gap = 1 if total * 2 <= width * room else 0
        self._across = max(1, width // (1 + self._gap))
        pointed = self._pointed(tasks)
        at = tasks.index(pointed) if pointed is not None else 0
        rows = -(-total // self._across)
        row = at // self._across
        if not self._first_row <= row < self._first_row + room or self._first_row + room > rows:
            self._first_row = max(0, min(row, rows - room))
        lines = []
        for line in range(self._first_row, min(rows, self._first_row + room)):
            parts: list[tuple[str, str]] = []
            for cell in range(line * self._across, min(total, (line + 1) * self._across)):
                if cell >= len(tasks):
                    parts.append((_TO_COME, MUTED))
                else:
                    mark = mark_of(tasks[cell])
                    chosen = tasks[cell] is pointed and self._chosen is not None
                    parts.append((mark.glyph, f"{mark.style} reverse" if chosen else mark.style))
                parts.append((" " * self._gap, ""))
            lines.append(Content.assemble(*parts))
        return lines

    def _pointed(self, tasks: Sequence[Task]) -> Task | None:
        """The problem under the cursor: the one that was chosen, else the first that is not solved, else the first."""
        chosen = next((task for task in tasks if task.name == self._chosen), None)
        return chosen or next((task for task in tasks if not task.solved), None) or (tasks[0] if tasks else None)

    def _several(self, answers: Answers) -> bool:
        return answers.judged > len(answers.tasks)

    def action_choose(self, by: int) -> None:
        """Moves the cursor by so many problems; with an answer open to that of another problem."""
        tasks = self.view.state.answers.tasks
        pointed = self._pointed(tasks)
        if pointed is None:
            return
        # The first key only shows where the cursor is.
        first = self._chosen is None and abs(by) == 1
        index = tasks.index(pointed) + (0 if first else by)
        self._chosen = tasks[min(len(tasks) - 1, max(0, index))].name
        if self._opened is not None:
            self._open()
        self.redraw()

    def action_up_or_down(self, by: int) -> None:
        """A line of the grid, or of the answer."""
        if self._opened is None:
            self.action_choose(by * self._across if abs(by) == 1 else by // 10 * self._across * 5)
            return
        most = len(self._answer.lines) - 1 if self._answer else 0
        self._top = min(max(0, self._top + by), max(0, most))
        self.redraw()

    def on_click(self, event: Click) -> None:
        """Chooses the problem that was clicked; again, its answer."""
        offset = event.get_content_offset(self)
        tasks = self.view.state.answers.tasks
        if offset is None or self._opened is not None or not tasks or offset.y < self._grid_top:
            return
        column = offset.x // (1 + self._gap)
        index = (self._first_row + offset.y - self._grid_top) * self._across + column
        if column < self._across and index < len(tasks):
            again = tasks[index].name == self._chosen
            self._chosen = tasks[index].name
            if again:
                self.action_answer()
            self.redraw()

    # An answer

    def action_answer(self) -> None:
        """Shows the answer of the problem under the cursor as it was generated, or goes back to the grid."""
        if self._opened is not None:
            self._opened = self._answer = None
        else:
            self._open()
        self.redraw()

    def action_sample(self, by: int) -> None:
        """Another answer to the same problem."""
        if self._opened is not None:
            self._open(max(0, self._opened[1] + by))
            self.redraw()

    def _open(self, sample: int | None = None) -> None:
        pointed = self._pointed(self.view.state.answers.tasks)
        if pointed is None:
            return
        self._chosen, self._top, self._answer = pointed.name, 0, None
        shown = (pointed.newest.sample if pointed.newest else 0) if sample is None else sample
        self._opened = pointed.name, shown
        self._read(pointed.name, shown)

    @work(thread=True, exclusive=True, group="answer")
    def _read(self, task: str, sample: int) -> None:
        found = read_answer(self._directory, task, sample)
        self.app.call_from_thread(self._arrived, (task, sample), found)

    def _arrived(self, asked: tuple[str, int], found: AnswerText) -> None:
        if self._opened == asked:
            self._answer = found
            self.redraw()

    def _answer_lines(self, width: int, height: int) -> list[Content]:
        assert self._opened is not None
        name, sample = self._opened
        task = next((each for each in self.view.state.answers.tasks if each.name == name), None)
        head: list[Content | tuple[str, str]] = [(f"{name}  answer {sample}", "bold")]
        if task is not None and task.newest is not None and task.newest.sample == sample:
            mark = MARKS[task.newest.outcome]
            told = f": {task.newest.detail}" if task.newest.detail else ""
            head.append((f"  {mark.glyph} {mark.word}{told}", mark.style))
        found = self._answer
        back = Content.styled("enter: back · ↑ ↓ scroll · ← → other problems · shift ← → other answers", MUTED)
        if found is None:
            return [cut(Content.assemble(*head), width), Content.styled("reading …", MUTED), cut(back, width)]
        if found.problem:
            body = [line.stylize("$warning") for line in wrapped(found.problem, width)]
            return [cut(Content.assemble(*head), width), *body, cut(back, width)]
        head.append((f"  {found.tokens:,} tokens, ended by {found.finish or 'nobody says what'}", MUTED))
        shown = [cut(Content(line), width) for line in found.lines[self._top : self._top + max(1, height - 2)]]
        if found.cut and len(shown) < height - 2:
            shown.append(Content.styled(f"… and {found.cut:,} more lines", MUTED))
        shown += [Content("")] * (height - 2 - len(shown))
        return [cut(Content.assemble(*head), width), *shown, cut(back, width)]

    # Out of here

    def csv(self) -> str:
        """Every problem with how many of its answers ended how; figures, where there are no problems."""
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        state = self.view.state
        if state.answers.tasks:
            writer.writerow(["task", "answers", *OUTCOMES])
            writer.writerows([task.name, task.answers, *task.counts] for task in state.answers.tasks)
        else:
            writer.writerow(["figure", "value", "detail"])
            writer.writerows([each.name, each.value, each.detail] for each in state.measures.values())
        return out.getvalue()


def mark_of(task: Task) -> Mark:
    """The one shape of a problem: solved by all answers, by some, or by none and how most of these ended."""
    if task.solved:
        return MARKS["passed"] if task.passed == task.answers else _SOME
    return MARKS[task.outcome]


def headline(state: RunState, result: Came, width: int) -> list[Content]:
    """The one thing that matters: the score as a block, or that there is none to be believed and why."""
    if result.tone == "bad" and state.answers:
        block = " ✘ NO SCORE: this evaluation cannot be believed "
        style = "reverse bold $error"
        return [cut(Content.styled(block, style), width), *wrapped(Content.styled(result.text, "bold $error"), width)]
    told = score(state)
    if told.believed and state.answers:
        block, rest = told.text.partition(": ")[::2]
        line = Content.assemble((f" {block} ", "reverse bold $primary"), f"  {rest}")
        return [padded(line, width)] if line.cell_length <= width else wrapped(line, width)
    text = result.text or "nothing yet"
    if result.name == "score" and result.figures and not state.answers:  # the others stand below
        text = " ".join(result.figures[0][:2])
    style = "bold $error" if result.tone == "bad" else "bold" if told.believed or result.figures else MUTED
    return wrapped(Content.styled(text, style), width)


def _working(view: View, width: int) -> list[Content]:
    """How far the work of this phase came, while there is more of it."""
    state = view.state
    made = work_of(view, host_now(view))
    if state.end is not None:
        return []
    if made is None or made.fraction is None:
        return [cut(Content.styled(f"phase {state.phase}", MUTED), width)]
    text = f"  {made.done:,} of {made.total:,} {made.unit}"
    phase = f"{state.phase}  "
    return [cut(Content.assemble(phase, drawn_bar(made.fraction, min(_BAR, width // 3)), text), width)]


def _controls(state: RunState, width: int) -> list[Content]:
    """What each control scored, with what it must where that differs."""
    parts = []
    for name in (*TRUTH, *(each for each in state.answers.controls if each not in TRUTH)):
        text, holds = control_word(state, name)
        mark = VERDICTS["PENDING" if holds is None else "PASS" if holds else "FAIL"]
        parts.append(Content.styled(f"{mark.glyph} {text}", mark.style if holds is None else f"bold {mark.style}"))
    lines = flowed([Content.assemble(("controls  ", MUTED), parts[0]), *parts[1:]], width, "  ")
    asked = f"  on {state.answers.asked:,} problems" if state.answers.asked else ""
    if lines[-1].cell_length + len(asked) <= width:
        lines[-1] = Content.assemble(lines[-1], (asked, MUTED))
    return lines


def _outcomes(state: RunState, width: int) -> list[Content]:
    counts = state.answers.by_outcome
    marks = [(MARKS[name], count) for name, count in counts.items()]
    parts = [Content.styled(f"{mark.glyph} {count:,} {mark.word}", mark.style) for mark, count in marks]
    if not parts:
        return []
    return flowed([Content.assemble(("answers   ", MUTED), parts[0]), *parts[1:]], width, "  ")


def _chosen_lines(task: Task | None, width: int, several: bool) -> list[Content]:
    """The problem under the cursor: what became of its answers, and of the newest one why."""
    if task is None:
        return []
    mark = mark_of(task)
    parts: list[Content | str | tuple[str, str]] = [(f"{task.name}  ", "bold"), (f"{mark.glyph} ", mark.style)]
    if several:
        counts = zip(OUTCOMES, task.counts, strict=True)
        told = ", ".join(f"{count:,} {name}" for name, count in counts if count)
        parts.append(f"{task.passed:,} of {task.answers:,} right ({percent(task.passed / task.answers)}): {told}")
    else:
        parts.append((mark.word, mark.style))
    newest = task.newest
    lines = [cut(Content.assemble(*parts), width)]
    if newest is not None:
        which = f"answer {newest.sample}: {newest.outcome}; " if several else ""
        took = f"{which}{newest.tokens:,} tokens, ran {newest.seconds:.2f} s · enter: the answer"
        why = [cut(Content(newest.detail), width)] if newest.detail and newest.outcome != "passed" else []
        lines += [*why, cut(Content.styled(took, MUTED), width)]
    return lines


def _figures(result: Came, width: int) -> list[Content]:
    """Names, values and details, in columns."""
    if not result.figures:
        return []
    names = max(len(name) for name, _, _ in result.figures)
    values = max(len(value) for _, value, _ in result.figures)
    return [
        Content(""),
        *(
            cut(Content.assemble(f"{name:<{names}}  ", (f"{value:>{values}}", "bold"), (f"  {detail}", MUTED)), width)
            for name, value, detail in result.figures
        ),
    ]
