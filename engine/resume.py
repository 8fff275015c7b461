"""What whoever resumes a run says of the attempt to come: `resume.json` of its directory. Needs no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import msgspec

from engine.errors import RunError

RESUME = "resume.json"


class Resume(msgspec.Struct, frozen=True, omit_defaults=True):
    """Written anew for every later attempt; a first one has none."""

    allow_changed: tuple[str, ...]
    """What may differ from the run's beginning, by name."""
    devices: Annotated[int, msgspec.Meta(ge=1)] | None = None
    """How many devices the attempt trains on; None: as many as the configuration says."""


def read_resume(run_dir: Path) -> Resume:
    """Of the run's newest attempt; one that allows nothing where there is no file.

    Raises:
        RunError: the file cannot be read.
    """
    path = run_dir / RESUME
    try:
        return msgspec.json.decode(path.read_bytes(), type=Resume)
    except FileNotFoundError:
        return Resume(())
    except (OSError, ValueError, msgspec.DecodeError) as error:
        expected = '{"allow_changed": [NAME, …]}, and "devices": N where they are not the configuration\'s'
        raise RunError(f"{path}: {error}", expected=expected) from None
