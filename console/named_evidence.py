"""What an operator means by a name on the command line: a path of any kind of evidence, or a run of ours by its id."""

from __future__ import annotations

import os
from pathlib import Path

from dispatch import runs
from dispatch.evidence import open_evidence
from engine.errors import RunError
from engine.text import clean


def named_evidence(evidence: Path, name: str) -> Path:
    """The directory or log that is meant.

    Args:
        evidence: whose runs may be told by their ids, or the beginning of one.
        name: a path, or an id.

    Raises:
        RunError: there is nothing of that name, or nothing that can be opened.
    """
    path = Path(name)
    if path.exists() or path.is_symlink():
        return open_evidence(path).path
    if os.sep in name or not name:
        raise RunError(
            f"{clean(repr(name), 200)}: no such file or directory", expected="a run directory, a log, or a run's id"
        )
    return runs.resolve_run(evidence, name).path
