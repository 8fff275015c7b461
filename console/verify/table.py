"""A verification as a table for people, the differences last, and as a document for programs."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from console.verify.claims import Claim, Mark
from console.verify.directory import Verified
from engine.errors import ExitCode
from engine.text import clean

_GLYPHS = {Mark.SAME: ("✔", "green"), Mark.DIFFERS: ("✘", "bold red"), Mark.UNTOLD: ("–", "yellow")}
_TITLES = {
    "files": "files, by SHA-256",
    "stream": "stream, replayed",
    "verdicts": "verdicts, judged anew",
    "end": "end, from the steps",
    "answers": "answers, scored anew",
    "manifest": "manifest, from its files",
    "log": "printed log",
    "weights": "weights",
}
_HASH = re.compile(r"\b([0-9a-f]{12})[0-9a-f]{28,52}\b")
_WORDS = {ExitCode.OK: "VERIFIED", ExitCode.FAILED: "DIFFERS", ExitCode.UNDECIDED: "UNPROVEN"}


def document(verified: Verified) -> dict[str, Any]:
    """One piece of evidence: every claim, and what became of it."""
    return {
        "path": str(verified.path),
        "kind": verified.kind,
        "id": verified.id,
        "run": verified.run,
        "evidence_id": verified.evidence_id,
        "result": _WORDS[verified.exit_code].lower(),
        "exit_code": int(verified.exit_code),
        "claims": [_row(claim) for claim in verified.claims],
        "differences": [_row(claim) for claim in verified.differences],
    }


def _row(claim: Claim) -> dict[str, Any]:
    row: dict[str, Any] = {"part": claim.part, "claim": claim.name, "stated": claim.stated}
    row |= {"recomputed": claim.recomputed, "mark": claim.mark.value, "why": claim.why}
    return row | ({"essential": True} if claim.essential else {})


def show(verified: Verified, console: Console) -> None:
    """Prints the table; the lines that people grep for keep their length."""
    console.print(_table(verified.claims))
    for line in _closing(verified):
        console.print(line, soft_wrap=True)


def _table(claims: Sequence[Claim]) -> RenderableType:
    grid = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    grid.add_column("", no_wrap=True)
    for name, ratio in (("claim", 3), ("stated", 3), ("recomputed", 3)):
        grid.add_column(name, overflow="fold", ratio=ratio)
    parts = list(dict.fromkeys([*_TITLES, *(claim.part for claim in claims)]))
    for part in parts:
        rows = [claim for claim in claims if claim.part == part]
        if not rows:
            continue
        grid.add_row("", Text(_TITLES.get(part, part), style="bold"), "", "")
        for claim in _folded(rows):
            glyph, style = _GLYPHS[claim.mark]
            found = claim.recomputed or claim.why
            grid.add_row(Text(glyph, style=style), Text(claim.name), Text(_short(claim.stated)), Text(_short(found)))
    return Group(Text(""), grid, Text(""))


def _folded(claims: Iterable[Claim]) -> list[Claim]:
    """Files of a directory that all are as listed, or all absent, as one row."""
    rows: list[Claim] = []
    groups: dict[tuple[str, Mark], list[Claim]] = {}
    for claim in claims:
        if claim.part != "files" or claim.mark is Mark.DIFFERS or "/" not in claim.name:
            rows.append(claim)
            continue
        group = groups.setdefault((claim.name.partition("/")[0], claim.mark), [])
        if not group:
            rows.append(claim)
        group.append(claim)
    heads = {id(group[0]): group for group in groups.values()}
    return [_summed(heads[id(row)]) if id(row) in heads else row for row in rows]


def _summed(group: list[Claim]) -> Claim:
    first, count = group[0], len(group)
    if count == 1:
        return first
    name = f"{first.name.partition('/')[0]}/, {count:,} files"
    found = "all the same" if first.mark is Mark.SAME else ""
    return Claim(first.part, name, f"{count:,} hashes", found, first.mark, first.why)


def _short(text: str) -> str:
    return _HASH.sub(r"\1…", text)


def _closing(verified: Verified) -> list[Text]:
    """Where it is, what counts against it, and last the conclusion."""
    lines = [Text(f"evidence  {clean(str(verified.path))}")]
    if verified.evidence_id is not None:
        lines.append(Text(f"evidence id  {verified.evidence_id}"))
    lines.append(Text(""))
    for claim in verified.differences:
        text = Text(f"✘ {claim.name}: ", style="bold red")
        both = f"stated {claim.stated}, recomputed {claim.recomputed}"
        told = claim.why if claim.recomputed == "not so" else f"{both}; {claim.why}" if claim.why else both
        text.append(told, style="default")
        lines.append(text)
    lines += [Text(f"– {claim.name}: {claim.why}", style="yellow") for claim in verified.unproven]
    marks = [claim.mark for claim in verified.claims]
    held, untold = marks.count(Mark.SAME), marks.count(Mark.UNTOLD)
    code = verified.exit_code
    glyph, style = _GLYPHS[{ExitCode.OK: Mark.SAME, ExitCode.FAILED: Mark.DIFFERS}.get(code, Mark.UNTOLD)]
    closing = Text(f"{glyph} {_WORDS[code]}  ", style=style)
    told = f"{len(verified.differences):,} of {len(marks):,} claims differ" if verified.differences else ""
    told = told or f"{held:,} claims hold, none differs"
    told += f", {untold:,} cannot be told" if untold else ""
    closing.append(told, style="default")
    return [*lines, closing]
