"""The machine that the run is on: what is used of it, and what is left."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from textual.content import Content

from console.outlook import host_now, outlook
from console.times import age
from console.view import View
from console.widgets.layout import MUTED, NOT_GIVEN, Part, drawn_bar, fit, size, wrapped
from console.widgets.pane import Pane
from console.widgets.provenance import provenance_lines
from dispatch.evidence import Kind
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
        if _from_a_log(self.view):
            host = self.view.review.about.host if self.view.review else ""
            return Content(f"Host and origin  {host}".rstrip())
        run, remote = self.view.state.run, self.view.manifest.remote if self.view.manifest else None
        own = run.host if run is not None else ""
        if remote is not None and own not in ("", remote.host):
            return Content(f"Host  {remote.host}, which calls itself {own}")
        return Content(f"Host  {own}" if own else "Host")

    def picture(self, width: int, height: int) -> Sequence[Content]:
        """See `Pane`."""
        return vitals_lines(self.view, width, height)


@dataclass(frozen=True)
class _Row:
    """A figure: its name, the share of the whole where that is known, its texts, the first one first."""

    name: str
    share: float | None
    texts: Sequence[str]
    alarming: bool = False

    @property
    def known(self) -> bool:
        return self.texts[0] != NOT_GIVEN


def vitals_lines(view: View, width: int, height: int = 100) -> list[Content]:
    """The pane's lines, none wider than `width` cells; where they are more than `height`, what is unknown goes."""
    if _from_a_log(view):
        said = provenance_lines(view, width, height)
        return said or [line.stylize(MUTED) for line in wrapped("Nothing stands beside the log.", width)]
    remarks = view.review.remarks if view.review is not None else ()
    told = [line.stylize("$warning") for remark in remarks for line in wrapped(f"⚠ {remark}", width)]
    return [*told, *_figures(view, width, max(0, height - len(told)))]


def _from_a_log(view: View) -> bool:
    """There never were figures of a host; what stands beside the log is told in their place."""
    return view.review is not None and view.review.kind is not Kind.RUN


def _figures(view: View, width: int, height: int) -> list[Content]:
    state = view.state
    told = [event.t for event in (state.vitals, state.heartbeat) if event is not None]
    if not told:
        past = "Figures of the host are not kept for the past." if view.scrubbed else "No figures of the host yet."
        return [line.stylize(MUTED) for line in wrapped(past, width)]
    vitals, beat = state.vitals or Vitals(), state.heartbeat
    rows = [_gpu(vitals), *_memory(vitals, beat, width), _share("cpu", vitals.cpu_percent), _disk(vitals)]
    rows.append(_Row("trainer", None, [f"{size(beat.rss_bytes)} resident"] if beat else [NOT_GIVEN]))
    ago = host_now(view) - max(told)
    notice = []
    if outlook(view).ended:
        notice.append(Content.styled("last figures of a run that is over", MUTED))
    elif ago > OLD_SECONDS:
        notice.append(Content.styled(f"⚠ figures are {age(ago)} old", "bold $warning"))
    excess = len(rows) + len(notice) - height
    for row in [row for row in rows if not row.known][: max(0, excess)]:
        rows.remove(row)
    # What `61.2 / 128.5 GB  unified` and the names leave; bars that are too short to be read are left out.
    room = min(_BAR_MOST, width - 36) if any(row.share is not None for row in rows) else 0
    return [*notice, *(_drawn(row, width, room if room >= _BAR_LEAST else 0) for row in rows)]


def _gpu(vitals: Vitals) -> _Row:
    """Use, temperature and power of the accelerator, each where it is given."""
    facts = [(vitals.gpu_percent, " %"), (vitals.gpu_temperature_c, " °C"), (vitals.gpu_power_watts, " W")]
    texts = [f"{value:.0f}{unit}" for value, unit in facts if value is not None and math.isfinite(value)]
    return _Row("GPU", _fraction(vitals.gpu_percent, 100.0), texts or [NOT_GIVEN])


def _memory(vitals: Vitals, beat: Heartbeat | None, width: int) -> list[_Row]:
    """Of the device and of the host; one line where both are the same memory."""
    free = _newest(vitals.host_free_bytes, beat.host_free_bytes if beat else None)
    total = vitals.host_total_bytes
    used = None if free is None or total is None else total - free
    if vitals.unified_memory:
        named = ("mem", "unified") if width >= _WIDE else ("unified", "")
        return [_used(named[0], used, total, free, named[1])]
    device_used, device_total = vitals.gpu_memory_used_bytes, vitals.gpu_memory_total_bytes
    if device_used is None and beat is not None:
        device_used, device_total = beat.device_used_bytes, beat.device_total_bytes
    return [_used("GPU mem", device_used, device_total, None), _used("host mem", used, total, free)]


def _newest(first: int | None, second: int | None) -> int | None:
    return second if first is None else first


def _used(name: str, used: int | None, total: int | None, free: int | None, note: str = "") -> _Row:
    """So much of so much; only what is free where the whole is not known."""
    if used is None or total is None:
        return _Row(name, None, [f"{size(free)} free" if free is not None else _bytes(used), note])
    share = _fraction(used, total)
    full = share is not None and share > _MEMORY_HIGH
    return _Row(name, share, [_pair(used, total), note, "⚠ nearly full" if full else ""], full)


def _pair(used: int, total: int) -> str:
    """`61.2 / 128.5 GB`, the unit once where both have the same."""
    first, second = size(used), size(total)
    return f"{first.partition(' ')[0]} / {second}" if first[-2:] == second[-2:] else f"{first} / {second}"


def _share(name: str, percent: float | None) -> _Row:
    share = _fraction(percent, 100.0)
    return _Row(name, share, [NOT_GIVEN if percent is None or share is None else f"{percent:.0f} %"])


def _disk(vitals: Vitals) -> _Row:
    free, total = vitals.disk_free_bytes, vitals.disk_total_bytes
    if free is None:
        return _Row("disk", None, [NOT_GIVEN])
    share = None if total is None else _fraction(total - free, total)
    low = share is not None and share > 1 - _DISK_LOW
    return _Row("disk", share, [f"{size(free)} free", "⚠ low" if low else ""], low)


def _fraction(part: float | None, whole: float | None) -> float | None:
    if part is None or whole is None or not math.isfinite(part) or not whole > 0:
        return None
    return part / whole


def _bytes(count: int | None) -> str:
    return NOT_GIVEN if count is None else size(count)


def _drawn(row: _Row, width: int, room: int) -> Content:
    """A name, a bar of so many cells where a share is known, and figures; figures stay when room is short."""
    first, *more = row.texts
    colour = "bold $warning" if row.alarming else "$primary"
    drawn = Content(" " * room) if row.share is None else drawn_bar(row.share, room, colour)
    style = "bold $warning" if row.alarming else "" if row.known else MUTED
    parts = [
        Part.of(8, Content.styled(row.name.ljust(8 if width >= _WIDE else 0), MUTED)),
        Part.of(1, drawn),
        Part.of(9, Content.styled(first, style), least=4),
        *(Part.of(4, Content.styled(text, style)) for text in more),
    ]
    return fit(parts, [], width, 2)
