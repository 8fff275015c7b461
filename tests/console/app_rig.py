"""The whole app with its real screens, without a terminal, at a fixed moment in a fixed place."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from textual.pilot import Pilot

from console import app as app_module
from console import watch as watch_module
from console.app import KdConsoleApp
from console.interactive import only_piece
from console.screens import compare as compare_module
from console.screens import dashboard as dashboard_module
from console.screens.compare import CompareScreen
from console.screens.home import HomeScreen
from console.screens.review import ReviewScreen
from console.screens.run import RunScreen
from console.settings import Settings
from tests.console.desk_app import until
from tests.streams import EPOCH

NOW = EPOCH + 3_600.0
WIDE, MIDDLE, NARROW, WALL = (120, 40), (80, 24), (60, 20), (200, 60)
SIZES = (NARROW, MIDDLE, WIDE, WALL)

Body = Callable[[KdConsoleApp, Any], Awaitable[None]]


@contextmanager
def frozen(monkeypatch: pytest.MonkeyPatch, now: float = NOW) -> Iterator[None]:
    """One moment for every clock that is drawn, in UTC, whatever the machine says."""
    with monkeypatch.context() as patch:
        clock = SimpleNamespace(time=lambda: now, monotonic=time.monotonic)
        for module in (dashboard_module, watch_module):
            patch.setattr(module, "time", clock)
        patch.setattr(app_module, "HomeScreen", partial(HomeScreen, clock=lambda: now))
        patch.setattr(compare_module, "CompareScreen", partial(CompareScreen, clock=lambda: now))
        patch.setenv("TZ", "UTC")
        patch.delenv("NO_COLOR", raising=False)
        time.tzset()
        try:
            yield
        finally:
            os.environ.pop("TZ", None)
    time.tzset()


def in_app(
    body: Body,
    *evidence: Path,
    size: tuple[int, int] = WIDE,
    readonly: bool = False,
    run: Path | None = None,
    review: Sequence[Path] = (),
    settings: Settings | None = None,
    wait: bool = True,
) -> KdConsoleApp:
    """Starts the app, with a run open and read if one is given, and does something there.

    Args:
        body: is given the app and its pilot.
        evidence: the directories whose runs are listed.
        size: columns and rows.
        readonly: as the command's option says.
        run: the run that `kdconsole attach` names.
        review: what `kdconsole review` names.
        settings: the user's own; quick redraws by default.
        wait: until the run is read.
    """
    alone = only_piece(review)
    app = KdConsoleApp(evidence, settings or Settings(fps=30), readonly=readonly, run=run, review=review, alone=alone)

    async def go() -> None:
        async with app.run_test(size=size) as pilot:
            if run is not None and wait:
                await opened(app, pilot)
            if alone is not None and wait:
                await reviewed(app, pilot)
            await body(app, pilot)

    asyncio.run(go())
    return app


async def opened(app: KdConsoleApp, pilot: Pilot[Any]) -> RunScreen:
    """Waits until a run is shown, and all was read that stands there."""
    await until(pilot, lambda: isinstance(app.screen, RunScreen) and app.screen.is_mounted, "the run's screen")
    screen = app.screen
    assert isinstance(screen, RunScreen)
    await until(pilot, screen.loaded.is_set, "the run is read")
    return screen


async def reviewed(app: KdConsoleApp, pilot: Pilot[Any]) -> ReviewScreen:
    """Waits until past evidence is shown, and all of it was read."""
    await until(pilot, lambda: isinstance(app.screen, ReviewScreen) and app.screen.is_mounted, "the review")
    screen = app.screen
    assert isinstance(screen, ReviewScreen)
    await until(pilot, screen.loaded.is_set, "the evidence is read")
    return screen


async def listed(app: KdConsoleApp, pilot: Pilot[Any]) -> HomeScreen:
    """Waits until Home is shown, and every stream was read."""

    def read() -> bool:
        screen = app.screen
        return isinstance(screen, HomeScreen) and screen._known.looked and not screen._known.to_fold

    await until(pilot, read, "every run is read")
    screen = app.screen
    assert isinstance(screen, HomeScreen)
    return screen


def said(app: KdConsoleApp) -> list[str]:
    """What the app told the operator, the newest last."""
    return [str(each.message) for each in app._notifications]
