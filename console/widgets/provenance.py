"""Where past evidence comes from: what was asked for, by whom, on what; and what of it is missing or odd."""

from __future__ import annotations

import math
from collections.abc import Sequence

from textual.content import Content

from console.outlook import asked_and_ran
from console.report import duration
from console.times import date
from console.view import View
from console.widgets.layout import MUTED, cut, wrapped
from dispatch.old_manifest import OldManifest
from engine.text import clean

_NAME = 11
"""Cells for what a line is about."""
_MOST_FILES = 8


def provenance_lines(view: View, width: int, height: int = 0) -> list[Content]:
    """Lines none wider than `width` cells, what an operator must know first; empty where nothing is said.

    Args:
        view: what to show.
        width: cells in a line.
        height: where the lines are more than so many, each is cut to one, and the last ones go; 0 for any number.
    """
    whole = [line for fact in _facts(view, width) for line in fact]
    if not 0 < height < len(whole):
        return whole
    short = [cut(Content.assemble(fact[0], " …"), width) if len(fact) > 1 else fact[0] for fact in _facts(view, width)]
    return short if len(short) <= height else [*short[: height - 1], Content.styled("… z shows all of it", MUTED)]


def _facts(view: View, width: int) -> list[list[Content]]:
    if view.review is None:
        return []
    about, found = view.review.about, view.review.evidence
    old = found.old if found else None
    run, end = view.state.run, view.state.end
    lines = [_warned(asked_and_ran(view), width)]
    device = [part for part in (run.device_name or run.device,) if part] if run else []
    lines.append(_fact("host", [about.host, *device], width))
    lines.append(_fact("ticket", [about.ticket, about.phase and f"phase {about.phase}"], width))
    for remark in view.review.remarks:
        lines.append(_warned(remark, width))
    lines.append(_fact("falsifier", [about.falsifier], width))
    lines.append(_fact("teacher", [about.teacher], width))
    lines.append(_fact("student", [about.student], width))
    if end is not None and {"initial_loss", "final_loss"} <= end.summary.keys():
        said = f"{end.summary['initial_loss']:.4f} → {end.summary['final_loss']:.4f}"
        lines.append(_fact("said", [f"loss {said}", _took(end.seconds)], width))
    if old is not None:
        lines.append(_fact("asked", _asked(old), width))
        lines.append(_fact("dispatched", [old.dispatched_at if old.created is None else date(old.created)], width))
    if found is not None:
        names = [clean(path.name, 80) for path in found.logs]
        if names:
            lines.append(_fact("read", [names[0]], width))
            lines.append(_fact("not read", [*names[1:], *(clean(path.name, 80) for path in found.notes)], width))
        else:
            lines.append(_fact("notes", [clean(path.name, 80) for path in found.notes], width))
    return [fact for fact in lines if fact]


def _took(seconds: float) -> str:
    return f"took {duration(seconds)}" if math.isfinite(seconds) else ""


def _asked(old: OldManifest) -> list[str]:
    """What the manifest asked for, in the words of the scripts."""
    told = (
        ("steps", old.steps),
        ("epochs", old.epochs),
        ("max steps", old.max_steps),
        ("batch", old.batch_size),
        ("lr", old.learning_rate),
        ("T", old.temperature),
        ("alpha", old.alpha),
        ("log every", old.log_every),
        ("checkpoint every", old.checkpoint_every),
    )
    return [f"{name} {value:g}" for name, value in told if value is not None]


def _fact(name: str, texts: Sequence[str], width: int) -> list[Content]:
    """A named fact under itself; none where nothing is said."""
    said = [text for text in texts if text]
    if len(said) > _MOST_FILES + 1:
        said = [*said[:_MOST_FILES], f"{len(said) - _MOST_FILES:,} more"]
    if not said:
        return []
    text = " · ".join(said)
    if width < 3 * _NAME:
        return wrapped(Content.assemble((f"{name} ", MUTED), text), width)
    first, *more = wrapped(text, width - _NAME)
    return [
        Content.assemble((name.ljust(_NAME), MUTED), first),
        *(Content.assemble(" " * _NAME, line) for line in more),
    ]


def _warned(text: str, width: int) -> list[Content]:
    if not text:
        return []
    first, *more = wrapped(text, max(1, width - 2))
    style = "$warning"
    return [
        Content.assemble(("⚠ ", "bold $warning"), first.stylize(style)),
        *(Content.assemble("  ", line.stylize(style)) for line in more),
    ]
