"""The loss chart: a run's losses and its agreement with the teacher, or several runs laid over each other."""

from __future__ import annotations

from collections.abc import Sequence

from rich.cells import cell_len
from rich.segment import Segment
from rich.style import Style
from textual.binding import Binding
from textual.content import Content
from textual.events import MouseDown, MouseMove, MouseScrollDown, MouseScrollUp, MouseUp
from textual.geometry import Offset, Region
from textual.strip import Strip
from textual.widget import Widget

from console.chart.canvas import CURSOR
from console.chart.frame import Frame, draw
from console.chart.model import SLOTS, Plot, RunLanes, many_runs, one_run
from console.chart.readout import readout
from console.chart.sight import Sight
from console.run_state import RunState
from console.view import View
from console.widgets.chart_colours import CSS

_PAN = 0.25
"""Share of the window that one press of a key moves it."""


class LossChart(Widget, can_focus=True):
    """Draws losses over steps or wall time; every step that is kept is in the picture.

    Args:
        fps: most redraws a second for what arrives; what the operator does is drawn at once.
        name: see Textual.
        id: see Textual.
        classes: see Textual.
    """

    DEFAULT_CSS = "LossChart { height: 1fr; }" + CSS
    COMPONENT_CLASSES = {f"loss-chart--{name}" for name in (*SLOTS, "cursor")}
    ALLOW_SELECT = False  # a drag pans
    BINDINGS = [
        Binding("left", "move(-1)", "cursor left", show=False),
        Binding("right", "move(1)", "cursor right", show=False),
        Binding("ctrl+left", "move(-10)", "cursor far left", show=False),
        Binding("ctrl+right", "move(10)", "cursor far right", show=False),
        Binding("shift+left", "pan(-1)", "pan left", show=False),
        Binding("shift+right", "pan(1)", "pan right", show=False),
    ]

    def __init__(
        self, *, fps: float = 4, name: str | None = None, id: str | None = None, classes: str | None = None
    ) -> None:
        super().__init__(name=name, id=id, classes=classes)
        self._interval = 1.0 / fps
        self._runs: dict[str, tuple[int, RunLanes]] = {}
        self._plot = Plot("loss")
        self._view: View | None = None
        self._order: tuple[str, ...] = ()
        self._sight = Sight()
        self._frame: Frame | None = None
        self._strips: dict[int, Strip] = {}
        self._styles_of: dict[int, Style] = {}
        self._dirty = True
        self._cooling = False
        self._texts = ("", "")
        self._dragged: tuple[int, tuple[float, float]] | None = None

    # What is shown

    def show(self, view: View) -> None:
        """Draws one run, when it differs from what is drawn."""
        if self._view is None:
            self._runs, self._order = {"": (0, RunLanes())}, ("",)
        changed = self._runs[""][1].update(view.state)
        self._view = view
        self._renew(changed)

    def overlay(self, runs: Sequence[tuple[str, RunState]]) -> None:
        """Draws runs over each other; a run keeps its colour as long as it is among them."""
        if self._view is not None:
            self._view, self._runs = None, {}
        order = tuple(name for name, _ in runs)
        changed = order != self._order
        self._runs = {name: run for name, run in self._runs.items() if name in order}
        for name, state in runs:
            if name not in self._runs:
                taken = {number for number, _ in self._runs.values()}
                self._runs[name] = next(n for n in range(len(taken) + 1) if n not in taken), RunLanes()
            changed |= self._runs[name][1].update(state)
        self._order = order
        self._renew(changed)

    def _renew(self, changed: bool) -> None:
        """Makes the plot anew; marks the picture as old if the plot differs in anything that is drawn."""
        page = self._sight.page
        if self._view is not None:
            view = self._view
            live = view.link.live or view.scrubbed
            plot = one_run(self._runs[""][1], page, live=live, now=view.now)
        else:
            plot = many_runs([(name, *self._runs[name]) for name in self._order], page)
        old, self._plot = self._plot, plot
        if not plot.timed and self._sight.look.axis == "time":  # one that came later has no times
            self._sight, self._dirty = self._sight.with_axis(plot), True
        told = [
            (p.page, p.message, p.target, p.growing, p.now if self._sight.look.axis == "time" else 0)
            for p in (old, plot)
        ]
        if changed or told[0] != told[1] or len(old.curves) != len(plot.curves):
            self._dirty = True
            if not self._cooling:
                self.redraw()

    def redraw(self) -> None:
        """Draws now what changed since the last picture."""
        if not self._dirty or not self.is_mounted or not self.size:
            return
        old = self._frame
        self._draw()
        self._cool()
        frame = self._frame
        if (
            old is None
            or frame is None
            or (old.canvas.width, old.canvas.height) != (frame.canvas.width, frame.canvas.height)
        ):
            self.refresh()
            return
        changed = old.canvas.changed(frame.canvas)
        for row, _, _ in changed:
            self._strips.pop(row, None)
        if changed:
            self.refresh(*(Region(begin, row, end - begin, 1) for row, begin, end in changed))

    def _cool(self) -> None:
        if not self._cooling:
            self._cooling = True
            self.set_timer(self._interval, self._cooled)

    def _cooled(self) -> None:
        self._cooling = False
        self.redraw()

    def _draw(self) -> None:
        """Makes the picture of what is known, in the size that the widget has."""
        self._dirty = False
        look = self._sight.settled(self._plot).look
        self._frame = draw(self._plot, look, self.size.width, self.size.height)
        said = ""
        for part in readout(self._frame, self._plot, look, self._view.state if self._view else None):
            longer = f"{said} · {part}" if said else part
            if said and cell_len(longer) > self.size.width - 2:  # the frame takes a blank at each end
                break
            said = longer
        title = self._title()
        if (title, said) != self._texts:
            self._texts = title, said
            head, _, rest = title.partition("  ")
            self.border_title = Content.assemble((head, "bold"), ("  " + rest, "$foreground 70%"))
            self.border_subtitle = Content(said)
            self._strips.clear()

    def _title(self) -> str:
        look, loss = self._sight.look, self._plot.page == "loss"
        parts = [("log y" if look.log else "linear y") if loss else "linear y, 0 to 1"]
        if loss:
            parts.append(f"EMA {look.smoothing:.3f}".removesuffix("0") if look.smoothing else "no EMA")
        parts.append(f"x: {self._plot.unit if look.axis == 'step' else 'wall time'}")
        if look.window is not None:
            parts.append("zoomed, following" if self._sight.following else "zoomed")
        return f"{'Loss' if loss else 'Agreement with the teacher'}  {' · '.join(parts)}"

    # Where one looks

    def _see(self, sight: Sight) -> None:
        """Draws at once what the operator asked for."""
        turned = sight.page != self._sight.page
        if sight != self._sight:
            self._sight, self._dirty = sight, True
            if turned:
                self._renew(True)
            self.redraw()

    def toggle_log(self) -> None:
        """Logarithmic or linear y."""
        self._see(self._sight.with_log())

    @property
    def timed(self) -> bool:
        """There are times for an axis of wall time."""
        return self._plot.timed

    def toggle_axis(self) -> None:
        """Steps or wall time on x; the same part is looked at. Where there are no times it stays at steps."""
        if self.timed:
            self._see(self._sight.with_axis(self._plot))

    def smooth(self, steps: int) -> None:
        """Goes so many smoothings up or down; the lowest is none."""
        self._see(self._sight.smoothed(steps))

    def zoom(self, times: int, at: float | None = None) -> None:
        """Looks closer (1) or from further away (-1).

        Args:
            times: how often.
            at: x that keeps its place; None: the cursor, else the newest while following, else the middle.
        """
        self._see(self._sight.zoomed(self._plot, times, at))

    def pan(self, quarters: float) -> None:
        """Looks further right (positive) or left, in quarters of what is seen; does nothing while all is seen."""
        self._see(self._sight.panned(self._plot, quarters * _PAN))

    def toggle_follow(self) -> None:
        """Goes along with what arrives, or stays at what is seen now."""
        self._see(self._sight.with_follow(self._plot))

    def reset(self) -> None:
        """Everything as it was at first, and no cursor."""
        self._see(Sight())

    def next_page(self) -> None:
        """The losses, or the agreement with the teacher."""
        self._see(self._sight.turned())

    @property
    def sight(self) -> Sight:
        """What is looked at, and how."""
        return self._sight

    @property
    def readout(self) -> str:
        """What the cursor says; empty without one."""
        return self._texts[1]

    def move_cursor(self, cells: int) -> None:
        """Moves the cursor to a step so many columns further; the first time it stands at the last step."""
        if self._frame is not None:
            self._see(self._sight.stepped(self._plot, self._frame, cells))

    # Keys and mouse

    def action_move(self, cells: int) -> None:
        """Moves the cursor."""
        self.move_cursor(cells)

    def action_pan(self, quarters: int) -> None:
        """Looks further left or right."""
        self.pan(quarters)

    def on_mouse_down(self, event: MouseDown) -> None:
        """Begins to drag."""
        offset, frame = event.get_content_offset(self), self._frame
        if event.button == 1 and offset is not None and frame is not None:
            self._dragged = offset.x, frame.window
            self.capture_mouse()
            self._point(frame, offset)

    def on_mouse_up(self, event: MouseUp) -> None:
        """Lets go of what was dragged."""
        self._dragged = None
        self.release_mouse()

    def on_mouse_move(self, event: MouseMove) -> None:
        """The cursor goes with the mouse; with its button down the picture does."""
        offset, frame = event.get_content_offset_capture(self), self._frame
        if frame is None:
            return
        if self._dragged is None:
            self._point(frame, offset)
        elif offset.x != self._dragged[0]:
            begin, window = self._dragged
            share = (begin - offset.x) / max(1, frame.box.width)
            self._see(self._sight.panned(self._plot, share, window))

    def on_mouse_scroll_up(self, event: MouseScrollUp) -> None:
        """Looks closer at where the mouse is."""
        self._wheel(event, 1)

    def on_mouse_scroll_down(self, event: MouseScrollDown) -> None:
        """Looks from further away."""
        self._wheel(event, -1)

    def _point(self, frame: Frame, offset: Offset) -> None:
        if 0 <= offset.y - frame.box.top < frame.box.height:
            self._see(self._sight.hovered(self._plot, frame, offset.x - frame.box.left))

    def _wheel(self, event: MouseScrollUp | MouseScrollDown, times: int) -> None:
        offset, frame = event.get_content_offset(self), self._frame
        event.stop()
        if offset is not None and frame is not None and offset.x >= frame.box.left:
            self.zoom(times, frame.x_at(offset.x - frame.box.left))

    # Lines

    def render_line(self, y: int) -> Strip:
        """See Textual."""
        frame = self._frame
        if frame is None or (frame.canvas.width, frame.canvas.height) != (self.size.width, self.size.height):
            self._strips.clear()
            self._draw()
            frame = self._frame
        if frame is None or y >= frame.canvas.height:
            return Strip.blank(self.size.width, self._style(0))
        strip = self._strips.get(y)
        if strip is None:
            pieces = [Segment(text, self._style(color)) for text, color in frame.canvas.line(y)]
            strip = self._strips[y] = Strip(pieces, frame.canvas.width)
        return strip

    def notify_style_update(self) -> None:
        """See Textual: the theme changed."""
        self._strips.clear()
        self._styles_of.clear()
        super().notify_style_update()

    def _style(self, number: int) -> Style:
        style = self._styles_of.get(number)
        if style is None:
            style = self.get_visual_style(f"loss-chart--{SLOTS[number & ~CURSOR]}").rich_style
            if number & CURSOR:
                cursor = self.get_visual_style("loss-chart--cursor").rich_style
                reverse = self.get_component_styles("loss-chart--cursor").text_style.reverse
                style += Style(bgcolor=cursor.bgcolor, reverse=reverse)
            self._styles_of[number] = style
        return style

    # Out of here

    def copy_text(self) -> str:
        """What is seen, as plain text."""
        if self._frame is None:
            return ""
        return "\n".join(filter(None, (self._texts[0], self._frame.canvas.text(), self._texts[1])))

    def csv(self) -> str:
        """All points of the page that is shown; see `console.chart.export.csv_lines`."""
        from console.chart import export  # seldom needed, and not on the way to the first picture

        return "".join(export.csv_lines(self._plot))

    def svg(self, title: str) -> str:
        """The page and the part that are looked at, as a picture; see `console.chart.export.svg`."""
        from console.chart import export

        return export.svg(self._plot, self._sight.settled(self._plot).look, title)

    def pictures(self, title: str) -> dict[str, str | bytes]:
        """The same as files by their suffix, a PNG among them where it can be made; see `export.pictures`."""
        from console.chart import export

        return export.pictures(self._plot, self._sight.settled(self._plot).look, title)
