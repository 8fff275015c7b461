"""A report as one picture: status, losses, checkpoints, verdicts and where it comes from."""

from __future__ import annotations

import textwrap

from console.chart.export import COLOURS, WIDTH
from console.run_report import timeline
from console.run_report.colours import LIGHT, picture_css
from console.run_report.curve import curve_of
from console.run_report.markup import escaped
from console.run_report.model import Curve, Facts, Report, Table, Timeline, Tone, tone_of

CURVE_HEIGHT = 470
FONT = "DejaVu Sans, Helvetica, Arial, sans-serif"
MOST_VERDICTS, MOST_TOLD, MOST_WARNINGS = 24, 12, 4
"""In the strip; with what was expected and observed; and of warnings at the top."""
_MARGIN, _ACROSS = 40, 3
_ORDER = {"bad": LIGHT["bad"], "warn": LIGHT["warn"], "good": LIGHT["good"], "muted": LIGHT["muted"], "": LIGHT["ink"]}
_CHARACTER = 0.62
"""Width of a character in parts of its size, about that of the widest of the fonts."""


def document(report: Report) -> str:
    """The whole file; light or dark as the reader's system is."""
    picture = _Picture()
    picture.head(report)
    for curve in report.blocks(Curve):
        assert isinstance(curve, Curve)
        picture.place(curve_of(curve, CURVE_HEIGHT), CURVE_HEIGHT)
    for line in report.blocks(Timeline):
        assert isinstance(line, Timeline)
        picture.place(timeline.picture(line, FONT), timeline.height_of(line))
    picture.verdicts(report)
    picture.facts(report, "efficiency", "Efficiency")
    picture.facts(report, "provenance", "Provenance")
    return picture.document(f"{report.mark.word} {report.name}")


