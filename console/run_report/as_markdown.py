"""A report in GitHub's Markdown: what a pull request's comment or a wiki's page shows without a picture."""

from __future__ import annotations

from collections.abc import Callable

from console.chart.frame import draw
from console.run_report import timeline
from console.run_report.markup import fenced, markdown
from console.run_report.model import Block, Curve, Facts, Paragraph, Report, Said, Section, Table, Timeline, Verbatim

CURVE_COLUMNS, CURVE_ROWS = 78, 16


def document(report: Report) -> str:
    """The whole file."""
    reason = markdown(report.reason)
    parts = [
        f"# {markdown(report.name)}",
        markdown(report.title),
        f"**{markdown(f'{report.mark.glyph} {report.mark.word}')}** {reason}",
        *(f"> ⚠ {markdown(line)}" for line in report.warnings),
        _facts(Facts(report.summary)),
        *map(_section, report.sections),
        f"---\n\n{markdown(report.footer)}",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _section(section: Section) -> str:
    blocks = "\n\n".join(_BLOCKS[type(block)](block) for block in section.blocks)
    if section.folded:
        return f"<details>\n<summary>{markdown(section.title)}</summary>\n\n{blocks}\n\n</details>"
    return f"## {markdown(section.title)}\n\n{blocks}"


def _cell(text: Said) -> str:
    return markdown(text.text, code=text.code, cell=True)


def _paragraph(block: Paragraph) -> str:
    return markdown(block.said.text, code=block.said.code)


def _facts(block: Facts) -> str:
    return _table(Table(("", ""), tuple((Said(name), text) for name, text in block.rows)))


def _table(block: Table) -> str:
    rows = [[markdown(name, cell=True) for name in block.header]]
    rows.append(["--:" if index in block.right else ":--" for index in range(len(block.header))])
    rows += [[_cell(cell) for cell in row] for row in block.rows]
    return "\n".join("| " + " | ".join(cell or " " for cell in row) + " |" for row in rows)


def _verbatim(block: Verbatim) -> str:
    return fenced(block.lines)


def _curve(block: Curve) -> str:
    drawn = draw(block.plot, block.look, CURVE_COLUMNS, CURVE_ROWS)
    return fenced(drawn.canvas.text().split("\n"), "text")


def _timeline(block: Timeline) -> str:
    return fenced(timeline.line_of_text(block), "text")


_BLOCKS: dict[type[Block], Callable[..., str]] = {
    Paragraph: _paragraph,
    Facts: _facts,
    Table: _table,
    Verbatim: _verbatim,
    Curve: _curve,
    Timeline: _timeline,
}
