"""The machine that the run is on: what is used of it, and what is left."""

from __future__ import annotations

import math
from collections.abc import Sequence

from textual.content import Content

from console.outlook import age, host_now, outlook
from console.view import View
from console.widgets.layout import NOT_GIVEN, Part, drawn_bar, fit, size, wrapped
from console.widgets.pane import Pane
from engine.stream import Heartbeat, Vitals

OLD_SECONDS = 30.0
"""From this age on the figures' age is told."""
_WIDE = 32
_BAR_LEAST, _BAR_MOST = 4, 24
_DISK_LOW, _MEMORY_HIGH = 0.05, 0.95


class VitalsPane(Pane):
    """Accelerator, memory, processor, disk and the trainer's own memory, as they were last told."""

    def title(self) -> Content:
        """See `Pane`."""
        run = self.view.state.run
        return Content(f"Host  {run.host}" if run is not None and run.host else "Host")

    def picture(self, width: int, height: int) -> Sequence[Content]:
        """See `Pane`."""
        return vitals_lines(self.view, width)[: height or None]


def vitals_lines(view: View, width: int) -> list[Content]:
    """The pane's lines, none wider than `width` cells."""
    state = view.state
    told = [event.t for event in (state.vitals, state.heartbeat) if event is not None]
    if not told:
        past = "Figures of the host are not kept for the past." if view.scrubbed else "No figures of the host yet."
        return [line.stylize("$text-muted") for line in wrapped(past, width)]
    vitals, beat = state.vitals or Vitals(), state.heartbeat
    lines = [_gpu(vitals, width), *_memory(vitals, beat, width)]
    lines += [_share("cpu", vitals.cpu_percent, width), _disk(vitals, width)]
    lines.append(_row("trainer", None, [f"{_bytes(beat.rss_bytes if beat else None)} resident"], width))
    ago = host_now(view) - max(told)
    if outlook(view).ended:
        lines.insert(0, Content.styled("last figures of a run that is over", "$text-muted"))
    elif ago > OLD_SECONDS:
        lines.insert(0, Content.styled(f"⚠ figures are {age(ago)} old", "bold $warning"))
    return lines


def _gpu(vitals: Vitals, width: int) -> Content:
    """Use, temperature and power of the accelerator, each where it is given."""
    facts = [(vitals.gpu_percent, " %"), (vitals.gpu_temperature_c, " °C"), (vitals.gpu_power_watts, " W")]
    texts = [f"{value:.0f}{unit}" for value, unit in facts if value is not None and math.isfinite(value)]
    return _row("GPU", _fraction(vitals.gpu_percent, 100.0), texts or [NOT_GIVEN], width)


def _memory(vitals: Vitals, beat: Heartbeat | None, width: int) -> list[Content]:
    """Of the device and of the host; one line where both are the same memory."""
    free = _newest(vitals.host_free_bytes, beat.host_free_bytes if beat else None)
    host = (
        (None if free is None or vitals.host_total_bytes is None else vitals.host_total_bytes - free),
        (vitals.host_total_bytes),
    )
    if vitals.unified_memory:
        named = ("mem", "unified") if width >= _WIDE else ("unified", "")
        return [_used(named[0], *host, free, named[1], width)]
    used, total = vitals.gpu_memory_used_bytes, vitals.gpu_memory_total_bytes
    if used is None and beat is not None:
        used, total = beat.device_used_bytes, beat.device_total_bytes
    return [_used("GPU mem", used, total, None, "", width), _used("host mem", *host, free, "", width)]


def _newest(first: int | None, second: int | None) -> int | None:
    return second if first is None else first


def _used(name: str, used: int | None, total: int | None, free: int | None, note: str, width: int) -> Content:
    """So much of so much; only what is free where the whole is not known."""
    if used is None or total is None:
        known = f"{size(free)} free" if free is not None else _bytes(used)
        return _row(name, None, [known, note], width)
    share = _fraction(used, total)
    full = share is not None and share > _MEMORY_HIGH
    return _row(name, share, [f"{_pair(used, total)}", note, "⚠ nearly full" if full else ""], width, full)


def _pair(used: int, total: int) -> str:
    """`61.2 / 128.5 GB`, the unit once where both have the same."""
    first, second = size(used), size(total)
    return f"{first.partition(' ')[0]} / {second}" if first[-2:] == second[-2:] else f"{first} / {second}"


def _share(name: str, percent: float | None, width: int) -> Content:
    share = _fraction(percent, 100.0)
    return _row(name, share, [NOT_GIVEN if percent is None or share is None else f"{percent:.0f} %"], width)


def _disk(vitals: Vitals, width: int) -> Content:
    free, total = vitals.disk_free_bytes, vitals.disk_total_bytes
    if free is None:
        return _row("disk", None, [NOT_GIVEN], width)
    share = None if total is None else _fraction(total - free, total)
    low = share is not None and share > 1 - _DISK_LOW
    return _row("disk", share, [f"{size(free)} free", "⚠ low" if low else ""], width, low)


def _fraction(part: float | None, whole: float | None) -> float | None:
    if part is None or whole is None or not math.isfinite(part) or not whole > 0:
        return None
    return part / whole


def _bytes(count: int | None) -> str:
    return NOT_GIVEN if count is None else size(count)


def _row(name: str, share: float | None, texts: Sequence[str], width: int, alarming: bool = False) -> Content:
    """A name, a small bar where a share is known, and figures; figures stay when room is short."""
    first, *more = texts
    column = 8 if width >= _WIDE else 0
    # What `61.2 / 128.5 GB  unified` and the names leave; a bar that is too short to be read is left out.
    room = min(_BAR_MOST, width - 36)
    room = room if room >= _BAR_LEAST else 0
    colour = "bold $warning" if alarming else "$primary"
    drawn = Content(" " * room) if share is None else drawn_bar(share, room, colour)
    style = "bold $warning" if alarming else "$text-muted" if first == NOT_GIVEN else ""
    parts = [
        Part.of(8, Content.styled(name.ljust(column), "$text-muted")),
        Part.of(1, drawn),
        Part.of(9, Content.styled(first, style), least=4),
        *(Part.of(4, Content.styled(text, style)) for text in more),
    ]
    return fit(parts, [], width, 2)
