"""A report as one HTML file that asks for nothing from anywhere: no script, no font, and only pictures inside it."""

from __future__ import annotations

from collections.abc import Callable

from console.run_report import timeline
from console.run_report.colours import DARK, LIGHT, picture_css, variables
from console.run_report.curve import curve_of
from console.run_report.markup import escaped
from console.run_report.model import (
    Block,
    Curve,
    Facts,
    Paragraph,
    Report,
    Said,
    Section,
    Table,
    Timeline,
    Verbatim,
    tone_of,
)

POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"
CURVE_HEIGHT = 460
SHORT = 40
"""Characters of what is not broken into lines, and of facts of which two stand side by side."""
FONT = "DejaVu Sans, Helvetica, Arial, sans-serif"
_CSS = """
*{box-sizing:border-box}
body{margin:0;background:var(--ground);color:var(--ink);
font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,Helvetica,Arial,sans-serif}
main{max-width:70rem;margin:0 auto;padding:1.5rem 1rem 3rem}
h1{font-size:1.6rem;line-height:1.25;margin:0;overflow-wrap:anywhere}
h2{font-size:1.15rem;margin:2.2rem 0 .7rem;padding-top:.6rem;border-top:1px solid var(--line)}
p{margin:.4rem 0;overflow-wrap:anywhere}
code,pre{font-family:ui-monospace,"DejaVu Sans Mono",Menlo,Consolas,monospace;font-size:.86em}
code{overflow-wrap:anywhere}
pre{background:var(--raised);border:1px solid var(--line);border-radius:6px;padding:.7rem .9rem;overflow-x:auto;
line-height:1.45;margin:.6rem 0}
header .of{color:var(--muted);margin:.2rem 0 .8rem}
.status{display:inline-block;font-weight:700;border:2px solid currentColor;border-radius:6px;padding:.1rem .6rem;
margin-right:.6rem;white-space:nowrap}
.good{color:var(--good)}.bad{color:var(--bad)}.warn{color:var(--warn)}.muted{color:var(--muted)}
.warnings{border-left:4px solid var(--warn);background:var(--raised);padding:.5rem .9rem;margin:1rem 0;
border-radius:0 6px 6px 0}
.warnings p::before{content:"\\26A0  "}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(8.2rem,1fr));gap:.6rem;margin:1.1rem 0 0;padding:0}
.tiles div{background:var(--raised);border:1px solid var(--line);border-radius:6px;padding:.5rem .55rem}
.tiles dt{color:var(--muted);font-size:.8rem}
.tiles dd{margin:0;font-weight:600;font-size:.87rem;overflow-wrap:anywhere}
.facts{display:grid;grid-template-columns:minmax(8rem,13rem) 1fr;gap:.25rem 1.2rem;margin:0}
@media (min-width:60rem){.pairs{grid-template-columns:10rem 1fr 10rem 1fr}}
.facts dt{color:var(--muted)}
.facts dd{margin:0;overflow-wrap:anywhere}
table{border-collapse:collapse;width:100%;font-size:.92rem;margin:.6rem 0}
th{text-align:left;color:var(--muted);font-weight:600;border-bottom:2px solid var(--line);padding:.3rem .8rem .3rem 0}
td{vertical-align:top;border-bottom:1px solid var(--line);padding:.35rem .8rem .35rem 0;overflow-wrap:break-word}
.short{overflow-wrap:break-word}
@media screen and (min-width:60rem){.short{white-space:nowrap}}
td:first-child{white-space:nowrap}
td.n,th.n{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}
.picture{overflow-x:auto;border:1px solid var(--line);border-radius:6px;margin:.6rem 0}
.picture svg{display:block;width:100%;min-width:44rem;height:auto}
.folded{margin-top:2.2rem;padding-top:.6rem;border-top:1px solid var(--line)}
details summary{cursor:pointer;font-size:1.15rem;font-weight:700}
footer{margin-top:2.5rem;padding-top:.8rem;border-top:1px solid var(--line);color:var(--muted);font-size:.85rem;
overflow-wrap:anywhere}
@media (max-width:44rem){
.facts{grid-template-columns:minmax(6rem,9rem) 1fr;gap:.2rem .8rem}
thead{display:none}tr{display:block;border-bottom:1px solid var(--line);padding:.4rem 0}
td,td.n,.short{display:block;border:0;padding:.05rem 0;text-align:left;white-space:normal}
td .short{display:inline}
td[data-of]::before{content:attr(data-of) ": ";color:var(--muted)}
}
@media print{
main{max-width:none;padding:0}h2{break-after:avoid}tr,.picture,.tiles div{break-inside:avoid}
.picture{overflow:visible}.picture svg{min-width:0}body{font-size:11pt}
}
"""