class _Picture:
    """A picture that grows downwards."""

    def __init__(self) -> None:
        self.parts: list[str] = []
        self.y = 0.0

    def document(self, title: str) -> str:
        """What was drawn, on a ground of its own."""
        height = round(self.y + 24)
        style = picture_css("svg", dark=False)
        dark = picture_css("svg", dark=True)
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" '
            f'viewBox="0 0 {WIDTH} {height}" font-family="{FONT}" font-size="14" role="img">\n'
            f"<title>{escaped(title)}</title>\n"
            f"<style>{style}@media (prefers-color-scheme:dark){{{dark}}}</style>\n"
            f'<rect width="{WIDTH}" height="{height}" rx="10" fill="{COLOURS.ground}"/>\n'
            + "\n".join(self.parts)
            + "\n</svg>\n"
        )

    def text(self, x: float, text: str, *, size: int = 14, tone: Tone = "", weight: str = "normal",
             room: float = WIDTH - 2 * _MARGIN) -> None:  # fmt: skip
        """A line at the present height, cut where it would not fit."""
        most = max(2, int(room / (size * _CHARACTER)))
        shown = text if len(text) <= most else text[: most - 1] + "…"
        self.parts.append(
            f'<text x="{x:.1f}" y="{self.y:.1f}" fill="{_ORDER[tone]}" font-size="{size}" '
            f'font-weight="{weight}">{escaped(shown)}</text>'
        )

    def lines(self, x: float, text: str, *, size: int = 14, tone: Tone = "", room: float = WIDTH - 2 * _MARGIN) -> None:
        """A text in two lines at most, the first one at the present height."""
        broken = textwrap.wrap(text, max(2, int(room / (size * _CHARACTER)))) or [""]
        for number, line in enumerate([*broken[:1], " ".join(broken[1:])] if len(broken) > 1 else broken):
            self.y += size + 5 if number else 0
            self.text(x, line, size=size, tone=tone, room=room)

    def rule(self, title: str) -> None:
        """A line across, and a title under it."""
        self.y += 14
        self.parts.append(f'<path d="M{_MARGIN} {self.y:.1f}H{WIDTH - _MARGIN}" stroke="{COLOURS.grid}"/>')
        self.y += 26
        self.text(_MARGIN, title, size=15, weight="bold")

    def head(self, report: Report) -> None:
        """What it is called, how it stands, and the few numbers that one wants first."""
        tone = tone_of(report.mark.style)
        self.y = 46
        self.text(_MARGIN, report.name, size=24, weight="bold")
        self.y += 26
        self.text(_MARGIN, report.title, tone="muted")
        self.y += 34
        status = f"{report.mark.glyph} {report.mark.word}"
        width = len(status) * 16 * 0.72 + 24
        self.parts.append(
            f'<rect x="{_MARGIN}" y="{self.y - 21:.1f}" width="{width:.1f}" height="30" rx="6" fill="none" '
            f'stroke="{_ORDER[tone]}" stroke-width="2"/>'
        )
        self.text(_MARGIN + 12, status, size=16, tone=tone, weight="bold")
        self.lines(_MARGIN + width + 14, report.reason, room=WIDTH - 2 * _MARGIN - width - 14)
        self.y += 12
        for line in report.warnings[:MOST_WARNINGS]:
            self.y += 22
            self.lines(_MARGIN, f"⚠ {line}", tone="warn")
        self.y += 34
        across = (WIDTH - 2 * _MARGIN) / max(1, len(report.summary))
        for index, (name, told) in enumerate(report.summary):
            x = _MARGIN + index * across
            self.text(x, name, size=12, tone="muted", room=across)
            self.y += 21
            size = min(15.0, (across - 10) / (_CHARACTER * 1.08 * max(1, len(told.text))))
            self.text(x, told.text, size=max(10, int(size)), tone=told.tone, weight="bold", room=across)
            self.y -= 21
        self.y += 44

    def place(self, picture: str, height: int) -> None:
        """Another picture of our own, as wide as this one."""
        self.parts.append(picture.replace("<svg ", f'<svg x="0" y="{self.y:.0f}" ', 1).rstrip("\n"))
        self.y += height + 6

    def verdicts(self, report: Report) -> None:
        """A strip of all verdicts; of what is not PASS also what was expected and observed."""
        section = report.section("verdicts")
        table = next((block for block in section.blocks if isinstance(block, Table)), None) if section else None
        self.rule(f"Verdicts: {report.verdicts or 'nothing was judged, and nothing stated'}")
        if table is None:
            self.y += 10
            return
        apart = [row for row in table.rows if row[0].tone in ("bad", "warn")][:MOST_TOLD]
        for row in apart:
            self.y += 24
            self.text(_MARGIN, f"{row[0].text}  {row[1].text}", tone=row[0].tone, weight="bold")
            self.y += 20
            self.text(_MARGIN + 24, f"{row[2].text} · observed: {row[3].text}", size=13, tone="muted")
        rest = [row for row in table.rows if row not in apart]
        across = (WIDTH - 2 * _MARGIN) / _ACROSS
        for index, row in enumerate(rest[:MOST_VERDICTS]):
            self.y += 24 if index % _ACROSS == 0 else 0
            x = _MARGIN + index % _ACROSS * across
            self.text(x, f"{row[0].text}  {row[1].text}", size=13, tone=row[0].tone, room=across - 6)
        if len(rest) > MOST_VERDICTS:
            self.y += 24
            self.text(_MARGIN, f"and {len(rest) - MOST_VERDICTS:,} more", size=13, tone="muted")
        self.y += 10

    def facts(self, report: Report, key: str, title: str) -> None:
        """The facts of a section, such as by what a run can be known again; nothing where there is no such section."""
        section = report.section(key)
        if section is None:
            return
        facts = next((block for block in section.blocks if isinstance(block, Facts)), None)
        self.rule(title)
        for name, told in facts.rows if facts else ():
            if told.tone == "muted" and told.text == "not said":
                continue
            self.y += 20
            self.text(_MARGIN, name, size=12, tone="muted", room=200)
            self.lines(_MARGIN + 210, told.text, size=12, tone=told.tone, room=WIDTH - 2 * _MARGIN - 210)
