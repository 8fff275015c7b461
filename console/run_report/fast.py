"""The section of a report that tells how well the device was used, and how that is counted."""

from __future__ import annotations

import math

from console.efficiency import counted, peak, seconds, shares, speed, split_text, step_seconds, utilisation
from console.run_reader import LoadedRun
from console.run_report.model import Block, Facts, Paragraph, Section, Table, known, said
from engine.flops import COUNTED


def efficiency_section(loaded: LoadedRun) -> Section | None:
    """Speed, utilisation, what a token costs and where a step's time went; left out where the run did not tell it."""
    event = loaded.state.pace.mean
    if event is None:
        return None
    used, step = utilisation(event), step_seconds(event)
    facts = (
        ("speed", said(speed(event))),
        (
            "model FLOP utilisation",
            said("not known: no peak is known of the device" if used is None else f"{used:.1%}"),
        ),
        ("of a peak of", said(peak(event))),
        ("that peak is from", said(event.peak_source)),
        ("a token costs", said(counted(event))),
        ("a step takes", said(f"{seconds(step)}: {split_text(event)}" if math.isfinite(step) else "")),
        ("means over", said(f"{event.steps:,} steps, without the first of each attempt")),
    )
    blocks: list[Block] = [Facts(known(facts))]
    if told := shares(event):
        rows = tuple((said(name), said(seconds(event.split[name])), said(f"{share:.1%}")) for name, share in told)
        blocks.append(Table(("part of a step", "takes", "share"), rows, frozenset((1, 2))))
    blocks.append(Paragraph(said(f"MFU = tokens/s x FLOP a token / peak. {COUNTED[0].upper()}{COUNTED[1:]}.", "muted")))
    return Section("efficiency", "Efficiency", tuple(blocks))
