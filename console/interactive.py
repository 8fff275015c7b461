"""The way from the command line into the app, and out of it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from console.app import KdConsoleApp
from console.settings import load_settings

if TYPE_CHECKING:
    from console.launch import Job


def open_app(
    evidence: Path,
    *,
    readonly: bool = False,
    run: Path | None = None,
    job: Job | None = None,
    resume: Sequence[str] | None = None,
) -> str:
    """Runs the app until the operator leaves it; returns what to tell on the terminal then.

    Args:
        evidence: whose runs are listed, and where new ones are made.
        readonly: forbid every action that starts, stops or writes something.
        run: a run to show at once.
        job: a run to start and show at once.
        resume: with `run`: start another attempt of it; what may differ from its beginning, by name.

    Raises:
        ConfigError: the settings file is wrong.
    """
    settings = load_settings()
    app = KdConsoleApp((evidence, *settings.evidence), settings, readonly=readonly, run=run, job=job, resume=resume)
    return app.run() or ""