def document(report: Report) -> str:
    """The whole file."""
    light, dark = variables(LIGHT), variables(DARK)
    style = (
        f":root{{color-scheme:light dark;{light}}}{_CSS}{picture_css('.picture', dark=False)}"
        f"@media screen and (prefers-color-scheme:dark){{:root{{{dark}}}{picture_css('.picture', dark=True)}}}"
    )
    title = f"{report.mark.glyph} {report.mark.word} · {report.name}"
    parts = [
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{escaped(POLICY)}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        '<meta name="referrer" content="no-referrer">\n<meta name="color-scheme" content="light dark">',
        f"<title>{escaped(title)}</title>\n<style>{style}</style>\n</head>\n<body>\n<main>",
        _head(report),
        *map(_section, report.sections),
        f"<footer>{escaped(report.footer)}</footer>\n</main>\n</body>\n</html>\n",
    ]
    return "\n".join(parts)


def _head(report: Report) -> str:
    tone = tone_of(report.mark.style)
    tiles = "".join(f"<div><dt>{escaped(name)}</dt><dd>{_said(text)}</dd></div>" for name, text in report.summary)
    status = f'<span class="status {tone}">{escaped(report.mark.glyph)} {escaped(report.mark.word)}</span>'
    lines = [f"<p>{escaped(line)}</p>" for line in report.warnings]
    warnings = f'<div class="warnings" role="note">{"".join(lines)}</div>\n' if lines else ""
    return (
        f'<header>\n<h1>{escaped(report.name)}</h1>\n<p class="of">{escaped(report.title)}</p>\n'
        f'<p>{status}{escaped(report.reason)}</p>\n{warnings}<dl class="tiles">{tiles}</dl>\n</header>'
    )


def _section(section: Section) -> str:
    blocks = "\n".join(_BLOCKS[type(block)](block) for block in section.blocks)
    key, title = escaped(section.key), escaped(section.title)
    if section.folded:
        blocks = f"<details>\n<summary>{title}</summary>\n{blocks}\n</details>"
        return f'<section id="{key}" class="folded">\n{blocks}\n</section>'
    return f'<section id="{key}">\n<h2>{title}</h2>\n{blocks}\n</section>'


def _said(text: Said) -> str:
    inner = escaped(text.text)
    if text.code:
        short = ' class="short"' if len(text.text) <= SHORT else ""
        inner = f"<code{short}>{inner}</code>"
    return f'<span class="{text.tone}">{inner}</span>' if text.tone else inner


def _paragraph(block: Paragraph) -> str:
    return f"<p>{_said(block.said)}</p>"


def _facts(block: Facts) -> str:
    rows = "\n".join(f"<dt>{escaped(name)}</dt><dd>{_said(text)}</dd>" for name, text in block.rows)
    two = len(block.rows) >= 8 and all(len(text.text) <= SHORT for _, text in block.rows)
    return f'<dl class="facts{" pairs" if two else ""}">\n{rows}\n</dl>'


def _table(block: Table) -> str:
    kinds = [' class="n"' if index in block.right else "" for index in range(len(block.header))]
    head = "".join(
        f'<th{kind} scope="col">{escaped(name)}</th>' for name, kind in zip(block.header, kinds, strict=True)
    )
    names = [
        f' data-of="{escaped(name)}"' if name and (index or 0 in block.right) else ""
        for index, name in enumerate(block.header)
    ]
    rows = []
    for row in block.rows:
        cells = zip(row, kinds, names, strict=True)
        rows.append("<tr>" + "".join(f"<td{kind}{name}>{_said(cell)}</td>" for cell, kind, name in cells) + "</tr>")
    return f"<table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n" + "\n".join(rows) + "\n</tbody>\n</table>"


def _verbatim(block: Verbatim) -> str:
    return "<pre>" + "\n".join(map(escaped, block.lines)) + "</pre>"


def _curve(block: Curve) -> str:
    return f'<div class="picture">{curve_of(block, CURVE_HEIGHT)}</div>'


def _timeline(block: Timeline) -> str:
    return f'<div class="picture">{timeline.picture(block, FONT)}</div>'


_BLOCKS: dict[type[Block], Callable[..., str]] = {
    Paragraph: _paragraph,
    Facts: _facts,
    Table: _table,
    Verbatim: _verbatim,
    Curve: _curve,
    Timeline: _timeline,
}
