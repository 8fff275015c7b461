"""The way from the command line into the app, and out of it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from console.app import KdConsoleApp
from console.settings import load_settings
from engine.errors import RunError

if TYPE_CHECKING:
    from console.launch import Job


def open_app(
    evidence: Path,
    *,
    readonly: bool = False,
    run: Path | None = None,
    job: Job | None = None,
    resume: Sequence[str] | None = None,
    review: Sequence[Path] | None = None,
    compare: Sequence[Path] | None = None,
) -> str:
    """Runs the app until the operator leaves it; returns what to tell on the terminal then.

    Args:
        evidence: whose runs are listed, and where new ones are made.
        readonly: forbid every action that starts, stops or writes something.
        run: a run to show at once.
        job: a run to start and show at once.
        resume: with `run`: start another attempt of it; what may differ from its beginning, by name.
        review: past evidence to look at: directories, logs, or folders with many of them. One piece of it is shown at
            once, several are listed.
        compare: evidence of any kind to lay over each other at once.

    Raises:
        ConfigError: the settings file is wrong.
        RunError: there is nothing to review at one of the paths.
    """
    settings = load_settings()
    app = KdConsoleApp(
        (evidence, *settings.evidence),
        settings,
        readonly=readonly,
        run=run,
        job=job,
        resume=resume,
        review=review or (),
        alone=only_piece(review or ()),
        compare=compare or (),
    )
    return app.run() or ""


def only_piece(review: Sequence[Path]) -> Path | None:
    """The one piece of evidence that is to be reviewed; None where there may be several.

    Raises:
        RunError: there is nothing at one of the paths.
    """
    from dispatch.evidence import open_evidence

    pieces = []
    for path in review:
        try:
            pieces.append(open_evidence(path).path)
        except RunError:
            if not path.is_dir():  # else it may be a folder with many
                raise
    return pieces[0] if len(review) == 1 and pieces else None
