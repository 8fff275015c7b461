"""`kdconsole screenshot`: the dashboard of a run as a picture, without a terminal."""

from __future__ import annotations

import asyncio
import errno
import os
from pathlib import Path

import click

from console.command import evidence_option
from engine.errors import RunError
from engine.text import clean

LOAD_SECONDS = 120.0


def picture(path: Path, *, columns: int, rows: int, theme: str, step: int | None) -> str:
    """The dashboard of a run as an SVG document.

    Args:
        path: the run directory.
        columns: width of the screen in cells.
        rows: height of the screen in cells.
        theme: name of a theme.
        step: show the run as it was after this step; None: as it is.

    Raises:
        RunError: there is no run, or it cannot be read in time.
    """
    from textual.pilot import Pilot

    from console.app import KdConsoleApp
    from console.screens.dashboard import Dashboard
    from console.settings import Settings
    from dispatch.evidence import open_evidence

    open_evidence(path)  # Refused here, where it can still be told.
    app = KdConsoleApp((path.parent,), Settings(theme=theme, notify=False, bell=False), readonly=True, run=path)
    drawn = ""

    async def shoot(pilot: Pilot[object]) -> None:
        nonlocal drawn
        screen = app.screen
        assert isinstance(screen, Dashboard)
        async with asyncio.timeout(LOAD_SECONDS):
            await screen.loaded.wait()
        if step is not None:
            screen.look_at_step(step)
        if beside := [w for w in app.workers if w.group in ("smoke", "close")]:  # of none it would wait for all
            await app.workers.wait_for_complete(beside)
            await pilot.pause()
        screen.chart.redraw()
        await pilot.pause()
        drawn = app.export_screenshot(title=f"kdconsole · {clean(screen.named_run, 200)}")
        app.exit("")

    async def go() -> None:
        await app.run_async(headless=True, size=(columns, rows), auto_pilot=shoot)

    try:
        asyncio.run(go())
    except TimeoutError:
        raise RunError(f"{path}: not read in {LOAD_SECONDS:g} s") from None
    return drawn


@click.command("screenshot", short_help="Draw the dashboard of a run as an SVG file.")
@click.argument("run")
@click.option(
    "--out",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="Where to write; a file that is there is replaced.  [default: a new RUN.svg]",
)
@click.option("--size", metavar="COLUMNSxROWS", default="120x40", show_default=True, help="Of the screen, in cells.")
@click.option("--theme", default="kdconsole-dark", show_default=True, help="As in the settings.")
@click.option("--step", type=click.IntRange(min=1), metavar="N", help="As it was after this step.")
@evidence_option
def screenshot_command(run: str, out: Path | None, size: str, theme: str, step: int | None, evidence: Path) -> None:
    """Draw the dashboard of a run, live or past, as an SVG file; no terminal is needed.

    RUN is an id, its beginning, or a path to past evidence of any kind, as review takes it.

    \b
    Examples:
      kdconsole screenshot 20260102-030405
      kdconsole screenshot evidence/20260102-030405-train-abcdef --size 200x60 --theme kdconsole-light
    """
    from console.export_files import write_new
    from console.named_evidence import named_evidence
    from engine.durable import replace

    columns, rows = _cells(size)
    _known_theme(theme)
    path = named_evidence(evidence, run)
    drawn = picture(path, columns=columns, rows=rows, theme=theme, step=step)
    stem = clean(path.name, 200)  # and not what its manifest calls it, which may be a path to anywhere
    shown = clean(str(out or f"{stem}.svg"))
    try:
        if out is not None and out.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        if out is None:
            [out] = write_new(Path(), stem, {".svg": drawn})
        else:
            replace(out, drawn.encode())
    except OSError as error:
        raise RunError(f"{shown}: {error.strerror}", do="choose another file with --out") from None
    click.echo(clean(str(out)))


def _cells(size: str) -> tuple[int, int]:
    columns, _, rows = size.lower().partition("x")
    if columns.isdecimal() and rows.isdecimal() and 20 <= int(columns) <= 500 and 5 <= int(rows) <= 300:
        return int(columns), int(rows)
    shown = clean(repr(size), 60)
    raise click.BadParameter(f"{shown}: expected COLUMNSxROWS, 20x5 to 500x300, such as 120x40", param_hint="--size")


def _known_theme(name: str) -> None:
    from textual.theme import BUILTIN_THEMES

    from console.themes import THEMES

    known = sorted({*BUILTIN_THEMES, *(theme.name for theme in THEMES)})
    if name not in known:
        raise click.BadParameter(f"{clean(repr(name), 60)}: expected one of {', '.join(known)}", param_hint="--theme")
